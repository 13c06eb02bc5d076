#pragma once

#include <immintrin.h>

#include <cstdint>

#include "simd/avx2.h"

// AVX-512 F, BW, DQ, VL; with VNNI where the compiler is told so: 64 bytes, 16 floats.
// The operations are described in simd/README.md.
namespace tmac {
namespace {

// The weights plus 1 behind an index of ternary tables.
struct TritWeights {
  alignas(64) uint8_t of[6][64];  // by quad and index
  alignas(32) uint8_t at[32];     // the weight of a chunk that each byte of its quads is
  constexpr TritWeights() : of(), at() {
    for (int quad = 0; quad < 6; ++quad) {
      for (int index = 0; index < 64; ++index) {
        const int magnitude = index & 15, sign = index >> (4 + quad % 2) & 1;
        int digits = 13 + (sign != 0 ? -magnitude : magnitude) + 27;
        for (int i = 0; i < quad / 2; ++i) digits /= 3;
        of[quad][index] = static_cast<uint8_t>(digits % 3);
      }
      for (int j = 0; j < 4; ++j) {
        at[4 * quad + j] = static_cast<uint8_t>(3 * (2 * j + quad % 2) + quad / 2);
      }
    }
  }
};
constexpr TritWeights kTritWeights;

struct Avx512 {
  using Narrow = Avx2;
#ifdef __AVX512VBMI__
  using Ternary = Avx512;
#else
  using Ternary = Avx2;
#endif
  using B = __m512i;
  using I = __m512i;
  using F = __m512;
  static constexpr int kBytes = 64;
  static constexpr int kFloats = 16;

  static constexpr int kAccumulators = 16;  // of 32 registers
  static constexpr int kVectorsTogether = 2;

  static B load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static B table(const int8_t* p) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static B low(B b) { return _mm512_and_si512(b, _mm512_set1_epi8(15)); }
#ifdef __GFNI__
  static B high(B b) {  // the bit matrix that shifts a byte right by 4
    return _mm512_gf2p8affine_epi64_epi8(b, _mm512_set1_epi64(0x1020408000000000), 0);
  }
#else
  static B high(B b) { return low(_mm512_srli_epi16(b, 4)); }
#endif
  static B lookup(B t, B index) { return _mm512_shuffle_epi8(t, index); }

  struct Index {
    B low, high;
  };
  // A vector of codes belongs to one chunk.
  struct Planes {
    static constexpr int kChunks = 1;
    template <int kTaken>
    static Index load(const uint8_t* codes, int64_t, int v, int) {
      B b = Avx512::load(codes + v * kBytes);
      asm("" : "+v"(b));  // loaded once, for both uses
      return {Avx512::low(b), Avx512::high(b)};
    }
    static B low_sums(const Index& index, const int8_t* entries, int chunk) {
      return lookup(table(entries + 16 * chunk), index.low);
    }
    static B high_sums(const Index& index, const int8_t* entries, int chunk) {
      return lookup(table(entries + 16 * (4 + chunk)), index.high);
    }
  };
  static B weights(const uint32_t* multipliers, int i) {
    return _mm512_set1_epi32(static_cast<int32_t>(multipliers[i]));
  }
#ifdef __AVX512VNNI__
  // Not the intrinsic: GCC copies accumulators to and fro around it.
  static I dot(I acc, B weights, B sums) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(weights), "v"(sums));
    return acc;
  }
  // Vector 0 holds rows 0-3 8-11 16-19 24-27, vector 1 those between them.
  struct DealtRows {
    alignas(64) static constexpr int64_t kOrder[2][8] = {{0, 1, 8, 9, 2, 3, 10, 11},
                                                         {4, 5, 12, 13, 6, 7, 14, 15}};
    static void deal(F (&v)[2]) {
      const F even = _mm512_shuffle_f32x4(v[0], v[1], 0x88);
      v[1] = _mm512_shuffle_f32x4(v[0], v[1], 0xdd);
      v[0] = even;
    }
    static void gather(F (&v)[2]) {
      const F first = gathered(v, 0);
      v[1] = gathered(v, 1);
      v[0] = first;
    }

