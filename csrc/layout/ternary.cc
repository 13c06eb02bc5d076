#include "layout/ternary.h"

#include <algorithm>
#include <cstring>

#include "layout/layout.h"

namespace tmac {
namespace {

constexpr int64_t kPairWeights = 2 * kTernaryTableWeights;  // behind a byte of magnitudes

constexpr uint64_t kOnes = 0x0101010101010101;

// The numbers t0 + 3 t1 + 9 t2 + 13 of the two tables whose codes are the lowest six bytes, as the
// lowest two bytes.
uint64_t two_numbers(uint64_t six) {
  // Byte j of the product is code j - 2 + 3 code j - 1 + 9 code j.
  const uint64_t sums = six * 0x010309;
  return (sums >> 16 & 0xff) | (sums >> 32 & 0xff00);
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
  const uint64_t numbers = two_numbers(load_eight(codes)) |
                           two_numbers(load_eight(codes + kPairWeights)) << 16 |
                           two_numbers(load_eight(codes + 2 * kPairWeights)) << 32 |
                           two_numbers(load_eight(codes + kTernaryChunkWeights - 8) >> 16) << 48;
  // Each byte less 13, plus 128: below 128 are the negative numbers, to be subtracted from 128.
  const uint64_t shifted = numbers + kOnes * (128 - 13);
  const uint64_t negative = ~shifted >> 7 & kOnes;
  const uint64_t magnitudes = ((shifted ^ negative * 0xff) + negative) & kOnes * 0x7f;
  const uint64_t nibbles = magnitudes | magnitudes >> 4;
  // The product moves bit 0 of byte i to bit 56 + i; no two bits meet below.
  chunk[r] = static_cast<uint8_t>(negative * 0x0102040810204080 >> 56);
  for (int i = 0; i * kPairWeights < n; ++i) {
    chunk[(1 + i) * kTileRows + r] = static_cast<uint8_t>(nibbles >> 16 * i);
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
