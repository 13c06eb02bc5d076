#include "model/kv_cache.h"

#include <memory>

#include "bindings/linear.h"

namespace tmac {
namespace {

using namespace py::literals;

KvType parse_kv_type(const std::string& text, const char* what) {
  if (text == "f16") return KvType::kF16;
  if (text == "int8") return KvType::kInt8;
  check_argument(text == "int4", what, " must be 'f16', 'int8' or 'int4', not '", text, "'");
  return KvType::kInt4;
}

const char* name(KvType type) {
  return type == KvType::kF16 ? "f16" : type == KvType::kInt8 ? "int8" : "int4";
}

std::unique_ptr<KvCache> make_cache(int64_t n_layers, int64_t n_kv_heads, int64_t head_dim,
                                    int64_t n_ctx, const std::string& keys,
                                    const std::string& values) {
  return std::make_unique<KvCache>(n_layers, n_kv_heads, head_dim, n_ctx,
                                   parse_kv_type(keys, "keys"), parse_kv_type(values, "values"));
}

py::array_t<uint8_t> state(KvCache& self) {
  const KvCache::Use use(self);
  py::array_t<uint8_t> out(self.state_bytes());
  uint8_t* data = out.mutable_data();
  py::gil_scoped_release release;
  self.write_state(data);
  return out;
}

void restore(KvCache& self, const py::array& state) {
  const KvCache::Use use(self);
  const int64_t size = state.size();
  const auto* data = array_data<uint8_t>(state, "state", {size}, "uint8");
  py::gil_scoped_release release;
  self.read_state(data, size);
}

}  // namespace

void bind_kv_cache(py::module_& module) {
  py::class_<KvCache>(module, "KvCache", "Keys and values of one sequence.")
      .def(py::init(&make_cache), py::kw_only(), "n_layers"_a, "n_kv_heads"_a, "head_dim"_a,
           "n_ctx"_a, "keys"_a = "f16", "values"_a = "f16")
      .def_property_readonly("pos", &KvCache::pos, "Tokens held.")
      .def_property_readonly("n_ctx", &KvCache::n_ctx)
      .def_property_readonly("nbytes", &KvCache::nbytes, "Bytes when full.")
      .def_property_readonly("keys", [](const KvCache& self) { return name(self.shape().keys); })
      .def_property_readonly("values",
                             [](const KvCache& self) { return name(self.shape().values); })
      .def(
          "truncate",
          [](KvCache& self, int64_t pos) {
            const KvCache::Use use(self);
            self.truncate(pos);
          },
          "pos"_a,
          "Forgets the tokens from `pos` on; in int8 and int4 up to 63 more (docs/attention.md).")
      .def(
          "fork",
          [](KvCache& self, int64_t n_ctx) {
            const KvCache::Use use(self);
            return self.fork(n_ctx == 0 ? self.n_ctx() : n_ctx);
          },
          "n_ctx"_a = 0, "A copy with room for n_ctx tokens; 0: for as many as this one.",
          py::call_guard<py::gil_scoped_release>())
      .def("state", &state, "The tokens held, as bytes that `restore` takes.")
      .def("restore", &restore, "state"_a, "Replaces what is held by a state.");
}

}  // namespace tmac
