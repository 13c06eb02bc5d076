// The part of a layer that knows sequences: rope, keys and values, attention.
#include <algorithm>
#include <cmath>

#include "model/pass.h"
#include "ops/rope.h"

namespace tmac {

void Decoder::Pass::store_keys_and_values(int64_t layer) {
  float* rotated = a.rotated.data() + team.thread() * head_dim;
  team.parallel_for(n * config.n_kv_heads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = i / config.n_kv_heads, head = i % config.n_kv_heads;
      const int64_t at = t * kv_width + head * head_dim, to = tokens[t].pos * head_dim;
      KvCache& cache = *tokens[t].cache;
      apply_rope(a.cosines.data() + t * half_dim, a.sines.data() + t * half_dim, half_dim,
                 a.k.data() + at, rotated);
      isa.to_half(rotated, cache.keys(layer, head) + to, head_dim);
      isa.to_half(a.v.data() + at, cache.values(layer, head) + to, head_dim);
    }
  });
}

void Decoder::Pass::attend(int64_t layer, const InputPlan& o_plan) {
  const bool build_now = a.inputs.builds_early(o_plan, n) && head_dim % weights_at_once(n) == 0;
  const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  const int64_t heads_per_kv = config.n_heads / config.n_kv_heads;
  float* rotated = a.rotated.data() + team.thread() * head_dim;
  float* scores = a.scores.data() + team.thread() * a.n_ctx;
  team.parallel_for(n * config.n_heads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / n, t = i % n;
      const int64_t at = head * head_dim;
      KvCache& cache = *tokens[t].cache;
      float* out = a.attended.data() + t * q_width;
      apply_rope(a.cosines.data() + t * half_dim, a.sines.data() + t * half_dim, half_dim,
                 a.q.data() + t * q_width + at, rotated);
      const int64_t last = tokens[t].pos;
      const int64_t first =
          config.sliding_window > 0 ? std::max<int64_t>(0, last + 1 - config.sliding_window) : 0;
      isa.attend(rotated, cache.keys(layer, head / heads_per_kv) + first * head_dim,
                 cache.values(layer, head / heads_per_kv) + first * head_dim, last + 1 - first,
                 head_dim, scale, scores, out + at);
      if (build_now) a.inputs.build_weights(o_plan, n, t, at, at + head_dim, out);
    }
  });
  if (!build_now) a.inputs.build_all(team, o_plan, n, a.attended.data(), q_width);
}

}  // namespace tmac
