#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "core/random.h"
#include "core/thread_pool.h"
#include "ops/score_index.h"

namespace tmac {

// The values that switch a step off are those of the members.
struct SamplerOptions {
  double temperature = 0;  // 0 takes the most likely token
  int64_t top_k = 0;
  double top_p = 1;
  double min_p = 0;
  float repeat_penalty = 1;
  double presence_penalty = 0;
  double frequency_penalty = 0;
  std::vector<std::pair<int32_t, float>> logit_bias;  // -inf forbids a token
};

struct TokenLogprob {
  int32_t id;
  double logprob;
};

// What may come next. The shares add up to 1.
struct Distribution {
  std::vector<int32_t> ids;
  std::vector<double> shares;
};

// From the logits of one position to the next token: bias, penalties, top-k, top-p, min-p and
// temperature, in this order, which is that of llama.cpp. Equal inputs give equal tokens on every
// machine.
//
// Logits are float32 [n]; -inf forbids a token. `recent` holds the ids that the penalties are for,
// each as often as it occurs. Throws std::invalid_argument for logits with NaN or +inf, if nothing
// is allowed, and for an id outside of the vocabulary.
class Sampler {
 public:
  Sampler(SamplerOptions options, Pcg64 random);

  // A token, with its log probability under the logits as they are given.
  TokenLogprob sample(const float* logits, int64_t n, const std::vector<int32_t>& recent);
  // What `sample` draws from. The order of the ids is falling by score with top-p, else rising.
  Distribution distribution(const float* logits, int64_t n, const std::vector<int32_t>& recent);
  // An index into shares, of any sum above 0, which become sums of those up to each. `sample` uses
  // one random number likewise.
  int64_t draw(std::vector<double>* shares);
  // In [0, 1).
  double uniform() { return random_.uniform(); }

 private:
  void open(const float* logits, int64_t n, const std::vector<int32_t>& recent);
  void adjust(std::vector<int32_t> recent);
  void find_candidates();
  void keep_mass(double mass);
  void drop_unlikely(double mass, size_t n_steps);
  void weigh(double temperature);

  SamplerOptions options_;
  Pcg64 random_;
  std::vector<float> adjusted_;
  ScoreIndex model_, scores_;  // of the logits as given, and as adjusted
  double model_sum_ = 0;       // of the exponentials of the former
  std::vector<Ranked> candidates_;
  std::vector<double> weights_;  // of the candidates
};

// The logits of one sequence, which `sampler` chooses from, and what came of it: a token, or else
// the text of the error.
struct SampledRow {
  Sampler* sampler;  // of this row alone
  const float* logits;
  int64_t n;
  std::vector<int32_t> recent;
  TokenLogprob token{};
  std::string error{};
};

// Chooses a token for each row, as `sample` does; the rows are shared out among the threads.
void sample_rows(std::vector<SampledRow>* rows, ThreadPool& pool);

// The log probability of one token, and the k most likely ones with theirs, largest first.
double log_probability(const float* logits, int64_t n, int64_t id);
std::vector<TokenLogprob> most_likely(const float* logits, int64_t n, int64_t k);

}  // namespace tmac
