#include "layout/groups.h"

#include "bindings/arrays.h"
#include "bindings/linear.h"

namespace tmac {
namespace {

using namespace py::literals;

// float32 [groups, n]
const float* group_data(const py::array& w) {
  check_argument(w.ndim() == 2, "w must be [groups, n]");
  return array_data<float>(w, "w", {w.shape(0), w.shape(1)}, "float32");
}

py::tuple ranges(const py::array& w) {
  const float* data = group_data(w);
  const int64_t groups = w.shape(0), n = w.shape(1);
  py::array_t<float> low(groups), high(groups);
  float *low_data = low.mutable_data(), *high_data = high.mutable_data();
  {
    py::gil_scoped_release release;
    group_ranges(data, groups, n, low_data, high_data);
  }
  return py::make_tuple(low, high);
}

py::array_t<uint8_t> codes_of(const py::array& w, const py::array& scales,
                              const std::optional<py::array>& offsets, float zero, int bits) {
  check_argument(bits >= 1 && bits <= kMaxBits, "bits must be 1 to 8, not ", bits);
  const float* data = group_data(w);
  const int64_t groups = w.shape(0), n = w.shape(1);
  const auto* scale_data = array_data<uint16_t>(scales, "scales", {groups}, "float16");
  const uint16_t* offset_data =
      offsets ? array_data<uint16_t>(*offsets, "offsets", {groups}, "float16") : nullptr;
  py::array_t<uint8_t> codes({groups, n});
  uint8_t* out = codes.mutable_data();
  py::gil_scoped_release release;
  nearest_codes(data, groups, n, scale_data, offset_data, zero, (1 << bits) - 1, out);
  return codes;
}

}  // namespace

void bind_groups(py::module_& module) {
  module.def("group_ranges", &ranges, "w"_a,
             "The smallest and the largest number in each row of w [groups, n] float32, NaN for a "
             "row with one that is not finite.");
  module.def("nearest_codes", &codes_of, "w"_a, "scales"_a, "offsets"_a = py::none(), py::kw_only(),
             "zero"_a, "bits"_a,
             "Codes [groups, n] uint8 nearest to w: of scale * code + offset, or of scale * "
             "(code - zero) without offsets; scales and offsets are [groups] float16.");
}

}  // namespace tmac
