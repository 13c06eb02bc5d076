#pragma once

#include <cstdint>
#include <vector>

namespace tmac {

// A score and its token id as one number, which sorts by falling score, then by rising id.
class Ranked {
 public:
  Ranked() = default;
  Ranked(float score, int64_t id);
  float score() const;
  int32_t id() const { return static_cast<int32_t>(key_ & 0xffffffffu); }
  bool operator<(const Ranked& other) const { return key_ < other.key_; }

 private:
  uint64_t key_ = 0;
};

// The scores of a vocabulary with the largest of each block: the few large ones are then found
// without another pass over all.
class ScoreIndex {
 public:
  // `scores` [n], n >= 1, has to stay as it is while the index is in use.
  void scan(const float* scores, int64_t n);

  int64_t size() const { return n_; }
  const float* scores() const { return scores_; }
  float largest() const { return largest_; }
  // The lowest id with the largest score.
  int64_t first_largest() const;
  // Sum of e^(score - largest), rounded to float32 in parts; NaN if there is a NaN or +inf among
  // the scores, or nothing but -inf.
  double exponential_sum() const;

  // Both into `out`, in no order, or by rising id already if many are found; without scores of
  // -inf. Of equal scores the top k are those of the lowest ids.
  void at_least(float bound, std::vector<Ranked>* out) const;
  void top(int64_t k, std::vector<Ranked>* out) const;

 private:
  const float* scores_ = nullptr;
  int64_t n_ = 0;
  float largest_ = 0;
  std::vector<float> block_largest_;
};

}  // namespace tmac
