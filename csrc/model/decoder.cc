#include "model/decoder.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "core/check.h"
#include "model/activations.h"
#include "ops/rope.h"

namespace tmac {
namespace {

void check_shape(const std::string& name, const Linear& w, int64_t m, int64_t k) {
  check_argument(w.spec.m == m && w.spec.k == k, name, " must be [", m, ", ", k, "], not [",
                 w.spec.m, ", ", w.spec.k, "]");
}

void check_model(const DecoderConfig& config, const DecoderWeights& weights) {
  check_argument(
      config.n_heads >= 1 && config.n_kv_heads >= 1 && config.n_heads % config.n_kv_heads == 0,
      "n_heads (", config.n_heads, ") must be a multiple of n_kv_heads (", config.n_kv_heads, ")");
  check_argument(config.head_dim >= 2 && config.head_dim % 2 == 0, "head_dim must be even, not ",
                 config.head_dim);
  check_argument(static_cast<int64_t>(config.inv_freq.size()) == config.head_dim / 2,
                 "inv_freq must hold head_dim / 2 = ", config.head_dim / 2, " values, not ",
                 config.inv_freq.size());
  check_argument(config.sliding_window >= 0, "sliding_window must not be negative");
  check_argument(!weights.layers.empty(), "a decoder needs at least one layer");
  const int64_t hidden = weights.embed_tokens.spec.k;
  const int64_t intermediate = weights.layers[0].gate.spec.m;
  const int64_t q_width = config.n_heads * config.head_dim;
  const int64_t kv_width = config.n_kv_heads * config.head_dim;
  check_argument(weights.embed_tokens.order == nullptr, "embed_tokens must have no order");
  check_shape("lm_head", weights.lm_head, weights.embed_tokens.spec.m, hidden);
  for (size_t i = 0; i < weights.layers.size(); ++i) {
    const LayerWeights& w = weights.layers[i];
    const std::string at = "layer " + std::to_string(i) + ": ";
    check_shape(at + "q_proj", w.q, q_width, hidden);
    check_shape(at + "k_proj", w.k, kv_width, hidden);
    check_shape(at + "v_proj", w.v, kv_width, hidden);
    check_shape(at + "o_proj", w.o, hidden, q_width);
    check_shape(at + "gate_proj", w.gate, intermediate, hidden);
    check_shape(at + "up_proj", w.up, intermediate, hidden);
    check_shape(at + "down_proj", w.down, hidden, intermediate);
  }
}

}  // namespace

// As many tokens as the plans allow at once on their way through the layers, as one thread of the
// team sees it.
struct Decoder::Pass {
  struct Product {
    const Linear& w;
    float* y;  // [n, w.spec.m]
  };

  Pass(const Decoder& decoder, Activations& activations, KvCache& kv, Team& members, int64_t tokens,
       int64_t first_pos)
      : model(decoder), a(activations), cache(kv), team(members), n(tokens), pos(first_pos) {}

  const Decoder& model;
  Activations& a;
  KvCache& cache;
  Team& team;
  const int64_t n;
  const int64_t pos;  // of the first token

  const DecoderConfig& config = model.config_;
  const DecoderWeights& weights = model.weights_;
  const Kernels& isa = kernels();
  const int64_t hidden = weights.embed_tokens.spec.k;
  const int64_t head_dim = config.head_dim;
  const int64_t half_dim = config.head_dim / 2;
  const int64_t q_width = config.n_heads * config.head_dim;
  const int64_t kv_width = config.n_kv_heads * config.head_dim;

