#include "model/sampler.h"

#include <algorithm>
#include <cmath>
#include <exception>
#include <limits>

#include "core/check.h"
#include "core/exponential.h"

namespace tmac {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();

// Returns the sum of the exponentials, which is a number only if the logits are usable.
double scan_logits(const float* logits, int64_t n, ScoreIndex* index) {
  check_argument(n >= 1, "there are no logits");
  index->scan(logits, n);
  const double sum = index->exponential_sum();
  if (sum == sum) return sum;
  const auto unusable = [](float x) { return !(x <= std::numeric_limits<float>::max()); };
  const float* found = std::find_if(logits, logits + n, unusable);
  const char* source = " (from values of the model file that are not finite, or a processor)";
  check_argument(found < logits + n, "no usable logits: all are -inf", source);
  check_argument(false, "no usable logits: token ", found - logits, " has ",
                 *found == *found ? "inf" : "nan", source);
  return sum;
}

double logprob_of(const ScoreIndex& index, double sum, int64_t id) {
  return static_cast<double>(index.scores()[id]) - index.largest() - std::log(sum);
}

}  // namespace

Sampler::Sampler(SamplerOptions options, Pcg64 random)
    : options_(std::move(options)), random_(random) {}

TokenLogprob Sampler::sample(const float* logits, int64_t n, const std::vector<int32_t>& recent) {
  open(logits, n, recent);
  int64_t id;
  if (options_.temperature == 0) {
    id = scores_.first_largest();
  } else {
    find_candidates();
    weigh(options_.temperature);
    id = candidates_[static_cast<size_t>(draw(&weights_))].id();
  }
  return {static_cast<int32_t>(id), logprob_of(model_, model_sum_, id)};
}

Distribution Sampler::distribution(const float* logits, int64_t n,
                                   const std::vector<int32_t>& recent) {
  open(logits, n, recent);
  if (options_.temperature == 0) return {{static_cast<int32_t>(scores_.first_largest())}, {1.0}};
  find_candidates();
  weigh(options_.temperature);
  Distribution result{{}, weights_};
  double sum = 0;
  for (const double weight : result.shares) sum += weight;
  for (double& share : result.shares) share /= sum;
  for (const Ranked& candidate : candidates_) result.ids.push_back(candidate.id());
  return result;
}

int64_t Sampler::draw(std::vector<double>* shares) {
  double sum = 0;
  bool valid = true;
  for (double& share : *shares) {
    valid = valid && share >= 0;
    share = sum += share;
  }
  check_argument(valid && sum > 0 && sum <= std::numeric_limits<double>::max(),
                 "shares to draw from must be at least 0, with a finite sum above 0");
  const double target = random_.uniform() * sum;
  const auto found = std::upper_bound(shares->begin(), shares->end(), target);
  // Rounding may take the target up to the sum, which the last share above 0 reaches.
  const auto last = std::lower_bound(shares->begin(), shares->end(), sum);
  return std::min(found, last) - shares->begin();
}

// Scans the logits, and what bias and penalties make of them.
void Sampler::open(const float* logits, int64_t n, const std::vector<int32_t>& recent) {
  model_sum_ = scan_logits(logits, n, &model_);
  if (recent.empty() && options_.logit_bias.empty()) {
    scores_ = model_;
    return;
  }
  adjusted_.assign(logits, logits + n);
  adjust(recent);
  scores_.scan(adjusted_.data(), n);
  const float largest = scores_.largest();
  check_argument(largest > kNone, "no token is allowed: all that the model allows are forbidden");
  check_argument(largest < std::numeric_limits<float>::infinity(),
                 "bias or penalties take logits out of the range of float32");
}

void Sampler::adjust(std::vector<int32_t> recent) {
  const auto n = static_cast<int64_t>(adjusted_.size());
  const auto score_of = [&](int64_t id, const char* what) -> float& {
    check_argument(id >= 0 && id < n, what, ": token ", id, " is outside the vocabulary of ", n);
    return adjusted_[static_cast<size_t>(id)];
  };
  for (const auto& [id, bias] : options_.logit_bias) score_of(id, "logit_bias") += bias;
  std::sort(recent.begin(), recent.end());
  for (auto at = recent.begin(); at != recent.end();) {
    const auto next = std::upper_bound(at, recent.end(), *at);
    float& score = score_of(*at, "history");
    score = score > 0 ? score / options_.repeat_penalty : score * options_.repeat_penalty;
    score -= static_cast<float>(static_cast<double>(next - at) * options_.frequency_penalty +
                                options_.presence_penalty);
    at = next;
  }
}

