#pragma once

#include <cstdint>
#include <cstring>

#include "layout/rows.h"

// Dot products of unpacked codes u of kBits bits with int8 activations q, |q| <= 127, for the
// vectors V of the x86 instruction sets: each lane of 32 bits adds up R of one row, centred or not
// (kernels/multiply_row_block.inl). The names are described in simd/README.md.
namespace tmac {
namespace {

template <typename V>
inline typename V::I broadcast_four(const int8_t* q) {
  int32_t four;
  std::memcpy(&four, q, 4);
  return V::set_i(four);
}

// With one instruction for 4 products a lane (VNNI).
template <typename V, bool kCentred, bool kHalves>
struct FoursCore {
  using I = typename V::I;
  using Codes = I;
  static constexpr int kTokens = 1, kQuads = 1;
  static constexpr int kTokenBytes = 64;
  static constexpr int kRun = kMostQuads;
  static constexpr bool kHasTotal = true;
  static constexpr bool kBiased = kCentred;
  static constexpr bool kHalved = kHalves;
  I acc;

  static Codes load(const uint8_t* codes) { return V::load_i(codes); }
  static I broadcast(const int8_t* q) { return broadcast_four<V>(q); }
  static I add_loud(I sum, const uint8_t* codes, uint32_t at, const int8_t* q) {
    return V::multiply_fours(sum, load(codes + at), broadcast(q));
  }
  void begin(const I (&base)[kTokens]) { acc = base[0]; }
  void add(Codes codes, I q) { acc = V::multiply_fours(acc, codes, q); }
  void fold() {}
  I sum(int) const { return acc; }
};

// Centred, 2 u is a byte up to 7 bits. For 8 bits R = 2 * sum (u - 128) q + sum q.
template <typename V, int kBits, bool kCentred>
struct FoursDot {
  using I = typename V::I;
  using Core = FoursCore<V, kCentred, kCentred && kBits == 8>;
  static I prepare(I codes) {
    if constexpr (!kCentred || kBits == 8) return codes;
    return V::template shift_left<1>(codes);
  }
  static I bias(I sum) {
    if constexpr (kBits == 8) return V::sub_i(V::zero_i(), V::template shift_left<7>(sum));
    return V::sub_i(sum, V::template shift_left<kBits>(sum));
  }
};

// The loud quad with maddubs: high parts are at most 64, and 2 * 255 * 64 < 2^15.
template <typename V>
inline typename V::I add_loud_pairs(typename V::I sum, const uint8_t* codes, const int8_t* q) {
  const auto pairs = V::multiply_pairs(V::load_i(codes), broadcast_four<V>(q));
  return V::add_i(sum, V::multiply_words(pairs, V::set_words(1)));
}

// With maddubs: 2 products an int16 lane, kRuns of which fit; then madd to int32, centred with 2.
template <typename V, int kRuns, bool kCentred>
struct PairsCore {
  using I = typename V::I;
  using Codes = I;
  static constexpr int kTokens = 1, kQuads = 1;
  static constexpr int kTokenBytes = 64;
  static constexpr int kRun = kRuns;
  static constexpr bool kHasTotal = kRun < kMostQuads;
  static constexpr bool kBiased = kCentred;
  static constexpr bool kHalved = false;
  I total, pairs;

  static Codes load(const uint8_t* codes) { return V::load_i(codes); }
  static I broadcast(const int8_t* q) { return broadcast_four<V>(q); }
  static I add_loud(I sum, const uint8_t* codes, uint32_t at, const int8_t* q) {
    return add_loud_pairs<V>(sum, codes + at, q);
  }
  void begin(const I (&base)[kTokens]) {
    total = base[0];
    pairs = V::zero_i();
  }
  void add(Codes codes, I q) {
    if constexpr (kRun == 1) {
      total = V::add_i(total, widened(V::multiply_pairs(codes, q)));
    } else {
      pairs = V::add_to_words(pairs, codes, q);
    }
  }
  void fold() {
    if constexpr (kRun > 1 && kHasTotal) {
      total = V::add_i(total, widened(pairs));
      pairs = V::zero_i();
    }
  }
  I sum(int) const { return kHasTotal ? total : widened(pairs); }

 private:
  static I widened(I pairs) { return V::multiply_words(pairs, V::set_words(kCentred ? 2 : 1)); }
};

// Where not even one maddubs fits int16: both factors as int16, those of weights 0 and 2 of 4 and
// those of weights 1 and 3.
template <typename V, bool kCentred>
struct WordsCore {
  using I = typename V::I;
  struct Codes {
    I even, odd;
  };
  static constexpr int kTokens = 1, kQuads = 1;
  static constexpr int kTokenBytes = 128;
  static constexpr int kRun = kMostQuads;
  static constexpr bool kHasTotal = true;
  static constexpr bool kBiased = kCentred;
  static constexpr bool kHalved = false;
  I total;

  // Centred, twice the codes.
  static Codes load(const uint8_t* codes) {
    const I bytes = V::load_i(codes);
    const I even = V::and_i(bytes, V::set_words(255));
    const I odd = V::and_i(V::template shift_right<8>(bytes), V::set_words(255));
    if constexpr (!kCentred) return {even, odd};
    return {V::add_words(even, even), V::add_words(odd, odd)};
  }
  static Codes broadcast(const int8_t* q) {
    return {broadcast_four<V>(q), broadcast_four<V>(q + kTokenBytes / 2)};
  }
  static I add_loud(I sum, const uint8_t* codes, uint32_t at, const int8_t* q) {
    return add_loud_pairs<V>(sum, codes + at, q);
  }
  // q [64] -> [2][64], as broadcast takes them.
  static void widen(const int8_t* q, int8_t* out) {
    for (int i = 0; i < 64; i += V::kBytes) {
      const I bytes = V::load_i(reinterpret_cast<const uint8_t*>(q) + i);
      uint8_t* at = reinterpret_cast<uint8_t*>(out) + i;
      V::store(at, even_bytes(bytes));
      V::store(at + kTokenBytes / 2, odd_bytes(bytes));
    }
  }
  void begin(const I (&base)[kTokens]) { total = base[0]; }
  void add(const Codes& codes, const Codes& q) {
    total = V::add_i(total, V::multiply_words(codes.even, q.even));
    total = V::add_i(total, V::multiply_words(codes.odd, q.odd));
  }
  void fold() {}
  I sum(int) const { return total; }

 private:
  static I even_bytes(I bytes) {
    return V::template shift_words_right<8>(V::template shift_words_left<8>(bytes));
  }
  static I odd_bytes(I bytes) { return V::template shift_words_right<8>(bytes); }
};

// A maddubs is at most 2 (2^b - 1) 127: as many as stay below 2^15, or all.
constexpr int pairs_run(int bits) {
  const int fit = INT16_MAX / (2 * ((1 << bits) - 1) * 127);
  int run = fit > 0;
  while (run > 0 && run < kMostQuads && 2 * run <= fit) run *= 2;
  return run;
}

template <typename V, int kRun, bool kCentred>
struct PairsCoreOf {
  using Core = PairsCore<V, kRun, kCentred>;
};
template <typename V, bool kCentred>
struct PairsCoreOf<V, 0, kCentred> {
  using Core = WordsCore<V, kCentred>;
};

template <typename V, int kBits, bool kCentred>
struct PairsDot {
  using I = typename V::I;
  using Core = typename PairsCoreOf<V, pairs_run(kBits), kCentred>::Core;
  static I prepare(I codes) { return codes; }
  static I bias(I sum) { return V::sub_i(sum, V::template shift_left<kBits>(sum)); }
};

}  // namespace
}  // namespace tmac
