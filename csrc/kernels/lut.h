#pragma once

#include <cstdint>

#include "layout/layout.h"

namespace tmac {

// Weights that share one table scale: a block of 4 chunks, 8 tables.
constexpr int kBlockWeights = 32;
constexpr int kBlockChunks = kBlockWeights / kChunkWeights;
constexpr int kBlockTables = kBlockWeights / kTableWeights;
constexpr int kTableEntries = 16;

enum class Tables : uint8_t {
  // int8 entries: round(signed sum / scale), |entry| <= 127.
  kInt8,
  // Activations rounded to 14 bits (|x| <= 8128), their signed sums kept exactly in two int8 tables,
  // low then high: sum = 255 * high + low. Base 255 makes both symmetric: |sum| <= 4 * 8128 = 32512
  // = 255 * 127 + 127.
  kExact,
};

constexpr int kExactMax = 8128;
constexpr int kExactBase = 255;

constexpr int64_t table_bytes(Tables tables) {
  return tables == Tables::kInt8 ? kTableEntries : 2 * kTableEntries;
}

// The lookup tables of one activation vector x [k], in chunk order (k padded with zeros).
// Entry e of table t is sum_i (bit i of e ? x : -x)[4 t + i], in units of its block's scale.
struct LutView {
  int8_t* entries;    // [n_blocks * 8, table_bytes]
  float* half_scale;  // [n_blocks] half of the entries' unit: a code is (2^b-1)/2 + sum 2^(p-1) beta
  float* chunk_sum;   // [n_blocks * 4] sum of x over a chunk
  float* block_sum;   // [n_blocks] sum of x over a block
};

}  // namespace tmac
