#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "core/check.h"
#include "layout/layout.h"

namespace tmac {

namespace py = pybind11;

// Arrays as they are: a wrong dtype or order is an error, never a silent copy.
template <typename T>
const T* array_data(const py::array& array, const char* name, const std::vector<int64_t>& shape,
                    const char* dtype) {
  const auto text = [](const auto& sizes) {
    std::string list;
    for (const auto size : sizes) list += (list.empty() ? "" : ", ") + std::to_string(size);
    return "[" + list + "]";
  };
  if (!array.dtype().equal(py::dtype(dtype))) {  // the message takes long: NumPy makes the name
    check_argument(false, name, " must be of dtype ", dtype, ", not ",
                   py::str(array.dtype()).cast<std::string>());
  }
  const std::vector<int64_t> found(array.shape(), array.shape() + array.ndim());
  if (found != shape) {
    check_argument(false, name, " must be ", text(shape), ", not ", text(found));
  }
  check_argument((array.flags() & py::array::c_style) != 0, name, " must be C-contiguous");
  return static_cast<const T*>(array.data());
}

inline OffsetKind parse_offset_kind(const std::string& text) {
  if (text == "none") return OffsetKind::kNone;
  if (text == "offset") return OffsetKind::kOffset;
  if (text == "zero") return OffsetKind::kZero;
  throw std::invalid_argument("offset_kind must be 'none', 'offset' or 'zero', not '" + text + "'");
}

inline Encoding parse_encoding(const std::string& text) {
  if (text == "uniform") return Encoding::kUniform;
  if (text == "ternary") return Encoding::kTernary;
  if (text == "bcq") return Encoding::kBcq;
  throw std::invalid_argument("encoding must be 'uniform', 'ternary' or 'bcq', not '" + text + "'");
}

inline LinearSpec parse_spec(int64_t m, int64_t k, int bits, int64_t group_size,
                             const std::string& offset_kind, const std::string& encoding,
                             std::optional<float> scale, std::optional<float> zero = std::nullopt) {
  LinearSpec spec;
  spec.m = m;
  spec.k = k;
  spec.bits = bits;
  spec.encoding = parse_encoding(encoding);
  spec.group_size = group_size;
  spec.scale_kind = scale ? ScaleKind::kMatrix : ScaleKind::kStored;
  spec.scale = scale.value_or(0.0f);
  spec.offset_kind = parse_offset_kind(offset_kind);
  spec.zero = zero.value_or(spec.ternary() ? 1.0f : 0.0f);
  check_spec(spec);
  return spec;
}

}  // namespace tmac
