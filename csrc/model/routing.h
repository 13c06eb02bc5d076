#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace tmac {

// The tokens of each expert in one layer. A slot is a token of an expert; those of one expert stand
// together, experts and their tokens in rising order.
struct ExpertSlots {
  int64_t count(size_t group) const { return first[group + 1] - first[group]; }

  std::vector<size_t> used;    // experts that have tokens: a group each
  std::vector<int64_t> first;  // [used + 1] where the slots of a group begin
  std::vector<int32_t> token;  // of a slot
  std::vector<float> weight;   // of what the expert gives for it
};

// How the tokens of a pass choose their experts.
class Router {
 public:
  Router(int64_t tokens, int64_t experts, int64_t per_token);

  int64_t experts() const { return experts_; }
  int64_t per_token() const { return per_token_; }
  // [experts] of a token, to be filled.
  float* logits(int64_t token) { return logits_.data() + token * experts_; }
  // The `per_token` experts with the largest logits (of equal ones the first), and their weights:
  // the softmax of all logits, or if `normalize` of the chosen ones. Scratch: [experts].
  void choose(int64_t token, bool normalize, double* scratch);
  // Of n tokens that have chosen.
  void fill(int64_t n, ExpertSlots* slots) const;
  // 0, 1, 2, ... for all slots.
  const int32_t* numbers() const { return numbers_.data(); }

 private:
  int64_t experts_, per_token_;
  std::vector<float> logits_;     // [tokens, experts]
  std::vector<int32_t> chosen_;   // [tokens, per_token] in rising order
  std::vector<float> weight_;     // [tokens, per_token]
  std::vector<int32_t> numbers_;  // [tokens * per_token]
};

// sum x[i] w[i] of n, in one order on every machine.
float dot(const float* x, const float* w, int64_t n);

}  // namespace tmac
