#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/linear.h"
#include "ops/bandwidth.h"

PYBIND11_MODULE(_core, module) {
  namespace py = pybind11;
  module.doc() = "The C++ core of tmac_py: packing, lookup-table products, the decoder step.";
  module.attr("__version__") = TMAC_VERSION;
  module.attr("compiler") = TMAC_COMPILER;
  module.def("isas", [] {
    py::list rows;
    for (const tmac::IsaInfo& info : tmac::isas()) {
      py::dict row;
      row["name"] = info.name;
      row["built"] = info.built;
      row["usable"] = info.usable;
      row["active"] = info.active;
      row["reason"] = info.reason;
      rows.append(row);
    }
    return rows;
  });
  module.def("use_isa", &tmac::use_isa, py::arg("name"));
  module.def("active_isa", [] { return tmac::kernels().name; });
  tmac::bind_linear(module);
  tmac::bind_kv_cache(module);
  tmac::bind_fields(module);
  tmac::bind_groups(module);
  tmac::bind_decoder(module);
  tmac::bind_sampler(module);
  module.def(
      "read_bandwidth",
      [](int64_t nbytes, tmac::ThreadPool& pool) {
        return tmac::read_bandwidth(nbytes, pool) / 1e9;
      },
      py::arg("nbytes"), py::arg("pool"), py::call_guard<py::gil_scoped_release>(),
      "GB/s that the pool reads from a buffer of nbytes: the best of several passes.");
  module.def("multiply_peak", &tmac::multiply_peak, py::arg("pool"),
             py::call_guard<py::gil_scoped_release>(),
             "Multiply-adds of int8 per second that the pool reaches from registers.");
}
