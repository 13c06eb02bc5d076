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
  const int64_t dims = a.attention.shape.dims();
  float* turned = a.attention.head.data() + team.thread() * 2 * dims;
  float* scratch = turned + dims;
  team.parallel_for(n * config.n_kv_heads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = i / config.n_kv_heads, head = i % config.n_kv_heads;
      const int64_t at = t * kv_width + head * head_dim;
      KvCache& cache = *tokens[t].cache;
      const KvHead to = cache.head(layer, head);
      turn_head(w, w.k_norm, t, a.k.data() + at, turned);
      isa.store_key(cache.shape(), to, tokens[t].pos, turned, scratch);
      isa.store_value(cache.shape(), to, tokens[t].pos, a.v.data() + at, scratch);
    }
  });
}

// Runs of up to `most` tokens of one sequence that read the same positions in fp16.
void Decoder::Pass::make_runs(int64_t most) {
  runs.clear();
  for (int64_t t = 0; t < n; ++t) {
    const bool same =
        t > 0 && tokens[t].cache == tokens[t - 1].cache &&
        (!tokens[t].cache->has_codes() || near_from(tokens[t].pos) == near_from(tokens[t - 1].pos));
    if (!same || t - runs.back() == most) runs.push_back(t);
  }
  runs.push_back(n);
}

// Heads that share keys and values are read together, and tokens of one sequence. Where that leaves
// threads without work, short contexts are shared out by heads, long ones by position.
void Decoder::Pass::share_out() {
  const int64_t group = config.n_heads / config.n_kv_heads;
  const int64_t few = kFewPieces * team.threads();
  const auto pieces = [&] { return static_cast<int64_t>(runs.size() - 1) * chunks(); };
  heads_at_once = std::min(group, kMostQueries);
  make_runs(std::max<int64_t>(1, kMostQueries / heads_at_once));
  int64_t longest = 0;
  for (int64_t t = 0; t < n; ++t) longest = std::max(longest, tokens[t].pos + 1);
  parts = ceil_div(longest, kAttendPart);
  by_part = pieces() < few && longest > kShortContext;
  if (pieces() < few && !by_part) {
    heads_at_once = 1;
    make_runs(kMostQueries);
  }
}

// The queries of piece `index`: of a run of tokens, token by token its heads.
Decoder::Pass::Piece Decoder::Pass::piece(int64_t layer, int64_t index) const {
  const LayerWeights& w = weights.layers[static_cast<size_t>(layer)];
  const int64_t group = config.n_heads / config.n_kv_heads;
  const int64_t per_kv = ceil_div(group, heads_at_once);
  const auto n_runs = static_cast<int64_t>(runs.size()) - 1;
  const int64_t chunk = index / n_runs;
  Piece p;
  p.first_token = runs[static_cast<size_t>(index % n_runs)];
  p.n_tokens = runs[static_cast<size_t>(index % n_runs) + 1] - p.first_token;
  p.kv_head = chunk / per_kv;
  p.first_head = p.kv_head * group + chunk % per_kv * heads_at_once;
  p.n_heads = std::min(heads_at_once, (p.kv_head + 1) * group - p.first_head);
  p.cache = tokens[p.first_token].cache;
  for (int64_t i = 0; i < p.n_tokens * p.n_heads; ++i) {
    p.end[i] = tokens[p.first_token + i / p.n_heads].pos + 1;
    p.first[i] = w.sliding_window > 0 ? std::max<int64_t>(0, p.end[i] - w.sliding_window) : 0;
  }
  p.first_part = p.first[0] / kAttendPart;
  p.end_part = ceil_div(p.end[p.n_tokens * p.n_heads - 1], kAttendPart);
  return p;
}

// What the queries of a piece are asked with; their vectors in scratch of this thread.
AttendQueries Decoder::Pass::prepare(int64_t layer, const Piece& p) {
  const LayerWeights& w = weights.layers[static_cast<size_t>(layer)];
  const KvShape& shape = p.cache->shape();
  float* turned = a.attention.head.data() + team.thread() * 2 * shape.dims();
  float* q = a.attention.queries.data() + team.thread() * kMostQueries * shape.query_floats();
  const int64_t count = p.n_tokens * p.n_heads;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t t = p.first_token + i / p.n_heads, head = p.first_head + i % p.n_heads;
    turn_head(w, w.q_norm, t, a.q.data() + t * q_width + head * head_dim, turned);
    isa.prepare_query(shape, turned, q + i * shape.query_floats());
  }
  return {count,
          q,
          p.first,
          p.end,
          near_from(tokens[p.first_token].pos),
          1.0f / std::sqrt(config.query_scalar),
          config.attention_softcap};
}

