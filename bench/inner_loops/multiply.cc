// One tile of 32 rows times one vector by unpacking codes and multiplying: what
// bench/inner_loops.py sets the lookup tables against. Compiled for one instruction set at a time,
// never run by tmac_py.
//
// Codes are unsigned (8 bits: signed, on AVX2 not -128; unsigned with VNNI), activations int8 of at
// most 127 in magnitude with one unit for 64 weights (a region), as in the table kernels; the
// centre of the codes is left to the caller. A step is 4 weights of each of the 32 rows. The 4
// weights of a row stand side by side in a vector, so the sums of a row stay in lanes of its own
// and no instruction crosses lanes.
//
// Each layout is chosen to be cheap to unpack. Where a mask alone will do, a field is not shifted
// down: its products are 2^shift too large until the region ends.

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

constexpr int kTileRows = 32;
constexpr int kRegionSteps = 16;
constexpr int kTurnSteps = 4;  // steps of one turn of the inner loop: whole cache lines of codes
constexpr int64_t kPrefetchBytes = 2048;

#if defined(__AVX2__)

using B = __m256i;  // 8 rows x 4 weights
using F = __m256;
constexpr int kVectors = 4;  // of a step, and floats of a tile

B load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const B*>(p)); }
B mask(B b, int bits) { return _mm256_and_si256(b, _mm256_set1_epi8(static_cast<char>(bits))); }
template <int kShift>
B shift(B b) {
  return _mm256_srli_epi16(b, kShift);
}
B either(B a, B b) { return _mm256_or_si256(a, b); }

#ifdef __AVXVNNI__
constexpr bool kVnni = true;
#else
constexpr bool kVnni = false;
#endif

// The steps that one block of codes holds.
constexpr int block_steps(int bits) { return bits == 1 || bits == 3 ? 2 : 1; }

// How far the codes of vector v are shifted up.
constexpr int up(int bits, int v) {
  switch (bits) {
    case 1:
      return v;
    case 2:
      return kVnni ? 2 * v : 2 * (v % 2);
    case 3:
      return kVnni ? 3 * (v % 2) : 0;
    case 4:
      return kVnni ? 4 * (v % 2) : 0;
    default:
      return 0;
  }
}

template <int kBits>
void unpack(const uint8_t* codes, B out[][kVectors]) {
  if constexpr (kBits == 1) {
    const B low = load(codes), high = shift<4>(low);
    for (int v = 0; v < 4; ++v) {
      out[0][v] = mask(low, 1 << v);
      out[1][v] = mask(high, 1 << v);
    }
  } else if constexpr (kBits == 2) {
    const B b = load(codes);
    if constexpr (kVnni) {
      for (int v = 0; v < 4; ++v) out[0][v] = mask(b, 3 << 2 * v);
    } else {
      const B high = shift<4>(b);
      out[0][0] = mask(b, 3);
      out[0][1] = mask(b, 12);
      out[0][2] = mask(high, 3);
      out[0][3] = mask(high, 12);
    }
  } else if constexpr (kBits == 3) {
    // Two codes in the low six bits of each byte; the rest of the bytes makes two more.
    const B a = load(codes), b = load(codes + 32), c = load(codes + 64);
    const auto second = [](B x) { return kVnni ? mask(x, 56) : mask(shift<3>(x), 7); };
    out[0][0] = mask(a, 7);
    out[0][1] = second(a);
    out[0][2] = mask(b, 7);
    out[0][3] = second(b);
    out[1][0] = mask(c, 7);
    out[1][1] = second(c);
    out[1][2] = either(mask(shift<6>(a), 3), mask(shift<4>(b), 4));
    out[1][3] = kVnni ? either(mask(shift<3>(c), 24), mask(shift<2>(b), 32))
                      : either(mask(shift<6>(c), 3), mask(shift<5>(b), 4));
  } else if constexpr (kBits == 4) {
    for (int half = 0; half < 2; ++half) {
      const B b = load(codes + 32 * half);
      out[0][2 * half] = mask(b, 15);
      out[0][2 * half + 1] = kVnni ? mask(b, 240) : mask(shift<4>(b), 15);
    }
  } else {
    for (int v = 0; v < 4; ++v) out[0][v] = load(codes + 32 * v);
  }
}

template <int kBits>
struct Sums {
  B wide[kVectors], narrow[kVectors];  // int32, int16

  Sums() {
    for (B& b : wide) b = _mm256_setzero_si256();
    for (B& b : narrow) b = _mm256_setzero_si256();
  }
  // The steps after which int16 is full: 2 * 127 * largest code << up, times steps <= 32767.
  static constexpr int kNarrowSteps = kBits == 2 || kBits == 4 ? 8 : 16;
  static constexpr bool kNarrow = !kVnni && kBits < 8;