// Each of top-k, top-p and min-p keeps some number of the largest scores, so they may be applied in
// any order, as long as top-p counts its share of all that top-k leaves.
void Sampler::find_candidates() {
  const float largest = scores_.largest();
  const bool nucleus = options_.top_p < 1;
  double bound = kNone;
  if (options_.min_p > 0) bound = largest + static_cast<float>(std::log(options_.min_p));
  double mass = 0;
  if (options_.top_k > 0 && options_.top_k < scores_.size()) {
    scores_.top(options_.top_k, &candidates_);
    std::sort(candidates_.begin(), candidates_.end());
    weigh(1);
    for (const double weight : weights_) mass += weight;
    while (candidates_.back().score() < bound) candidates_.pop_back();
  } else {
    if (nucleus) {
      mass = scores_.exponential_sum();
      // All below this together have less than what top-p leaves out; 0.01 is for rounding.
      const double share = (1 - options_.top_p) * mass / static_cast<double>(scores_.size());
      bound = std::max(bound, largest + std::log(share) - 0.01);
    }
    scores_.at_least(static_cast<float>(bound), &candidates_);
  }
  if (nucleus) {
    keep_mass(options_.top_p * mass);
    return;
  }
  const auto by_id = [](const Ranked& a, const Ranked& b) { return a.id() < b.id(); };
  if (std::is_sorted(candidates_.begin(), candidates_.end(), by_id)) return;
  std::sort(candidates_.begin(), candidates_.end(), by_id);
}

// The fewest of the largest whose e^(score - largest) sum up to `mass`, else all, sorted.
void Sampler::keep_mass(double mass) {
  constexpr size_t kSteps = 2048;
  if (candidates_.size() > kSteps) drop_unlikely(mass, kSteps);
  std::sort(candidates_.begin(), candidates_.end());
  weigh(1);
  double sum = 0;
  for (size_t i = 0; i < weights_.size(); ++i) {
    sum += weights_[i];
    if (sum >= mass) {
      candidates_.resize(i + 1);
      return;
    }
  }
}

// Drops what `mass` is reached without, by sums over steps of the score: it need not be sorted.
void Sampler::drop_unlikely(double mass, size_t n_steps) {
  const double largest = scores_.largest();
  const auto step_of = [&](const Ranked& candidate) {
    constexpr double kStepsPerUnit = 32;
    const double step = (largest - candidate.score()) * kStepsPerUnit;
    const auto last = static_cast<double>(n_steps - 1);
    return static_cast<size_t>(step < last ? step : last);
  };
  weigh(1);
  std::vector<double> sums(n_steps);
  for (size_t i = 0; i < weights_.size(); ++i) sums[step_of(candidates_[i])] += weights_[i];
  size_t last = 0;
  double sum = sums[0];
  while (sum < mass * (1 + 1e-9) && last + 1 < n_steps) sum += sums[++last];
  const auto unlikely = [&](const Ranked& candidate) { return step_of(candidate) > last; };
  candidates_.erase(std::remove_if(candidates_.begin(), candidates_.end(), unlikely),
                    candidates_.end());
}

// weights_ = e^((score - largest) / temperature) of each candidate.
void Sampler::weigh(double temperature) {
  weights_.resize(candidates_.size());
  const double largest = scores_.largest();
  for (size_t i = 0; i < weights_.size(); ++i) {
    weights_[i] = (candidates_[i].score() - largest) / temperature;
  }
  exponentiate(weights_.data(), static_cast<int64_t>(weights_.size()));
}

void sample_rows(std::vector<SampledRow>* rows, ThreadPool& pool) {
  const auto choose = [rows](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      SampledRow& row = (*rows)[static_cast<size_t>(i)];
      try {
        row.token = row.sampler->sample(row.logits, row.n, row.recent);
      } catch (const std::exception& error) {
        row.error = error.what();
      }
    }
  };
  const auto n = static_cast<int64_t>(rows->size());
  if (n <= 1) {
    choose(0, n);
  } else {
    pool.run([&](Team& team) { team.parallel_for(n, choose); });
  }
}

double log_probability(const float* logits, int64_t n, int64_t id) {
  check_argument(id >= 0 && id < n, "token ", id, " is outside the vocabulary of ", n);
  ScoreIndex index;
  const double sum = scan_logits(logits, n, &index);
  return logprob_of(index, sum, id);
}

std::vector<TokenLogprob> most_likely(const float* logits, int64_t n, int64_t k) {
  ScoreIndex index;
  const double sum = scan_logits(logits, n, &index);
  std::vector<Ranked> ranked;
  index.top(std::min(k, n), &ranked);
  std::sort(ranked.begin(), ranked.end());
  std::vector<TokenLogprob> result;
  for (const Ranked& token : ranked) {
    result.push_back({token.id(), logprob_of(index, sum, token.id())});
  }
  return result;
}

}  // namespace tmac
