#pragma once

#include <immintrin.h>

#include <cstdint>

#include "layout/lut.h"
#include "simd/x86_dot.h"

// AVX2, FMA and F16C; with the VNNI instructions of 256 bits where the compiler is told so: 32
// bytes, 8 floats. The operations are described in simd/README.md.
#if defined(__AVXVNNI__) || (defined(__AVX512VNNI__) && defined(__AVX512VL__))
#define TMAC_AVX2_DOT
#endif

namespace tmac {
namespace {

struct Avx2 {
  using Narrow = Avx2;
  using Ternary = Avx2;
  using DealtRows = void;
  using B = __m256i;
  using I = __m256i;
  using W = __m256i;
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

  static constexpr int kAccumulators = 8;  // of 16 registers
  static constexpr int kVectorsTogether = 1;

  struct Index {
    B low, high;
  };
  // What all sets share: a vector of codes belongs to one chunk.
  struct Planes {
    static constexpr int kChunks = 1;
    template <int kTaken>
    static Index load(const uint8_t* codes, int64_t, int v, int) {
      B b = Avx2::load(codes + v * kBytes);
      asm("" : "+x"(b));  // loaded once, for both uses
      return {Avx2::low(b), Avx2::high(b)};
    }
    static B low_sums(const Index& index, const int8_t* entries, int chunk) {
      return lookup(table(entries + 16 * chunk), index.low);
    }
    static B high_sums(const Index& index, const int8_t* entries, int chunk) {
      return lookup(table(entries + 16 * (4 + chunk)), index.high);
    }
    static B weights(const uint32_t* multipliers, int i) {
      return _mm256_set1_epi32(static_cast<int32_t>(multipliers[i]));
    }
  };
#ifdef TMAC_AVX2_DOT
  // acc + 4 products of unsigned and signed bytes a lane.
  static I dot(I acc, B a, B b) {
#ifdef __AVXVNNI__
    return _mm256_dpbusd_avx_epi32(acc, a, b);
#else
    return _mm256_dpbusd_epi32(acc, a, b);
#endif
  }
  // 8 rows x 4 planes a vector.
  struct Quad : Planes {
    using Several = Quad;
    static constexpr int kVectors = 4, kAccumulators = 4;
    I acc[4] = {zero_i(), zero_i(), zero_i(), zero_i()};
    template <int kTaken>
    void add(int v, const Index& index, const int8_t* entries, const uint32_t* multipliers, int c) {
      acc[v] = dot(acc[v], weights(multipliers, c), low_sums(index, entries, c));
      acc[v] = dot(acc[v], weights(multipliers, 4 + c), high_sums(index, entries, c));
    }
    I sum(int i) const { return acc[i]; }
  };
  // 16 rows x 2 planes a vector: the two tables of a row side by side make a dot product of four.
  struct Pair : Planes {
    using Several = Pair;
    static constexpr int kVectors = 2, kAccumulators = 4;
    I acc[4] = {zero_i(), zero_i(), zero_i(), zero_i()};  // rows 0-3 8-11, 4-7 12-15, ...
    template <int kTaken>
    void add(int v, const Index& index, const int8_t* entries, const uint32_t* multipliers, int c) {
      const B low = low_sums(index, entries, c), high = high_sums(index, entries, c);
      const B w = weights(multipliers, 8 + c);
      acc[2 * v] = dot(acc[2 * v], w, _mm256_unpacklo_epi16(low, high));
      acc[2 * v + 1] = dot(acc[2 * v + 1], w, _mm256_unpackhi_epi16(low, high));
    }
    I sum(int i) const {
      const I a = acc[i & 2], b = acc[i | 1];
      return i % 2 == 0 ? _mm256_permute2x128_si256(a, b, 0x20)
                        : _mm256_permute2x128_si256(a, b, 0x31);
    }
  };
#else
  // 8 rows x 4 planes a vector, as two pairs: a lane takes m (p0 + 2 p1), which int16 holds for the
  // tables of a region (layout/lut.h).
  struct Quad : Planes {
    using Several = Quad;
    static constexpr int kVectors = 4, kAccumulators = 4;
    I acc[4] = {zero_i(), zero_i(), zero_i(), zero_i()};
    template <int kTaken>
    void add(int v, const Index& index, const int8_t* entries, const uint32_t* multipliers, int c) {
      acc[v] = add_pairs(acc[v], weights(multipliers, c), low_sums(index, entries, c));
      acc[v] = add_pairs(acc[v], weights(multipliers, 4 + c), high_sums(index, entries, c));
    }
    I sum(int i) const { return _mm256_madd_epi16(acc[i], _mm256_set1_epi32(0x00040001)); }
  };
  // 16 rows x 2 planes a vector, with the same bound.
  struct Pair : Planes {
    using Several = Pair;
    static constexpr int kVectors = 2, kAccumulators = 2;
    I acc[2] = {zero_i(), zero_i()};
    template <int kTaken>
    void add(int v, const Index& index, const int8_t* entries, const uint32_t* multipliers, int c) {
      acc[v] = add_pairs(acc[v], weights(multipliers, c), low_sums(index, entries, c));
      acc[v] = add_pairs(acc[v], weights(multipliers, 4 + c), high_sums(index, entries, c));
    }
    I sum(int i) const { return widen(acc[i / 2], i % 2); }
  };
#endif
  // 32 rows x 1 plane a vector, both tables of a chunk at once.
  struct Single : Planes {
    using Several = Single;
    static constexpr int kVectors = 1, kAccumulators = 2;
    I acc[2] = {zero_i(), zero_i()};  // rows 0-7 16-23, 8-15 24-31
    template <int kTaken>
    void add(int, const Index& index, const int8_t* entries, const uint32_t* multipliers, int c) {
      const B low = low_sums(index, entries, c), high = high_sums(index, entries, c);
      const B w = weights(multipliers, 12 + c);
      acc[0] = add_pairs(acc[0], w, _mm256_unpacklo_epi8(low, high));
      acc[1] = add_pairs(acc[1], w, _mm256_unpackhi_epi8(low, high));
    }
    I sum(int i) const { return widen(acc[i % 2], i / 2); }
  };
  // Steps: the bytes of tables 6 7, 4 5, 2 3, 0 1 of all rows. A sign takes effect in bit 7, and
  // needs another bit set, or the product is 0.
  struct Trits {
    static constexpr int kSteps = 4, kAccumulators = 2, kEntries = 16, kWords = 4;
    I acc[2] = {zero_i(), zero_i()};  // as for a Single
    struct Chunk {
      explicit Chunk(const uint8_t* codes) : bytes(codes), signs(with_bit0(Avx2::load(codes))) {}
      const uint8_t* bytes;
      B signs;  // doubled from table to table
    };
    struct Index {
      B low, low_signs, high, high_signs;
    };
    template <int kStep>
    static Index index(Chunk& chunk) {
      const B b = Avx2::load(chunk.bytes + kTileRows * (kSteps - kStep));
      const B high_signs = chunk.signs;
      const B low_signs = kStep + 1 == kSteps
                              ? with_bit0(_mm256_slli_epi16(Avx2::load(chunk.bytes), 7))
                              : _mm256_add_epi8(high_signs, high_signs);
      chunk.signs = _mm256_add_epi8(low_signs, low_signs);
      return {Avx2::low(b), low_signs, Avx2::high(b), high_signs};
    }
    template <int kStep>
    void add(const Index& index, const int8_t* entries, const uint32_t* multipliers) {
      constexpr int kPair = kSteps - 1 - kStep;
      const B low =
          _mm256_sign_epi8(lookup(table(entries + 32 * kPair), index.low), index.low_signs);
      const B high =
          _mm256_sign_epi8(lookup(table(entries + 32 * kPair + 16), index.high), index.high_signs);
      const B w = Planes::weights(multipliers, kPair);
      acc[0] = add_pairs(acc[0], w, _mm256_unpacklo_epi8(low, high));
      acc[1] = add_pairs(acc[1], w, _mm256_unpackhi_epi8(low, high));
    }
    I sum(int i) const { return widen(acc[i % 2], i / 2); }

