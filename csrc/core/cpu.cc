#include "core/cpu.h"

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace tmac {
namespace {

#if defined(__x86_64__)

struct CpuId {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  explicit CpuId(uint32_t leaf, uint32_t subleaf = 0) {
    __get_cpuid_count(leaf, subleaf, &eax, &ebx, &ecx, &edx);
  }
};

// XCR0: which register states the operating system saves. Needs OSXSAVE.
uint64_t saved_states() {
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

bool has(const std::string& feature) {
  const auto bit = [](uint32_t word, int i) { return ((word >> i) & 1) != 0; };
  const CpuId basic(1), extended(7);
  const uint64_t states = bit(basic.ecx, 27) ? saved_states() : 0;
  const bool ymm = (states & 0x06) == 0x06, zmm = (states & 0xe6) == 0xe6;
  if (feature == "fma") return ymm && bit(basic.ecx, 12);
  if (feature == "f16c") return ymm && bit(basic.ecx, 29);
  if (feature == "avx2") return ymm && bit(basic.ecx, 28) && bit(extended.ebx, 5);
  if (feature == "avxvnni") return ymm && extended.eax >= 1 && bit(CpuId(7, 1).eax, 4);
  if (feature == "avx512f") return zmm && bit(extended.ebx, 16);
  if (feature == "avx512dq") return zmm && bit(extended.ebx, 17);
  if (feature == "avx512bw") return zmm && bit(extended.ebx, 30);
  if (feature == "avx512vl") return zmm && bit(extended.ebx, 31);
  if (feature == "avx512vbmi") return zmm && bit(extended.ecx, 1);
  if (feature == "avx512vnni") return zmm && bit(extended.ecx, 11);
  if (feature == "avx512bitalg") return zmm && bit(extended.ecx, 12);
  if (feature == "gfni") return ymm && bit(extended.ecx, 8);
  return false;
}

#elif defined(__aarch64__)

bool has(const std::string& feature) {
  if (feature == "neon") return true;
#if defined(__linux__)
  constexpr unsigned long kHwcapAsimdDp = 1ul << 20;
  constexpr unsigned long kHwcap2I8mm = 1ul << 13;
  if (feature == "dotprod") return (getauxval(AT_HWCAP) & kHwcapAsimdDp) != 0;
  if (feature == "i8mm") return (getauxval(AT_HWCAP2) & kHwcap2I8mm) != 0;
#elif defined(__APPLE__)
  if (feature == "dotprod") return true;  // every Apple CPU that runs macOS on Arm
  if (feature == "i8mm") {
    int has = 0;
    size_t size = sizeof(has);
    return sysctlbyname("hw.optional.arm.FEAT_I8MM", &has, &size, nullptr, 0) == 0 && has != 0;
  }
#endif
  return false;
}

#else

bool has(const std::string&) { return false; }

#endif

}  // namespace

bool cpu_has(const std::string& feature) { return has(feature); }

}  // namespace tmac
