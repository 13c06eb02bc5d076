#pragma once

#include <cstdint>

#include "layout/lut.h"
#include "layout/rows.h"

namespace tmac {

// The products of one instruction set and the tables that they read: csrc/kernels/isa.cc. The float
// work between them is in vector_kernels.h.
struct Kernels {
  const char* name;

  // Builds the tables of one region from x [64] into the arrays that `lut` begins with. A region
  // with a NaN or an infinity gets a NaN unit, so that what reads it becomes NaN.
  // to_token_units is 127 / the token's largest |x|, for Tables::kExact8.
  void (*build_region)(const float* x, Tables tables, float to_token_units, const LutView& lut);

  // The same for the ternary tables of x [96], or their integers, but for the sums of x. Each
  // region takes up `ternary_places` places of others, by kind of tables.
  void (*build_ternary_region)(const float* x, Tables tables, float to_token_units,
                               const LutView& lut);
  int ternary_places[kTableKinds];

  // y [n, 32] = one tile of 32 rows times the activations behind `luts` [n]; rows of y are
  // `stride` apart. By parts of the tables - 1, then by bits - 1.
  using MultiplyTile = void (*)(const LinearSpec& spec, const uint8_t* tile, const LutView* luts,
                                int64_t n, float* y, int64_t stride);
  MultiplyTile multiply_tile[2][kMaxBits];
  // The same for binary-coded weights.
  MultiplyTile multiply_bcq_tile[2][kMaxBcqBits];
  // For ternary weights, by kind of tables.
  MultiplyTile multiply_ternary_tile[kTableKinds];

  // Two regions x [2][64] of one token as integers: those of the first into out [parts][12][64],
  // with sums and unit in lane `lane` of `region` and, unless null, `chunks`; the second ones
  // follow in the order of layout/rows.h. Units and to_token_units as above; `shares_unit` is for
  // Tables::kInt8.
  void (*quantize_row_regions)(const float* x, Tables tables, bool shares_unit,
                               float to_token_units, int lane, int8_t* out, RowRegion* region,
                               RowChunks* chunks);
  // y[t, 0..rows) of one tile, or of two if rows > 32, for all tokens of x; rows of y are `stride`
  // apart. By kind of integers, then by bits - 1.
  using MultiplyRows = void (*)(const LinearSpec& spec, const uint8_t* tile, const RowView& x,
                                const RowSums& sums, int rows, float* y, int64_t stride);
  MultiplyRows multiply_rows[kTableKinds][kMaxBits];
  // The same for ternary weights, by kind of integers that serve them (layout/rows.h).
  MultiplyRows multiply_ternary_rows[kTableKinds];
  // Multiplies and adds in registers, `rounds` times over; returns the number of multiply-adds.
  int64_t (*multiply_peak)(int64_t rounds);
};

}  // namespace tmac
