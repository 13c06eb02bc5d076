#pragma once

#include <immintrin.h>

#include <cstdint>

// AVX2, FMA and F16C: 32 bytes, 8 floats. The operations are described in simd/README.md.
namespace tmac {
namespace {

struct Avx2 {
  using Narrow = Avx2;
  using B = __m256i;
  using I = __m256i;
  using F = __m256;
  static constexpr int kBytes = 32;
  static constexpr int kFloats = 8;

  static B load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const B*>(p)); }
  static B table(const int8_t* p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static B low(B b) { return _mm256_and_si256(b, _mm256_set1_epi8(15)); }
  static B high(B b) { return low(_mm256_srli_epi16(b, 4)); }
  static B lookup(B t, B index) { return _mm256_shuffle_epi8(t, index); }

  // 8 rows x 4 planes a vector. A lane takes 4 p2 + 8 p3: |.| <= 12 * 127 = 1524 a table, so int16
  // holds 21 tables; a block has 4.
  struct Quad {
    I acc = _mm256_setzero_si256();
    void add(B b) {
      acc = _mm256_add_epi16(acc, _mm256_maddubs_epi16(_mm256_set1_epi32(0x08040201), b));
    }
    I sum(int) const { return _mm256_madd_epi16(acc, _mm256_set1_epi16(1)); }
  };
  // 16 rows x 2 planes a vector: |p0 + 2 p1| <= 381 a table.
  struct Pair {
    I acc = _mm256_setzero_si256();
    void add(B b) {
      acc = _mm256_add_epi16(acc, _mm256_maddubs_epi16(_mm256_set1_epi16(0x0201), b));
    }
    I sum(int i) const {
      return _mm256_cvtepi16_epi32(i == 0 ? _mm256_castsi256_si128(acc)
                                          : _mm256_extracti128_si256(acc, 1));
    }
  };
  // 32 rows x 1 plane a vector, both tables of a chunk at once: |.| <= 254 a chunk.
  using B1 = B;
  static constexpr int kBytes1 = 32;
  static B1 load1(const uint8_t* p) { return load(p); }
  static B1 narrow(B b) { return b; }
  struct Single {
    I acc[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};  // rows 0-7 16-23, 8-15 24-31
    void add(B1 even, B1 odd) {
      const B ones = _mm256_set1_epi8(1);
      acc[0] =
          _mm256_add_epi16(acc[0], _mm256_maddubs_epi16(ones, _mm256_unpacklo_epi8(even, odd)));
      acc[1] =
          _mm256_add_epi16(acc[1], _mm256_maddubs_epi16(ones, _mm256_unpackhi_epi8(even, odd)));
    }
    I sum(int i) const {
      const I a = acc[i & 1];
      return _mm256_cvtepi16_epi32(i < 2 ? _mm256_castsi256_si128(a)
                                         : _mm256_extracti128_si256(a, 1));
    }
  };

  static I zero_i() { return _mm256_setzero_si256(); }
  template <int kShift>
  static I add_shifted(I a, I b) {
    return _mm256_add_epi32(a, _mm256_slli_epi32(b, kShift));
  }
  static I sub_i(I a, I b) { return _mm256_sub_epi32(a, b); }
  static F to_float(I a) { return _mm256_cvtepi32_ps(a); }
  static I round_to_int(F a) { return _mm256_cvtps_epi32(a); }
  static I exponent_of_two(I n) {
    return _mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23);
  }
  static F as_float(I a) { return _mm256_castsi256_ps(a); }
  static void store_i(int32_t* p, I a) { _mm256_storeu_si256(reinterpret_cast<I*>(p), a); }

  static F set(float x) { return _mm256_set1_ps(x); }
  static F load_f(const float* p) { return _mm256_loadu_ps(p); }
  static void store_f(float* p, F f) { _mm256_storeu_ps(p, f); }
  static F load_half(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void store_half(uint16_t* p, F f) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT));
  }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static float sum(F a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }

  static void prefetch(const uint8_t* p) {
    _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
  }

  // entries [8 upper entries, 8 tables] -> 8 tables of 16 bytes, `stride` apart.
  static void write_tables(const int32_t (*entries)[8], int8_t* out, int64_t stride) {
    const auto row = [&](int e) { return load(reinterpret_cast<const uint8_t*>(entries[e])); };
    // Four entries of every table as bytes: lane 0 tables 0-3, lane 1 tables 4-7.
    const auto four = [&](int e) {
      const B by_entry = _mm256_packs_epi16(_mm256_packs_epi32(row(e), row(e + 1)),
                                            _mm256_packs_epi32(row(e + 2), row(e + 3)));
      return _mm256_shuffle_epi8(
          by_entry, _mm256_broadcastsi128_si256(
                        _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)));
    };
    const B lower = four(0), upper = four(4);
    const B mirror = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(7, 6, 5, 4, 3, 2, 1, 0, 15, 14, 13, 12, 11, 10, 9, 8));
    const auto write_two = [&](B halves, int t) {  // entries 8-15 of tables t, t+1 | t+4, t+5
      const B negated =
          _mm256_sub_epi8(_mm256_setzero_si256(), _mm256_shuffle_epi8(halves, mirror));
      write(_mm256_unpacklo_epi64(negated, halves), out + t * stride, 4 * stride);
      write(_mm256_unpackhi_epi64(negated, halves), out + (t + 1) * stride, 4 * stride);
    };
    write_two(_mm256_unpacklo_epi32(lower, upper), 0);
    write_two(_mm256_unpackhi_epi32(lower, upper), 2);
  }

 private:
  static void write(B b, int8_t* out, int64_t distance) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(b));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + distance), _mm256_extracti128_si256(b, 1));
  }
};

}  // namespace
}  // namespace tmac
