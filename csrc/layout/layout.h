#pragma once

#include <cstdint>

#include "core/aligned.h"
#include "layout/ternary.h"

namespace tmac {

// The packed layouts (docs/lut-format.md). A matrix [m, k] is cut into tiles of 32 rows; a tile is
// one contiguous stream, in the order in which the kernels read it: for each group of k the codes
// of all its rows in chunks, their scales, and their offsets or zero points.
//
// "planes421-m32": chunks of 8 weights. The bit planes of a chunk are taken in sets of 4, then 2,
// then 1, lowest first. In a set of w planes, byte r * w + p holds plane p of row r: its low nibble
// indexes the table of weights 0-3, its high nibble that of weights 4-7.
//
// "bcq-m32": the same, but every plane is a set of its own, and each group has as many scales for a
// row as there are planes: 32 of plane 0, 32 of plane 1, ...
constexpr int kTileRows = 32;
constexpr int kTableWeights = 4;  // weights behind one table lookup
constexpr int kChunkWeights = 8;  // weights behind one byte of codes
constexpr int kMaxBits = 8;
constexpr int kMaxBcqBits = 4;

enum class Encoding : uint8_t {
  kUniform,  // codes of 1 to 8 bits as bit planes: "planes421-m32"
  kTernary,  // codes 0, 1, 2 of the weights -1, 0, 1 times a scale: "trits3-m32"
  kBcq,      // codes of 1 to 4 bits, each with a scale: w = sum +-scale + offset: "bcq-m32"
};

enum class OffsetKind : uint8_t {
  kNone,    // w = scale * (code - zero), one zero for the whole matrix
  kOffset,  // w = scale * code + offset, an offset for each row and group
  kZero,    // w = scale * (code - zero), a zero for each row and group
};

enum class ScaleKind : uint8_t {
  kStored,  // a scale for each row and group, of binary-coded weights one for each bit
  kMatrix,  // one scale for the whole matrix, which is not part of the packed bytes: ternary only
};

struct LinearSpec {
  int64_t m = 0;  // out features
  int64_t k = 0;  // in features
  int bits = 0;   // 1 to 8; ternary: 2; binary-coded: 1 to 4
  Encoding encoding = Encoding::kUniform;
  int64_t group_size = 0;  // weights along k that share a scale: a multiple of 4, or k
  ScaleKind scale_kind = ScaleKind::kStored;
  float scale = 0;  // for kMatrix
  OffsetKind offset_kind = OffsetKind::kNone;
  float zero = 0;  // for kNone; ternary: 1

  int64_t n_groups() const { return ceil_div(k, group_size); }
  int64_t n_tiles() const { return ceil_div(m, kTileRows); }
  bool ternary() const { return encoding == Encoding::kTernary; }
  bool bcq() const { return encoding == Encoding::kBcq; }
  int64_t chunk_weights() const { return ternary() ? kTernaryChunkWeights : kChunkWeights; }
  int64_t group_chunks() const { return ceil_div(group_size, chunk_weights()); }
  // Weights and chunks of group g: the last group may be ragged.
  int64_t weights_in(int64_t g) const {
    const int64_t rest = k - g * group_size;
    return rest < group_size ? rest : group_size;
  }
  int64_t chunks_in(int64_t g) const { return ceil_div(weights_in(g), chunk_weights()); }
  int64_t n_chunks() const { return (n_groups() - 1) * group_chunks() + chunks_in(n_groups() - 1); }
  // Bytes of a chunk that holds n weights.
  int64_t chunk_bytes(int64_t n) const {
    return kTileRows * (ternary() ? ternary_chunk_row_bytes(n) : bits);
  }
  // Kernels must leave no copy of this or of tile_bytes to the linker: it would be for one CPU.
  __attribute__((always_inline)) int64_t code_bytes(int64_t g) const {
    const int64_t before = chunks_in(g) - 1, last = weights_in(g) - before * chunk_weights();
    return before * chunk_bytes(chunk_weights()) + chunk_bytes(last);
  }
  // Scales stored for each row and group.
  int64_t n_scales() const {
    return scale_kind == ScaleKind::kMatrix ? 0 : encoding == Encoding::kBcq ? bits : 1;
  }
  int64_t n_constants() const { return n_scales() + (offset_kind == OffsetKind::kNone ? 0 : 1); }
  int64_t scale_bytes() const { return 2 * kTileRows * n_constants(); }
  __attribute__((always_inline)) int64_t tile_bytes() const {
    const int64_t last = n_groups() - 1;
    return round_up(last * code_bytes(0) + code_bytes(last) + n_groups() * scale_bytes(),
                    kAlignment);
  }
  // Kernels read whole chunks: zeros stand in for the scales behind the last one.
  int64_t packed_bytes() const {
    return n_tiles() * tile_bytes() + (scale_kind == ScaleKind::kMatrix ? kAlignment : 0);
  }
  // True if chunks follow each other along k without padding, whatever the group size: then every
  // matrix of this encoding over the same activations can read the same tables.
  bool contiguous_chunks() const { return group_size % chunk_weights() == 0 || n_groups() == 1; }
};

// Throws std::invalid_argument naming the first field that is out of range.
void check_spec(const LinearSpec& spec);

// A packed matrix that somebody else owns and keeps alive.
struct Linear {
  LinearSpec spec;
  const uint8_t* packed = nullptr;  // [spec.packed_bytes()]
  // [spec.k] a permutation, or null: column j of the codes multiplies activation order[j]. So
  // columns of equal scale stand together, however the matrix was quantised (GPTQ's act-order).
  const int32_t* order = nullptr;
};

// Throws std::invalid_argument unless `order` holds each of 0 .. k - 1 once.
void check_order(const int32_t* order, int64_t k);

// Width of the set of planes that starts at plane `first`, of `bits` planes.
constexpr int plane_set_width(int bits, int first) {
  return bits - first >= 4 ? 4 : bits - first >= 2 ? 2 : 1;
}

// codes [m, k], scales [m, n_groups, n_scales] and offsets [m, n_groups] as binary16 bits -> packed
// [packed_bytes].
// scales is null for ScaleKind::kMatrix, offsets for OffsetKind::kNone.
void pack(const LinearSpec& spec, const uint8_t* codes, const uint16_t* scales,
          const uint16_t* offsets, uint8_t* packed);
void unpack(const LinearSpec& spec, const uint8_t* packed, uint8_t* codes, uint16_t* scales,
            uint16_t* offsets);

// One row of the matrix in float32: out [k].
void dequantize_row(const LinearSpec& spec, const uint8_t* packed, int64_t row, float* out);

}  // namespace tmac
