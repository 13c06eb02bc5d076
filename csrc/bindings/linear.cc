#include "bindings/linear.h"

#include <algorithm>
#include <memory>

#include "layout/pack.h"

namespace tmac {
namespace {

using namespace py::literals;

// Shape of the scales: [m, n_groups], binary-coded [m, n_groups, bits].
std::vector<int64_t> scale_shape(const LinearSpec& spec) {
  std::vector<int64_t> shape{spec.m, spec.n_groups()};
  if (spec.bcq()) shape.push_back(spec.bits);
  return shape;
}

// Binary16 numbers, or null for None, which is what `kind` asks for if not `wanted`.
const uint16_t* half_data(const py::object& array, const char* name,
                          const std::vector<int64_t>& shape, bool wanted, const std::string& kind) {
  check_argument(array.is_none() != wanted, kind, " goes with ", wanted ? "an array of " : "no ",
                 name);
  if (!wanted) return nullptr;
  check_argument(py::isinstance<py::array>(array), name, " must be an array");
  return array_data<uint16_t>(py::reinterpret_borrow<py::array>(array), name, shape, "float16");
}

py::array_t<uint8_t> pack_codes(const py::array& codes, const py::object& scales,
                                const py::object& offsets, int bits, int64_t group_size,
                                const std::string& offset_kind, const std::string& encoding,
                                std::optional<float> scale,
                                std::optional<py::array_t<uint8_t>> tiles) {
  check_argument(codes.ndim() == 2, "codes must be a matrix [m, k]");
  const LinearSpec spec =
      parse_spec(codes.shape(0), codes.shape(1), bits, group_size, offset_kind, encoding, scale);
  const auto* code_data = array_data<uint8_t>(codes, "codes", {spec.m, spec.k}, "uint8");
  const auto* scale_data = half_data(scales, "scales", scale_shape(spec), !scale,
                                     scale ? "a scale for the matrix" : "no scale");
  const auto* offset_data =
      half_data(offsets, "offsets", {spec.m, spec.n_groups()},
                spec.offset_kind != OffsetKind::kNone, "offset_kind '" + offset_kind + "'");
  if (tiles) {
    array_data<uint8_t>(*tiles, "tiles", {spec.n_tiles() * spec.tile_bytes()}, "uint8");
  }
  py::array_t<uint8_t> packed = tiles ? *tiles : py::array_t<uint8_t>(spec.packed_bytes());
  uint8_t* out = packed.mutable_data();
  py::gil_scoped_release release;
  uint8_t largest = 0;
  for (int64_t i = 0; i < spec.m * spec.k; ++i) largest = std::max(largest, code_data[i]);
  check_argument(largest < 1 << bits, "codes must be below 2^", bits);
  check_argument(!spec.ternary() || largest <= 2, "ternary codes must be 0, 1 or 2");
  if (tiles) {
    pack_tiles(spec, code_data, scale_data, offset_data, out);
  } else {
    pack(spec, code_data, scale_data, offset_data, out);
  }
  return packed;
}

py::tuple unpack_codes(const py::array& packed, int64_t m, int64_t k, int bits, int64_t group_size,
                       const std::string& offset_kind, const std::string& encoding,
                       std::optional<float> scale) {
  const LinearSpec spec = parse_spec(m, k, bits, group_size, offset_kind, encoding, scale);
  const auto* data = array_data<uint8_t>(packed, "packed", {spec.packed_bytes()}, "uint8");
  const py::dtype half("float16");
  py::array_t<uint8_t> codes({m, k});
  py::array scales(half, scale_shape(spec));
  py::array offsets(half, {m, spec.n_groups()});
  auto* code_data = codes.mutable_data();
  auto* scale_data = static_cast<uint16_t*>(scales.mutable_data());
  auto* offset_data = static_cast<uint16_t*>(offsets.mutable_data());
  {
    py::gil_scoped_release release;
    unpack(spec, data, code_data, scale_data, offset_data);
  }
  const auto if_stored = [](const py::array& array, bool stored) {
    return stored ? py::object(array) : py::none();
  };
  return py::make_tuple(codes, if_stored(scales, spec.scale_kind == ScaleKind::kStored),
                        if_stored(offsets, spec.offset_kind != OffsetKind::kNone));
}

py::array_t<float> forward(const PyLinear& self, const py::array& x, ThreadPool& pool,
                           const std::string& tables) {
  const Tables kind = parse_tables(tables);
  const LinearSpec& spec = self.linear.spec;
  check_argument(x.ndim() == 2 && x.shape(1) == spec.k && x.shape(0) >= 1, "x must be [n, ", spec.k,
                 "] with n at least 1");
  const int64_t n = x.shape(0);
  const auto* data = array_data<float>(x, "x", {n, spec.k}, "float32");
  py::array_t<float> y({n, spec.m});
  float* out = y.mutable_data();
  py::gil_scoped_release release;
  linear_forward(self.linear, kind, data, n, out, pool);
  return y;
}

}  // namespace

Tables parse_tables(const std::string& text) {
  if (text == "int8") return Tables::kInt8;
  if (text == "exact") return Tables::kExact;
  if (text == "exact8") return Tables::kExact8;
  throw std::invalid_argument("tables must be 'int8', 'exact' or 'exact8', not '" + text + "'");
}

void bind_linear(py::module_& module) {
  module.def(
      "packed_nbytes",
      [](int64_t m, int64_t k, int bits, int64_t group_size, const std::string& offset_kind,
         const std::string& encoding, std::optional<float> scale) {
        return parse_spec(m, k, bits, group_size, offset_kind, encoding, scale).packed_bytes();
      },
      "m"_a, "k"_a, py::kw_only(), "bits"_a, "group_size"_a, "offset_kind"_a,
      "encoding"_a = "uniform", "scale"_a = py::none(),
      "Bytes of the packed form of a matrix [m, k].");
  module.def("pack", &pack_codes, "codes"_a, "scales"_a = py::none(), "offsets"_a = py::none(),
             py::kw_only(), "bits"_a, "group_size"_a, "offset_kind"_a, "encoding"_a = "uniform",
             "scale"_a = py::none(), "tiles"_a = py::none(),
             "Packs codes [m, k] uint8 with scales (unless the matrix has one scale) and offsets "
             "[m, n_groups] float16; bcq has scales [m, n_groups, bits]. The tiles alone, without "
             "the end of a matrix with one scale, go to `tiles` if it is there.");
  module.def("unpack", &unpack_codes, "packed"_a, py::kw_only(), "m"_a, "k"_a, "bits"_a,
             "group_size"_a, "offset_kind"_a, "encoding"_a = "uniform", "scale"_a = py::none(),
             "The codes, scales and offsets (None where there are none) of a packed matrix.");

  py::class_<PyLinear, std::shared_ptr<PyLinear>>(module, "Linear",
                                                  "A packed matrix, ready to be multiplied with.")
      .def(py::init([](const py::array& packed, int64_t m, int64_t k, int bits, int64_t group_size,
                       const std::string& offset_kind, float zero, const std::string& encoding,
                       std::optional<float> scale, const std::optional<py::array>& order) {
             const LinearSpec spec =
                 parse_spec(m, k, bits, group_size, offset_kind, encoding, scale, zero);
             const auto* data =
                 array_data<uint8_t>(packed, "packed", {spec.packed_bytes()}, "uint8");
             auto self = std::make_shared<PyLinear>(PyLinear{{spec, data}, packed, {}});
             if (order) {
               const auto* columns = array_data<int32_t>(*order, "order", {k}, "int32");
               self->order.assign(columns, columns + k);
               check_order(self->order.data(), k);
               self->linear.order = self->order.data();
             }
             return self;
           }),
           "packed"_a, py::kw_only(), "m"_a, "k"_a, "bits"_a, "group_size"_a, "offset_kind"_a,
           "zero"_a, "encoding"_a = "uniform", "scale"_a = py::none(), "order"_a = py::none())
      .def_property_readonly("m", [](const PyLinear& self) { return self.linear.spec.m; })
      .def_property_readonly("k", [](const PyLinear& self) { return self.linear.spec.k; })
      .def_property_readonly("bits", [](const PyLinear& self) { return self.linear.spec.bits; })
      .def_property_readonly("group_size",
                             [](const PyLinear& self) { return self.linear.spec.group_size; });

  module.def("linear_forward", &forward, "linear"_a, "x"_a, "pool"_a, py::kw_only(), "tables"_a,
             "y [n, m] = x [n, k] times the transposed matrix.");
}

}  // namespace tmac
