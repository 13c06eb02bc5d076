#pragma once

#include <cstdint>

namespace tmac {

// The codes of the packed layout "trits3-m32" (docs/lut-format.md): weights of -1, 0 and 1, stored
// as codes 0, 1 and 2. Three weights t0 t1 t2 are the number t0 + 3 t1 + 9 t2, |.| <= 13: a nibble
// with its magnitude, which indexes a table, and a bit with its sign.
//
// A chunk is 24 weights: 32 bytes with the signs of row 0, row 1, ... (bit t: table t), then up to
// 4 x 32 bytes of magnitudes, row by row: table 2i in the low and 2i + 1 in the high nibble.
constexpr int kTernaryTableWeights = 3;
constexpr int kTernaryChunkTables = 8;
constexpr int kTernaryChunkWeights = kTernaryChunkTables * kTernaryTableWeights;

// Bytes that a row takes in a chunk of n weights. The last chunk of a group may lack magnitudes,
// but at most 64 bytes of a tile: kernels read them from what follows.
constexpr int64_t ternary_chunk_row_bytes(int64_t n) {
  const int64_t pairs = (n + 2 * kTernaryTableWeights - 1) / (2 * kTernaryTableWeights);
  return 1 + (pairs > 2 ? pairs : 2);
}

// The n <= 24 codes of row r of a tile, to and from a chunk (whose bytes are zero before packing).
void pack_ternary(const uint8_t* codes, int64_t n, int64_t r, uint8_t* chunk);
void unpack_ternary(const uint8_t* chunk, int64_t n, int64_t r, uint8_t* codes);

}  // namespace tmac
