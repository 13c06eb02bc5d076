#pragma once

#include <cstdint>
#include <cstring>

namespace tmac {

// IEEE binary16 <-> binary32 in plain integer arithmetic, for code that no ISA flag reaches.
// `static` keeps a copy in every object, so that one compiled for a newer ISA never leaks out.

static inline float half_to_float(uint16_t h) {
  // Shift exponent and mantissa into place; multiplying by 2^112 rebiases normals and subnormals.
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fff) << 13;
  uint32_t bits;
  if (magnitude >= 0x0f800000u) {  // infinity or NaN
    bits = magnitude | 0x7f800000u;
  } else {
    float value;
    std::memcpy(&value, &magnitude, 4);
    value *= 0x1p112f;
    std::memcpy(&bits, &value, 4);
  }
  bits |= static_cast<uint32_t>(h & 0x8000) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

// Rounds to nearest even; overflow goes to infinity, NaN stays NaN.
static inline uint16_t float_to_half(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00;
  if (bits >= 0x477ff000u) return sign | 0x7c00;  // >= 65520 rounds to infinity
  if (bits < 0x38800000u) {                       // subnormal half: let the adder round
    float value;
    std::memcpy(&value, &bits, 4);
    value += 0.5f;  // ulp of [0.5, 1) is 2^-24, the unit of a subnormal half
    std::memcpy(&bits, &value, 4);
    return sign | static_cast<uint16_t>(bits - 0x3f000000u);
  }
  bits += 0xfff + ((bits >> 13) & 1);
  return sign | static_cast<uint16_t>((bits - 0x38000000u) >> 13);
}

}  // namespace tmac
