// The float work. Compiled once for each row of the ISA list (kernels/isa_unit.h).

#include "core/half.h"
#include "kernels/isa_unit.h"
#include "kernels/vector_kernels.h"

namespace tmac {
namespace {

#include "kernels/vector_ops.inl"

using Isa = TMAC_ISA_TYPE;

}  // namespace

extern const VectorKernels TMAC_JOIN(kVectorKernels_, TMAC_ISA_NAME);
const VectorKernels TMAC_JOIN(kVectorKernels_, TMAC_ISA_NAME) = {
    rms_norm<Isa>, silu_multiply<Isa>, gelu_tanh_multiply<Isa>, relu2_multiply<Isa>, soft_cap<Isa>,
    add<Isa>,      max_abs<Isa>,       sum_exponentials<Isa>,   to_half<Isa>,        attend<Isa>,
};

}  // namespace tmac