    static void write_tables(const W (&pairs)[8], int8_t* out, int64_t chunk_bytes) {
      each_table(pairs, [&](int t, B tables) {
        write_lanes(tables, out + kEntries * t, out + kEntries * t + chunk_bytes);
      });
    }
    // Words 0-3: tables 0 1, 2 3, 4 5, 6 7.
    static void write_multipliers(W m, uint32_t* out) {
      const B order = _mm256_broadcastsi128_si256(
          _mm_setr_epi8(0, 2, 0, 2, 4, 6, 4, 6, 8, 10, 8, 10, 12, 14, 12, 14));
      _mm256_storeu_si256(reinterpret_cast<I*>(out), _mm256_shuffle_epi8(m, order));
    }
    // Calls visit(t, table t of both chunks) for 8 tables, whose entries 2 i and 2 i + 1 are the
    // bytes of word t of pairs[i].
    template <typename Visit>
    static void each_table(const W (&pairs)[8], const Visit& visit) {
      for (int half = 0; half < 2; ++half) {  // tables 0-3, 4-7
        B fours[4];                           // 4 entries of tables 0 1 | 2 3, 8 entries of each
        for (int i = 0; i < 4; i += 2) {
          const B first = half == 0 ? _mm256_unpacklo_epi16(pairs[2 * i], pairs[2 * i + 1])
                                    : _mm256_unpackhi_epi16(pairs[2 * i], pairs[2 * i + 1]);
          const B second = half == 0 ? _mm256_unpacklo_epi16(pairs[2 * i + 2], pairs[2 * i + 3])
                                     : _mm256_unpackhi_epi16(pairs[2 * i + 2], pairs[2 * i + 3]);
          fours[i] = _mm256_unpacklo_epi32(first, second);
          fours[i + 1] = _mm256_unpackhi_epi32(first, second);
        }
        for (int i = 0; i < 2; ++i) {
          visit(4 * half + 2 * i, _mm256_unpacklo_epi64(fours[i], fours[i + 2]));
          visit(4 * half + 2 * i + 1, _mm256_unpackhi_epi64(fours[i], fours[i + 2]));
        }
      }
    }

