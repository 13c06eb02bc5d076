#include "ops/rope.h"

#include <cmath>

namespace tmac {

void rope_angles(int64_t pos, const float* inv_freq, int64_t half, float scale, float* cosines,
                 float* sines) {
  for (int64_t i = 0; i < half; ++i) {
    const float angle = static_cast<float>(pos) * inv_freq[i];
    cosines[i] = std::cos(angle) * scale;
    sines[i] = std::sin(angle) * scale;
  }
}

void apply_rope(const float* cosines, const float* sines, int64_t half, const float* x,
                float* out) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    out[i] = a * cosines[i] - b * sines[i];
    out[i + half] = b * cosines[i] + a * sines[i];
  }
}

}  // namespace tmac
