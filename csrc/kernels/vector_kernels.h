#pragma once

#include <cstdint>

#include "layout/kv.h"

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

  // Attention (layout/kv.h). Vectors are stored as the type of the cache asks for; k and v
  // [head_dim], scratch [dims].
  void (*store_key)(const KvShape& shape, const KvHead& head, int64_t pos, const float* k,
                    float* scratch);
  void (*store_value)(const KvShape& shape, const KvHead& head, int64_t pos, const float* v,
                      float* scratch);
  // q [head_dim] -> out [query_floats] as `attend` reads it.
  void (*prepare_query)(const KvShape& shape, const float* q, float* out);
  // States [count, state_floats] of the queries over positions [begin, end), begin a multiple of
  // kAttendPart and end at most kAttendPart more.
  void (*attend)(const KvShape& shape, const KvHead& head, const AttendQueries& queries,
                 int64_t begin, int64_t end, float* states);
  // Adds to the state of a query over earlier positions that over the following ones.
  void (*merge_attended)(const KvShape& shape, float* state, const float* following);
  // out [head_dim] = what the query has attended to. Changes the state.
  void (*finish_attended)(const KvShape& shape, float* state, float* out);
};

}  // namespace tmac
