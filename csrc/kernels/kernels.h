#pragma once

#include <string>
#include <vector>

#include "kernels/kernels_table.h"
#include "kernels/vector_kernels.h"

namespace tmac {

struct IsaInfo {
  const char* name;
  bool built;
  bool usable;
  bool active;
  std::string reason;  // why it is not built, not usable or not active
};

// The kernels in force: the best this CPU runs, or what TMAC_ISA names.
// Throws std::invalid_argument if TMAC_ISA names none that can run here.
const Kernels& kernels();
const VectorKernels& vector_kernels();
// Switches every later call in this process. Throws std::invalid_argument likewise.
void use_isa(const std::string& name);
std::vector<IsaInfo> isas();

}  // namespace tmac
