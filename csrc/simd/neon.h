#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "simd/scalar.h"

// NEON of Armv8.0; with the dot-product instructions where the compiler is told so: 16 bytes,
// 4 floats. The operations are described in simd/README.md.
namespace tmac {
namespace {

struct Neon {
  using Narrow = Neon;
  using B = int8x16_t;
  using I = int32x4_t;
  using F = float32x4_t;
  static constexpr int kBytes = 16;
  static constexpr int kFloats = 4;

  static B load(const uint8_t* p) { return vreinterpretq_s8_u8(vld1q_u8(p)); }
  static B table(const int8_t* p) { return vld1q_s8(p); }
  static B low(B b) { return vandq_s8(b, vdupq_n_s8(15)); }
  static B high(B b) { return vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(b), 4)); }
  static B lookup(B t, B index) { return vqtbl1q_s8(t, vreinterpretq_u8_s8(index)); }

  // 4 rows x 4 planes a vector.
  struct Quad {
#ifdef __ARM_FEATURE_DOTPROD
    I acc = vdupq_n_s32(0);
    void add(B b) { acc = vdotq_s32(acc, b, vreinterpretq_s8_u32(vdupq_n_u32(0x08040201))); }
    I sum(int) const { return acc; }
#else
    int16x8_t lo = vdupq_n_s16(0), hi = vdupq_n_s16(0);  // |8 p3| <= 1016 a table, 4 tables a block
    void add(B b) {
      const int8x8_t weights = vreinterpret_s8_u32(vdup_n_u32(0x08040201));
      lo = vmlal_s8(lo, vget_low_s8(b), weights);
      hi = vmlal_s8(hi, vget_high_s8(b), weights);
    }
    I sum(int) const { return vpaddq_s32(vpaddlq_s16(lo), vpaddlq_s16(hi)); }
#endif
  };
  // 8 rows x 2 planes a vector.
  struct Pair {
    int16x8_t lo = vdupq_n_s16(0), hi = vdupq_n_s16(0);
    void add(B b) {
      const int8x8_t weights = vreinterpret_s8_u16(vdup_n_u16(0x0201));
      lo = vmlal_s8(lo, vget_low_s8(b), weights);
      hi = vmlal_s8(hi, vget_high_s8(b), weights);
    }
    I sum(int i) const { return vpaddlq_s16(i == 0 ? lo : hi); }
  };
  // 16 rows x 1 plane a vector, both tables of a chunk at once.
  using B1 = B;
  static constexpr int kBytes1 = 16;
  static B1 load1(const uint8_t* p) { return load(p); }
  static B1 narrow(B b) { return b; }
  struct Single {
    int16x8_t lo = vdupq_n_s16(0), hi = vdupq_n_s16(0);
    void add(B1 even, B1 odd) {
      lo = vaddq_s16(lo, vaddl_s8(vget_low_s8(even), vget_low_s8(odd)));
      hi = vaddq_s16(hi, vaddl_s8(vget_high_s8(even), vget_high_s8(odd)));
    }
    I sum(int i) const {
      const int16x8_t half = i < 2 ? lo : hi;
      return vmovl_s16(i % 2 == 0 ? vget_low_s16(half) : vget_high_s16(half));
    }
  };

  static I zero_i() { return vdupq_n_s32(0); }
  template <int kShift>
  static I add_shifted(I a, I b) {
    return vaddq_s32(a, vshlq_n_s32(b, kShift));
  }
  static I sub_i(I a, I b) { return vsubq_s32(a, b); }
  static F to_float(I a) { return vcvtq_f32_s32(a); }
  static I round_to_int(F a) { return vcvtnq_s32_f32(a); }
  static I exponent_of_two(I n) { return vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23); }
  static F as_float(I a) { return vreinterpretq_f32_s32(a); }
  static void store_i(int32_t* p, I a) { vst1q_s32(p, a); }

  static F set(float x) { return vdupq_n_f32(x); }
  static F load_f(const float* p) { return vld1q_f32(p); }
  static void store_f(float* p, F f) { vst1q_f32(p, f); }
  static F load_half(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
  static void store_half(uint16_t* p, F f) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(f))); }
  static F add(F a, F b) { return vaddq_f32(a, b); }
  static F sub(F a, F b) { return vsubq_f32(a, b); }
  static F mul(F a, F b) { return vmulq_f32(a, b); }
  static F div(F a, F b) { return vdivq_f32(a, b); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static F max(F a, F b) { return vmaxq_f32(a, b); }
  static F min(F a, F b) { return vminq_f32(a, b); }
  static float sum(F a) {
    const float32x2_t pairs = vadd_f32(vget_low_f32(a), vget_high_f32(a));
    return vget_lane_f32(pairs, 0) + vget_lane_f32(pairs, 1);
  }

  static void prefetch(const uint8_t* p) { __builtin_prefetch(p); }

  static void write_tables(const int32_t (*entries)[8], int8_t* out, int64_t stride) {
    Scalar::write_tables(entries, out, stride);
  }
};

}  // namespace
}  // namespace tmac