  void turn(const uint8_t* codes, const int8_t* q) {
    constexpr int kSteps = block_steps(kBits);
#pragma GCC unroll 8
    for (int step = 0; step < kTurnSteps; step += kSteps) {
      B u[kSteps][kVectors];
      unpack<kBits>(codes + step * kTileRows * kBits / 2, u);
#pragma GCC unroll 8
      for (int s = 0; s < kSteps; ++s) {
        int four;
        __builtin_memcpy(&four, q + 4 * (step + s), 4);
        const B x = _mm256_set1_epi32(four);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) add(v, u[s][v], x);
      }
    }
  }
  void add(int v, B u, B x) {
#ifdef __AVXVNNI__
    wide[v] = _mm256_dpbusd_avx_epi32(wide[v], u, x);
#else
    if constexpr (kBits == 8) {
      const B pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(u, x));
      wide[v] = _mm256_add_epi32(wide[v], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    } else {
      narrow[v] = _mm256_add_epi16(narrow[v], _mm256_maddubs_epi16(u, x));
    }
#endif
  }
  void widen() {
    if constexpr (!kNarrow) return;
    for (int v = 0; v < kVectors; ++v) {
      wide[v] = _mm256_add_epi32(wide[v], _mm256_madd_epi16(narrow[v], _mm256_set1_epi16(1)));
      narrow[v] = _mm256_setzero_si256();
    }
  }
  void flush(float unit, F* group) const {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const F scale = _mm256_set1_ps(unit / static_cast<float>(1 << up(kBits, v)));
      group[v] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(wide[v]), scale, group[v]);
    }
  }
};

F zero() { return _mm256_setzero_ps(); }
void store(float* p, F f) { _mm256_storeu_ps(p, f); }
constexpr int kFloats = 8;

#elif defined(__ARM_NEON)

using B = int8x16_t;  // 4 rows x 4 weights
using F = float32x4_t;
constexpr int kVectors = 8;  // of a step, and floats of a tile

#ifdef __ARM_FEATURE_DOTPROD
constexpr bool kDot = true;
#else
constexpr bool kDot = false;
#endif

B load(const uint8_t* p) { return vreinterpretq_s8_u8(vld1q_u8(p)); }
B mask(B b, int bits) { return vandq_s8(b, vdupq_n_s8(static_cast<int8_t>(bits))); }
template <int kShift>
B shift(B b) {
  return vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(b), kShift));
}

constexpr int block_steps(int) { return 1; }

// How far the codes of vector v are shifted up. Without dot products a lane of int16 takes 16
// products of at most 127 * largest code << up <= 2048.
constexpr int up(int bits, int v) {
  switch (bits) {
    case 1:
      return kDot ? v % 7 : v % 5;
    case 2:
      return kDot ? 2 * (v % 4 % 3) : 2 * (v % 2);
    case 3:
      return kDot && v < 6 ? 3 * (v % 2) : 0;
    default:
      return 0;
  }
}

template <int kBits>
void unpack(const uint8_t* codes, B out[][kVectors]) {
  B* u = out[0];
  if constexpr (kBits == 1) {
    const B b = load(codes);
    if constexpr (kDot) {
      for (int v = 0; v < 7; ++v) u[v] = mask(b, 1 << v);
      u[7] = shift<7>(b);
    } else {
      const B high = shift<5>(b);
      for (int v = 0; v < 5; ++v) u[v] = mask(b, 1 << v);
      for (int v = 5; v < 8; ++v) u[v] = mask(high, 1 << (v - 5));
    }
  } else if constexpr (kBits == 2) {
    for (int half = 0; half < 2; ++half, u += 4) {
      const B b = load(codes + 16 * half);
      u[0] = mask(b, 3);
      u[1] = mask(b, 12);
      if constexpr (kDot) {
        u[2] = mask(b, 48);
        u[3] = shift<6>(b);
      } else {
        const B high = shift<4>(b);
        u[2] = mask(high, 3);
        u[3] = mask(high, 12);
      }
    }
  } else if constexpr (kBits == 3) {
    // Two codes in the low six bits of each byte; the rest of the bytes makes two more.
    const B a = load(codes), b = load(codes + 16), c = load(codes + 32);
    const auto second = [](B x) { return kDot ? mask(x, 56) : mask(shift<3>(x), 7); };
    u[0] = mask(a, 7);
    u[1] = second(a);
    u[2] = mask(b, 7);
    u[3] = second(b);
    u[4] = mask(c, 7);
    u[5] = second(c);
    u[6] = shift<5>(vsriq_n_s8(a, vshlq_n_s8(b, 1), 2));
    u[7] = shift<5>(vsriq_n_s8(c, b, 2));
  } else if constexpr (kBits == 4) {
    for (int v = 0; v < 4; ++v) {
      const B b = load(codes + 16 * v);
      u[2 * v] = mask(b, 15);
      u[2 * v + 1] = shift<4>(b);
    }
  } else {
    for (int v = 0; v < 8; ++v) u[v] = load(codes + 16 * v);
  }
}

template <int kBits>
struct Sums {
  static constexpr int kNarrowSteps = kRegionSteps;
  int32x4_t wide[2 * kVectors];    // 8 bits: two for a vector; dot products: one
  int16x8_t narrow[2 * kVectors];  // up to 4 bits

