#pragma once

#include "bindings/arrays.h"
#include "kernels/kernels.h"
#include "ops/linear.h"

namespace tmac {

// A packed matrix in Python's hands: keeps its bytes alive, and an order of its own, which nobody
// can change once it is checked.
struct PyLinear {
  Linear linear;
  py::array packed;
  std::vector<int32_t> order;
};

Tables parse_tables(const std::string& text);
void bind_linear(py::module_& module);
void bind_kv_cache(py::module_& module);
void bind_fields(py::module_& module);
void bind_groups(py::module_& module);
void bind_decoder(py::module_& module);
void bind_sampler(py::module_& module);

}  // namespace tmac
