#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/half.h"
#include "layout/rows.h"

// Portable stand-in for a 128-bit ISA: the same operations as the other headers of this folder,
// which are described in simd/README.md, on arrays of 16 bytes.
namespace tmac {
namespace {

struct Scalar {
  using Narrow = Scalar;
  using Ternary = Scalar;
  using DealtRows = void;
  struct B {
    int8_t v[16];
  };
  struct I {
    int32_t v[4];
  };
  struct W {
    int16_t v[8];
  };
  struct F {
    float v[4];
  };
  static constexpr int kBytes = 16;
  static constexpr int kFloats = 4;

  static B load(const uint8_t* p) {
    B b;
    std::memcpy(b.v, p, 16);
    return b;
  }
  static B table(const int8_t* p) { return load(reinterpret_cast<const uint8_t*>(p)); }
  static B low(B b) {
    for (int8_t& x : b.v) x &= 15;
    return b;
  }
  static B high(B b) {
    for (int8_t& x : b.v) x = static_cast<int8_t>(static_cast<uint8_t>(x) >> 4);
    return b;
  }
  static B lookup(const B& t, const B& index) {
    B b;
    for (int i = 0; i < 16; ++i) b.v[i] = t.v[index.v[i]];
    return b;
  }

  static constexpr int kAccumulators = 0;  // one token at a time
  static constexpr int kVectorsTogether = 1;

  struct Index {
    B low, high;
  };
  template <typename Rows>
  struct Planes {
    static constexpr int kChunks = 1;
    template <int kTaken>
    static Index load(const uint8_t* codes, int64_t, int v, int) {
      const B b = Scalar::load(codes + v * kBytes);
      return {Scalar::low(b), Scalar::high(b)};
    }
    // Not inlined: compilers take minutes over a tile's worth of it.
    template <int kTaken>
    __attribute__((noinline)) void add(int v, const Index& index, const int8_t* entries,
                                       const uint32_t* multipliers, int chunk) {
      auto& rows = static_cast<Rows&>(*this);
      const int high = kHalfTables / 2 + chunk;
      rows.weigh(v, lookup(table(entries + 16 * chunk), index.low),
                 static_cast<int32_t>(multipliers[chunk]));
      rows.weigh(v, lookup(table(entries + 16 * high), index.high),
                 static_cast<int32_t>(multipliers[high]));
    }
  };
  struct Quad : Planes<Quad> {
    using Several = Quad;
    static constexpr int kVectors = 8, kAccumulators = 8;
    I rows[8] = {};
    void weigh(int v, const B& b, int32_t m) {
      for (int r = 0; r < 4; ++r) {
        const int8_t* p = b.v + 4 * r;
        rows[v].v[r] += m * (p[0] + 2 * p[1] + 4 * p[2] + 8 * p[3]);
      }
    }
    I sum(int i) const { return rows[i]; }
  };
  struct Pair : Planes<Pair> {
    using Several = Pair;
    static constexpr int kVectors = 4, kAccumulators = 8;
    I rows[8] = {};
    void weigh(int v, const B& b, int32_t m) {
      for (int r = 0; r < 8; ++r) {
        rows[2 * v + r / 4].v[r % 4] += m * (b.v[2 * r] + 2 * b.v[2 * r + 1]);
      }
    }
    I sum(int i) const { return rows[i]; }
  };
  struct Single : Planes<Single> {
    using Several = Single;
    static constexpr int kVectors = 2, kAccumulators = 8;
    I rows[8] = {};
    void weigh(int v, const B& b, int32_t m) {
      for (int r = 0; r < 16; ++r) rows[4 * v + r / 4].v[r % 4] += m * b.v[r];
    }
    I sum(int i) const { return rows[i]; }
  };
  static void write_multipliers(const int32_t* m, uint32_t* out) {
    for (int t = 0; t < kHalfTables; ++t) out[t] = static_cast<uint32_t>(m[t]);
  }
  // Steps: the bytes of two tables for rows 0-15, then for rows 16-31. A table has the entries of
  // positive numbers, then those of negative ones.
  struct Trits {
    static constexpr int kSteps = 8, kAccumulators = 8, kEntries = 32, kWords = 8;
    I rows[8] = {};
    struct Chunk {
      explicit Chunk(const uint8_t* codes) : bytes(codes) {}
      const uint8_t* bytes;
    };
    template <int kStep>
    static Index index(const Chunk& chunk) {
      const uint8_t* at = chunk.bytes + kStep % 2 * 16;
      const B b = Scalar::load(at + kTileRows * (1 + kStep / 2)), signs = Scalar::load(at);
      Index index{Scalar::low(b), Scalar::high(b)};
      for (int i = 0; i < 16; ++i) {
        const int both = signs.v[i] >> kStep / 2 * 2;
        index.low.v[i] = static_cast<int8_t>(index.low.v[i] | (both & 1) << 4);
        index.high.v[i] = static_cast<int8_t>(index.high.v[i] | (both & 2) << 3);
      }
      return index;
    }
    template <int kStep>
    void add(const Index& index, const int8_t* entries, const uint32_t* multipliers) {
      constexpr int kTable = kStep / 2 * 2;
      const int8_t* table = entries + kTable * kEntries;
      const int32_t* m = reinterpret_cast<const int32_t*>(multipliers + kTable);
      for (int i = 0; i < 16; ++i) {
        rows[kStep % 2 * 4 + i / 4].v[i % 4] +=
            m[0] * table[index.low.v[i]] + m[1] * table[kEntries + index.high.v[i]];
      }
    }
    I sum(int i) const { return rows[i]; }