   private:
    static F gathered(const F (&v)[2], int i) {
      return _mm512_castsi512_ps(_mm512_permutex2var_epi64(
          _mm512_castps_si512(v[0]), _mm512_load_si512(kOrder[i]), _mm512_castps_si512(v[1])));
    }
  };
  // int32 sums of 32 rows. A dot product takes longer to come out than the next one takes to go in:
  // one token alone needs two chains of them, low and high tables apart.
  template <int kChains>
  struct Dots {
    static constexpr int kAccumulators = 2 * kChains;
    I acc[kChains][2] = {};
    void add_low(int v, B weights, B sums) { acc[0][v] = dot(acc[0][v], weights, sums); }
    void add_high(int v, B weights, B sums) {
      acc[kChains - 1][v] = dot(acc[kChains - 1][v], weights, sums);
    }
    I rows(int v) const {
      return kChains == 1 ? acc[0][v] : _mm512_add_epi32(acc[0][v], acc[kChains - 1][v]);
    }
    I interleaved_rows(int i) const {
      const I order = _mm512_load_si512(DealtRows::kOrder[i]);
      return _mm512_permutex2var_epi64(rows(0), order, rows(1));
    }
  };
  // 16 rows x 4 planes a vector.
  template <int kChains>
  struct QuadDots : Planes, Dots<kChains> {
    using Several = QuadDots<1>;
    static constexpr int kVectors = 2;
    template <int kTaken>
    void add(int v, const Index& index, const int8_t* entries, const uint32_t* multipliers, int c) {
      this->add_low(v, weights(multipliers, c), Planes::low_sums(index, entries, c));
      this->add_high(v, weights(multipliers, 4 + c), Planes::high_sums(index, entries, c));
    }
    I sum(int i) const { return this->rows(i); }
  };
  using Quad = QuadDots<2>;
#else
  using DealtRows = void;
  static I add_pairs(I acc, B weights, B sums) {
    return _mm512_add_epi16(acc, _mm512_maddubs_epi16(weights, sums));
  }
  // 16 rows x 4 planes a vector, as two pairs; bounds as for AVX2.
  struct Quad : Planes {
    using Several = Quad;
    static constexpr int kVectors = 2, kAccumulators = 2;
    I acc[2] = {zero_i(), zero_i()};
    template <int kTaken>
    void add(int v, const Index& index, const int8_t* entries, const uint32_t* multipliers, int c) {
      acc[v] = add_pairs(acc[v], weights(multipliers, c), low_sums(index, entries, c));
      acc[v] = add_pairs(acc[v], weights(multipliers, 4 + c), high_sums(index, entries, c));
    }
    I sum(int i) const { return _mm512_madd_epi16(acc[i], _mm512_set1_epi32(0x00040001)); }
  };
#endif
#ifdef __AVX512VBMI__
  // Rows 0-3 16-19 4-7 20-23 ..., each a byte of the lower and one of the upper half.
  alignas(64) static constexpr uint8_t kRowsOfTwo[64] = {
      0,  32, 1,  33, 2,  34, 3,  35, 16, 48, 17, 49, 18, 50, 19, 51, 4,  36, 5,  37, 6,  38,
      7,  39, 20, 52, 21, 53, 22, 54, 23, 55, 8,  40, 9,  41, 10, 42, 11, 43, 24, 56, 25, 57,
      26, 58, 27, 59, 12, 44, 13, 45, 14, 46, 15, 47, 28, 60, 29, 61, 30, 62, 31, 63};
  // Two chunks at a time: a dot product takes two planes of both, each from a table of its own.
  template <int kChains>
  struct PairDots : Dots<kChains> {
    using Several = PairDots<1>;
    static constexpr int kChunks = 2, kVectors = 2;
    template <int kTaken>
    static Index load(const uint8_t* codes, int64_t stride, int v, int) {
      const B first = Avx512::load(codes);
      const B second = kTaken == 2 ? Avx512::load(codes + stride) : first;
      const B both =
          v == 0 ? _mm512_unpacklo_epi16(first, second) : _mm512_unpackhi_epi16(first, second);
      return table_indices(both, _mm512_set1_epi32(0x10100000));
    }
    template <int kTaken>
    void add(int v, const Index& index, const int8_t* entries, const uint32_t* multipliers, int c) {
      const int unit = c / 2;
      const uint32_t taken = kTaken == 2 ? ~0u : c % 2 == 0 ? 0x0000ffffu : 0xffff0000u;
      this->add_low(v, masked(multipliers[8 + unit], taken),
                    _mm512_permutexvar_epi8(index.low, two_tables(entries + 32 * unit)));
      this->add_high(v, masked(multipliers[10 + unit], taken),
                     _mm512_permutexvar_epi8(index.high, two_tables(entries + 64 + 32 * unit)));
    }
    I sum(int i) const { return this->interleaved_rows(i); }
  };
  using Pair = PairDots<2>;
  // Four chunks at a time, likewise.
  template <int kChains>
  struct SingleDots : Dots<kChains> {
    using Several = SingleDots<1>;
    static constexpr int kChunks = 4, kVectors = 2;
    template <int kTaken>
    static Index load(const uint8_t* codes, int64_t stride, int v, int first) {
      const auto chunk = [&](int c) {
        return codes + (c < first || c >= first + kTaken ? 0 : (c - first) * stride);
      };
      const B both01 = rows_of_two(chunk(0), chunk(1)), both23 = rows_of_two(chunk(2), chunk(3));
      const B all =
          v == 0 ? _mm512_unpacklo_epi16(both01, both23) : _mm512_unpackhi_epi16(both01, both23);
      return table_indices(all, _mm512_set1_epi32(0x30201000));
    }
    template <int kTaken>
    void add(int v, const Index& index, const int8_t* entries, const uint32_t* multipliers, int c) {
      const uint32_t taken = kTaken == 4 ? ~0u : (kTaken == 2 ? 0xffffu : 0xffu) << (8 * c);
      this->add_low(v, masked(multipliers[12], taken),
                    _mm512_permutexvar_epi8(index.low, _mm512_loadu_si512(entries)));
      this->add_high(v, masked(multipliers[13], taken),
                     _mm512_permutexvar_epi8(index.high, _mm512_loadu_si512(entries + 64)));
    }
    I sum(int i) const { return this->rows(i); }

