// The float work. Compiled once for each row of the ISA list (kernels/isa_unit.h).

#include "core/half.h"
#include "kernels/isa_unit.h"
#include "kernels/vector_kernels.h"

namespace tmac {
namespace {

// Each builds on those before it.
// clang-format off
#include "kernels/vector_ops.inl"
#include "kernels/kv_formats.inl"
#include "kernels/kv_store.inl"
#include "kernels/attention.inl"
// clang-format on

using Isa = TMAC_ISA_TYPE;

}  // namespace

extern const VectorKernels TMAC_JOIN(kVectorKernels_, TMAC_ISA_NAME);
const VectorKernels TMAC_JOIN(kVectorKernels_, TMAC_ISA_NAME) = {
    rms_norm<Isa>,       silu_multiply<Isa>,    gelu_tanh_multiply<Isa>,
    relu2_multiply<Isa>, soft_cap<Isa>,         add<Isa>,
    max_abs<Isa>,        sum_exponentials<Isa>, store_key<Isa>,
    store_value<Isa>,    prepare_query<Isa>,    attend<Isa>,
    merge_attended<Isa>, finish_attended<Isa>,
};

}  // namespace tmac
