#include "model/decoder.h"

#include <algorithm>
#include <deque>
#include <string>
#include <utility>

#include "core/check.h"
#include "model/activations.h"
#include "model/pass.h"

namespace tmac {
namespace {

void check_shape(const std::string& name, const Linear& w, int64_t m, int64_t k) {
  check_argument(w.spec.m == m && w.spec.k == k, name, " must be [", m, ", ", k, "], not [",
                 w.spec.m, ", ", w.spec.k, "]");
}

void check_feed_forwards(const std::string& at, const DecoderConfig& config, const LayerWeights& w,
                         int64_t hidden) {
  const auto experts = static_cast<int64_t>(w.feed_forwards.size());
  check_argument(experts >= 1, at, "a layer needs a feed-forward");
  if (w.router == nullptr) {
    check_argument(experts == 1, at, "several feed-forwards need a router");
  } else {
    check_argument(config.experts_per_token >= 1 && config.experts_per_token <= experts, at,
                   "experts_per_token must be 1 to ", experts, ", not ", config.experts_per_token);
    check_argument(w.feed_forward_out_norm == nullptr && w.ffn_sub_norm == nullptr, at,
                   "experts have no norms of their own");
  }
  const int64_t intermediate = w.feed_forwards[0].gate.spec.m;
  for (const FeedForward& f : w.feed_forwards) {
    check_shape(at + "gate_proj", f.gate, intermediate, hidden);
    check_shape(at + "up_proj", f.up, intermediate, hidden);
    check_shape(at + "down_proj", f.down, hidden, intermediate);
    check_argument(w.router == nullptr || (!f.gate_bias && !f.up_bias && !f.down_bias), at,
                   "experts have no biases");
  }
}

// One for all where they are the same: the tables of a token then serve all experts.
std::vector<FeedForwardPlans> plan_feed_forwards(const LayerWeights& w, Tables tables) {
  const FewTokens few = w.router == nullptr ? FewTokens::kFastest : FewTokens::kTables;
  std::vector<FeedForwardPlans> plans;
  bool same = true;
  for (const FeedForward& f : w.feed_forwards) {
    FeedForwardPlans its{InputPlan(tables, {f.gate, f.up}, few), InputPlan(tables, {f.down}, few)};
    if (!plans.empty() && same) {
      same = its.gate_up == plans[0].gate_up && its.down == plans[0].down;
      if (same) continue;
      plans.resize(static_cast<size_t>(&f - w.feed_forwards.data()), plans[0]);
    }
    plans.push_back(std::move(its));
  }
  return plans;
}

void check_model(const DecoderConfig& config, const DecoderWeights& weights) {
  check_argument(
      config.n_heads >= 1 && config.n_kv_heads >= 1 && config.n_heads % config.n_kv_heads == 0,
      "n_heads (", config.n_heads, ") must be a multiple of n_kv_heads (", config.n_kv_heads, ")");
  check_argument(config.head_dim >= 2 && config.head_dim % 2 == 0, "head_dim must be even, not ",
                 config.head_dim);
  check_argument(
      config.rotary_dim >= 2 && config.rotary_dim % 2 == 0 && config.rotary_dim <= config.head_dim,
      "rotary_dim must be even and at most head_dim, not ", config.rotary_dim);
  check_argument(config.query_scalar > 0, "query_scalar must be positive");
  const auto half = static_cast<size_t>(config.rotary_dim / 2);
  for (const Rope& rope : config.ropes) {
    const size_t of_long = rope.long_inv_freq.size();
    check_argument(rope.inv_freq.size() == half && (of_long == half || of_long == 0),
                   "inv_freq must hold rotary_dim / 2 = ", half, " values");
  }
  check_argument(!weights.layers.empty(), "a decoder needs at least one layer");
  size_t experts = 0;  // of the layers that have several
  const int64_t hidden = weights.embed_tokens.spec.k;
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
    check_feed_forwards(at, config, w, hidden);
    if (w.router != nullptr) {
      if (experts == 0) experts = w.feed_forwards.size();
      check_argument(w.feed_forwards.size() == experts, at, "all layers must have ", experts,
                     " experts, not ", w.feed_forwards.size());
    }
    check_argument(w.sliding_window >= 0, at, "sliding_window must not be negative");
    check_argument(w.rope >= -1 && w.rope < static_cast<int>(config.ropes.size()), at,
                   "there is no rope ", w.rope);
  }
}

}  // namespace

Decoder::Decoder(DecoderConfig config, DecoderWeights weights)
    : config_(std::move(config)),
      weights_(std::move(weights)),
      head_plan_(config_.head_tables, {weights_.lm_head}) {
  check_model(config_, weights_);
  for (const LayerWeights& w : weights_.layers) {
    plans_.push_back({InputPlan(config_.tables, {w.q, w.k, w.v}), InputPlan(config_.tables, {w.o}),
                      plan_feed_forwards(w, config_.tables)});
  }
  tokens_at_once_ = count_tokens_at_once(false);
  tokens_at_once_with_head_ = count_tokens_at_once(true);
}

Decoder::~Decoder() = default;

