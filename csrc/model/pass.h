#pragma once

#include <cstdint>
#include <initializer_list>
#include <vector>

#include "model/activations.h"
#include "model/decoder.h"
#include "model/step_times.h"

namespace tmac {

// A token on its way, and where its keys and values go.
struct Token {
  int32_t id;
  KvCache* cache;
  int64_t pos;
};

// As many tokens as the plans allow at once on their way through the layers, as one thread of the
// team sees it. The tokens of one sequence stand together, in order.
struct Decoder::Pass {
 public:
  // `step_times` or null.
  Pass(const Decoder& decoder, Activations& activations, Team& members, const Token* first_token,
       int64_t n_tokens, StepTimes* step_times)
      : model(decoder),
        a(activations),
        team(members),
        tokens(first_token),
        n(n_tokens),
        times(members.thread() == 0 ? step_times : nullptr) {
    share_out();
    if (times != nullptr) times->begin();
  }

  void embed();
  void layer(size_t index);
  // Logits [count, vocab] of tokens of this pass; `outputs` count from `first`, its first token.
  void head(const int64_t* outputs, int64_t count, int64_t first, float* logits);
  // What the head would read of them, [count, hidden].
  void final_norm(const int64_t* outputs, int64_t count, int64_t first, float* normed);

 private:
  struct Product {
    const Linear& w;
    const float* bias;  // [w.spec.m] or null
    float* y;           // [tokens, w.spec.m]
  };
  // Queries that one thread works on together: some heads of tokens of one sequence.
  struct Piece {
    KvCache* cache;
    int64_t first_token, n_tokens, kv_head, first_head, n_heads;
    int64_t first_part, end_part;                    // of kAttendPart positions
    int64_t first[kMostQueries], end[kMostQueries];  // positions of each query
  };
  static constexpr int64_t kShortContext = 1024;  // keys and values of a head stay in cache

  // Takes note that a part ends here.
  void ended(Part part) const {
    if (times != nullptr) times->end(part);
  }
  // pass.cc
  template <typename TokenAt, typename Visit>
  void norm_tokens(const float* x, const float* weight, int64_t width, int64_t count,
                   const TokenAt& token_at, const Visit& visit);
  template <typename TokenAt>
  void norm_into_inputs(const float* x, const float* weight, int64_t width, const InputPlan& plan,
                        Inputs& inputs, int64_t count, const TokenAt& token_at);
  void build_part(const InputPlan& plan, Inputs& inputs, TokenSet set, int64_t token, int64_t part,
                  int64_t parts, const float* x);
  void norm_into_inputs(const float* x, const float* weight, int64_t width, const InputPlan& plan,
                        Inputs& inputs);
  void add_bias(const float* bias, int64_t count, int64_t begin, int64_t end, float* y,
                int64_t stride);
  void multiply(Inputs& inputs, const InputPlan& plan, std::initializer_list<Product> products,
                int64_t count);
  void multiply_add(const Linear& w, const float* bias, const float* out_norm, Inputs& inputs,
                    const InputPlan& plan);
  // Where the cosines and sines of a token are.
  int64_t rope_at(size_t rope, int64_t token) const {
    return (static_cast<int64_t>(rope) * a.tokens + token) * half_rotary;
  }
  // feed_forward.cc
  void feed_forward(const LayerWeights& w, const LayerPlans& layer_plans);
  void multiply_gated(const FeedForward& f, const FeedForwardPlans& plans, const float* sub_norm,
                      int64_t count);
  void activate(float* gate, const float* up, int64_t size) const;
  // experts.cc
  void mix_experts(size_t layer);
  void route(const LayerWeights& w, const LayerPlans& plans, ExpertSlots* slots);
  void build_shared_inputs(const LayerWeights& w, const InputPlan& plan, const ExpertSlots& slots);
  void run_wave(const LayerWeights& w, const FeedForwardPlans& plans, const ExpertSlots& slots,
                size_t wave);
  void gather_inputs(const InputPlan& plan, const ExpertSlots& slots, size_t begin, size_t end);
  void build_down_inputs(const InputPlan& plan, const ExpertSlots& slots, size_t begin, size_t end);
  // Integers that stand behind those of all tokens.
  TokenSet behind_all(TokenSet gathered) const {
    return {gathered.n, RowBlocks{n}.n_blocks() + gathered.first};
  }
  void run_expert(const LayerWeights& w, const LayerPlans& layer_plans, const ExpertSlots& slots,
                  size_t group);
  void add_weighed(const ExpertSlots& slots, size_t group, int64_t first_delta, int64_t begin,
                   int64_t end);
  // attention.cc
  void norm_and_clip(const LayerWeights& w);
  void turn_head(const LayerWeights& w, const float* norm, int64_t token, const float* x,
                 float* out);
  void store_keys_and_values(int64_t layer);
  void attend(int64_t layer, const InputPlan& o_plan);
  void share_out();
  void make_runs(int64_t most);
  Piece piece(int64_t layer, int64_t index) const;
  AttendQueries prepare(int64_t layer, const Piece& p);
  void attend_part(int64_t layer, const Piece& p, const AttendQueries& queries, int64_t part,
                   float* states);
  void attend_piece(int64_t layer, const Piece& p, float* states);
  void merge(const Piece& p, float* states, const float* following);
  void finish(const Piece& p, float* states, const InputPlan& o_plan, bool build_now);
  int64_t chunks() const {
    return config.n_kv_heads * ceil_div(config.n_heads / config.n_kv_heads, heads_at_once);
  }

