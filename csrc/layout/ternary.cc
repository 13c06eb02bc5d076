#include "layout/ternary.h"

#include <algorithm>
#include <cstring>

#include "layout/layout.h"

namespace tmac {
namespace {

constexpr int64_t kPairWeights = 2 * kTernaryTableWeights;  // behind a byte of magnitudes

// The magnitudes of the two tables that begin at the lowest of six codes; their signs go to bits 0
// and 1 of `signs`.
uint8_t pack_pair(uint64_t six, int* signs) {
  // Byte j of the product is code j - 2 + 3 code j - 1 + 9 code j.
  const uint64_t sums = six * 0x010309;
  const int low = static_cast<int>(sums >> 16 & 0xff) - 13;
  const int high = static_cast<int>(sums >> 40 & 0xff) - 13;
  *signs = (low < 0) | (high < 0) << 1;
  return static_cast<uint8_t>((low < 0 ? -low : low) | (high < 0 ? -high : high) << 4);
}

uint64_t load_eight(const uint8_t* codes) {
  uint64_t eight;
  std::memcpy(&eight, codes, 8);
  return eight;
}

}  // namespace

void pack_ternary(const uint8_t* codes, int64_t n, int64_t r, uint8_t* chunk) {
  uint8_t padded[kTernaryChunkWeights];
  if (n < kTernaryChunkWeights) {
    std::memset(padded, 1, sizeof(padded));  // weights of 0
    std::memcpy(padded, codes, static_cast<size_t>(n));
    codes = padded;
  }
  // Eight codes from the fourth six on would reach behind the chunk.
  const uint64_t sixes[] = {load_eight(codes), load_eight(codes + kPairWeights),
                            load_eight(codes + 2 * kPairWeights),
                            load_eight(codes + kTernaryChunkWeights - 8) >> 16};
  int signs = 0;
  for (int i = 0; i * kPairWeights < n; ++i) {
    int two;
    chunk[(1 + i) * kTileRows + r] = pack_pair(sixes[i], &two);
    signs |= two << 2 * i;
  }
  chunk[r] = static_cast<uint8_t>(signs);
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
