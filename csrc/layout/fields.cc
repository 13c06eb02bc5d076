#include "layout/fields.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace tmac {
namespace {

constexpr int64_t kWordBytes = 4, kWordBits = 32;

// Words of neighbouring rows may share a cache line: rows that are read together.
constexpr int64_t kRows = 16;

// Words of a row that are read at once.
constexpr int64_t kRowWords = 16;

// 64 bits in which runs of `width` bits are set, `distance` * 2 apart.
constexpr uint64_t runs_of_ones(int width, int distance) {
  uint64_t mask = 0;
  for (int at = 0; at < 64; at += 2 * distance) mask |= ((uint64_t{1} << width) - 1) << at;
  return mask;
}

// Halves x in the runs of kFields * 2 fields that begin 16 * kFields bits apart.
template <int kBits, int kFields>
uint64_t halve(uint64_t x) {
  constexpr int kWidth = kFields * kBits, kDistance = kFields * 8;
  constexpr uint64_t kLow = runs_of_ones(kWidth, kDistance);
  return (x & kLow) | (x & kLow << kWidth) << (kDistance - kWidth);
}

// The eight lowest fields of x, a byte each.
template <int kBits>
uint64_t spread(uint64_t x) {
  return kBits == 8 ? x : halve<kBits, 1>(halve<kBits, 2>(halve<kBits, 4>(x)));
}

// The first n fields of a stream behind which 8 bytes can be read.
template <int kBits>
void unpack_stream(const uint8_t* stream, int64_t n, uint8_t* fields) {
  const auto eight = [stream](int64_t i) {
    uint64_t x;
    std::memcpy(&x, stream + i * kBits, 8);
    return spread<kBits>(x);
  };
  for (int64_t i = 0; i < n / 8; ++i) {
    const uint64_t x = eight(i);
    std::memcpy(fields + 8 * i, &x, 8);
  }
  if (n % 8 != 0) {
    const uint64_t x = eight(n / 8);
    std::memcpy(fields + n / 8 * 8, &x, static_cast<size_t>(n % 8));
  }
}

using UnpackStream = void (*)(const uint8_t*, int64_t, uint8_t*);
constexpr UnpackStream kUnpackStream[] = {nullptr,          unpack_stream<1>, unpack_stream<2>,
                                          unpack_stream<3>, unpack_stream<4>, unpack_stream<5>,
                                          unpack_stream<6>, unpack_stream<7>, unpack_stream<8>};

// At most kRows rows: fields [rows, count].
void unpack_few_streams(const Words& words, int bits, int64_t count, uint8_t* fields) {
  // Whole words that begin with a field.
  const int64_t step = kRowWords / bits * bits;
  uint8_t tile[kRows][kRowWords * kWordBytes + 8] = {};
  for (int64_t w0 = 0; w0 < words.columns; w0 += step) {
    const int64_t first = w0 * kWordBits / bits;
    if (first >= count) return;
    const int64_t n = std::min(step, words.columns - w0);
    const uint8_t* column = words.data + w0 * words.column_stride;
    for (int64_t j = 0; j < n; ++j, column += words.column_stride) {
      for (int64_t r = 0; r < words.rows; ++r) {
        std::memcpy(tile[r] + j * kWordBytes, column + r * words.row_stride, kWordBytes);
      }
    }
    const int64_t fields_here = std::min(count - first, step * kWordBits / bits);
    for (int64_t r = 0; r < words.rows; ++r) {
      kUnpackStream[bits](tile[r], fields_here, fields + r * count + first);
    }
  }
}

}  // namespace

void unpack_streams(const Words& words, int bits, int64_t count, const int32_t* order,
                    uint8_t* fields) {
  std::vector<uint8_t> unordered(order == nullptr ? 0 : static_cast<size_t>(kRows * count));
  for (int64_t r0 = 0; r0 < words.rows; r0 += kRows) {
    Words few = words;
    few.data += r0 * words.row_stride;
    few.rows = std::min(kRows, words.rows - r0);
    uint8_t* const out = fields + r0 * count;
    if (order == nullptr) {
      unpack_few_streams(few, bits, count, out);
      continue;
    }
    unpack_few_streams(few, bits, count, unordered.data());
    for (int64_t r = 0; r < few.rows; ++r) {
      const uint8_t* const from = unordered.data() + r * count;
      uint8_t* const to = out + r * count;
      for (int64_t j = 0; j < count; ++j) to[j] = from[order[j]];
    }
  }
}

void unpack_nibble_rows(const Words& words, const int32_t (&which)[8], uint8_t* nibbles) {
  constexpr int64_t kTileRows = 64;  // a cache line of nibbles
  uint32_t tile[kRowWords][kTileRows];
  for (int64_t r0 = 0; r0 < words.rows; r0 += kTileRows) {
    const int64_t rows = std::min(kTileRows, words.rows - r0);
    for (int64_t c0 = 0; c0 < words.columns; c0 += kRowWords) {
      const int64_t columns = std::min(kRowWords, words.columns - c0);
      for (int64_t r = 0; r < rows; ++r) {
        const uint8_t* word = words.data + (r0 + r) * words.row_stride + c0 * words.column_stride;
        for (int64_t c = 0; c < columns; ++c, word += words.column_stride) {
          std::memcpy(&tile[c][r], word, kWordBytes);
        }
      }
      for (int64_t c = 0; c < columns; ++c) {
        for (int64_t i = 0; i < 8; ++i) {
          uint8_t* const out = nibbles + (8 * (c0 + c) + i) * words.rows + r0;
          const int shift = 4 * which[i];
          for (int64_t r = 0; r < rows; ++r) {
            out[r] = static_cast<uint8_t>(tile[c][r] >> shift & 15);
          }
        }
      }
    }
  }
}

void unpack_runs(const uint8_t* bytes, int64_t rows, int64_t columns, int64_t stride, int64_t run,
                 int bits, uint8_t* fields) {
  const uint64_t mask = runs_of_ones(bits, 4);
  for (int64_t r = 0; r < rows; ++r, bytes += stride) {
    for (int64_t at = 0; at < columns; at += run) {
      for (int shift = 0; shift < 8; shift += bits, fields += run) {
        int64_t i = 0;
        for (; i + 8 <= run; i += 8) {
          uint64_t x;
          std::memcpy(&x, bytes + at + i, 8);
          x = x >> shift & mask;
          std::memcpy(fields + i, &x, 8);
        }
        for (; i < run; ++i) {
          fields[i] = static_cast<uint8_t>(bytes[at + i] >> shift & static_cast<int>(mask & 0xff));
        }
      }
    }
  }
}

}  // namespace tmac
