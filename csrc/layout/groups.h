#pragma once

#include <cstdint>

namespace tmac {

// Rounding of floats in groups of n, each [groups, n]; see tmac_py.quant.encode_groups.

// The smallest and the largest weight of each group: low, high [groups]. NaN for a group that has a
// number that is not finite.
void group_ranges(const float* w, int64_t groups, int64_t n, float* low, float* high);

// The nearest codes 0 .. largest [groups, n] to w: of scale * code + offset, or, where offsets is
// null, of scale * (code - zero). Scales and offsets [groups] are binary16 bits. Halves go to the
// even code; a scale of 0 gives the code of 0 (with offsets) or `zero`, rounded.
void nearest_codes(const float* w, int64_t groups, int64_t n, const uint16_t* scales,
                   const uint16_t* offsets, float zero, int largest, uint8_t* codes);

}  // namespace tmac