  Sums() {
    for (int32x4_t& b : wide) b = vdupq_n_s32(0);
    for (int16x8_t& b : narrow) b = vdupq_n_s16(0);
  }

#ifdef __ARM_FEATURE_DOTPROD
  void turn(const uint8_t* codes, const int8_t* q) {
    const B x = vld1q_s8(q);
    step<0>(codes, x);
    step<1>(codes, x);
    step<2>(codes, x);
    step<3>(codes, x);
  }
  template <int kStep>
  void step(const uint8_t* codes, B x) {
    B u[1][kVectors];
    unpack<kBits>(codes + kStep * kTileRows * kBits / 2, u);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) wide[v] = vdotq_laneq_s32(wide[v], u[0][v], x, kStep);
  }
  int32x4_t rows(int v) const { return wide[v]; }
#else
  void turn(const uint8_t* codes, const int8_t* q) {
    constexpr int kBytes = kTileRows * kBits / 2;
#pragma GCC unroll 8
    for (int step = 0; step < kTurnSteps; step += 2) {
      B u[2][kVectors];
      unpack<kBits>(codes + step * kBytes, u);
      unpack<kBits>(codes + (step + 1) * kBytes, u + 1);
      const B x[2] = {four(q + 4 * step), four(q + 4 * step + 4)};
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        if constexpr (kBits == 8) {  // two products fit int16: 2 * 128 * 127
          const int16x8_t low = vmlal_s8(vmull_s8(vget_low_s8(u[0][v]), vget_low_s8(x[0])),
                                         vget_low_s8(u[1][v]), vget_low_s8(x[1]));
          const int16x8_t high = vmlal_s8(vmull_s8(vget_high_s8(u[0][v]), vget_high_s8(x[0])),
                                          vget_high_s8(u[1][v]), vget_high_s8(x[1]));
          wide[2 * v] = vpadalq_s16(wide[2 * v], low);
          wide[2 * v + 1] = vpadalq_s16(wide[2 * v + 1], high);
        } else {
#pragma GCC unroll 2
          for (int s = 0; s < 2; ++s) {
            narrow[2 * v] = vmlal_s8(narrow[2 * v], vget_low_s8(u[s][v]), vget_low_s8(x[s]));
            narrow[2 * v + 1] =
                vmlal_s8(narrow[2 * v + 1], vget_high_s8(u[s][v]), vget_high_s8(x[s]));
          }
        }
      }
    }
  }
  static B four(const int8_t* q) {
    return vreinterpretq_s8_s32(vld1q_dup_s32(reinterpret_cast<const int32_t*>(q)));
  }
  int32x4_t rows(int v) const {
    if constexpr (kBits == 8) return vpaddq_s32(wide[2 * v], wide[2 * v + 1]);
    return vpaddq_s32(vpaddlq_s16(narrow[2 * v]), vpaddlq_s16(narrow[2 * v + 1]));
  }
#endif
  void widen() {}
  void flush(float unit, F* group) const {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const float scale = unit / static_cast<float>(1 << up(kBits, v));
      group[v] = vfmaq_n_f32(group[v], vcvtq_f32_s32(rows(v)), scale);
    }
  }
};

F zero() { return vdupq_n_f32(0); }
void store(float* p, F f) { vst1q_f32(p, f); }
constexpr int kFloats = 4;
#endif

// codes [n_regions * 256 * kBits], q [n_regions * 64], unit [n_regions] -> rows [32]: the sums of
// code * activation, in the layout above.
template <int kBits>
void multiply(const uint8_t* codes, const int8_t* q, const float* unit, int64_t n_regions,
              float* rows) {
  constexpr int64_t kTurnBytes = kTurnSteps * kTileRows * kBits / 2;
  F group[kVectors];
  for (F& f : group) f = zero();
  for (int64_t region = 0; region < n_regions; ++region) {
    Sums<kBits> sums;
    for (int full = 0; full < kRegionSteps / Sums<kBits>::kNarrowSteps; ++full) {
      for (int turn = 0; turn < Sums<kBits>::kNarrowSteps / kTurnSteps; ++turn) {
        for (int64_t line = 0; line < kTurnBytes; line += 64) {
          __builtin_prefetch(codes + line + kPrefetchBytes);
        }
        sums.turn(codes, q);
        codes += kTurnBytes;
        q += 4 * kTurnSteps;
      }
      sums.widen();
    }
    sums.flush(unit[region], group);
  }
  for (int v = 0; v < kVectors; ++v) store(rows + v * kFloats, group[v]);
}

}  // namespace

#define MULTIPLY(bits)                                                                      \
  extern "C" void multiply_##bits(const uint8_t* codes, const int8_t* q, const float* unit, \
                                  int64_t n_regions, float* rows) {                         \
    multiply<bits>(codes, q, unit, n_regions, rows);                                        \
  }
MULTIPLY(1)
MULTIPLY(2)
MULTIPLY(3)
MULTIPLY(4)
MULTIPLY(8)
