// The part of a layer that knows sequences: rope, keys and values, attention.
#include <algorithm>
#include <cmath>

#include "model/pass.h"
#include "ops/rope.h"

namespace tmac {

// One head x [head_dim] of a token as attention reads it, normed and turned: out [head_dim].
void Decoder::Pass::turn_head(const LayerWeights& w, const float* norm, int64_t token,
                              const float* x, float* out) {
  if (norm != nullptr) {
    isa.rms_norm(x, norm, head_dim, config.rms_norm_eps, out);
    x = out;
  }
  int64_t turned = 0;
  if (w.rope >= 0) {
    const int64_t at = rope_at(static_cast<size_t>(w.rope), token);
    apply_rope(a.cosines.data() + at, a.sines.data() + at, half_rotary, x, out);
    turned = config.rotary_dim;
  }
  if (x != out) std::copy(x + turned, x + head_dim, out + turned);
}

// Where q and k are normed with all heads together, and where q, k and v are kept small.
void Decoder::Pass::norm_and_clip(const LayerWeights& w) {
  if (w.q_full_norm == nullptr && w.k_full_norm == nullptr && config.clip_qkv == 0) return;
  const auto work_on = [&](const float* norm, float* x, int64_t width) {
    if (norm != nullptr) isa.rms_norm(x, norm, width, config.rms_norm_eps, x);
    if (config.clip_qkv == 0) return;
    for (int64_t i = 0; i < width; ++i) {
      x[i] = std::clamp(x[i], -config.clip_qkv, config.clip_qkv);
    }
  };
  team.parallel_for(n, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      work_on(w.q_full_norm, a.q.data() + t * q_width, q_width);
      work_on(w.k_full_norm, a.k.data() + t * kv_width, kv_width);
      work_on(nullptr, a.v.data() + t * kv_width, kv_width);
    }
  });
}

void Decoder::Pass::store_keys_and_values(int64_t layer) {
  const LayerWeights& w = weights.layers[static_cast<size_t>(layer)];
  float* rotated = a.rotated.data() + team.thread() * head_dim;
  team.parallel_for(n * config.n_kv_heads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = i / config.n_kv_heads, head = i % config.n_kv_heads;
      const int64_t at = t * kv_width + head * head_dim, to = tokens[t].pos * head_dim;
      KvCache& cache = *tokens[t].cache;
      turn_head(w, w.k_norm, t, a.k.data() + at, rotated);
      isa.to_half(rotated, cache.keys(layer, head) + to, head_dim);
      isa.to_half(a.v.data() + at, cache.values(layer, head) + to, head_dim);
    }
  });
}

void Decoder::Pass::attend(int64_t layer, const InputPlan& o_plan) {
  const LayerWeights& w = weights.layers[static_cast<size_t>(layer)];
  const bool build_now = w.attn_sub_norm == nullptr && a.inputs.builds_early(o_plan, n) &&
                         head_dim % weights_at_once(n) == 0;
  const float scale = 1.0f / std::sqrt(config.query_scalar);
  const int64_t heads_per_kv = config.n_heads / config.n_kv_heads;
  float* rotated = a.rotated.data() + team.thread() * head_dim;
  float* scores = a.scores.data() + team.thread() * a.n_ctx;
  team.parallel_for(n * config.n_heads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / n, t = i % n;
      const int64_t at = head * head_dim;
      KvCache& cache = *tokens[t].cache;
      float* out = a.attended.data() + t * q_width;
      turn_head(w, w.q_norm, t, a.q.data() + t * q_width + at, rotated);
      const int64_t last = tokens[t].pos;
      const int64_t first =
          w.sliding_window > 0 ? std::max<int64_t>(0, last + 1 - w.sliding_window) : 0;
      isa.attend(rotated, cache.keys(layer, head / heads_per_kv) + first * head_dim,
                 cache.values(layer, head / heads_per_kv) + first * head_dim, last + 1 - first,
                 head_dim, scale, config.attention_softcap, scores, out + at);
      if (build_now) a.inputs.build_weights(o_plan, n, t, at, at + head_dim, out);
    }
  });
  if (build_now) return;
  if (w.attn_sub_norm != nullptr) {
    norm_into_inputs(a.attended.data(), w.attn_sub_norm, q_width, o_plan, a.inputs);
  } else {
    a.inputs.build_all(team, o_plan, n, a.attended.data(), q_width);
  }
}

}  // namespace tmac