  void embed(const int32_t* ids) {
    team.parallel_for(n, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        dequantize_row(weights.embed_tokens.spec, weights.embed_tokens.packed, ids[t],
                       a.x.data() + t * hidden);
        rope_angles(pos + t, config.inv_freq.data(), half_dim, config.rope_attention_scale,
                    a.cosines.data() + t * half_dim, a.sines.data() + t * half_dim);
      }
    });
  }

  void layer(size_t i) {
    const LayerWeights& w = weights.layers[i];
    const LayerPlans& plans = model.plans_[i];
    norm_into_inputs(w.input_norm, plans.qkv, 0, n);
    multiply(plans.qkv, {{w.q, a.q.data()}, {w.k, a.k.data()}, {w.v, a.v.data()}}, n);
    store_keys_and_values(static_cast<int64_t>(i));
    attend(static_cast<int64_t>(i), plans.o);
    multiply_add(w.o, a.inputs, plans.o);
    norm_into_inputs(w.post_attention_norm, plans.gate_up, 0, n);
    feed_forward(w, plans);
    multiply_add(w.down, a.down_inputs, plans.down);
  }

  // Logits of the tokens from `first` on: [n - first, vocab].
  void head(int64_t first, float* logits) {
    norm_into_inputs(weights.final_norm, model.head_plan_, first, n);
    multiply(model.head_plan_, {{weights.lm_head, logits}}, n - first);
  }

 private:
  // norm(x) of the tokens [first, last) as tokens 0.. of a.inputs. For one token the threads share
  // the regions, and each computes the norm for itself.
  void norm_into_inputs(const float* weight, const InputPlan& plan, int64_t first, int64_t last) {
    const int64_t tokens = last - first;
    const int64_t parts = tokens == 1 ? team.threads() : 1;
    const int64_t n_regions = plan.regions(tokens).size();
    float* normed = a.normed.data() + team.thread() * hidden;
    team.parallel_for(tokens * parts, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t t = i / parts, part = i % parts;
        isa.rms_norm(a.x.data() + (first + t) * hidden, weight, hidden, config.rms_norm_eps,
                     normed);
        a.inputs.build(plan, tokens, t, n_regions * part / parts, n_regions * (part + 1) / parts,
                       normed);
      }
    });
  }

  // All products of one input, their tiles dealt out together.
  void multiply(const InputPlan& plan, std::initializer_list<Product> products, int64_t tokens) {
    const int64_t at_once = tiles_at_once(tokens);
    const auto pieces_of = [&](const Product& p) { return ceil_div(p.w.spec.n_tiles(), at_once); };
    int64_t pieces = 0;
    for (const Product& p : products) pieces += pieces_of(p);
    team.parallel_for(pieces, [&](int64_t begin, int64_t end) {
      size_t reader = 0;
      int64_t before = 0;  // pieces of earlier products
      for (const Product& p : products) {
        const int64_t here = pieces_of(p);
        const auto tile = [&](int64_t piece) {
          return std::min(std::clamp<int64_t>(piece - before, 0, here) * at_once,
                          p.w.spec.n_tiles());
        };
        multiply_tiles(team, p.w, a.inputs, plan, reader++, tokens, tile(begin), tile(end), p.y,
                       p.w.spec.m);
        before += here;
      }
    });
  }

  // x += w . input
  void multiply_add(const Linear& w, Inputs& inputs, const InputPlan& plan) {
    for_tiles(team, w.spec.n_tiles(), tiles_at_once(n), [&](int64_t begin, int64_t end) {
      multiply_tiles(team, w, inputs, plan, 0, n, begin, end, a.delta.data(), hidden);
      const int64_t row = begin * kTileRows, row_end = std::min(end * kTileRows, hidden);
      for (int64_t t = 0; t < n; ++t) {
        isa.add(a.x.data() + t * hidden + row, a.delta.data() + t * hidden + row, row_end - row);
      }
    });
  }

  void store_keys_and_values(int64_t layer) {
    float* rotated = a.rotated.data() + team.thread() * head_dim;
    team.parallel_for(n * config.n_kv_heads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t t = i / config.n_kv_heads, head = i % config.n_kv_heads;
        const int64_t at = t * kv_width + head * head_dim, to = (pos + t) * head_dim;
        apply_rope(a.cosines.data() + t * half_dim, a.sines.data() + t * half_dim, half_dim,
                   a.k.data() + at, rotated);
        isa.to_half(rotated, cache.keys(layer, head) + to, head_dim);
        isa.to_half(a.v.data() + at, cache.values(layer, head) + to, head_dim);
      }
    });
  }

  void attend(int64_t layer, const InputPlan& o_plan) {
    const bool build_now = a.inputs.builds_early(o_plan, n) && head_dim % weights_at_once(n) == 0;
    const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
    const int64_t heads_per_kv = config.n_heads / config.n_kv_heads;
    float* rotated = a.rotated.data() + team.thread() * head_dim;
    float* scores = a.scores.data() + team.thread() * a.n_ctx;
    team.parallel_for(n * config.n_heads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i / n, t = i % n;
        const int64_t at = head * head_dim;
        float* out = a.attended.data() + t * q_width;
        apply_rope(a.cosines.data() + t * half_dim, a.sines.data() + t * half_dim, half_dim,
                   a.q.data() + t * q_width + at, rotated);
        const int64_t last = pos + t;
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

  // silu(gate . x) * (up . x) as the inputs of `down`.
  void feed_forward(const LayerWeights& w, const LayerPlans& plans) {
    const int64_t width = w.gate.spec.m;
    const bool build_now = a.down_inputs.builds_early(plans.down, n);
    // As many tiles as make what is built at once of the next product's input.
    static_assert(kRowRegionsWeights % (kTilesAtOnce * kTileRows) == 0);
    const int64_t at_once = build_now ? weights_at_once(n) / kTileRows : tiles_at_once(n);
    for_tiles(team, w.gate.spec.n_tiles(), at_once, [&](int64_t begin, int64_t end) {
      multiply_tiles(team, w.gate, a.inputs, plans.gate_up, 0, n, begin, end, a.gate.data(), width);
      multiply_tiles(team, w.up, a.inputs, plans.gate_up, 1, n, begin, end, a.up.data(), width);
      const int64_t row = begin * kTileRows, row_end = std::min(end * kTileRows, width);
      for (int64_t t = 0; t < n; ++t) {
        isa.silu_multiply(a.gate.data() + t * width + row, a.up.data() + t * width + row,
                          row_end - row);
        if (build_now) {
          a.down_inputs.build_weights(plans.down, n, t, row, row_end, a.gate.data() + t * width);
        }
      }
    });
    if (!build_now) a.down_inputs.build_all(team, plans.down, n, a.gate.data(), width);
  }
};

Decoder::Decoder(DecoderConfig config, DecoderWeights weights)
    : config_(std::move(config)), weights_(std::move(weights)), head_plan_({weights_.lm_head}) {
  check_model(config_, weights_);
  for (const LayerWeights& w : weights_.layers) {
    plans_.push_back({InputPlan({w.q, w.k, w.v}), InputPlan({w.o}), InputPlan({w.gate, w.up}),
                      InputPlan({w.down})});
  }
}

Decoder::~Decoder() = default;

int64_t Decoder::most_regions() const {
  int64_t most = head_plan_.most_regions();
  for (const LayerPlans& p : plans_) {
    most = std::max({most, p.qkv.most_regions(), p.o.most_regions(), p.gate_up.most_regions(),
                     p.down.most_regions()});
  }
  return most;
}

int64_t Decoder::tokens_at_once(bool all) const {
  const Tables tables = config_.tables;
  bool serve_rows = !all || head_plan_.serves_rows(tables), prefer_tables = true;
  for (const LayerPlans& p : plans_) {
    for (const InputPlan* plan : {&p.qkv, &p.o, &p.gate_up, &p.down}) {
      serve_rows &= plan->serves_rows(tables);
      prefer_tables &= plan->prefers_tables(tables);
    }
  }
  return serve_rows && !prefer_tables ? kTokensAtOnce : kTableTokens;
}

std::unique_ptr<Activations> Decoder::take_activations(int64_t tokens, int threads, int64_t n_ctx) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& idle : idle_) {
      if (idle->tokens >= tokens && idle->threads >= threads && idle->n_ctx >= n_ctx) {
        std::swap(idle, idle_.back());
        std::unique_ptr<Activations> taken = std::move(idle_.back());
        idle_.pop_back();
        return taken;
      }
    }
    idle_.clear();  // too small: larger ones come back in their place
  }
  return std::make_unique<Activations>(config_, weights_, most_regions(), tokens, threads, n_ctx);
}

