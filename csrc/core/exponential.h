#pragma once

#include <cstdint>
#include <cstring>

namespace tmac {

// e^x for x from -708 to 0, relative error below 1e-15. The same bits on every machine, which a C
// library does not promise: 2^n * P(r) with n = round(x log2 e), |r| <= ln2 / 2, P the Taylor
// polynomial of degree 13.
inline double exponential(double x) {
  const double shifted = x * 1.4426950408889634 + 0x1.8p52;  // n in its last bits
  const double n = shifted - 0x1.8p52;
  double r = x - n * 0x1.62e42feep-1;  // ln 2 in two parts: the first has few bits
  r -= n * 0x1.a39ef35793c76p-33;
  double p = 1.0 / 6227020800;  // no loop: compilers take several x at once instead
  p = p * r + 1.0 / 479001600;
  p = p * r + 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  uint64_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 1023) << 52;
  double power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

// x[i] = e^x[i] for x [n] <= 0; what lies below -708 counts as that. Two loops, which compilers
// turn into vectors.
inline void exponentiate(double* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = x[i] > -708.0 ? x[i] : -708.0;
  for (int64_t i = 0; i < n; ++i) x[i] = exponential(x[i]);
}

}  // namespace tmac
