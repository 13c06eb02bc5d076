#include "layout/pack.h"

#include <algorithm>
#include <cstring>

namespace tmac {
namespace {

// Chunks of a row that are packed before those of the next row.
constexpr int64_t kBlockChunks = 16;

// Exchanges the bits of x in `mask` with those `distance` above them.
uint64_t exchange(uint64_t x, uint64_t mask, int distance) {
  const uint64_t differ = (x ^ x >> distance) & mask;
  return x ^ differ ^ differ << distance;
}

// The bit planes of eight codes: bit i of byte p is bit p of byte i (Warren, Hacker's Delight,
// section 7-3: 2 x 2 blocks of 1, 2 and 4 bits are transposed).
uint64_t planes_of(uint64_t eight) {
  eight = exchange(eight, 0x00aa00aa00aa00aa, 7);
  eight = exchange(eight, 0x0000cccc0000cccc, 14);
  return exchange(eight, 0x00000000f0f0f0f0, 28);
}

// Writes plane kFirst and those above to the bytes of row r in a chunk, set by set.
template <int kBits, bool kBcq, int kFirst = 0>
void store_planes(uint64_t planes, int64_t r, uint8_t* chunk) {
  if constexpr (kFirst < kBits) {
    constexpr int kWidth = kBcq ? 1 : plane_set_width(kBits, kFirst);
    const uint64_t set = planes >> 8 * kFirst;
    std::memcpy(chunk + kTileRows * kFirst + r * kWidth, &set, kWidth);
    store_planes<kBits, kBcq, kFirst + kWidth>(planes, r, chunk);
  }
}

// Packs at most kBlockChunks chunks of row r of a tile, n codes, to chunks from `chunk` on.
template <int kBits, bool kBcq>
void pack_planes(const uint8_t* codes, int64_t n, int64_t r, uint8_t* chunk) {
  const int64_t chunks = ceil_div(n, kChunkWeights);
  uint64_t planes[kBlockChunks];
  planes[chunks - 1] = 0;  // the last one may be ragged
  std::memcpy(planes, codes, static_cast<size_t>(n));
  for (int64_t i = 0; i < chunks; ++i) planes[i] = planes_of(planes[i]);
  for (int64_t i = 0; i < chunks; ++i, chunk += kTileRows * kBits) {
    store_planes<kBits, kBcq>(planes[i], r, chunk);
  }
}

void pack_trits(const uint8_t* codes, int64_t n, int64_t r, uint8_t* chunk) {
  for (; n > 0; n -= kTernaryChunkWeights, codes += kTernaryChunkWeights) {
    const int64_t here = std::min<int64_t>(n, kTernaryChunkWeights);
    pack_ternary(codes, here, r, chunk);
    chunk += kTileRows * ternary_chunk_row_bytes(here);
  }
}

using PackRow = void (*)(const uint8_t*, int64_t, int64_t, uint8_t*);

PackRow pack_row(const LinearSpec& spec) {
  constexpr PackRow kUniform[] = {
      pack_planes<1, false>, pack_planes<2, false>, pack_planes<3, false>, pack_planes<4, false>,
      pack_planes<5, false>, pack_planes<6, false>, pack_planes<7, false>, pack_planes<8, false>};
  constexpr PackRow kBcq[] = {pack_planes<1, true>, pack_planes<2, true>, pack_planes<3, true>,
                              pack_planes<4, true>};
  if (spec.ternary()) return pack_trits;
  return spec.bcq() ? kBcq[spec.bits - 1] : kUniform[spec.bits - 1];
}

}  // namespace

void pack_tiles(const LinearSpec& spec, const uint8_t* codes, const uint16_t* scales,
                const uint16_t* offsets, uint8_t* tiles) {
  const PackRow pack_codes = pack_row(spec);
  const int64_t n_groups = spec.n_groups(), n_scales = spec.n_scales();
  const int64_t weights = spec.chunk_weights();
  for (int64_t t = 0; t < spec.n_tiles(); ++t) {
    const int64_t row0 = t * kTileRows;
    const int64_t rows = std::min<int64_t>(kTileRows, spec.m - row0);
    uint8_t* at = tiles + t * spec.tile_bytes();
    std::memset(at, 0, static_cast<size_t>(spec.tile_bytes()));
    for (int64_t g = 0; g < n_groups; ++g) {
      const int64_t end = std::min(spec.k, (g + 1) * spec.group_size);
      // Row by row in blocks, whose codes are whole cache lines and whose chunks stay in the cache.
      for (int64_t k0 = g * spec.group_size; k0 < end;) {
        const int64_t block_end = std::min(end, k0 + kBlockChunks * weights);
        for (int64_t r = 0; r < rows; ++r) {
          pack_codes(codes + (row0 + r) * spec.k + k0, block_end - k0, r, at);
        }
        for (; k0 < block_end; k0 += weights) {
          at += spec.chunk_bytes(std::min(weights, block_end - k0));
        }
      }
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t i = (row0 + r) * n_groups + g;
        uint8_t* const constants = at + 2 * r;
        for (int64_t p = 0; p < n_scales; ++p) {
          std::memcpy(constants + p * kTileConstantBytes, scales + i * n_scales + p, 2);
        }
        if (spec.offset_kind != OffsetKind::kNone) {
          std::memcpy(constants + n_scales * kTileConstantBytes, offsets + i, 2);
        }
      }
      at += spec.scale_bytes();
    }
  }
}

void pack(const LinearSpec& spec, const uint8_t* codes, const uint16_t* scales,
          const uint16_t* offsets, uint8_t* packed) {
  pack_tiles(spec, codes, scales, offsets, packed);
  const int64_t filled = spec.n_tiles() * spec.tile_bytes();
  std::memset(packed + filled, 0, static_cast<size_t>(spec.packed_bytes() - filled));
}

}  // namespace tmac