   private:
    // The bytes of a row in two chunks side by side, rows in the order that unpacking restores.
    static B rows_of_two(const uint8_t* first, const uint8_t* second) {
      const B both = second == first + kTileRows
                         ? Avx512::load(first)
                         : _mm512_inserti64x4(_mm512_castsi256_si512(Avx2::load(first)),
                                              Avx2::load(second), 1);
      return _mm512_permutexvar_epi8(_mm512_load_si512(kRowsOfTwo), both);
    }
  };
  using Single = SingleDots<2>;
  // Steps: the bytes of tables 0-3 and of tables 4-7 of all rows, two tables of a row side by side:
  // tables t and t + 2 in the bytes of a word, each with the entries of positive numbers, then
  // those of negative ones.
  struct Trits {
    static constexpr int kSteps = 2, kAccumulators = 1, kEntries = 32, kWords = 4;
    B acc = zero_i();  // int16 sums of a row
    struct Chunk {
      explicit Chunk(const uint8_t* codes) : bytes(codes) {
        const B signs = both_bytes(_mm512_castsi256_si512(Avx2::load(codes)), 0);
        // Bits 0 2 4 6: the signs of tables 0 1 4 5, in the second byte of tables 2 3 6 7; above
        // each the bit that chooses between the two tables of a register.
        selectors = _mm512_gf2p8affine_epi64_epi8(signs, _mm512_set1_epi64(0x0100020010002000), 0);
        selectors = _mm512_mask_gf2p8affine_epi64_epi8(selectors, 0xAAAAAAAAAAAAAAAA, signs,
                                                       _mm512_set1_epi64(0x0400080040008000), 0xAA);
      }
      const uint8_t* bytes;
      B selectors;
    };
    template <int kStep>
    static Index index(const Chunk& chunk) {
      const B b = both_bytes(Avx512::load(chunk.bytes + kTileRows * (1 + 2 * kStep)), 32);
      const B low = kStep == 0 ? _mm512_slli_epi16(chunk.selectors, 4) : chunk.selectors;
      const B high = kStep == 0 ? _mm512_slli_epi16(chunk.selectors, 2)
                                : _mm512_srli_epi16(chunk.selectors, 2);
      constexpr int kChoose = 0xE2;  // b ? a : c
      const B nibble = _mm512_set1_epi8(15), shifted = _mm512_srli_epi16(b, 4);
      return {_mm512_ternarylogic_epi32(b, nibble, low, kChoose),
              _mm512_ternarylogic_epi32(shifted, nibble, high, kChoose)};
    }
    template <int kStep>
    void add(const Index& index, const int8_t* entries, const uint32_t* multipliers) {
      const auto add_two = [&](int i, B b) {
        const B sums = _mm512_permutexvar_epi8(b, _mm512_loadu_si512(entries + 64 * i));
        acc = _mm512_add_epi16(acc, _mm512_maddubs_epi16(weights(multipliers, i), sums));
      };
      add_two(2 * kStep, index.low);
      add_two(2 * kStep + 1, index.high);
    }
    I sum(int i) const {
      return _mm512_cvtepi16_epi32(i == 0 ? _mm512_castsi512_si256(acc)
                                          : _mm512_extracti64x4_epi64(acc, 1));
    }

