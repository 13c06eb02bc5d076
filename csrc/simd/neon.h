#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "simd/scalar.h"

// NEON of Armv8.0; with the instructions for dot products and for matrix products where the
// compiler is told so: 16 bytes, 4 floats. The operations are described in simd/README.md.
namespace tmac {
namespace {

struct Neon {
  using Narrow = Neon;
  using Ternary = Neon;
  using DealtRows = void;
  using B = int8x16_t;
  using I = int32x4_t;
  using W = int16x8_t;
  using F = float32x4_t;
  static constexpr int kBytes = 16;
  static constexpr int kFloats = 4;

  static B load(const uint8_t* p) { return vreinterpretq_s8_u8(vld1q_u8(p)); }
  static B table(const int8_t* p) { return vld1q_s8(p); }
  static B low(B b) { return vandq_s8(b, vdupq_n_s8(15)); }
  static B high(B b) { return vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(b), 4)); }
  static B lookup(B t, B index) { return vqtbl1q_s8(t, vreinterpretq_u8_s8(index)); }

  static constexpr int kAccumulators = 16;  // of 32 registers
  static constexpr int kVectorsTogether = 1;

  struct Index {
    B low, high;
  };
  struct Planes {
    static constexpr int kChunks = 1;
    template <int kTaken>
    static Index load(const uint8_t* codes, int64_t, int v, int) {
      const B b = Neon::load(codes + v * kBytes);
      return {Neon::low(b), Neon::high(b)};
    }
    static B low_sums(const Index& index, const int8_t* entries, int chunk) {
      return lookup(table(entries + 16 * chunk), index.low);
    }
    static B high_sums(const Index& index, const int8_t* entries, int chunk) {
      return lookup(table(entries + 16 * (4 + chunk)), index.high);
    }
    // The multipliers of a table for 4, 2 planes and 1.
    static uint32x4_t four(const uint32_t* multipliers, int i) {
      return vld1q_dup_u32(multipliers + i);
    }
    static B two(const uint32_t* multipliers, int i) {
      return vreinterpretq_s8_u16(
          vld1q_dup_u16(reinterpret_cast<const uint16_t*>(multipliers + i)));
    }
    static B one(const uint32_t* multipliers, int i) {
      return vld1q_dup_s8(reinterpret_cast<const int8_t*>(multipliers + i));
    }
  };
  // int16 sums of products, for the two halves of a vector.
  struct Wide {
    int16x8_t lo = vdupq_n_s16(0), hi = vdupq_n_s16(0);
    void add(B b, B weights) {
      lo = vmlal_s8(lo, vget_low_s8(b), vget_low_s8(weights));
      hi = vmlal_high_s8(hi, b, weights);
    }
  };
  // 4 rows x 4 planes a vector.
  struct Quad : Planes {
    using Several = Quad;
#ifdef __ARM_FEATURE_DOTPROD
    static constexpr int kVectors = 8, kAccumulators = 8;
    I acc[8] = {zero_i(), zero_i(), zero_i(), zero_i(), zero_i(), zero_i(), zero_i(), zero_i()};
    template <int kTaken>
    void add(int v, const Index& index, const int8_t* entries, const uint32_t* multipliers, int c) {
      acc[v] = vdotq_s32(acc[v], low_sums(index, entries, c),
                         vreinterpretq_s8_u32(four(multipliers, c)));
      acc[v] = vdotq_s32(acc[v], high_sums(index, entries, c),
                         vreinterpretq_s8_u32(four(multipliers, 4 + c)));
    }
    I sum(int i) const { return acc[i]; }
#else
    static constexpr int kVectors = 8, kAccumulators = 16;
    // As two pairs: a lane takes m p0 or 2 m p1, less than int16 holds for a region (layout/lut.h).
    Wide acc[8] = {};
    template <int kTaken>
    void add(int v, const Index& index, const int8_t* entries, const uint32_t* multipliers, int c) {
      acc[v].add(low_sums(index, entries, c), two(multipliers, c));
      acc[v].add(high_sums(index, entries, c), two(multipliers, 4 + c));
    }
    I sum(int i) const {
      const I weights = vreinterpretq_s32_u64(vdupq_n_u64(uint64_t{4} << 32 | 1));
      return vpaddq_s32(vmulq_s32(vpaddlq_s16(acc[i].lo), weights),
                        vmulq_s32(vpaddlq_s16(acc[i].hi), weights));
    }
#endif
  };
  // 8 rows x 2 planes a vector.
  struct Pair : Planes {
    using Several = Pair;
    static constexpr int kVectors = 4, kAccumulators = 8;
    Wide acc[4] = {};
    template <int kTaken>
    void add(int v, const Index& index, const int8_t* entries, const uint32_t* multipliers, int c) {
      acc[v].add(low_sums(index, entries, c), two(multipliers, c));
      acc[v].add(high_sums(index, entries, c), two(multipliers, 4 + c));
    }
    I sum(int i) const { return vpaddlq_s16(i % 2 == 0 ? acc[i / 2].lo : acc[i / 2].hi); }
  };
  // 16 rows x 1 plane a vector.
  struct Single : Planes {
    using Several = Single;
    static constexpr int kVectors = 2, kAccumulators = 4;
    Wide acc[2] = {};
    template <int kTaken>
    void add(int v, const Index& index, const int8_t* entries, const uint32_t* multipliers, int c) {
      acc[v].add(low_sums(index, entries, c), one(multipliers, c));
      acc[v].add(high_sums(index, entries, c), one(multipliers, 4 + c));
    }
    I sum(int i) const { return widen(acc[i / 4], i % 4); }
  };
  static I widen(const Wide& w, int quarter) {
    const int16x8_t half = quarter < 2 ? w.lo : w.hi;
    return vmovl_s16(quarter % 2 == 0 ? vget_low_s16(half) : vget_high_s16(half));
  }
  // Steps: the bytes of two tables for rows 0-15, then for rows 16-31.
  struct Trits {
    static constexpr int kSteps = 8, kAccumulators = 4, kEntries = 32, kWords = 8;
    Wide acc[2] = {};
    struct Chunk {
      explicit Chunk(const uint8_t* codes)
          : bytes(codes), signs{vld1q_u8(codes), vld1q_u8(codes + 16)} {}
      const uint8_t* bytes;
      uint8x16_t signs[2];
    };
    // Brings the sign of table t to bit 4.
    template <int t>
    static uint8x16_t sign(uint8x16_t signs) {
      if constexpr (t < 4) return vshlq_n_u8(signs, 4 - t);
      if constexpr (t > 4) return vshrq_n_u8(signs, t - 4);
      return signs;
    }
    template <int kStep>
    static Index index(const Chunk& chunk) {
      constexpr int kTable = kStep / 2 * 2, kHalf = kStep % 2;
      const B b = Neon::load(chunk.bytes + kTileRows * (1 + kStep / 2) + 16 * kHalf);
      const auto with_sign = [](B nibbles, uint8x16_t signs) {
        return vreinterpretq_s8_u8(vbslq_u8(vdupq_n_u8(16), signs, vreinterpretq_u8_s8(nibbles)));
      };
      return {with_sign(Neon::low(b), sign<kTable>(chunk.signs[kHalf])),
              with_sign(Neon::high(b), sign<kTable + 1>(chunk.signs[kHalf]))};
    }
    template <int kStep>
    void add(const Index& index, const int8_t* entries, const uint32_t* multipliers) {
      constexpr int kTable = kStep / 2 * 2;
      const auto look_up = [&](int t, B b) {
        return vqtbl2q_s8(vld1q_s8_x2(entries + kEntries * t), vreinterpretq_u8_s8(b));
      };
      acc[kStep % 2].add(look_up(kTable, index.low), Planes::one(multipliers, kTable));
      acc[kStep % 2].add(look_up(kTable + 1, index.high), Planes::one(multipliers, kTable + 1));
    }
    I sum(int i) const { return widen(acc[i / 4], i % 4); }