    static void write_tables(const W (&pairs)[8], int8_t* out, int64_t) {
      for (int t = 0; t < kTernaryChunkTables; ++t, out += kEntries) {
        for (int e = 0; e < 16; ++e) {
          const int byte = pairs[e / 2].v[t] >> e % 2 * 8;
          out[e] = static_cast<int8_t>(byte);
          out[16 + e] = static_cast<int8_t>(-out[e]);
        }
      }
    }
    static void write_multipliers(const W& m, uint32_t* out) {
      for (int t = 0; t < kTernaryChunkTables; ++t) out[t] = static_cast<uint32_t>(m.v[t]);
    }
  };
  using TritDots = void;

  static I zero_i() { return I{}; }
  template <int kShift>
  static I add_shifted(I a, const I& b) {
    for (int i = 0; i < 4; ++i) a.v[i] += b.v[i] * (1 << kShift);
    return a;
  }
  static I sub_i(const I& a, const I& b) {
    return each(a, b, [](uint32_t x, uint32_t y) { return x - y; });
  }
  static F to_float(const I& a) {
    F f;
    for (int i = 0; i < 4; ++i) f.v[i] = static_cast<float>(a.v[i]);
    return f;
  }
  static I round_to_int(const F& a) {
    I r;
    for (int i = 0; i < 4; ++i) {
      r.v[i] = a.v[i] == a.v[i] ? static_cast<int32_t>(std::nearbyint(a.v[i])) : 0;
    }
    return r;
  }
  static I exponent_of_two(const I& n) {  // bits of 2^n
    I r;
    for (int i = 0; i < 4; ++i)
      r.v[i] = static_cast<int32_t>(static_cast<uint32_t>(n.v[i] + 127) << 23);
    return r;
  }
  static F as_float(const I& a) {
    F f;
    std::memcpy(f.v, a.v, 16);
    return f;
  }
  static void store_i(int32_t* p, const I& a) { std::memcpy(p, a.v, 16); }

