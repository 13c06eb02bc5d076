#pragma once

#include <cstdint>

namespace tmac {

// PCG XSL RR 128/64 (O'Neill, "PCG: A Family of Simple Fast Space-Efficient Statistically Good
// Algorithms for Random Number Generation", 2014): the stream of numpy.random.PCG64.
class Pcg64 {
 public:
  struct Number {  // of 128 bits
    uint64_t high, low;
  };

  Pcg64(Number state, Number increment) : state_(state), increment_(increment) {}

  uint64_t next() {
    state_ = sum(product(state_, {2549297995355413924u, 4865540595714422341u}), increment_);
    const uint64_t folded = state_.high ^ state_.low;
    const int turn = static_cast<int>(state_.high >> 58);
    return turn == 0 ? folded : folded >> turn | folded << (64 - turn);
  }
  // In [0, 1), a multiple of 2^-53.
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }

 private:
  static Number sum(Number a, Number b) {
    const uint64_t low = a.low + b.low;
    return {a.high + b.high + (low < a.low), low};
  }
  static Number product(Number a, Number b) {
    const uint64_t a0 = a.low & 0xffffffffu, a1 = a.low >> 32;
    const uint64_t b0 = b.low & 0xffffffffu, b1 = b.low >> 32;
    const uint64_t middle = a1 * b0 + (a0 * b0 >> 32);
    const uint64_t carry = (middle & 0xffffffffu) + a0 * b1;
    const uint64_t high = a1 * b1 + (middle >> 32) + (carry >> 32);
    return {high + a.low * b.high + a.high * b.low, a.low * b.low};
  }

  Number state_, increment_;
};

}  // namespace tmac
