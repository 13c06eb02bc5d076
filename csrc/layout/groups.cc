#include "layout/groups.h"

#include <limits>

#include "core/half.h"

namespace tmac {
namespace {

// Independent minima and maxima: what the compiler turns into vectors without changing the result.
constexpr int kLanes = 8;

// Adding and subtracting it rounds floats of 0 .. 2^22 to whole numbers, halves to even.
constexpr float kRounder = 0x1.8p23f;

struct Range {
  float low, high;
  float spoiled;  // NaN after infinity or NaN

  void add(float w) {
    low = w < low ? w : low;
    high = w > high ? w : high;
    spoiled += w * 0.0f;
  }
};

// The range of the `blocks` * kLanes floats at w.
Range range_of_blocks(const float* w, int64_t blocks) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  float low[kLanes], high[kLanes], spoiled[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    low[i] = kInfinity;
    high[i] = -kInfinity;
    spoiled[i] = 0;
  }
  for (int64_t b = 0; b < blocks; ++b, w += kLanes) {
    for (int i = 0; i < kLanes; ++i) {
      low[i] = w[i] < low[i] ? w[i] : low[i];
      high[i] = w[i] > high[i] ? w[i] : high[i];
      spoiled[i] += w[i] * 0.0f;
    }
  }
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) {
      low[i] = low[i + half] < low[i] ? low[i + half] : low[i];
      high[i] = high[i + half] > high[i] ? high[i + half] : high[i];
      spoiled[i] += spoiled[i + half];
    }
  }
  return {low[0], high[0], spoiled[0]};
}

}  // namespace

void group_ranges(const float* w, int64_t groups, int64_t n, float* low, float* high) {
  const int64_t blocks = n / kLanes;
  for (int64_t g = 0; g < groups; ++g, w += n) {
    Range range = range_of_blocks(w, blocks);
    for (int64_t j = blocks * kLanes; j < n; ++j) range.add(w[j]);
    const bool finite = range.spoiled == 0;
    low[g] = finite ? range.low : std::numeric_limits<float>::quiet_NaN();
    high[g] = finite ? range.high : std::numeric_limits<float>::quiet_NaN();
  }
}

void nearest_codes(const float* w, int64_t groups, int64_t n, const uint16_t* scales,
                   const uint16_t* offsets, float zero, int largest, uint8_t* codes) {
  const float top = static_cast<float>(largest);
  for (int64_t g = 0; g < groups; ++g, w += n, codes += n) {
    const float scale = half_to_float(scales[g]);
    const float inverse = scale != 0 ? 1 / scale : 0;
    const float offset = offsets == nullptr ? 0 : half_to_float(offsets[g]);
    const float shift = offsets == nullptr ? zero : 0;
    for (int64_t j = 0; j < n; ++j) {
      float q = (w[j] - offset) * inverse + shift;
      q = q > 0 ? q : 0;
      q = q < top ? q : top;
      codes[j] = static_cast<uint8_t>(static_cast<int>((q + kRounder) - kRounder));
    }
  }
}

}  // namespace tmac
