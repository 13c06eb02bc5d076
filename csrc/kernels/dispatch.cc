#include <atomic>
#include <cstdlib>
#include <sstream>
#include <stdexcept>

#include "core/cpu.h"
#include "kernels/isa_list.h"  // written by CMake from its list of ISAs
#include "kernels/kernels.h"

namespace tmac {

#define TMAC_DECLARE(name, needs)       \
  extern const Kernels kKernels_##name; \
  extern const VectorKernels kVectorKernels_##name;
TMAC_BUILT_ISAS(TMAC_DECLARE)
#undef TMAC_DECLARE

namespace {

struct Row {
  const char* name;
  const char* needs;       // CPU features, separated by spaces
  const Kernels* kernels;  // null where this architecture does not build them
  const VectorKernels* vector_kernels;
};

// Best last.
const Row kRows[] = {
#define TMAC_ROW(name, needs) {#name, needs, &kKernels_##name, &kVectorKernels_##name},
    TMAC_BUILT_ISAS(TMAC_ROW)
#undef TMAC_ROW
#define TMAC_ROW(name, needs) {#name, needs, nullptr, nullptr},
        TMAC_OTHER_ISAS(TMAC_ROW)
#undef TMAC_ROW
};

std::string missing_features(const Row& row) {
  std::istringstream needs(row.needs);
  std::string feature, missing;
  while (needs >> feature) {
    if (!cpu_has(feature)) missing += (missing.empty() ? "" : ", ") + feature;
  }
  return missing;
}

bool usable(const Row& row) { return row.kernels != nullptr && missing_features(row).empty(); }

const Row& find_usable(const std::string& name, const char* what) {
  std::string choices;
  for (const Row& row : kRows) {
    if (!usable(row)) continue;
    if (name == row.name) return row;
    choices += (choices.empty() ? "" : ", ") + std::string(row.name);
  }
  throw std::invalid_argument(std::string(what) + " '" + name +
                              "' is not an instruction set that runs here; choose from " + choices);
}

const Row& best_usable() {
  const Row* best = nullptr;
  for (const Row& row : kRows) {
    if (usable(row)) best = &row;
  }
  return *best;  // the scalar row needs nothing
}

const Row& first_choice() {
  const char* name = std::getenv("TMAC_ISA");
  const bool forced = name != nullptr && *name != '\0';
  return forced ? find_usable(name, "TMAC_ISA:") : best_usable();
}

std::atomic<const Row*> active{nullptr};

const Row& active_row() {
  const Row* row = active.load(std::memory_order_acquire);
  if (row == nullptr) {
    row = &first_choice();
    active.store(row, std::memory_order_release);
  }
  return *row;
}

}  // namespace

const Kernels& kernels() { return *active_row().kernels; }
const VectorKernels& vector_kernels() { return *active_row().vector_kernels; }

void use_isa(const std::string& name) { active.store(&find_usable(name, "ISA")); }

std::vector<IsaInfo> isas() {
  const Row& current = active_row();
  std::vector<IsaInfo> rows;
  for (const Row& row : kRows) {
    const std::string missing = missing_features(row);
    IsaInfo info{row.name, row.kernels != nullptr, usable(row), &row == &current, ""};
    info.reason = !info.built              ? "not built for this architecture"
                  : !info.usable           ? "this CPU or its system lacks " + missing
                  : !info.active           ? "usable"
                  : &row == &best_usable() ? "the best that runs here"
                                           : "chosen by TMAC_ISA or by the program";
    rows.push_back(info);
  }
  return rows;
}

}  // namespace tmac
