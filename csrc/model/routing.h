#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "ops/inputs.h"

namespace tmac {

// The tokens of each expert in one layer. A slot is a token of an expert; those of one expert stand
// together, experts and their tokens in rising order. As many groups as there is room for make a
// wave: they are worked on together.
struct ExpertSlots {
  int64_t count(size_t group) const { return first[group + 1] - first[group]; }
  // Of the group, to be read where its wave's are.
  TokenSet inputs(size_t group) const { return {count(group), inputs_at[group]}; }

  std::vector<size_t> used;        // experts that have tokens: a group each
  std::vector<int64_t> first;      // [used + 1] where the slots of a group begin
  std::vector<int64_t> inputs_at;  // [used] where the group's inputs begin among those of its wave
  std::vector<size_t> waves;       // [waves + 1] where the groups of a wave begin
  std::vector<int32_t> token;      // of a slot
  std::vector<float> weight;       // of what the expert gives for it
  std::vector<uint8_t> looks_up;   // [tokens] whether an expert reads the token's tables
};

// What there is room for in a wave.
struct WaveRoom {
  int64_t slots, tables, blocks;
};

// How the tokens of a pass choose their experts.
class Router {
 public:
  Router(int64_t tokens, int64_t experts, int64_t per_token);

  int64_t experts() const { return experts_; }
  // [experts] of a token, to be filled.
  float* logits(int64_t token) { return logits_.data() + token * experts_; }
  // The `per_token` experts with the largest logits (of equal ones the first), and their weights:
  // the softmax of all logits, or if `normalize` of the chosen ones. Scratch: [experts].
  void choose(int64_t token, bool normalize, double* scratch);
  // Of n tokens that have chosen.
  void fill(int64_t n, const WaveRoom& room, ExpertSlots* slots) const;

 private:
  int64_t experts_, per_token_;
  std::vector<float> logits_;    // [tokens, experts]
  std::vector<int32_t> chosen_;  // [tokens, per_token] in rising order
  std::vector<float> weight_;    // [tokens, per_token]
};

// sum x[i] w[i] of n, in one order on every machine.
float dot(const float* x, const float* w, int64_t n);

}  // namespace tmac
