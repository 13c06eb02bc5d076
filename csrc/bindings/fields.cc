#include "layout/fields.h"

#include "bindings/arrays.h"
#include "bindings/linear.h"

namespace tmac {
namespace {

using namespace py::literals;

// An array [rows, columns] of 32-bit integers, however it lies in memory.
Words words_of(const py::array& words) {
  check_argument(words.ndim() == 2 && words.itemsize() == 4 &&
                     (words.dtype().kind() == 'i' || words.dtype().kind() == 'u'),
                 "words must be a matrix of 32-bit integers");
  return {static_cast<const uint8_t*>(words.data()), words.shape(0), words.shape(1),
          words.strides(0), words.strides(1)};
}

// Where a result of this shape goes.
uint8_t* output(py::array& out, const std::vector<int64_t>& shape) {
  array_data<uint8_t>(out, "out", shape, "uint8");
  return static_cast<uint8_t*>(out.mutable_data());
}

void streams(const py::array& source, py::array out, int bits,
             const std::optional<py::array>& order) {
  check_argument(bits >= 1 && bits <= kMaxBits, "bits must be 1 to 8, not ", bits);
  const Words words = words_of(source);
  check_argument(out.ndim() == 2, "out must be a matrix");
  const int64_t count = out.shape(1);
  check_argument(count * bits <= words.columns * 32, "rows of ", words.columns,
                 " words have fewer than ", count, " fields of ", bits, " bits");
  uint8_t* const fields = output(out, {words.rows, count});
  const int32_t* columns = order ? array_data<int32_t>(*order, "order", {count}, "int32") : nullptr;
  py::gil_scoped_release release;
  for (int64_t j = 0; columns != nullptr && j < count; ++j) {
    check_argument(columns[j] >= 0 && columns[j] < count, "order must hold 0 to ", count - 1,
                   "; entry ", j, " is ", columns[j]);
  }
  unpack_streams(words, bits, count, columns, fields);
}

void nibble_rows(const py::array& source, py::array out, const std::vector<int32_t>& which) {
  const Words words = words_of(source);
  int32_t fields[8];
  check_argument(which.size() == 8, "which must have 8 fields, not ", which.size());
  for (size_t i = 0; i < 8; ++i) {
    check_argument(which[i] >= 0 && which[i] < 8, "fields must be 0 to 7, not ", which[i]);
    fields[i] = which[i];
  }
  uint8_t* const nibbles = output(out, {words.columns * 8, words.rows});
  py::gil_scoped_release release;
  unpack_nibble_rows(words, fields, nibbles);
}

py::array_t<uint8_t> runs(const py::array& packed, int64_t run, int bits) {
  check_argument(bits == 1 || bits == 2 || bits == 4, "bits must be 1, 2 or 4, not ", bits);
  check_argument(packed.ndim() == 2 && packed.dtype().equal(py::dtype("uint8")) &&
                     (packed.strides(1) == 1 || packed.shape(1) <= 1),
                 "packed must be a uint8 matrix whose rows are contiguous");
  const int64_t rows = packed.shape(0), columns = packed.shape(1), stride = packed.strides(0);
  check_argument(run >= 1 && columns % run == 0, "rows of ", columns,
                 " bytes are not made of runs of ", run);
  const auto* data = static_cast<const uint8_t*>(packed.data());
  py::array_t<uint8_t> fields({rows, columns * 8 / bits});
  uint8_t* out = fields.mutable_data();
  py::gil_scoped_release release;
  unpack_runs(data, rows, columns, stride, run, bits, out);
  return fields;
}

}  // namespace

void bind_fields(py::module_& module) {
  module.def("unpack_streams", &streams, "words"_a, "out"_a, py::kw_only(), "bits"_a,
             "order"_a = py::none(),
             "Rows of words [n, words] of 32 bits as streams of fields, lowest first, into out "
             "[n, count] uint8: the first count of them. Column j is field order[j] (int32).");
  module.def("unpack_nibble_rows", &nibble_rows, "words"_a, "out"_a, "which"_a,
             "Words [n, words] of 8 fields of 4 bits that belong to 8 rows, into out "
             "[words * 8, n] uint8: row 8 w + i is field which[i] of the words in column w.");
  module.def("unpack_runs", &runs, "packed"_a, "run"_a, "bits"_a,
             "Fields [n, bytes * 8 / bits] of packed uint8 [n, bytes], 1, 2 or 4 bits each: a run "
             "of bytes holds first the lowest fields of all its bytes, then the next.");
}

}  // namespace tmac
