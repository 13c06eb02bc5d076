#pragma once

#include <cstdint>

namespace tmac {

// Codes of a few bits as checkpoints store them -> one byte each.

// A matrix of 32-bit words in memory; strides are in bytes.
struct Words {
  const uint8_t* data = nullptr;
  int64_t rows = 0, columns = 0;
  int64_t row_stride = 0, column_stride = 0;
};

// Each row of words is a stream of fields of `bits` (1 to 8), lowest bits first, which may cross
// words: the first `count` of each row, fields [rows, count]. Column j is field order[j] of the
// row, if there is an order (of numbers below count).
void unpack_streams(const Words& words, int bits, int64_t count, const int32_t* order,
                    uint8_t* fields);

// Each word holds 8 fields of 4 bits, which belong to 8 rows: nibbles [columns * 8, rows], whose
// row 8 c + i holds field which[i] of the words in column c.
void unpack_nibble_rows(const Words& words, const int32_t (&which)[8], uint8_t* nibbles);

// Each run of `run` bytes holds 8 / bits runs of fields: first the lowest fields of all its bytes,
// then the next. bits is 1, 2 or 4; rows of `columns` bytes, a multiple of run, stand `stride`
// apart: fields [rows, columns * 8 / bits].
void unpack_runs(const uint8_t* bytes, int64_t rows, int64_t columns, int64_t stride, int64_t run,
                 int bits, uint8_t* fields);

}  // namespace tmac