  const Decoder& model;
  Activations& a;
  Team& team;
  const Token* const tokens;  // [n]
  const int64_t n;
  StepTimes* const times;     // of the thread that called, or null
  std::vector<int64_t> runs;  // where runs of tokens that are worked on together begin, and n
  int64_t heads_at_once = 1;
  bool by_part = false;
  int64_t parts = 1;  // that the longest of the sequences has

  const DecoderConfig& config = model.config_;
  const DecoderWeights& weights = model.weights_;
  const VectorKernels& isa = vector_kernels();
  const int64_t hidden = weights.embed_tokens.spec.k;
  const int64_t head_dim = config.head_dim;
  const int64_t half_rotary = config.rotary_dim / 2;
  const int64_t q_width = config.n_heads * config.head_dim;
  const int64_t kv_width = config.n_kv_heads * config.head_dim;
};

// Calls visit(i, part, parts, norm(x)) for the tokens token_at(0 .. count), rows of x [width]. For
// one token the threads share the parts of the work, and each computes the norm for itself.
template <typename TokenAt, typename Visit>
void Decoder::Pass::norm_tokens(const float* x, const float* weight, int64_t width, int64_t count,
                                const TokenAt& token_at, const Visit& visit) {
  const int64_t parts = count == 1 ? team.threads() : 1;
  float* normed = a.normed.data() + team.thread() * a.widest;
  team.parallel_for(count * parts, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      isa.rms_norm(x + token_at(i / parts) * width, weight, width, config.rms_norm_eps, normed);
      visit(i / parts, i % parts, parts, normed);
    }
  });
}

// norm(x) of these tokens as tokens 0.. of `inputs`.
template <typename TokenAt>
void Decoder::Pass::norm_into_inputs(const float* x, const float* weight, int64_t width,
                                     const InputPlan& plan, Inputs& inputs, int64_t count,
                                     const TokenAt& token_at) {
  norm_tokens(x, weight, width, count, token_at,
              [&](int64_t t, int64_t part, int64_t parts, const float* normed) {
                build_part(plan, inputs, count, t, part, parts, normed);
              });
}

// One of the parts of the inputs of a token, from all of x.
inline void Decoder::Pass::build_part(const InputPlan& plan, Inputs& inputs, TokenSet set,
                                      int64_t token, int64_t part, int64_t parts, const float* x) {
  const int64_t n_regions = plan.regions(set.n).size();
  inputs.build(plan, set, token, n_regions * part / parts, n_regions * (part + 1) / parts, x);
}

}  // namespace tmac
