// Codes of a tile, from bit planes to bytes in the order in which dot products read them.

// Bit i of byte p of each nibble <-> bit p of byte i, for the 4 bytes of every lane.
template <typename S>
inline typename S::I transpose_nibbles(typename S::I x) {
  using I = typename S::I;
  const I one = S::and_i(S::xor_i(x, S::template shift_right<7>(x)), S::set_i(0x00aa00aa));
  x = S::xor_i(x, S::xor_i(one, S::template shift_left<7>(one)));
  const I two = S::and_i(S::xor_i(x, S::template shift_right<14>(x)), S::set_i(0x0000cccc));
  return S::xor_i(x, S::xor_i(two, S::template shift_left<14>(two)));
}

// The last kBits % 4 planes of kFloats rows, from row `row` on, as the bytes of a lane.
template <typename S, int kBits>
inline typename S::I load_rest(const uint8_t* chunk, int row) {
  constexpr int kPairsAt = kTileRows * (kBits / 4 * 4);
  constexpr int kSinglesAt = kTileRows * (kBits / 2 * 2);
  if constexpr (kBits % 4 == 1) {
    return S::load_bytes(chunk + kSinglesAt + row);
  } else {
    const typename S::I pairs = S::load_words(chunk + kPairsAt + 2 * row);
    if constexpr (kBits % 4 == 2) return pairs;
    return S::xor_i(pairs, S::template shift_left<16>(S::load_bytes(chunk + kSinglesAt + row)));
  }
}

constexpr int kChunkCodes = kTileRows * kChunkWeights;

// 8 codes of kFloats rows, to where the first 4 of the first row go.
template <typename S, typename Dot>
inline void store_chunk(typename S::I first, typename S::I second, uint8_t* out) {
  first = Dot::prepare(first);
  second = Dot::prepare(second);
  if constexpr (Dot::Core::kTokens == 2) Dot::Core::interleave(first, second);
  S::store_i(reinterpret_cast<int32_t*>(out), first);
  S::store_i(reinterpret_cast<int32_t*>(out + kChunkCodes / 2), second);
}

// One chunk [32 * kBits] -> out [2][32][4]: weights 0-3 of each row, then weights 4-7, as
// Dot takes them.
template <typename S, typename Dot, int kBits>
inline void unpack_chunk(const uint8_t* chunk, uint8_t* out) {
  using I = typename S::I;
  const I low_nibbles = S::set_i(0x0f0f0f0f);
  for (int row = 0; row < kTileRows; row += S::kFloats) {
    I first, second;
    if constexpr (kBits < 4) {
      const I planes = transpose_nibbles<S>(load_rest<S, kBits>(chunk, row));
      first = S::and_i(planes, low_nibbles);
      second = S::and_i(S::template shift_right<4>(planes), low_nibbles);
    } else {
      const I low = transpose_nibbles<S>(S::load_i(chunk + 4 * row));
      first = S::and_i(low, low_nibbles);
      second = S::and_i(S::template shift_right<4>(low), low_nibbles);
      if constexpr (kBits > 4) {
        I high;
        if constexpr (kBits == 8) {
          high = S::load_i(chunk + 4 * (kTileRows + row));
        } else {
          high = load_rest<S, kBits>(chunk, row);
        }
        high = transpose_nibbles<S>(high);
        const I lower = S::template shift_left<4>(S::and_i(high, low_nibbles));
        const I upper = S::and_i(high, S::set_i(static_cast<int32_t>(0xf0f0f0f0)));
        first = S::xor_i(first, lower);
        second = S::xor_i(second, upper);
      }
    }
    store_chunk<S, Dot>(first, second, out + 4 * row);
  }
}
