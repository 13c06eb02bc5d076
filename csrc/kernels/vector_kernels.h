#pragma once

#include <cstdint>

namespace tmac {

// The float work between two products in one instruction set: csrc/kernels/vector_isa.cc.
struct VectorKernels {
  // out[i] = x[i] * weight[i] / sqrt(mean(x^2) + eps)
  void (*rms_norm)(const float* x, const float* weight, int64_t n, float eps, float* out);
  // gate[i] = silu(gate[i]) * up[i]
  void (*silu_multiply)(float* gate, const float* up, int64_t n);
  // The same with GELU by tanh, and with the square of relu.
  void (*gelu_tanh_multiply)(float* gate, const float* up, int64_t n);
  void (*relu2_multiply)(float* gate, const float* up, int64_t n);
  // x[i] = cap * tanh(x[i] / cap)
  void (*soft_cap)(float* x, int64_t n, float cap);
  void (*add)(float* x, const float* y, int64_t n);
  // The largest |x|; unspecified where an x is NaN.
  float (*max_abs)(const float* x, int64_t n);
  // The sum of e^(x[i] - largest), for largest >= x[i]; what lies 87 below counts as e^-87.
  float (*sum_exponentials)(const float* x, int64_t n, float largest);
  void (*to_half)(const float* x, uint16_t* out, int64_t n);
  // One head's softmax(scale * q.K^T) V over n positions: q [head_dim], keys and values
  // [n, head_dim] binary16, scores [n] scratch, out [head_dim]. softcap > 0: scores are soft-capped
  // there.
  void (*attend)(const float* q, const uint16_t* keys, const uint16_t* values, int64_t n,
                 int64_t head_dim, float scale, float softcap, float* scores, float* out);
};

}  // namespace tmac
