#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "model/kv_cache.h"
#include "ops/linear.h"

namespace tmac {

// One way to turn heads by their position.
struct Rope {
  std::vector<float> inv_freq;       // [rotary_dim / 2]
  std::vector<float> long_inv_freq;  // the same for contexts beyond the original one; or empty
  int64_t original_context = 0;      // if there are long_inv_freq
  float attention_scale = 1;         // on cosines and sines
};

// What multiplies the rows of `up` after `gate`.
enum class Activation { kSilu, kGeluTanh, kRelu2 };

// What one decoder family differs by from others, as data.
struct DecoderConfig {
  int64_t n_heads = 0;
  int64_t n_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t rotary_dim = 0;  // the first elements of each head, which rope turns
  float rms_norm_eps = 0;
  float query_scalar = 0;                           // attention scores are q.k / sqrt(query_scalar)
  float attention_softcap = 0, logits_softcap = 0;  // 0: none
  float embedding_scale = 1;
  Activation activation = Activation::kSilu;
  float clip_qkv = 0;              // the largest |q|, |k| and |v|; 0: any
  int64_t experts_per_token = 0;   // in layers with a router
  bool normalize_experts = false;  // weights of the chosen experts add up to 1
  std::vector<Rope> ropes;

  // Whether texts that begin in a cache of that size are turned by long_inv_freq.
  bool turns_long(int64_t n_ctx) const {
    return std::any_of(ropes.begin(), ropes.end(), [&](const Rope& rope) {
      return !rope.long_inv_freq.empty() && n_ctx > rope.original_context;
    });
  }

  Tables tables = Tables::kInt8;
  Tables head_tables = Tables::kInt8;  // of lm_head
};

// The matrices of a feed-forward, of which a layer with a router has several.
struct FeedForward {
  Linear gate, up;  // [intermediate, hidden]
  Linear down;      // [hidden, intermediate]
  const float *gate_bias = nullptr, *up_bias = nullptr, *down_bias = nullptr;
};

// Null pointers are steps that a family does not have.
struct LayerWeights {
  const float* input_norm = nullptr;                 // [hidden], before q, k and v
  const float* attention_out_norm = nullptr;         // [hidden], of what attention adds
  const float* feed_forward_norm = nullptr;          // [hidden], before gate and up
  const float* feed_forward_out_norm = nullptr;      // [hidden], of what it adds
  const float *q_norm = nullptr, *k_norm = nullptr;  // [head_dim], of each head
  const float* q_full_norm = nullptr;                // [n_heads * head_dim], of all heads together
  const float* k_full_norm = nullptr;                // [n_kv_heads * head_dim]
  const float* attn_sub_norm = nullptr;              // [n_heads * head_dim], before o
  const float* ffn_sub_norm = nullptr;               // [intermediate], before down
  Linear q, k, v;                                    // [heads * head_dim, hidden]
  Linear o;                                          // [hidden, n_heads * head_dim]
  const float *q_bias = nullptr, *k_bias = nullptr, *v_bias = nullptr, *o_bias = nullptr;
  const float* router = nullptr;           // [experts, hidden], chooses among feed-forwards
  std::vector<FeedForward> feed_forwards;  // [experts], or one without a router
  int64_t sliding_window = 0;              // 0: attend to every earlier position
  int rope = 0;                            // which of the ropes; -1: none
};

struct DecoderWeights {
  Linear embed_tokens;                // [vocab, hidden]
  Linear lm_head;                     // [vocab, hidden]; the same bytes when tied
  const float* final_norm = nullptr;  // [hidden]
  std::vector<LayerWeights> layers;
};

// One plan for each vector that matrices read.
struct FeedForwardPlans {
  InputPlan gate_up, down;
};

struct LayerPlans {
  InputPlan qkv, o;
  std::vector<FeedForwardPlans> feed_forwards;  // one if all experts read the same inputs

  const FeedForwardPlans& of_expert(size_t i) const {
    return feed_forwards[feed_forwards.size() == 1 ? 0 : i];
  }
};

// The next tokens of one sequence.
struct Sequence {
  const int32_t* ids;  // [n]
  int64_t n;
  KvCache* cache;  // what came before; grows by them
};

// What a step gives of its tokens: logits of the last of each sequence, logits of all, or the
// hidden states of all after the final norm.
enum class Output { kLastLogits, kAllLogits, kHiddenStates };

struct Activations;
class StepTimes;
struct Token;

// One model: const weights, shared by every cache and thread.
class Decoder {
 public:
  // Throws std::invalid_argument naming the matrix or setting that does not fit.
  Decoder(DecoderConfig config, DecoderWeights weights);
  ~Decoder();

  int64_t vocab() const { return weights_.lm_head.spec.m; }
  // Numbers that a step gives of a token.
  int64_t width(Output output) const {
    return output == Output::kHiddenStates ? weights_.embed_tokens.spec.k : vocab();
  }

  // Appends to each cache the tokens of its sequence; all of them share the passes over the
  // weights. out: [batch, width] for the last tokens, else [tokens of all sequences, width]. Throws
  // std::invalid_argument for an id outside the vocabulary and for a cache that is of another
  // shape, has no room or stands twice in the batch, std::runtime_error for one that is in use; all
  // caches are then unchanged. `times`, unless null, adds up what the parts take.
  void forward(const std::vector<Sequence>& batch, Output output, ThreadPool& pool, float* out,
               StepTimes* times = nullptr);

 private:
  struct Pass;
  std::vector<Token> check_batch(const std::vector<Sequence>& batch) const;
  // Where a pass of tokens from `first` on ends that their caches have room for.
  static int64_t end_of_pass(const std::vector<Token>& tokens, int64_t first, int64_t end);
  // Calls visit(InputPlan) for the plans of all layers.
  template <typename Visit>
  void each_plan(const Visit& visit) const;
  int64_t most_regions() const;
  int64_t count_tokens_at_once(bool all) const;
  std::unique_ptr<Activations> take_activations(int64_t tokens, int threads, int64_t n_ctx);

  const DecoderConfig config_;
  const DecoderWeights weights_;
  std::vector<LayerPlans> plans_;
  const InputPlan head_plan_;
  // Tokens on their way through the layers together; through the head as well.
  int64_t tokens_at_once_, tokens_at_once_with_head_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Activations>> idle_;  // of finished steps, for the next ones
};

}  // namespace tmac
