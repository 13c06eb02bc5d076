#pragma once

#include <immintrin.h>

#include <cstdint>

#include "simd/avx2.h"

// AVX-512 F, BW, DQ, VL; with VNNI where the compiler is told so: 64 bytes, 16 floats.
// The operations are described in simd/README.md.
namespace tmac {
namespace {

struct Avx512 {
  using Narrow = Avx2;
  using B = __m512i;
  using I = __m512i;
  using F = __m512;
  static constexpr int kBytes = 64;
  static constexpr int kFloats = 16;

  static B load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static B table(const int8_t* p) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static B low(B b) { return _mm512_and_si512(b, _mm512_set1_epi8(15)); }
  static B high(B b) { return low(_mm512_srli_epi16(b, 4)); }
  static B lookup(B t, B index) { return _mm512_shuffle_epi8(t, index); }

  // 16 rows x 4 planes a vector.
  struct Quad {
    I acc = _mm512_setzero_si512();
#ifdef __AVX512VNNI__
    void add(B b) { acc = _mm512_dpbusd_epi32(acc, _mm512_set1_epi32(0x08040201), b); }
    I sum(int) const { return acc; }
#else
    // |4 p2 + 8 p3| <= 12 * 127 = 1524 a table: int16 holds 21 tables; a block has 4.
    void add(B b) {
      acc = _mm512_add_epi16(acc, _mm512_maddubs_epi16(_mm512_set1_epi32(0x08040201), b));
    }
    I sum(int) const { return _mm512_madd_epi16(acc, _mm512_set1_epi16(1)); }
#endif
  };
  // 32 rows x 2 planes a vector: |p0 + 2 p1| <= 381 a table.
  struct Pair {
    I acc = _mm512_setzero_si512();
    void add(B b) {
      acc = _mm512_add_epi16(acc, _mm512_maddubs_epi16(_mm512_set1_epi16(0x0201), b));
    }
    I sum(int i) const {
      return _mm512_cvtepi16_epi32(i == 0 ? _mm512_castsi512_si256(acc)
                                          : _mm512_extracti64x4_epi64(acc, 1));
    }
  };
  // A tile's 32 rows x 1 plane are half a vector. |.| <= 254 a chunk.
  using B1 = __m256i;
  static constexpr int kBytes1 = 32;
  static B1 load1(const uint8_t* p) { return Avx2::load(p); }
  static B1 low(B1 b) { return Avx2::low(b); }
  static B1 high(B1 b) { return Avx2::high(b); }
  static B1 lookup(B1 t, B1 index) { return Avx2::lookup(t, index); }
  static B1 narrow(B b) { return _mm512_castsi512_si256(b); }
  struct Single {
    I acc = _mm512_setzero_si512();  // 32 rows, int16
    void add(B1 even, B1 odd) {
      acc = _mm512_add_epi16(
          acc, _mm512_add_epi16(_mm512_cvtepi8_epi16(even), _mm512_cvtepi8_epi16(odd)));
    }
    I sum(int i) const {
      return _mm512_cvtepi16_epi32(i == 0 ? _mm512_castsi512_si256(acc)
                                          : _mm512_extracti64x4_epi64(acc, 1));
    }
  };

  static I zero_i() { return _mm512_setzero_si512(); }
  template <int kShift>
  static I add_shifted(I a, I b) {
    return _mm512_add_epi32(a, _mm512_slli_epi32(b, kShift));
  }
  static I sub_i(I a, I b) { return _mm512_sub_epi32(a, b); }
  static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  static I round_to_int(F a) { return _mm512_cvtps_epi32(a); }
  static I exponent_of_two(I n) {
    return _mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23);
  }
  static F as_float(I a) { return _mm512_castsi512_ps(a); }
  static void store_i(int32_t* p, I a) { _mm512_storeu_si512(p, a); }

  static F set(float x) { return _mm512_set1_ps(x); }
  static F load_f(const float* p) { return _mm512_loadu_ps(p); }
  static void store_f(float* p, F f) { _mm512_storeu_ps(p, f); }
  static F load_half(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void store_half(uint16_t* p, F f) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT));
  }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static float sum(F a) {
    return Avx2::sum(_mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1)));
  }

  static void prefetch(const uint8_t* p) { Avx2::prefetch(p); }
  static void write_tables(const int32_t (*entries)[8], int8_t* out, int64_t stride) {
    Avx2::write_tables(entries, out, stride);
  }
};

}  // namespace
}  // namespace tmac