    // Tables 0 2, 1 3, 4 6, 5 7.
    static void write_tables(const Avx2::W (&pairs)[8], int8_t* out, int64_t chunk_bytes) {
      Avx2::Trits::each_table(pairs, [&](int t, __m256i tables) {
        int8_t* at = out + t / 4 * 128 + t % 2 * 64 + t / 2 % 2 * 32;
        Avx2::write_lanes(tables, at, at + chunk_bytes);
        const __m256i negated = _mm256_sub_epi8(_mm256_setzero_si256(), tables);
        Avx2::write_lanes(negated, at + 16, at + 16 + chunk_bytes);
      });
    }
    static void write_multipliers(Avx2::W m, uint32_t* out) {
      const __m256i order = _mm256_broadcastsi128_si256(
          _mm_setr_epi8(0, 4, 0, 4, 2, 6, 2, 6, 8, 12, 8, 12, 10, 14, 10, 14));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_shuffle_epi8(m, order));
    }

   private:
    // Byte r and byte r + `distance` as word r.
    static B both_bytes(B b, int distance) {
      B order = _mm512_cvtepu8_epi16(_mm256_load_si256(reinterpret_cast<const __m256i*>(kRows)));
      order = _mm512_or_si512(order, _mm512_slli_epi16(order, 8));
      return _mm512_permutexvar_epi8(
          _mm512_add_epi8(order, _mm512_set1_epi16(static_cast<short>(distance << 8))), b);
    }
    alignas(32) static constexpr uint8_t kRows[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10,
                                                      11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
                                                      22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
  };
  // The weights of a chunk plus 1, as dot products take them: quads of a row that are weight i of
  // four even tables, then of four odd ones.
  struct TritDots {
    // Bits 0-3: a magnitude of the row's parts; bit 4: the sign in an even table, bit 5: in an odd
    // one.
    B even[2], odd[2];
    explicit TritDots(const uint8_t* codes) {
      const B order = _mm512_load_si512(kRowsOfTwo), nibble = _mm512_set1_epi8(15);
      const B parts01 = _mm512_permutexvar_epi8(order, Avx512::load(codes + kTileRows));
      const B parts23 = _mm512_permutexvar_epi8(order, Avx512::load(codes + 3 * kTileRows));
      for (int v = 0; v < 2; ++v) {
        const B parts = v == 0 ? _mm512_unpacklo_epi16(parts01, parts23)
                               : _mm512_unpackhi_epi16(parts01, parts23);
        // Bits 2 j and 2 j + 1 of the row's signs, to bits 4 and 5 of byte j.
        const B signs = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x22201e1c02003e3c),
                                                     load_bytes(codes + v * kFloats));
        constexpr int kChoose = 0xE2;  // b ? a : c
        even[v] = _mm512_ternarylogic_epi32(parts, nibble, signs, kChoose);
        odd[v] = _mm512_ternarylogic_epi32(_mm512_srli_epi16(parts, 4), nibble, signs, kChoose);
      }
    }
    template <int kQuad, int kVector>
    B quad() const {
      return _mm512_permutexvar_epi8(kQuad % 2 == 0 ? even[kVector] : odd[kVector],
                                     _mm512_load_si512(kTritWeights.of[kQuad]));
    }
    static B broadcast(const int8_t* q) {
      int32_t four;
      __builtin_memcpy(&four, q, sizeof(four));
      return _mm512_set1_epi32(four);
    }
    // q [96] of a region, and the sum of each chunk's.
    static void write_integers(const I (&q)[6], int8_t* out, int32_t* sums) {
      alignas(64) int8_t bytes[128];
      for (int i = 0; i < 6; ++i) {
        _mm_store_si128(reinterpret_cast<__m128i*>(bytes + 16 * i), _mm512_cvtepi32_epi8(q[i]));
      }
      for (int c = 0; c < 4; ++c) {
        const __m256i chunk = _mm256_maskz_loadu_epi8(0xffffff, bytes + 24 * c);
        const __m256i order = _mm256_load_si256(reinterpret_cast<const __m256i*>(kTritWeights.at));
        _mm256_mask_storeu_epi8(out + 24 * c, 0xffffff, _mm256_permutexvar_epi8(order, chunk));
        const __m256i fours =
            _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), chunk);
        const __m128i two =
            _mm_add_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
        const __m128i one = _mm_add_epi32(two, _mm_unpackhi_epi64(two, two));
        sums[c] = _mm_cvtsi128_si32(one) + _mm_extract_epi32(one, 1);
      }
    }
  };
  // Which of up to four tables side by side a byte looks up (`tables`), and which entry.
  static Index table_indices(B b, B tables) {
    constexpr int kAndOr = 0xEA;  // (a & b) | c
    const B nibble = _mm512_set1_epi8(15);
    return {_mm512_ternarylogic_epi32(b, nibble, tables, kAndOr),
            _mm512_ternarylogic_epi32(_mm512_srli_epi16(b, 4), nibble, tables, kAndOr)};
  }
  static B two_tables(const int8_t* p) {
    return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static B masked(uint32_t weights, uint32_t taken) {
    return _mm512_set1_epi32(static_cast<int32_t>(weights & taken));
  }
#else
#ifdef __AVX512VNNI__
  // 32 rows x 2 planes a vector: the two tables of a row side by side make a dot product of four.
  struct Pair : Planes, Dots<2> {
    using Several = Pair;
    static constexpr int kVectors = 1;
    template <int kTaken>
    void add(int, const Index& index, const int8_t* entries, const uint32_t* multipliers, int c) {
      const B low_tables = low_sums(index, entries, c), high_tables = high_sums(index, entries, c);
      const B w = weights(multipliers, 8 + c),
              first = _mm512_unpacklo_epi16(low_tables, high_tables),
              second = _mm512_unpackhi_epi16(low_tables, high_tables);
      if (c % 2 == 0) {
        add_low(0, w, first);
        add_low(1, w, second);
      } else {
        add_high(0, w, first);
        add_high(1, w, second);
      }
    }
    I sum(int i) const { return interleaved_rows(i); }
  };
#else
  // 32 rows x 2 planes a vector.
  struct Pair : Planes {
    using Several = Pair;
    static constexpr int kVectors = 1, kAccumulators = 1;
    I acc = zero_i();
    template <int kTaken>
    void add(int, const Index& index, const int8_t* entries, const uint32_t* multipliers, int c) {
      acc = add_pairs(acc, weights(multipliers, c), low_sums(index, entries, c));
      acc = add_pairs(acc, weights(multipliers, 4 + c), high_sums(index, entries, c));
    }
    I sum(int i) const {
      return _mm512_cvtepi16_epi32(i == 0 ? _mm512_castsi512_si256(acc)
                                          : _mm512_extracti64x4_epi64(acc, 1));
    }
  };
#endif
  // A tile's 32 rows x 1 plane are half a vector.
  struct Single : Avx2::Single {
    using Several = Single;
    I sum(int i) const {
      const auto rows = [i](__m256i a) {
        return i == 0 ? _mm256_castsi256_si128(a) : _mm256_extracti128_si256(a, 1);
      };
      return _mm512_cvtepi16_epi32(_mm256_set_m128i(rows(acc[1]), rows(acc[0])));
    }
  };
#endif
  // Words 0-7: the planes of table 0-7. With VBMI 8-11: two planes of chunks 0 1 | 2 3, low tables,
  // then high ones; 12, 13: one plane of all chunks. Else as for AVX2.
  static void write_multipliers(const int32_t* m, uint32_t* out) {
#ifdef __AVX512VBMI__
    const __m256i tables = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(m));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                        _mm256_mullo_epi32(tables, _mm256_set1_epi32(0x08040201)));
    // Bytes of the tables: 01 23 45 67, doubled for the second plane.
    const __m256i two = _mm256_mullo_epi32(tables, _mm256_set1_epi32(0x0201));
    const __m128i words = _mm256_cvtepi32_epi16(two), bytes = _mm256_cvtepi32_epi8(tables);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 8), words);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out + 12), bytes);