template <typename Visit>
void Decoder::each_plan(const Visit& visit) const {
  for (const LayerPlans& layer : plans_) {
    visit(layer.qkv);
    visit(layer.o);
    for (const FeedForwardPlans& plans : layer.feed_forwards) {
      visit(plans.gate_up);
      visit(plans.down);
    }
  }
}

int64_t Decoder::most_regions() const {
  int64_t most = head_plan_.most_regions();
  each_plan([&](const InputPlan& plan) { most = std::max(most, plan.most_regions()); });
  return most;
}

int64_t Decoder::count_tokens_at_once(bool all) const {
  bool serve_rows = !all || head_plan_.serves_rows();
  bool prefer_tables = true;
  each_plan([&](const InputPlan& plan) {
    serve_rows &= plan.serves_rows();
    prefer_tables &= plan.prefers_tables();
  });
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

std::vector<Token> Decoder::check_batch(const std::vector<Sequence>& batch) const {
  check_argument(!batch.empty(), "forward needs at least one sequence");
  std::vector<Token> tokens;
  for (const Sequence& sequence : batch) {
    KvCache& cache = *sequence.cache;
    const int64_t n = sequence.n;
    check_argument(cache.n_layers() == static_cast<int64_t>(weights_.layers.size()) &&
                       cache.n_kv_heads() == config_.n_kv_heads &&
                       cache.shape().head_dim == config_.head_dim,
                   "the KV cache was made for another model");
    check_argument(n >= 1, "forward needs at least one token");
    check_argument(cache.pos() + n <= cache.n_ctx(), n, " tokens do not fit: the cache holds ",
                   cache.pos(), " of ", cache.n_ctx());
    for (int64_t i = 0; i < n; ++i) {
      const int32_t id = sequence.ids[i];
      check_argument(id >= 0 && id < vocab(), "token id ", id, " at position ", i,
                     " is outside the vocabulary of ", vocab());
      tokens.push_back({id, &cache, cache.pos() + i});
    }
  }
  return tokens;
}

// At most `end`.
int64_t Decoder::end_of_pass(const std::vector<Token>& tokens, int64_t first, int64_t end) {
  const auto at = [&](int64_t t) -> const Token& { return tokens[static_cast<size_t>(t)]; };
  for (int64_t t = first, begin = first; t < end; ++t) {
    if (at(t).cache != at(begin).cache) begin = t;
    if (at(t).pos >= at(t).cache->end_of_pass(at(begin).pos)) return t;
  }
  return end;
}

void Decoder::forward(const std::vector<Sequence>& batch, Output output, ThreadPool& pool,
                      float* out, StepTimes* times) {
  kernels();  // throws, if it must, before the threads set out
  for (size_t i = 0; i < batch.size(); ++i) {
    for (size_t j = 0; j < i; ++j) {
      check_argument(batch[i].cache != batch[j].cache, "sequences ", j, " and ", i,
                     " have the same KV cache");
    }
  }
  std::deque<KvCache::Use> in_use;
  for (const Sequence& sequence : batch) in_use.emplace_back(*sequence.cache);
  const std::vector<Token> tokens = check_batch(batch);
  for (const Sequence& sequence : batch) {
    KvCache& cache = *sequence.cache;
    if (cache.pos() == 0) cache.set_long_rope(config_.turns_long(cache.n_ctx()));
  }
  const bool last = output == Output::kLastLogits;
  std::vector<int64_t> outputs;  // tokens that are asked for
  int64_t n = 0, longest = 0;
  for (const Sequence& sequence : batch) {
    for (int64_t t = last ? n + sequence.n - 1 : n; t < n + sequence.n; ++t) outputs.push_back(t);
    n += sequence.n;
    longest = std::max(longest, sequence.cache->n_ctx());
  }

  const bool one_row = last && batch.size() == 1;
  const bool head_of_many = output != Output::kHiddenStates && !one_row;
  const int64_t at_once = std::min(n, head_of_many ? tokens_at_once_with_head_ : tokens_at_once_);
  std::unique_ptr<Activations> activations = take_activations(at_once, pool.threads(), longest);
  size_t done = 0;
  for (int64_t first = 0, end = 0; first < n; first = end) {
    end = end_of_pass(tokens, first, std::min(first + at_once, n));
    const int64_t* here = outputs.data() + done;
    float* rows = out + static_cast<int64_t>(done) * width(output);
    const size_t before = done;
    while (done < outputs.size() && outputs[done] < end) ++done;
    const auto count = static_cast<int64_t>(done - before);
    pool.run([&](Team& team) {
      Pass pass(*this, *activations, team, tokens.data() + first, end - first, times);
      pass.embed();
      for (size_t i = 0; i < weights_.layers.size(); ++i) pass.layer(i);
      if (output == Output::kHiddenStates) {
        pass.final_norm(here, count, first, rows);
      } else {
        pass.head(here, count, first, rows);
      }
    });
  }
  for (const Sequence& sequence : batch) sequence.cache->advance(sequence.n);
  std::lock_guard<std::mutex> lock(mutex_);
  idle_.push_back(std::move(activations));
}

}  // namespace tmac