  static F set(float x) { return F{{x, x, x, x}}; }
  static F load_f(const float* p) {
    F f;
    std::memcpy(f.v, p, 16);
    return f;
  }
  static void store_f(float* p, const F& f) { std::memcpy(p, f.v, 16); }
  static F load_half(const uint16_t* p) {
    F f;
    for (int i = 0; i < 4; ++i) f.v[i] = half_to_float(p[i]);
    return f;
  }
  static void store_half(uint16_t* p, const F& f) {
    for (int i = 0; i < 4; ++i) p[i] = float_to_half(f.v[i]);
  }
  static F add(F a, const F& b) {
    for (int i = 0; i < 4; ++i) a.v[i] += b.v[i];
    return a;
  }
  static F sub(F a, const F& b) {
    for (int i = 0; i < 4; ++i) a.v[i] -= b.v[i];
    return a;
  }
  static F mul(F a, const F& b) {
    for (int i = 0; i < 4; ++i) a.v[i] *= b.v[i];
    return a;
  }
  static F div(F a, const F& b) {
    for (int i = 0; i < 4; ++i) a.v[i] /= b.v[i];
    return a;
  }
  static F fma(const F& a, const F& b, F c) {
    for (int i = 0; i < 4; ++i) c.v[i] = fused(a.v[i], b.v[i], c.v[i]);
    return c;
  }
  static F max(F a, const F& b) {
    for (int i = 0; i < 4; ++i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return a;
  }
  static F min(F a, const F& b) {
    for (int i = 0; i < 4; ++i) a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
    return a;
  }
  static float sum(const F& a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
  static float largest(const F& a) {
    float largest = a.v[0];
    for (const float lane : a.v) largest = lane > largest ? lane : largest;
    return largest;
  }
  static float lane(const F& a) { return a.v[0]; }
  template <int kDistance>
  static F swap(const F& a) {
    F swapped;
    for (int i = 0; i < 4; ++i) swapped.v[i] = a.v[i ^ kDistance];
    return swapped;
  }
  static uint32_t equal_lanes(const F& a, const F& b) {
    uint32_t lanes = 0;
    for (int i = 0; i < 4; ++i) lanes |= static_cast<uint32_t>(a.v[i] == b.v[i]) << i;
    return lanes;
  }

  static void prefetch(const uint8_t*) {}
  static void prefetch_near(const uint8_t*) {}

  static void deal_to_tables(const float* x, float (*lanes)[kHalfTables]) {
    for (int t = 0; t < kHalfTables; ++t) {
      for (int i = 0; i < kTableWeights; ++i) {
        lanes[i][t % 2 * kHalfChunks + t / 2] = x[kTableWeights * t + i];
      }
    }
  }
  static void deal_threes(const float* x, F (&lanes)[kTernaryTableWeights]) {
    for (int t = 0; t < kFloats; ++t) {
      for (int i = 0; i < kTernaryTableWeights; ++i)
        lanes[i].v[t] = x[kTernaryTableWeights * t + i];
    }
  }
  static W words(const I& a, const I& b) {
    W w;
    for (int i = 0; i < 8; ++i) w.v[i] = static_cast<int16_t>(i < 4 ? a.v[i] : b.v[i - 4]);
    return w;
  }
  static W set_words(int16_t x) { return W{{x, x, x, x, x, x, x, x}}; }
  template <typename Operation>
  static W each_word(const W& a, const W& b, const Operation& operation) {
    W w;
    for (int i = 0; i < 8; ++i) w.v[i] = static_cast<int16_t>(operation(a.v[i], b.v[i]));
    return w;
  }
  static W add_words(const W& a, const W& b) {
    return each_word(a, b, [](int x, int y) { return x + y; });
  }
  static W sub_words(const W& a, const W& b) {
    return each_word(a, b, [](int x, int y) { return x - y; });
  }
  template <int kShift>
  static W shift_words_left(const W& a) {
    return each_word(a, a, [](int x, int) { return x * (1 << kShift); });
  }
  template <int kShift>
  static W shift_words_right(const W& a) {
    return each_word(a, a, [](int x, int) { return x >> kShift; });
  }
  template <int kShift>
  static W shift_words_right_unsigned(const W& a) {
    return each_word(a, a, [](int x, int) { return static_cast<uint16_t>(x) >> kShift; });
  }
  static W join_bytes(const W& low, const W& high) {
    return each_word(low, high, [](int x, int y) { return (x & 255) | y * 256; });
  }
  // Entry e is -entry (15 - e).
  static void write_tables(const int32_t (*entries)[kHalfTables], int8_t* out) {
    for (int t = 0; t < kHalfTables; ++t, out += kTableEntries) {
      for (int e = 0; e < 8; ++e) {
        out[8 + e] = static_cast<int8_t>(entries[e][t]);
        out[7 - e] = static_cast<int8_t>(-entries[e][t]);
      }
    }
  }

  // Products of unpacked codes (kernels/multiply_row_block.inl).

  template <typename Operation>
  static I each(const I& a, const I& b, const Operation& operation) {
    I r;
    for (int i = 0; i < 4; ++i) {
      r.v[i] = static_cast<int32_t>(
          operation(static_cast<uint32_t>(a.v[i]), static_cast<uint32_t>(b.v[i])));
    }
    return r;
  }
  static I set_i(int32_t x) { return I{{x, x, x, x}}; }
  static I add_i(const I& a, const I& b) {
    return each(a, b, [](uint32_t x, uint32_t y) { return x + y; });
  }
  static I xor_i(const I& a, const I& b) {
    return each(a, b, [](uint32_t x, uint32_t y) { return x ^ y; });
  }
  static I and_i(const I& a, const I& b) {
    return each(a, b, [](uint32_t x, uint32_t y) { return x & y; });
  }
  template <int kShift>
  static I shift_left(const I& a) {
    return each(a, a, [](uint32_t x, uint32_t) { return x << kShift; });
  }
  template <int kShift>
  static I shift_right(const I& a) {
    return each(a, a, [](uint32_t x, uint32_t) { return x >> kShift; });
  }
  static I load_i(const uint8_t* p) {
    I a;
    std::memcpy(a.v, p, 16);
    return a;
  }
  static I load_words(const uint8_t* p) {
    I a;
    for (int i = 0; i < 4; ++i) a.v[i] = p[2 * i] | p[2 * i + 1] << 8;
    return a;
  }
  static I load_bytes(const uint8_t* p) { return I{{p[0], p[1], p[2], p[3]}}; }
  template <typename T>
  static void opaque(T& x) {
    asm volatile("" : "+m"(x));
  }

  static constexpr int kDotTokens = 2;
  static constexpr int kDotVectors = 2;
  template <bool kCentred>
  struct DotCore {
    using Codes = B;
    static constexpr int kTokens = 1, kQuads = 1;
    static constexpr int kTokenBytes = 64;
    static constexpr int kRun = kMostQuads;
    static constexpr bool kHasTotal = true;
    static constexpr bool kBiased = kCentred;
    static constexpr bool kHalved = false;
    I acc;

    static B load(const uint8_t* codes) { return Scalar::load(codes); }
    static B broadcast(const int8_t* q) {
      B b;
      for (int i = 0; i < 16; ++i) b.v[i] = q[i % 4];
      return b;
    }
    static I add_loud(const I& sum, const uint8_t* codes, uint32_t at, const int8_t* q) {
      DotCore high{sum};
      high.add(load(codes + at), broadcast(q));
      return high.acc;
    }
    void begin(const I (&base)[kTokens]) { acc = base[0]; }
    void add(const B& codes, const B& q) {
      for (int r = 0; r < 4; ++r) {
        int32_t sum = 0;
        for (int i = 4 * r; i < 4 * r + 4; ++i) sum += static_cast<uint8_t>(codes.v[i]) * q.v[i];
        acc.v[r] += (kCentred ? 2 : 1) * sum;
      }
    }
    void fold() {}
    I sum(int) const { return acc; }
  };
  template <int kBits, bool kCentred>
  struct Dot {
    using Core = DotCore<kCentred>;
    static I prepare(const I& codes) { return codes; }
    static I bias(const I& sum) { return sub_i(sum, shift_left<kBits>(sum)); }
  };

 private:
  // a * b + c with one rounding, on a CPU that may not have the instruction: the product is exact
  // in double, the sum is rounded to odd, and so the last rounding is that of the exact sum
  // (Boldo and Melquiond, Emulation of FMA and correctly rounded sums, 2008).
  static float fused(float a, float b, float c) {
    const double product = static_cast<double>(a) * b, addend = c;
    const double sum = product + addend;
    const double part = sum - product;
    const double error = (product - (sum - part)) + (addend - part);
    if (!(error != 0) || !(sum - sum == 0)) return static_cast<float>(sum);
    int64_t bits;
    std::memcpy(&bits, &sum, 8);
    if ((bits & 1) == 0) bits += (error > 0) == (sum > 0) ? 1 : -1;
    double odd;
    std::memcpy(&odd, &bits, 8);
    return static_cast<float>(odd);
  }
};

}  // namespace
}  // namespace tmac
