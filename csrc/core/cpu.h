#pragma once

#include <string>

namespace tmac {

// True if this CPU, and its operating system, offer a feature of that name: on x86-64 avx2,
// fma, f16c, avxvnni, avx512f, avx512bw, avx512dq, avx512vl, avx512vnni, avx512vbmi, avx512bitalg,
// gfni; on aarch64 neon, dotprod, i8mm.
bool cpu_has(const std::string& feature);

}  // namespace tmac