    static void write_tables(const W (&pairs)[8], int8_t* out, int64_t) {
      int16x8x2_t twos[4];  // 4 entries of tables 0-3, 4-7
      for (int i = 0; i < 4; ++i) twos[i] = vzipq_s16(pairs[2 * i], pairs[2 * i + 1]);
      for (int half = 0; half < 2; ++half) {
        int32x4x2_t fours[2];  // 8 entries of tables 0 1, 2 3 of the half
        for (int i = 0; i < 2; ++i) {
          fours[i] = vzipq_s32(vreinterpretq_s32_s16(twos[2 * i].val[half]),
                               vreinterpretq_s32_s16(twos[2 * i + 1].val[half]));
        }
        for (int i = 0; i < 2; ++i) {
          const int64x2_t low = vreinterpretq_s64_s32(fours[0].val[i]),
                          high = vreinterpretq_s64_s32(fours[1].val[i]);
          for (const int64x2_t entries : {vzip1q_s64(low, high), vzip2q_s64(low, high)}) {
            vst1q_s8(out, vreinterpretq_s8_s64(entries));
            vst1q_s8(out + 16, vnegq_s8(vreinterpretq_s8_s64(entries)));
            out += kEntries;
          }
        }
      }
    }
    static void write_multipliers(W m, uint32_t* out) {
      vst1q_s32(reinterpret_cast<int32_t*>(out), vmovl_s16(vget_low_s16(m)));
      vst1q_s32(reinterpret_cast<int32_t*>(out) + 4, vmovl_s16(vget_high_s16(m)));
    }
  };
  using TritDots = void;
  // The planes of table 0-7, lowest first.
  static void write_multipliers(const int32_t* m, uint32_t* out) {
    for (int t = 0; t < kHalfTables; ++t) out[t] = static_cast<uint32_t>(m[t]) * 0x08040201u;
  }

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
  static float largest(F a) { return vmaxvq_f32(a); }
  static float lane(F a) { return vgetq_lane_f32(a, 0); }
  template <int kDistance>
  static F swap(F a) {
    if constexpr (kDistance == 2) return vextq_f32(a, a, 2);
    return vrev64q_f32(a);
  }
  static uint32_t equal_lanes(F a, F b) {
    const uint32x4_t lanes = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(vceqq_f32(a, b), lanes));
  }

  static void prefetch(const uint8_t* p) { __builtin_prefetch(p, 0, 2); }
  static void prefetch_near(const uint8_t* p) { __builtin_prefetch(p, 0, 3); }

  static void deal_to_tables(const float* x, float (*lanes)[kHalfTables]) {
    const float32x4x4_t first = vld4q_f32(x), second = vld4q_f32(x + 16);
    for (int i = 0; i < kTableWeights; ++i) {
      vst1q_f32(lanes[i], vuzp1q_f32(first.val[i], second.val[i]));
      vst1q_f32(lanes[i] + kHalfChunks, vuzp2q_f32(first.val[i], second.val[i]));
    }
  }
  static void deal_threes(const float* x, F (&lanes)[kTernaryTableWeights]) {
    const float32x4x3_t dealt = vld3q_f32(x);
    for (int i = 0; i < kTernaryTableWeights; ++i) lanes[i] = dealt.val[i];
  }
  static W words(I a, I b) { return vcombine_s16(vmovn_s32(a), vmovn_s32(b)); }
  static W set_words(int16_t x) { return vdupq_n_s16(x); }
  static W add_words(W a, W b) { return vaddq_s16(a, b); }
  static W sub_words(W a, W b) { return vsubq_s16(a, b); }
  template <int kShift>
  static W shift_words_left(W a) {
    return vshlq_n_s16(a, kShift);
  }
  template <int kShift>
  static W shift_words_right(W a) {
    return vshrq_n_s16(a, kShift);
  }
  template <int kShift>
  static W shift_words_right_unsigned(W a) {
    return vreinterpretq_s16_u16(vshrq_n_u16(vreinterpretq_u16_s16(a), kShift));
  }
  static W join_bytes(W low, W high) { return vsliq_n_s16(low, high, 8); }
  static void write_tables(const int32_t (*entries)[kHalfTables], int8_t* out) {
    Scalar::write_tables(entries, out);
  }

  // Products of unpacked codes (kernels/multiply_row_block.inl).

  static I set_i(int32_t x) { return vdupq_n_s32(x); }
  static I add_i(I a, I b) { return vaddq_s32(a, b); }
  static I xor_i(I a, I b) { return veorq_s32(a, b); }
  static I and_i(I a, I b) { return vandq_s32(a, b); }
  template <int kShift>
  static I shift_left(I a) {
    return vshlq_n_s32(a, kShift);
  }
  template <int kShift>
  static I shift_right(I a) {
    return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a), kShift));
  }
  static I load_i(const uint8_t* p) { return vreinterpretq_s32_u8(vld1q_u8(p)); }
  static I load_words(const uint8_t* p) {
    return vreinterpretq_s32_u32(vmovl_u16(vreinterpret_u16_u8(vld1_u8(p))));
  }
  static I load_bytes(const uint8_t* p) {
    uint32_t four;
    std::memcpy(&four, p, 4);
    const uint16x8_t words = vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four)));
    return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(words)));
  }
  template <typename T>
  static void opaque(T& x) {
    asm volatile("" : "+w"(x));
  }

  static constexpr int kDotVectors = 4;
