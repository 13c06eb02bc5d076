// The products. Compiled once for each row of the ISA list (kernels/isa_unit.h).

#include <type_traits>

#include "core/half.h"
#include "kernels/isa_unit.h"
#include "kernels/kernels_table.h"

namespace tmac {
namespace {

// Each builds on those before it.
// clang-format off
#include "kernels/scale.inl"
#include "kernels/build_lut.inl"
#include "kernels/build_lut_ternary.inl"
#include "kernels/multiply_tile.inl"
#include "kernels/multiply_tile_bcq.inl"
#include "kernels/multiply_tile_ternary.inl"
#include "kernels/multiply_tile_ternary_dots.inl"
#include "kernels/quantize_rows.inl"
#include "kernels/unpack_tile.inl"
#include "kernels/unpack_ternary.inl"
#include "kernels/multiply_row_block.inl"
#include "kernels/multiply_rows.inl"
// clang-format on

using Isa = TMAC_ISA_TYPE;

#define TMAC_TILES(parts)                                                                    \
  {multiply_tile<Isa, 1, parts>, multiply_tile<Isa, 2, parts>, multiply_tile<Isa, 3, parts>, \
   multiply_tile<Isa, 4, parts>, multiply_tile<Isa, 5, parts>, multiply_tile<Isa, 6, parts>, \
   multiply_tile<Isa, 7, parts>, multiply_tile<Isa, 8, parts>}

#define TMAC_BCQ_TILES(parts)                                          \
  {multiply_bcq_tile<Isa, 1, parts>, multiply_bcq_tile<Isa, 2, parts>, \
   multiply_bcq_tile<Isa, 3, parts>, multiply_bcq_tile<Isa, 4, parts>}

#define TMAC_ROWS(kind)                                                              \
  {multiply_rows<Isa, PlaneCodes<1>, kind>, multiply_rows<Isa, PlaneCodes<2>, kind>, \
   multiply_rows<Isa, PlaneCodes<3>, kind>, multiply_rows<Isa, PlaneCodes<4>, kind>, \
   multiply_rows<Isa, PlaneCodes<5>, kind>, multiply_rows<Isa, PlaneCodes<6>, kind>, \
   multiply_rows<Isa, PlaneCodes<7>, kind>, multiply_rows<Isa, PlaneCodes<8>, kind>}

}  // namespace

extern const Kernels TMAC_JOIN(kKernels_, TMAC_ISA_NAME);
const Kernels TMAC_JOIN(kKernels_, TMAC_ISA_NAME) = {
    TMAC_STRING(TMAC_ISA_NAME),
    build_region<Isa>,
    build_ternary<Isa::Ternary>,
    {kTablePlaces<Isa::Ternary>, kTablePlaces<Isa::Ternary>, kExact8Places<Isa::Ternary>},
    {TMAC_TILES(1), TMAC_TILES(2)},
    {TMAC_BCQ_TILES(1), TMAC_BCQ_TILES(2)},
    {multiply_ternary_tile<Isa::Ternary, 1>, multiply_ternary_tile<Isa::Ternary, 2>,
     exact8_ternary_tile<Isa::Ternary>()},
    quantize_row_regions<Isa>,
    {TMAC_ROWS(Tables::kInt8), TMAC_ROWS(Tables::kExact), TMAC_ROWS(Tables::kExact8)},
    {multiply_rows<Isa, TernaryCodes, Tables::kInt8>, nullptr,
     multiply_rows<Isa, TernaryCodes, Tables::kExact8>},
    multiply_peak<Isa>,
};

}  // namespace tmac
