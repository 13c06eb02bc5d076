#pragma once

#include <cstdint>

#include "core/aligned.h"

namespace tmac {

// The packed layout "planes421-m32" (docs/lut-format.md). A matrix [m, k] is cut into tiles of 32
// rows; a tile is one contiguous stream, in the order in which the kernels read it: for each group
// of k the codes of all its rows, their scales, and their offsets or zero points.
//
// Codes come in chunks of 8 weights. The bit planes of a chunk are taken in sets of 4, then 2,
// then 1, lowest first. In a set of w planes, byte r * w + p holds plane p of row r: its low nibble
// indexes the table of weights 0-3, its high nibble that of weights 4-7.
constexpr int kTileRows = 32;
constexpr int kTableWeights = 4;  // weights behind one table lookup
constexpr int kChunkWeights = 8;  // weights behind one byte of codes
constexpr int kMaxBits = 8;

enum class OffsetKind : uint8_t {
  kNone,    // w = scale * (code - zero), one zero for the whole matrix
  kOffset,  // w = scale * code + offset, an offset for each row and group
  kZero,    // w = scale * (code - zero), a zero for each row and group
};

struct LinearSpec {
  int64_t m = 0;           // out features
  int64_t k = 0;           // in features
  int bits = 0;            // 1 to 8
  int64_t group_size = 0;  // weights along k that share a scale: a multiple of 4, or k
  OffsetKind offset_kind = OffsetKind::kNone;
  float zero = 0;  // for kNone

  int64_t n_groups() const { return ceil_div(k, group_size); }
  int64_t n_tiles() const { return ceil_div(m, kTileRows); }
  int64_t group_chunks() const { return ceil_div(group_size, kChunkWeights); }
  // Chunks of group g: the last group may be ragged.
  int64_t chunks_in(int64_t g) const {
    const int64_t rest = k - g * group_size;
    return ceil_div(rest < group_size ? rest : group_size, kChunkWeights);
  }
  int64_t n_chunks() const { return (n_groups() - 1) * group_chunks() + chunks_in(n_groups() - 1); }
  int64_t chunk_bytes() const { return kTileRows * bits; }
  int64_t scale_bytes() const { return 2 * kTileRows * (offset_kind == OffsetKind::kNone ? 1 : 2); }
  int64_t tile_bytes() const {
    return round_up(n_chunks() * chunk_bytes() + n_groups() * scale_bytes(), kAlignment);
  }
  int64_t packed_bytes() const { return n_tiles() * tile_bytes(); }
  // True if chunk c holds weights 8c..8c+7 of k, whatever the group size: then every matrix over
  // the same activations can read the same tables.
  bool contiguous_chunks() const { return group_size % kChunkWeights == 0 || n_groups() == 1; }
};

// Throws std::invalid_argument naming the first field that is out of range.
void check_spec(const LinearSpec& spec);

// Width of the set of planes that starts at plane `first`, of `bits` planes.
constexpr int plane_set_width(int bits, int first) {
  return bits - first >= 4 ? 4 : bits - first >= 2 ? 2 : 1;
}

// codes [m, k], scales and offsets [m, n_groups] as binary16 bits -> packed [packed_bytes].
// offsets is null for OffsetKind::kNone.
void pack(const LinearSpec& spec, const uint8_t* codes, const uint16_t* scales,
          const uint16_t* offsets, uint8_t* packed);
void unpack(const LinearSpec& spec, const uint8_t* packed, uint8_t* codes, uint16_t* scales,
            uint16_t* offsets);

// One row of the matrix in float32: out [k].
void dequantize_row(const LinearSpec& spec, const uint8_t* packed, int64_t row, float* out);

}  // namespace tmac
