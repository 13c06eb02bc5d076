#include "layout/ternary.h"

#include <algorithm>

#include "layout/layout.h"

namespace tmac {

void pack_ternary(const uint8_t* codes, int64_t n, int64_t r, uint8_t* chunk) {
  for (int64_t t = 0; t * kTernaryTableWeights < n; ++t) {
    const int64_t first = t * kTernaryTableWeights;
    int number = 0;
    for (int64_t i = std::min(n, first + kTernaryTableWeights); i-- > first;) {
      number = 3 * number + codes[i] - 1;
    }
    const int magnitude = number < 0 ? -number : number;
    chunk[r] |= static_cast<uint8_t>((number < 0) << t);
    chunk[(1 + t / 2) * kTileRows + r] |= static_cast<uint8_t>(magnitude << 4 * (t % 2));
  }
}

void unpack_ternary(const uint8_t* chunk, int64_t n, int64_t r, uint8_t* codes) {
  for (int64_t t = 0; t * kTernaryTableWeights < n; ++t) {
    const int64_t first = t * kTernaryTableWeights;
    const int magnitude = chunk[(1 + t / 2) * kTileRows + r] >> 4 * (t % 2) & 15;
    // t0 + 3 t1 + 9 t2 + 13 has the codes as its digits.
    int number = 13 + ((chunk[r] >> t & 1) != 0 ? -magnitude : magnitude) + 27;
    for (int64_t i = first; i < std::min(n, first + kTernaryTableWeights); ++i) {
      codes[i] = static_cast<uint8_t>(number % 3);
      number /= 3;
    }
  }
}

}  // namespace tmac
