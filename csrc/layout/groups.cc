#include "layout/groups.h"

#include <limits>

#include "core/half.h"

namespace tmac {
namespace {

// Independent minima and maxima: what the compiler turns into vectors without changing the result.
constexpr int kLanes = 16;

// Adding and subtracting it rounds floats of 0 .. 2^22 to whole numbers, halves to even.
constexpr float kRounder = 0x1.8p23f;

struct Lanes {
  float low[kLanes], high[kLanes], spoiled[kLanes];

  void add(const float* w, int count) {
    for (int i = 0; i < count; ++i) {
      low[i] = w[i] < low[i] ? w[i] : low[i];
      high[i] = w[i] > high[i] ? w[i] : high[i];
      spoiled[i] += w[i] * 0.0f;  // NaN from infinity and NaN on
    }
  }
};

}  // namespace

void group_ranges(const float* w, int64_t groups, int64_t n, float* low, float* high) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (int64_t g = 0; g < groups; ++g, w += n) {
    Lanes lanes;
    for (int i = 0; i < kLanes; ++i) {
      lanes.low[i] = kInfinity;
      lanes.high[i] = -kInfinity;
      lanes.spoiled[i] = 0;
    }
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) lanes.add(w + j, kLanes);
    lanes.add(w + j, static_cast<int>(n - j));
    float spoiled = lanes.spoiled[0];
    low[g] = lanes.low[0];
    high[g] = lanes.high[0];
    for (int i = 1; i < kLanes; ++i) {
      low[g] = lanes.low[i] < low[g] ? lanes.low[i] : low[g];
      high[g] = lanes.high[i] > high[g] ? lanes.high[i] : high[g];
      spoiled += lanes.spoiled[i];
    }
    if (spoiled != 0) low[g] = high[g] = std::numeric_limits<float>::quiet_NaN();
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