#else
    Avx2::write_multipliers(m, out);
#endif
  }

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
  static float largest(F a) {
    return Avx2::largest(_mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1)));
  }

  static void prefetch(const uint8_t* p) { Avx2::prefetch(p); }
  static void prefetch_near(const uint8_t* p) { Avx2::prefetch_near(p); }

  // Products of unpacked codes (kernels/multiply_row_block.inl).

  static I set_i(int32_t x) { return _mm512_set1_epi32(x); }
  static I add_i(I a, I b) { return _mm512_add_epi32(a, b); }
  static I xor_i(I a, I b) { return _mm512_xor_si512(a, b); }
  static I and_i(I a, I b) { return _mm512_and_si512(a, b); }
  template <int kShift>
  static I shift_left(I a) {
    return _mm512_slli_epi32(a, kShift);
  }
  template <int kShift>
  static I shift_right(I a) {
    return _mm512_srli_epi32(a, kShift);
  }
  static I load_i(const uint8_t* p) { return load(p); }
  static I load_words(const uint8_t* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static I load_bytes(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  template <typename T>
  static void opaque(T& x) {
    asm volatile("" : "+v"(x));
  }

  static constexpr int kDotVectors = 2;
#ifdef __AVX512VNNI__
  static constexpr int kDotTokens = 12;
  static I multiply_fours(I sum, I codes, I q) { return dot(sum, codes, q); }
  template <int kBits, bool kCentred>
  using Dot = FoursDot<Avx512, kBits, kCentred>;
#else
  static constexpr int kDotTokens = 6;
  static I add_words(I a, I b) { return _mm512_add_epi16(a, b); }
  static I multiply_pairs(I codes, I q) { return _mm512_maddubs_epi16(codes, q); }
  static I add_to_words(I sum, I codes, I q) {
    I products;
    asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0"
        : "+v"(sum), "=&v"(products)
        : "v"(codes), "v"(q));
    return sum;
  }
  static I multiply_words(I a, I b) { return _mm512_madd_epi16(a, b); }
  static I set_words(int16_t x) { return _mm512_set1_epi16(x); }
  template <int kShift>
  static I shift_words_left(I a) {
    return _mm512_slli_epi16(a, kShift);
  }
  template <int kShift>
  static I shift_words_right(I a) {
    return _mm512_srai_epi16(a, kShift);
  }
  static void store(uint8_t* p, I a) { _mm512_storeu_si512(p, a); }
  template <int kBits, bool kCentred>
  using Dot = PairsDot<Avx512, kBits, kCentred>;
#endif
};

}  // namespace
}  // namespace tmac
