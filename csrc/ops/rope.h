#pragma once

#include <cstdint>

namespace tmac {

// Cosines and sines of one position: pos * inv_freq [half], times `scale`. cosines, sines [half].
void rope_angles(int64_t pos, const float* inv_freq, int64_t half, float scale, float* cosines,
                 float* sines);

// Rotates the pairs (x[i], x[i + half]) of one head x [2 * half] (the rotate_half order). `out` may
// be x.
void apply_rope(const float* cosines, const float* sines, int64_t half, const float* x, float* out);

}  // namespace tmac
