#include "ops/score_index.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>

#include "core/aligned.h"
#include "kernels/kernels.h"

namespace tmac {
namespace {

// Scores lie in groups of rows; a block is a column of a group, so that finding the largest of each
// takes whole vectors. More than 16 columns, or the compiler unrolls a row before it sees vectors.
constexpr int64_t kColumns = 32, kRows = 64, kGroup = kColumns * kRows;
constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr float kNone = -std::numeric_limits<float>::infinity();

// largest[j] = the largest of x[j], x[j + kColumns], ... of `rows` whole rows.
void largest_of_columns(const float* x, int64_t rows, float* largest) {
  float columns[kColumns];
  for (float& column : columns) column = kNone;
  for (int64_t r = 0; r < rows; ++r, x += kColumns) {
    for (int64_t j = 0; j < kColumns; ++j) columns[j] = x[j] > columns[j] ? x[j] : columns[j];
  }
  std::copy(columns, columns + kColumns, largest);
}

}  // namespace

Ranked::Ranked(float score, int64_t id) {
  const float value = score + 0.0f;  // both zeros are equal
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t falling = bits >> 31 ? bits : ~bits & 0x7fffffffu;
  key_ = static_cast<uint64_t>(falling) << 32 | static_cast<uint64_t>(id);
}

float Ranked::score() const {
  const uint32_t falling = static_cast<uint32_t>(key_ >> 32);
  const uint32_t bits = falling >> 31 ? falling : ~falling & 0x7fffffffu;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

void ScoreIndex::scan(const float* scores, int64_t n) {
  scores_ = scores;
  n_ = n;
  block_largest_.resize(static_cast<size_t>(ceil_div(n, kGroup) * kColumns));
  float* blocks = block_largest_.data();
  for (int64_t begin = 0; begin < n; begin += kGroup, blocks += kColumns) {
    const int64_t size = std::min(kGroup, n - begin), rows = size / kColumns;
    largest_of_columns(scores + begin, rows, blocks);
    for (int64_t i = rows * kColumns; i < size; ++i) {
      float& largest = blocks[i % kColumns];
      largest = std::max(largest, scores[begin + i]);
    }
  }
  largest_ = *std::max_element(block_largest_.begin(), block_largest_.end());
}

int64_t ScoreIndex::first_largest() const {
  const float* blocks = block_largest_.data();
  int64_t begin = 0;  // of the first group with the largest
  for (; std::find(blocks, blocks + kColumns, largest_) == blocks + kColumns; begin += kGroup) {
    blocks += kColumns;
  }
  return std::find(scores_ + begin, scores_ + n_, largest_) - scores_;
}

double ScoreIndex::exponential_sum() const {
  constexpr int64_t kPart = 4096;  // few enough for float32
  double sum = 0;
  for (int64_t i = 0; i < n_; i += kPart) {
    sum += vector_kernels().sum_exponentials(scores_ + i, std::min(kPart, n_ - i), largest_);
  }
  return sum;
}

void ScoreIndex::at_least(float bound, std::vector<Ranked>* out) const {
  out->clear();
  bound = std::max(bound, kLowest);
  const auto reaches = [&](float largest) { return largest >= bound; };
  const auto blocks = static_cast<int64_t>(block_largest_.size());
  if (std::count_if(block_largest_.begin(), block_largest_.end(), reaches) * 4 > blocks) {
    out->resize(static_cast<size_t>(n_));
    size_t found = 0;
    for (int64_t i = 0; i < n_; ++i) {  // without a branch that nothing could predict
      (*out)[found] = Ranked(scores_[i], i);
      found += scores_[i] >= bound;
    }
    out->resize(found);
    return;
  }
  for (int64_t block = 0; block < blocks; ++block) {
    if (!reaches(block_largest_[static_cast<size_t>(block)])) continue;
    const int64_t begin = block / kColumns * kGroup, end = std::min(begin + kGroup, n_);
    for (int64_t i = begin + block % kColumns; i < end; i += kColumns) {
      if (scores_[i] >= bound) out->emplace_back(scores_[i], i);
    }
  }
}

void ScoreIndex::top(int64_t k, std::vector<Ranked>* out) const {
  // k blocks reach the k-th largest block maximum: it bounds the k-th largest score from below, and
  // only a handful lies above.
  float bound = kLowest;
  if (k <= static_cast<int64_t>(block_largest_.size())) {
    std::vector<float> largest = block_largest_;
    const auto kth = largest.begin() + (k - 1);
    std::nth_element(largest.begin(), kth, largest.end(), std::greater<float>());
    bound = *kth;
  }
  at_least(bound, out);
  if (k >= static_cast<int64_t>(out->size())) return;
  std::nth_element(out->begin(), out->begin() + k, out->end());
  out->resize(static_cast<size_t>(k));
}

}  // namespace tmac