   private:
    static B with_bit0(B b) { return _mm256_or_si256(b, _mm256_set1_epi8(1)); }
  };
  using TritDots = void;
  static I add_pairs(I acc, B weights, B sums) {
    return _mm256_add_epi16(acc, _mm256_maddubs_epi16(weights, sums));
  }
  static I widen(I a, int half) {
    return _mm256_cvtepi16_epi32(half == 0 ? _mm256_castsi256_si128(a)
                                           : _mm256_extracti128_si256(a, 1));
  }
  // Words 0-7: the planes of table 0-7; 8-11: two planes of both tables of chunk 0-3; 12-15: one.
  static void write_multipliers(const int32_t* m, uint32_t* out) {
#ifdef TMAC_AVX2_DOT
    constexpr int32_t kPlanes = 0x08040201;
#else
    constexpr int32_t kPlanes = 0x02010201;
#endif
    const I tables = _mm256_loadu_si256(reinterpret_cast<const I*>(m));
    _mm256_storeu_si256(reinterpret_cast<I*>(out),
                        _mm256_mullo_epi32(tables, _mm256_set1_epi32(kPlanes)));
    const __m128i low = _mm256_castsi256_si128(tables), high = _mm256_extracti128_si256(tables, 1);
    const __m128i both = _mm_or_si128(low, _mm_slli_epi32(high, 16));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 8),
                     _mm_or_si128(both, _mm_slli_epi32(both, 9)));
    const __m128i bytes = _mm_or_si128(low, _mm_slli_epi32(high, 8));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 12),
                     _mm_or_si128(bytes, _mm_slli_epi32(bytes, 16)));
  }

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
  static float largest(F a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }
  static float lane(F a) { return _mm256_cvtss_f32(a); }
  template <int kDistance>
  static F swap(F a) {
    if constexpr (kDistance == 4) return _mm256_permute2f128_ps(a, a, 1);
    return _mm256_permute_ps(a, kDistance == 2 ? 0x4e : 0xb1);
  }
  static uint32_t equal_lanes(F a, F b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)));
  }

  static void prefetch(const uint8_t* p) {
    _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1);
  }
  static void prefetch_near(const uint8_t* p) {
    _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
  }

  static void deal_to_tables(const float* x, float (*lanes)[8]) {
    const F c0 = load_f(x), c1 = load_f(x + 8), c2 = load_f(x + 16), c3 = load_f(x + 24);
    const F low01 = _mm256_unpacklo_ps(c0, c1), high01 = _mm256_unpackhi_ps(c0, c1);
    const F low23 = _mm256_unpacklo_ps(c2, c3), high23 = _mm256_unpackhi_ps(c2, c3);
    store_f(lanes[0], _mm256_shuffle_ps(low01, low23, 0x44));
    store_f(lanes[1], _mm256_shuffle_ps(low01, low23, 0xEE));
    store_f(lanes[2], _mm256_shuffle_ps(high01, high23, 0x44));
    store_f(lanes[3], _mm256_shuffle_ps(high01, high23, 0xEE));
  }
  static void deal_threes(const float* x, F (&lanes)[kTernaryTableWeights]) {
    const F v0 = load_f(x), v1 = load_f(x + 8), v2 = load_f(x + 16);
    // x[3 t + i] stands in lane (3 t + i) % 8 of one of the three vectors.
    const auto deal = [](F a, F b, F c, int first) {
      const I order = _mm256_and_si256(
          _mm256_add_epi32(_mm256_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21), _mm256_set1_epi32(first)),
          _mm256_set1_epi32(7));
      return _mm256_permutevar8x32_ps(_mm256_blend_ps(_mm256_blend_ps(a, b, 0x92), c, 0x24), order);
    };
    lanes[0] = deal(v0, v1, v2, 0);  // lanes 0 3 6, 1 4 7, 2 5
    lanes[1] = deal(v2, v0, v1, 1);  // lanes 1 4 7, 2 5, 0 3 6
    lanes[2] = deal(v1, v2, v0, 2);  // lanes 2 5, 0 3 6, 1 4 7
  }
  static void write_tables(const int32_t (*entries)[8], int8_t* out) {
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
      write(_mm256_unpacklo_epi64(negated, halves), out + 16 * t);
      write(_mm256_unpackhi_epi64(negated, halves), out + 16 * (t + 1));
    };
    write_two(_mm256_unpacklo_epi32(lower, upper), 0);
    write_two(_mm256_unpackhi_epi32(lower, upper), 2);
  }

  // Products of unpacked codes (kernels/multiply_row_block.inl).

  static I set_i(int32_t x) { return _mm256_set1_epi32(x); }
  static I add_i(I a, I b) { return _mm256_add_epi32(a, b); }
  static I xor_i(I a, I b) { return _mm256_xor_si256(a, b); }
  static I and_i(I a, I b) { return _mm256_and_si256(a, b); }
  template <int kShift>
  static I shift_left(I a) {
    return _mm256_slli_epi32(a, kShift);
  }
  template <int kShift>
  static I shift_right(I a) {
    return _mm256_srli_epi32(a, kShift);
  }
  static I load_i(const uint8_t* p) { return load(p); }
  static I load_words(const uint8_t* p) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static I load_bytes(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  template <typename T>
  static void opaque(T& x) {
    asm volatile("" : "+x"(x));
  }

  static constexpr int kDotVectors = 2;
  static I sub_words(I a, I b) { return _mm256_sub_epi16(a, b); }
  static I add_words(I a, I b) { return _mm256_add_epi16(a, b); }
  static I multiply_pairs(I codes, I q) { return _mm256_maddubs_epi16(codes, q); }
  // sum + multiply_pairs(codes, q). Not the intrinsics: GCC copies sums to and fro around them.
  static I add_to_words(I sum, I codes, I q) {
    I products;
    asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0"
        : "+x"(sum), "=&x"(products)
        : "x"(codes), "x"(q));
    return sum;
  }
  static I multiply_words(I a, I b) { return _mm256_madd_epi16(a, b); }
  static I set_words(int16_t x) { return _mm256_set1_epi16(x); }
  template <int kShift>
  static I shift_words_left(I a) {
    return _mm256_slli_epi16(a, kShift);
  }
  template <int kShift>
  static I shift_words_right(I a) {
    return _mm256_srai_epi16(a, kShift);
  }
  template <int kShift>
  static I shift_words_right_unsigned(I a) {
    return _mm256_srli_epi16(a, kShift);
  }
  static I words(I a, I b) {
    return _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), _MM_SHUFFLE(3, 1, 2, 0));
  }
  static I join_bytes(I low, I high) {
    return _mm256_or_si256(_mm256_and_si256(low, set_words(255)), shift_words_left<8>(high));
  }
  static void write_lanes(B b, int8_t* low, int8_t* high) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(low), _mm256_castsi256_si128(b));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(high), _mm256_extracti128_si256(b, 1));
  }
  static void store(uint8_t* p, I a) { _mm256_storeu_si256(reinterpret_cast<I*>(p), a); }
#ifdef TMAC_AVX2_DOT
  static constexpr int kDotTokens = 6;
  static I multiply_fours(I sum, I codes, I q) { return dot(sum, codes, q); }
  template <int kBits, bool kCentred>
  using Dot = FoursDot<Avx2, kBits, kCentred>;
#else
  static constexpr int kDotTokens = 4;
  template <int kBits, bool kCentred>
  using Dot = PairsDot<Avx2, kBits, kCentred>;
#endif

 private:
  static void write(B b, int8_t* out) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(b));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 64), _mm256_extracti128_si256(b, 1));
  }
};

}  // namespace
}  // namespace tmac
