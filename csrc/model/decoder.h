#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "model/kv_cache.h"
#include "ops/linear.h"

namespace tmac {

// What one member of the Llama family differs by, as data.
struct DecoderConfig {
  int64_t n_heads = 0;
  int64_t n_kv_heads = 0;
  int64_t head_dim = 0;
  float rms_norm_eps = 0;
  std::vector<float> inv_freq;  // [head_dim / 2]
  float rope_attention_scale = 1;
  int64_t sliding_window = 0;  // 0: attend to every earlier position
  Tables tables = Tables::kInt8;
  Tables head_tables = Tables::kInt8;  // of lm_head
};

struct LayerWeights {
  const float* input_norm = nullptr;           // [hidden]
  const float* post_attention_norm = nullptr;  // [hidden]
  Linear q, k, v;                              // [n_heads or n_kv_heads * head_dim, hidden]
  Linear o;                                    // [hidden, n_heads * head_dim]
  Linear gate, up;                             // [intermediate, hidden]
  Linear down;                                 // [hidden, intermediate]
};

struct DecoderWeights {
  Linear embed_tokens;                // [vocab, hidden]
  Linear lm_head;                     // [vocab, hidden]; the same bytes when tied
  const float* final_norm = nullptr;  // [hidden]
  std::vector<LayerWeights> layers;
};

// One plan for each vector that matrices read.
struct LayerPlans {
  InputPlan qkv, o, gate_up, down;
};

// The next tokens of one sequence.
struct Sequence {
  const int32_t* ids;  // [n]
  int64_t n;
  KvCache* cache;  // what came before; grows by them
};

struct Activations;
struct Token;

// One model: const weights, shared by every cache and thread.
class Decoder {
 public:
  // Throws std::invalid_argument naming the matrix or setting that does not fit.
  Decoder(DecoderConfig config, DecoderWeights weights);
  ~Decoder();

  int64_t vocab() const { return weights_.lm_head.spec.m; }

  // Appends to each cache the tokens of its sequence; all of them share the passes over the
  // weights. logits: [batch, vocab] of the last tokens, or [tokens of all sequences, vocab] if
  // `all`. Throws std::invalid_argument for an id outside the vocabulary and for a cache that is of
  // another shape, has no room or stands twice in the batch, std::runtime_error for one that is in
  // use; all caches are then unchanged.
  void forward(const std::vector<Sequence>& batch, bool all, ThreadPool& pool, float* logits);

 private:
  struct Pass;
  std::vector<Token> check_batch(const std::vector<Sequence>& batch) const;
  int64_t most_regions() const;
  // Tokens on their way through the layers together; `all`: and through the head.
  int64_t tokens_at_once(bool all) const;
  std::unique_ptr<Activations> take_activations(int64_t tokens, int threads, int64_t n_ctx);

  const DecoderConfig config_;
  const DecoderWeights weights_;
  std::vector<LayerPlans> plans_;
  const InputPlan head_plan_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Activations>> idle_;  // of finished steps, for the next ones
};

}  // namespace tmac
