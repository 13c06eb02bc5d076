#include "layout/layout.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "core/check.h"
#include "core/half.h"
#include "layout/pack.h"

namespace tmac {
namespace {

// Calls visit(row_in_tile, k_begin, k_end, codes_at, group) for the chunks of one tile in stream
// order, and group_end(group, scales_at) where a group's scales stand.
template <typename Chunk, typename GroupEnd>
void walk_tile(const LinearSpec& spec, int64_t tile_at, const Chunk& chunk,
               const GroupEnd& group_end) {
  int64_t at = tile_at;
  for (int64_t g = 0; g < spec.n_groups(); ++g) {
    const int64_t group_end_k = std::min(spec.k, (g + 1) * spec.group_size);
    for (int64_t c = 0; c < spec.chunks_in(g); ++c) {
      const int64_t k0 = g * spec.group_size + c * spec.chunk_weights();
      const int64_t n = std::min(spec.chunk_weights(), group_end_k - k0);
      chunk(k0, n, at);
      at += spec.chunk_bytes(n);
    }
    group_end(g, at);
    at += spec.scale_bytes();
  }
}

// Where the byte of row r (of the tile) and bit plane p stands in a chunk.
int64_t plane_byte(const LinearSpec& spec, int64_t r, int p) {
  if (spec.bcq()) return kTileRows * p + r;
  int first = 0;
  int width = plane_set_width(spec.bits, 0);
  while (p >= first + width) {
    first += width;
    width = plane_set_width(spec.bits, first);
  }
  return kTileRows * first + r * width + (p - first);
}

void unpack_planes(const LinearSpec& spec, const uint8_t* chunk, int64_t n, int64_t r,
                   uint8_t* codes) {
  std::memset(codes, 0, static_cast<size_t>(n));
  for (int p = 0; p < spec.bits; ++p) {
    const uint8_t byte = chunk[plane_byte(spec, r, p)];
    for (int64_t i = 0; i < n; ++i) codes[i] |= static_cast<uint8_t>(((byte >> i) & 1) << p);
  }
}

void unpack_chunk(const LinearSpec& spec, const uint8_t* chunk, int64_t n, int64_t r,
                  uint8_t* codes) {
  if (spec.ternary()) {
    unpack_ternary(chunk, n, r, codes);
  } else {
    unpack_planes(spec, chunk, n, r, codes);
  }
}

}  // namespace

void check_spec(const LinearSpec& spec) {
  constexpr int64_t kMaxSide = int64_t{1} << 31;
  constexpr int64_t kMaxWeights = int64_t{1} << 48;  // sizes in bytes stay far below 2^63
  check_argument(spec.m >= 1 && spec.m < kMaxSide, "m must be 1 to 2^31 - 1, not ", spec.m);
  check_argument(spec.k >= 1 && spec.k < kMaxSide, "k must be 1 to 2^31 - 1, not ", spec.k);
  check_argument(spec.m <= kMaxWeights / spec.k, "a matrix [", spec.m, ", ", spec.k,
                 "] has more than 2^48 weights");
  check_argument(spec.bits >= 1 && spec.bits <= kMaxBits, "bits must be 1 to 8, not ", spec.bits);
  check_argument(spec.group_size == spec.k || (spec.group_size >= 4 && spec.group_size < kMaxSide &&
                                               spec.group_size % kTableWeights == 0),
                 "group_size must be a multiple of 4 or k (", spec.k, "), not ", spec.group_size);
  check_argument(!spec.ternary() || spec.bits == 2, "ternary codes have 2 bits, not ", spec.bits);
  check_argument(!spec.ternary() || (spec.offset_kind == OffsetKind::kNone && spec.zero == 1),
                 "ternary weights have no offsets, and their zero is 1");
  check_argument(!spec.bcq() || spec.bits <= kMaxBcqBits,
                 "binary-coded weights have 1 to 4 bits, not ", spec.bits);
  check_argument(!spec.bcq() || (spec.offset_kind == OffsetKind::kOffset && spec.zero == 0),
                 "binary-coded weights have offsets, and their zero is 0");
  check_argument(spec.scale_kind == ScaleKind::kStored ||
                     (spec.ternary() && spec.group_size == spec.k && std::isfinite(spec.scale)),
                 "a scale for the whole matrix must be finite, and the matrix ternary, its "
                 "group_size k");
}

void check_order(const int32_t* order, int64_t k) {
  std::vector<bool> seen(static_cast<size_t>(k), false);
  for (int64_t j = 0; j < k; ++j) {
    const bool fits = order[j] >= 0 && order[j] < k && !seen[static_cast<size_t>(order[j])];
    check_argument(fits, "order must hold each of 0 to ", k - 1, " once; entry ", j, " is ",
                   order[j]);
    seen[static_cast<size_t>(order[j])] = true;
  }
}

void unpack(const LinearSpec& spec, const uint8_t* packed, uint8_t* codes, uint16_t* scales,
            uint16_t* offsets) {
  const int64_t n_groups = spec.n_groups(), n_scales = spec.n_scales();
  for (int64_t t = 0; t < spec.n_tiles(); ++t) {
    const int64_t row0 = t * kTileRows;
    const int64_t rows = std::min<int64_t>(kTileRows, spec.m - row0);
    walk_tile(
        spec, t * spec.tile_bytes(),
        [&](int64_t k0, int64_t n, int64_t at) {
          for (int64_t r = 0; r < rows; ++r) {
            unpack_chunk(spec, packed + at, n, r, codes + (row0 + r) * spec.k + k0);
          }
        },
        [&](int64_t g, int64_t at) {
          for (int64_t r = 0; r < rows; ++r) {
            const int64_t i = (row0 + r) * n_groups + g;
            const uint8_t* const constants = packed + at + 2 * r;
            for (int64_t p = 0; p < n_scales; ++p) {
              std::memcpy(scales + i * n_scales + p, constants + p * kTileConstantBytes, 2);
            }
            if (spec.offset_kind != OffsetKind::kNone) {
              std::memcpy(offsets + i, constants + n_scales * kTileConstantBytes, 2);
            }
          }
        });
  }
}

void dequantize_row(const LinearSpec& spec, const uint8_t* packed, int64_t row, float* out) {
  const int64_t r = row % kTileRows;
  walk_tile(
      spec, row / kTileRows * spec.tile_bytes(),
      [&](int64_t k0, int64_t n, int64_t at) {
        uint8_t codes[kTernaryChunkWeights];
        unpack_chunk(spec, packed + at, n, r, codes);
        for (int64_t i = 0; i < n; ++i) out[k0 + i] = static_cast<float>(codes[i]);
      },
      [&](int64_t g, int64_t at) {
        const auto constant = [&](int64_t i) {
          uint16_t half;
          std::memcpy(&half, packed + at + i * kTileConstantBytes + 2 * r, 2);
          return half_to_float(half);
        };
        const int64_t begin = g * spec.group_size, end = std::min(spec.k, begin + spec.group_size);
        const float stored = spec.offset_kind == OffsetKind::kNone ? 0 : constant(spec.n_scales());
        if (spec.bcq()) {
          float levels[1 << kMaxBcqBits];
          for (int code = 0; code < 1 << spec.bits; ++code) {
            levels[code] = 0;
            for (int p = 0; p < spec.bits; ++p) {
              levels[code] += code >> p & 1 ? constant(p) : -constant(p);
            }
            levels[code] += stored;
          }
          for (int64_t j = begin; j < end; ++j) out[j] = levels[static_cast<int>(out[j])];
          return;
        }
        const float scale = spec.scale_kind == ScaleKind::kMatrix ? spec.scale : constant(0);
        const float zero = spec.offset_kind == OffsetKind::kNone   ? spec.zero
                           : spec.offset_kind == OffsetKind::kZero ? stored
                                                                   : 0;
        const float offset = spec.offset_kind == OffsetKind::kOffset ? stored : 0;
        for (int64_t j = begin; j < end; ++j) {
          out[j] = scale * (out[j] - zero) + offset;
        }
      });
}

}  // namespace tmac