#ifdef __ARM_FEATURE_DOTPROD
  static constexpr int kDotTokens = 6;
#else
  static constexpr int kDotTokens = 2;
#endif
  template <bool kCentred, bool kByte>
  struct CoreTraits {
    static constexpr int kTokenBytes = 64;
    static constexpr int kRun = kMostQuads;
    static constexpr bool kHasTotal = true;
    static constexpr bool kBiased = !kCentred && kByte;
    static constexpr bool kHalved = kCentred && kByte;
    void fold() {}
  };
#ifdef __ARM_FEATURE_MATMUL_INT8
  // Two tokens: each instruction multiplies 8 weights of two rows with them.
  template <bool kCentred, bool kByte>
  struct DotCore : CoreTraits<kCentred, kByte> {
    static constexpr int kTokens = 2, kQuads = 2;
    struct Codes {
      int8x16_t low, high;  // rows 0 1 and 2 3 of 4
    };
    I low, high;  // rows 0 0 1 1 and 2 2 3 3, tokens 0 1 0 1

    // 4 rows of two quads, one row after another: what load reads.
    static void interleave(I& first, I& second) {
      const I low = vzip1q_s32(first, second);
      second = vzip2q_s32(first, second);
      first = low;
    }
    static Codes load(const uint8_t* codes) {
      return {Neon::load(codes), Neon::load(codes + kTileRows * kTableWeights)};
    }
    static int8x16_t broadcast(const int8_t* q) {
      return vcombine_s8(vld1_s8(q), vld1_s8(q + CoreTraits<kCentred, kByte>::kTokenBytes));
    }
    static I add_loud(I sum, const uint8_t* codes, uint32_t at, const int8_t* q) {
      constexpr uint32_t kQuadBytes = kTileRows * kTableWeights;
      const uint32_t quad = at / kQuadBytes % 2;  // of the two
      uint32_t four;
      std::memcpy(&four, q, 4);
      const int8x16_t eight =
          vreinterpretq_s8_u64(vdupq_n_u64(static_cast<uint64_t>(four) << (32 * quad)));
      const Codes w = load(codes + at - quad * kQuadBytes);
      return vaddq_s32(
          sum, vpaddq_s32(vdotq_s32(zero_i(), w.low, eight), vdotq_s32(zero_i(), w.high, eight)));
    }
    void begin(const I (&base)[kTokens]) {
      low = vzip1q_s32(base[0], base[1]);
      high = vzip2q_s32(base[0], base[1]);
    }
    void add(const Codes& codes, int8x16_t q) {
      low = vmmlaq_s32(low, codes.low, q);
      high = vmmlaq_s32(high, codes.high, q);
    }
    I sum(int token) const { return token == 0 ? vuzp1q_s32(low, high) : vuzp2q_s32(low, high); }
  };
