#pragma once

#include <cstdint>

#include "layout/layout.h"

namespace tmac {

// Weights that share one table scale: 2 chunks, 4 tables. Half as many weights would cost the
// kernels a third of their speed, twice as many half again the error (docs/kernels.md).
constexpr int kBlockWeights = 16;
constexpr int kBlockChunks = kBlockWeights / kChunkWeights;
constexpr int kBlockTables = kBlockWeights / kTableWeights;
// Weights whose tables are built in one go: as many as a tile has rows, so that the tile that one
// product ends with is the input that the next one's tables begin with.
constexpr int kSpanWeights = kTileRows;
constexpr int kSpanChunks = kSpanWeights / kChunkWeights;
constexpr int kSpanTables = kSpanWeights / kTableWeights;
constexpr int kSpanBlocks = kSpanWeights / kBlockWeights;
constexpr int kTableEntries = 16;

enum class Tables : uint8_t {
  // int8 entries: round(signed sum / scale), |entry| <= 127.
  kInt8,
  // Activations rounded to 14 bits (|x| <= 8128), their signed sums kept exactly in two int8
  // tables,
  // low then high: sum = 255 * high + low. Base 255 makes both symmetric: |sum| <= 4 * 8128 = 32512
  // = 255 * 127 + 127.
  kExact,
};

constexpr int kExactMax = 8128;
constexpr int kExactBase = 255;

constexpr int64_t table_bytes(Tables tables) {
  return tables == Tables::kInt8 ? kTableEntries : 2 * kTableEntries;
}

// The lookup tables of one activation vector x [k], in chunk order; k is padded with zeros to whole
// spans. Entry e of table t is sum_i (bit i of e ? x : -x)[4 t + i], in units of its block's scale.
struct LutView {
  int8_t* entries;    // [n_spans * 8, table_bytes]
  float* half_scale;  // [n_spans * 2] half of the entries' unit: u = (2^b-1)/2 + sum 2^(p-1) beta_p
  float* chunk_sum;   // [n_spans * 4] sum of x over a chunk
  float* block_sum;   // [n_spans * 2] sum of x over a block

  LutView from_span(int64_t span, Tables tables) const {
    return {entries + span * kSpanTables * table_bytes(tables), half_scale + span * kSpanBlocks,
            chunk_sum + span * kSpanChunks, block_sum + span * kSpanBlocks};
  }
};

}  // namespace tmac
