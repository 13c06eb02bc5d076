#pragma once

#include <cstdint>

#include "layout/lut.h"

namespace tmac {

// Activations of many tokens as integers, for the product with unpacked codes. Tokens are dealt out
// to blocks of nearly equal, even size, whose integers the kernels read side by side.
constexpr int kBlockTokens = 12;
constexpr int kTokenLanes = 16;  // room for the numbers of a block's tokens: whole vectors
constexpr int kTilesAtOnce = 2;  // that read the same integers from the first-level cache
constexpr int kLoudShift = 7;    // the two parts of a loud quad: q = 2^7 * high + low
constexpr int kLoudBase = 1 << kLoudShift;
constexpr int kQuadWeights = 4;  // that one dot product takes
constexpr int kQuadCodes = kTileRows * kQuadWeights;
// Regions that are built together, 2 i and 2 i + 1 of a reader's.
constexpr int kRowRegions = 2;
constexpr int kRowRegionsWeights = kRowRegions * kRegionWeights;
constexpr int kMostQuads = kRowRegionsWeights / kQuadWeights;  // that products add up at once

// True if integers of that kind can be multiplied with the matrix's codes. Planes with scales of
// their own are no codes. Ternary weights are taken as codes of 2 bits, in regions as for these and
// not as for ternary tables: with kExact, whose units follow the region, the bits would differ.
inline bool serves_rows(const LinearSpec& spec, Tables tables) {
  if (spec.encoding == Encoding::kBcq) return false;
  if (!spec.ternary()) return true;
  return tables != Tables::kExact &&
         (spec.n_groups() == 1 || spec.group_size % kRegionWeights == 0);
}

// True if no group of the matrix, which they serve, but the last ends between two regions that are
// built together or within one of them. Where this is so of all readers, such regions, if they are
// whole, share their unit and their loud quads with Tables::kInt8: products convert the sum of both
// to floats at once.
inline bool can_share_units(const LinearSpec& spec) {
  return spec.n_groups() == 1 || spec.group_size % kRowRegionsWeights == 0;
}

// True if a group of the matrix, which they serve, ends within a region.
inline bool cuts_regions(const LinearSpec& spec) {
  if (spec.ternary()) return spec.k % kRegionWeights != 0;
  return spec.n_chunks() % kRegionChunks != 0 ||
         (spec.n_groups() > 1 && spec.group_chunks() % kRegionChunks != 0);
}

// One region of one block; the integers, int8 [parts][12][64], follow it. They have 8 bits, |q| <=
// 127, or two parts, q = 255 * high + low with |q| <= 32512 (Tables::kExact, the integers of
// layout/lut.h). With Tables::kInt8 the 4 integers with the largest activation, the loud quad, have
// two parts, |q| <= 8128: outliers would cost the others of their region most of their bits. Two
// regions that share their unit have two loud quads wherever they lie.
struct RowRegion {
  alignas(64) float unit[kTokenLanes];  // of the sums of products; NaN if an x is not finite
  alignas(64) int32_t sum[kTokenLanes];
  alignas(64) uint32_t loud_at[kTokenLanes];  // where a loud quad's codes begin, from the first
                                              // region with that unit on
  alignas(64) uint32_t loud[kTokenLanes];     // its high parts, 4 bytes
};

// Sums of the chunks of a region, where groups of a reader end within regions.
struct RowChunks {
  alignas(64) int32_t sum[kRegionChunks][kTokenLanes];
};

// Where a token's numbers stand: in one lane of a block.
struct RowPlace {
  int64_t block;
  int lane;
};

// How n tokens are dealt out.
struct RowBlocks {
  int64_t n_tokens;

  // Half the number of tokens, the last of which may be missing.
  int64_t n_pairs() const { return ceil_div(n_tokens, 2); }
  int64_t n_blocks() const { return ceil_div(n_tokens, kBlockTokens); }
  int64_t first_token(int64_t block) const { return 2 * (n_pairs() * block / n_blocks()); }
  // With the missing one.
  int tokens(int64_t block) const {
    return static_cast<int>(first_token(block + 1) - first_token(block));
  }
  RowPlace place(int64_t token) const {
    const int64_t block = ((token / 2 + 1) * n_blocks() - 1) / n_pairs();
    return {block, static_cast<int>(token - first_token(block))};
  }
};

// The integers that one matrix reads.
struct RowView {
  uint8_t* regions;   // [blocks][stride regions][region_bytes(parts)]
  RowChunks* chunks;  // [blocks][stride regions]
  float* token_unit;  // [blocks][16] factor of the token's product
  int64_t stride;     // regions of a block
  int parts;
  bool shares_units;
  RowBlocks blocks;

  static constexpr int64_t region_bytes(int parts) {
    return static_cast<int64_t>(sizeof(RowRegion)) + parts * kBlockTokens * kRegionWeights;
  }
  RowRegion& region(int64_t block, int64_t region) const {
    return *reinterpret_cast<RowRegion*>(regions + (block * stride + region) * region_bytes(parts));
  }
  int8_t* integers_at(int64_t block, int64_t at) const {
    return reinterpret_cast<int8_t*>(&region(block, at) + 1);
  }
  RowChunks& chunks_of(int64_t block, int64_t region) const {
    return chunks[block * stride + region];
  }
};

// Scratch memory of one product: sums of rows and of groups for each token.
struct RowSums {
  float* product;  // [blocks][2][12][32]
  float* group;    // [blocks][2][12][32]
  float* x_sum;    // [blocks][16]

  static constexpr int64_t kBlockFloats = kTilesAtOnce * kBlockTokens * kTileRows;
  static constexpr int64_t size(int64_t n_blocks) {
    return n_blocks * (2 * kBlockFloats + kTokenLanes);
  }
  RowSums(float* memory, int64_t n_blocks)
      : product(memory),
        group(product + n_blocks * kBlockFloats),
        x_sum(group + n_blocks * kBlockFloats) {}
};

}  // namespace tmac
