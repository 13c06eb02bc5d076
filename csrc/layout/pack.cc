#include "layout/pack.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace tmac {
namespace {

// Chunks of a row, of one or more groups, that are packed before those of the next row: their codes
// are whole cache lines, and the chunks of all rows stay in the cache.
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
  const int64_t whole = n / kChunkWeights;
  uint64_t planes[kBlockChunks];
  for (int64_t i = 0; i < whole; ++i) {
    uint64_t eight;
    std::memcpy(&eight, codes + i * kChunkWeights, kChunkWeights);
    planes[i] = planes_of(eight);
  }
  for (int64_t i = 0; i < whole; ++i, chunk += kTileRows * kBits) {
    store_planes<kBits, kBcq>(planes[i], r, chunk);
  }
  if (n % kChunkWeights != 0) {
    uint64_t rest = 0;
    std::memcpy(&rest, codes + whole * kChunkWeights, static_cast<size_t>(n % kChunkWeights));
    store_planes<kBits, kBcq>(planes_of(rest), r, chunk);
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

// At most kBlockChunks chunks of one group: the codes of columns k0 .. k0 + n of a row stand from
// byte `at` of a tile on.
struct Piece {
  int64_t k0, n, at;
  int64_t group;  // that ends here, or -1
  int64_t constants_at;
};

std::vector<Piece> pieces_of_tile(const LinearSpec& spec) {
  const int64_t weights = spec.chunk_weights(), most = kBlockChunks * weights;
  std::vector<Piece> pieces;
  int64_t at = 0;
  for (int64_t g = 0; g < spec.n_groups(); ++g) {
    const int64_t end = g * spec.group_size + spec.weights_in(g);
    for (int64_t k0 = g * spec.group_size; k0 < end; k0 += most) {
      const int64_t n = std::min(most, end - k0);
      pieces.push_back({k0, n, at, -1, 0});
      for (int64_t j = 0; j < n; j += weights) at += spec.chunk_bytes(std::min(weights, n - j));
    }
    pieces.back().group = g;
    pieces.back().constants_at = at;
    at += spec.scale_bytes();
  }
  return pieces;
}

// The first piece behind the block that begins with `piece`.
const Piece* block_end(const LinearSpec& spec, const Piece* piece, const Piece* end) {
  const int64_t most = kBlockChunks * spec.chunk_weights(), first = piece->k0;
  do {
    ++piece;
  } while (piece != end && piece->k0 + piece->n - first <= most);
  return piece;
}

}  // namespace

void pack_tiles(const LinearSpec& spec, const uint8_t* codes, const uint16_t* scales,
                const uint16_t* offsets, uint8_t* tiles) {
  const PackRow pack_codes = pack_row(spec);
  const std::vector<Piece> pieces = pieces_of_tile(spec);
  const Piece* const last = pieces.data() + pieces.size();
  const int64_t n_groups = spec.n_groups(), n_scales = spec.n_scales();
  for (int64_t t = 0; t < spec.n_tiles(); ++t) {
    const int64_t row0 = t * kTileRows;
    const int64_t rows = std::min<int64_t>(kTileRows, spec.m - row0);
    uint8_t* const tile = tiles + t * spec.tile_bytes();
    std::memset(tile, 0, static_cast<size_t>(spec.tile_bytes()));
    for (const Piece *block = pieces.data(), *end; block != last; block = end) {
      end = block_end(spec, block, last);
      for (int64_t r = 0; r < rows; ++r) {
        const uint8_t* const row = codes + (row0 + r) * spec.k;
        for (const Piece* piece = block; piece != end; ++piece) {
          pack_codes(row + piece->k0, piece->n, r, tile + piece->at);
          if (piece->group < 0) continue;
          const int64_t i = (row0 + r) * n_groups + piece->group;
          uint8_t* const constants = tile + piece->constants_at + 2 * r;
          for (int64_t p = 0; p < n_scales; ++p) {
            std::memcpy(constants + p * kTileConstantBytes, scales + i * n_scales + p, 2);
          }
          if (spec.offset_kind != OffsetKind::kNone) {
            std::memcpy(constants + n_scales * kTileConstantBytes, offsets + i, 2);
          }
        }
      }
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
