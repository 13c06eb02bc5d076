#include "model/routing.h"

#include <algorithm>

#include "core/exponential.h"

namespace tmac {

Router::Router(int64_t tokens, int64_t experts, int64_t per_token)
    : experts_(experts),
      per_token_(per_token),
      logits_(static_cast<size_t>(tokens * experts)),
      chosen_(static_cast<size_t>(tokens * per_token)),
      weight_(chosen_.size()) {}

void Router::choose(int64_t token, bool normalize, double* scratch) {
  const float* scores = logits(token);
  int32_t* best = chosen_.data() + token * per_token_;
  float* weight = weight_.data() + token * per_token_;
  for (int64_t i = 0; i < per_token_; ++i) {
    int32_t next = -1;
    for (int32_t e = 0; e < experts_; ++e) {
      if (std::find(best, best + i, e) != best + i) continue;
      if (next < 0 || scores[e] > scores[next]) next = e;
    }
    best[i] = next;
  }
  const double largest = scores[best[0]];
  std::sort(best, best + per_token_);
  for (int64_t e = 0; e < experts_; ++e) scratch[e] = scores[e] - largest;
  exponentiate(scratch, experts_);
  double sum = 0;
  if (normalize) {
    for (int64_t i = 0; i < per_token_; ++i) sum += scratch[best[i]];
  } else {
    for (int64_t e = 0; e < experts_; ++e) sum += scratch[e];
  }
  for (int64_t i = 0; i < per_token_; ++i) weight[i] = static_cast<float>(scratch[best[i]] / sum);
}

namespace {

// Cuts the groups into waves.
void share_room(const WaveRoom& room, ExpertSlots* slots) {
  slots->waves.assign(1, 0);
  slots->inputs_at.clear();
  WaveRoom rest = room;
  for (size_t group = 0; group < slots->used.size(); ++group) {
    const int64_t count = slots->count(group);
    const bool looks_up = count <= kTableTokens;
    const WaveRoom need{count, looks_up ? count : 0, looks_up ? 0 : RowBlocks{count}.n_blocks()};
    if (need.slots > rest.slots || need.tables > rest.tables || need.blocks > rest.blocks) {
      slots->waves.push_back(group);
      rest = room;
    }
    slots->inputs_at.push_back(looks_up ? room.tables - rest.tables : room.blocks - rest.blocks);
    rest = {rest.slots - need.slots, rest.tables - need.tables, rest.blocks - need.blocks};
  }
  slots->waves.push_back(slots->used.size());
}

}  // namespace

void Router::fill(int64_t n, const WaveRoom& room, ExpertSlots* slots) const {
  const auto size = static_cast<size_t>(n * per_token_);
  std::vector<int64_t> next(static_cast<size_t>(experts_));  // slots of an expert, then its next
  for (size_t i = 0; i < size; ++i) ++next[static_cast<size_t>(chosen_[i])];
  slots->used.clear();
  slots->first.clear();
  int64_t before = 0;
  for (size_t expert = 0; expert < next.size(); ++expert) {
    const int64_t count = next[expert];
    if (count > 0) {
      slots->used.push_back(expert);
      slots->first.push_back(before);
    }
    next[expert] = before;
    before += count;
  }
  slots->first.push_back(before);
  slots->token.resize(size);
  slots->weight.resize(size);
  for (size_t i = 0; i < size; ++i) {
    const auto at = static_cast<size_t>(next[static_cast<size_t>(chosen_[i])]++);
    slots->token[at] = static_cast<int32_t>(static_cast<int64_t>(i) / per_token_);
    slots->weight[at] = weight_[i];
  }
  share_room(room, slots);
  slots->looks_up.assign(static_cast<size_t>(n), 0);
  for (size_t group = 0; group < slots->used.size(); ++group) {
    if (slots->count(group) > kTableTokens) continue;
    for (int64_t i = slots->first[group]; i < slots->first[group + 1]; ++i) {
      slots->looks_up[static_cast<size_t>(slots->token[static_cast<size_t>(i)])] = 1;
    }
  }
}

float dot(const float* x, const float* w, int64_t n) {
  constexpr int kLanes = 16;
  float sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) sums[j] += x[i + j] * w[i + j];
  }
  for (int j = 0; i + j < n; ++j) sums[j] += x[i + j] * w[i + j];
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) sums[j] += sums[j + width];
  }
  return sums[0];
}

}  // namespace tmac