#elif defined(__ARM_FEATURE_DOTPROD)
  // Two quads: instructions take the integers of one of them from a register that holds both.
  template <bool kCentred, bool kByte>
  struct DotCore : CoreTraits<kCentred, kByte> {
    static constexpr int kTokens = 1, kQuads = 2;
    struct Codes {
      int8x16_t first, second;
    };
    I acc;

    static Codes load(const uint8_t* codes) {
      return {Neon::load(codes), Neon::load(codes + kTileRows * kTableWeights)};
    }
    static int8x8_t broadcast(const int8_t* q) { return vld1_s8(q); }
    static I add_loud(I sum, const uint8_t* codes, uint32_t at, const int8_t* q) {
      int32_t four;
      std::memcpy(&four, q, 4);
      return vdotq_s32(sum, Neon::load(codes + at), vreinterpretq_s8_s32(vdupq_n_s32(four)));
    }
    void begin(const I (&base)[kTokens]) { acc = base[0]; }
    void add(const Codes& codes, int8x8_t q) {
      acc = vdotq_lane_s32(vdotq_lane_s32(acc, codes.first, q, 0), codes.second, q, 1);
    }
    I sum(int) const { return acc; }
  };
#else
  template <bool kCentred, bool kByte>
  struct DotCore : CoreTraits<kCentred, kByte> {
    static constexpr int kTokens = 1, kQuads = 1;
    using Codes = int8x16_t;
    I total, lo, hi;

    static Codes load(const uint8_t* codes) { return Neon::load(codes); }
    static int8x16_t broadcast(const int8_t* q) {
      int32_t four;
      std::memcpy(&four, q, 4);
      return vreinterpretq_s8_s32(vdupq_n_s32(four));
    }
    static I add_loud(I sum, const uint8_t* codes, uint32_t at, const int8_t* q) {
      DotCore high;
      high.begin({sum});
      high.add(load(codes + at), broadcast(q));
      return high.sum(0);
    }
    void begin(const I (&base)[kTokens]) {
      total = base[0];
      lo = hi = vdupq_n_s32(0);
    }
    void add(Codes codes, int8x16_t q) {
      lo = vpadalq_s16(lo, vmull_s8(vget_low_s8(codes), vget_low_s8(q)));
      hi = vpadalq_s16(hi, vmull_s8(vget_high_s8(codes), vget_high_s8(q)));
    }
    I sum(int) const { return vaddq_s32(total, vpaddq_s32(lo, hi)); }
  };
#endif
  // What is an int8: centred, 2 u - (2^b - 1) up to 7 bits, and else u. For 8 bits u - 128:
  // R = 2 * sum (u - 128) q + sum q, centred, or sum (u - 128) q + 128 * sum q.
  template <int kBits, bool kCentred>
  struct Dot {
    using Core = DotCore<kCentred, kBits == 8>;
    static I prepare(I codes) {
      const int8x16_t bytes = vreinterpretq_s8_s32(codes);
      if constexpr (kBits == 8) {
        return vreinterpretq_s32_s8(veorq_s8(bytes, vdupq_n_s8(INT8_MIN)));
      }
      if constexpr (!kCentred) return codes;
      return vreinterpretq_s32_s8(
          vsubq_s8(vaddq_s8(bytes, bytes), vdupq_n_s8(static_cast<int8_t>((1 << kBits) - 1))));
    }
    static I bias(I sum) { return shift_left<7>(sum); }
  };
};

}  // namespace
}  // namespace tmac