void Decoder::forward(const int32_t* ids, int64_t n, bool all, KvCache& cache, ThreadPool& pool,
                      float* logits) {
  kernels();  // throws, if it must, before the threads set out
  KvCache::Use use(cache);
  check_argument(cache.n_layers() == static_cast<int64_t>(weights_.layers.size()) &&
                     cache.n_kv_heads() == config_.n_kv_heads &&
                     cache.head_dim() == config_.head_dim,
                 "the KV cache was made for another model");
  check_argument(n >= 1, "forward needs at least one token");
  check_argument(cache.pos() + n <= cache.n_ctx(), n, " tokens do not fit: the cache holds ",
                 cache.pos(), " of ", cache.n_ctx());
  for (int64_t i = 0; i < n; ++i) {
    check_argument(ids[i] >= 0 && ids[i] < vocab(), "token id ", ids[i], " at position ", i,
                   " is outside the vocabulary of ", vocab());
  }

  const int64_t at_once = std::min(n, tokens_at_once(all));
  std::unique_ptr<Activations> activations =
      take_activations(at_once, pool.threads(), cache.n_ctx());
  const int64_t start = cache.pos();
  pool.run([&](Team& team) {
    for (int64_t first = 0; first < n; first += at_once) {
      const int64_t tokens = std::min(at_once, n - first);
      Pass pass(*this, *activations, cache, team, tokens, start + first);
      pass.embed(ids + first);
      for (size_t i = 0; i < weights_.layers.size(); ++i) pass.layer(i);
      if (all) {
        pass.head(0, logits + first * vocab());
      } else if (first + tokens == n) {
        pass.head(tokens - 1, logits);
      }
    }
  });
  cache.advance(n);
  std::lock_guard<std::mutex> lock(mutex_);
  idle_.push_back(std::move(activations));
}

}  // namespace tmac