void Decoder::Pass::attend_part(int64_t layer, const Piece& p, const AttendQueries& queries,
                                int64_t part, float* states) {
  const int64_t begin = part * kAttendPart;
  const int64_t end = std::min(begin + kAttendPart, p.end[queries.count - 1]);
  isa.attend(p.cache->shape(), p.cache->head(layer, p.kv_head), queries, begin, end, states);
}

// Following states [queries] into those before them.
void Decoder::Pass::merge(const Piece& p, float* states, const float* following) {
  const KvShape& shape = p.cache->shape();
  for (int64_t i = 0; i < p.n_tokens * p.n_heads; ++i) {
    isa.merge_attended(shape, states + i * shape.state_floats(),
                       following + i * shape.state_floats());
  }
}

void Decoder::Pass::finish(const Piece& p, float* states, const InputPlan& o_plan, bool build_now) {
  const KvShape& shape = p.cache->shape();
  for (int64_t i = 0; i < p.n_tokens * p.n_heads; ++i) {
    const int64_t t = p.first_token + i / p.n_heads, at = (p.first_head + i % p.n_heads) * head_dim;
    float* out = a.attended.data() + t * q_width;
    isa.finish_attended(shape, states + i * shape.state_floats(), out + at);
    if (build_now) a.inputs.build_weights(o_plan, n, t, at, at + head_dim, out);
  }
}

// All positions of a piece, part after part.
void Decoder::Pass::attend_piece(int64_t layer, const Piece& p, float* states) {
  const AttendQueries queries = prepare(layer, p);
  attend_part(layer, p, queries, p.first_part, states);
  float* following = states + kMostQueries * p.cache->shape().state_floats();
  for (int64_t part = p.first_part + 1; part < p.end_part; ++part) {
    attend_part(layer, p, queries, part, following);
    merge(p, states, following);
  }
}

void Decoder::Pass::attend(int64_t layer, const InputPlan& o_plan) {
  const LayerWeights& w = weights.layers[static_cast<size_t>(layer)];
  const bool build_now = w.attn_sub_norm == nullptr && a.inputs.builds_early(o_plan, n) &&
                         head_dim % o_plan.weights_at_once(n) == 0;
  const int64_t states_size = kMostQueries * a.attention.shape.state_floats();
  float* states = a.attention.states.data() + team.thread() * 2 * states_size;
  const int64_t pieces = static_cast<int64_t>(runs.size() - 1) * chunks();
  if (!by_part) {
    team.parallel_for(pieces, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Piece p = piece(layer, i);
        attend_piece(layer, p, states);
        finish(p, states, o_plan, build_now);
      }
    });
  } else {
    const auto states_of = [&](int64_t i, int64_t part) {
      return a.attention.parts.data() + (i * parts + part) * states_size;
    };
    team.parallel_for(pieces * parts, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Piece p = piece(layer, i / parts);
        const int64_t part = i % parts;
        if (part < p.first_part || part >= p.end_part) continue;
        attend_part(layer, p, prepare(layer, p), part, states_of(i / parts, part));
      }
    });
    team.parallel_for(pieces, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Piece p = piece(layer, i);
        float* all = states_of(i, p.first_part);
        for (int64_t part = p.first_part + 1; part < p.end_part; ++part) {
          merge(p, all, states_of(i, part));
        }
        finish(p, all, o_plan, build_now);
      }
    });
  }
  if (build_now) return;
  if (w.attn_sub_norm != nullptr) {
    norm_into_inputs(a.attended.data(), w.attn_sub_norm, q_width, o_plan, a.inputs);
  } else {
    a.inputs.build_all(team, o_plan, n, a.attended.data(), q_width);
  }
}

}  // namespace tmac
