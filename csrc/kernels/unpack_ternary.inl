// Ternary codes of a tile (layout/ternary.h), as bytes in the order in which dot products read
// them.

// The codes of three weights, whose number t0 + 3 t1 + 9 t2 is n - 13, as the lower bytes of each
// lane.
template <typename S>
inline typename S::I ternary_codes(typename S::I n) {
  using I = typename S::I;
  const auto eight = [](I x) { return S::template shift_left<3>(x); };
  const auto two = [](I x) { return S::template shift_left<1>(x); };
  // For n up to 26, n / 9 = 57 n / 512, and for r up to 8, r / 3 = 11 r / 32, rounded down.
  const I times57 = S::add_i(S::sub_i(S::template shift_left<6>(n), eight(n)), n);
  const I third = S::template shift_right<9>(times57);
  const I rest = S::sub_i(n, S::add_i(eight(third), third));
  const I second = S::template shift_right<5>(S::add_i(S::add_i(eight(rest), two(rest)), rest));
  const I first = S::sub_i(rest, S::add_i(two(second), second));
  return S::xor_i(first,
                  S::xor_i(S::template shift_left<8>(second), S::template shift_left<16>(third)));
}

// One chunk of 24 weights -> out [6][32][4], as Dot takes them.
template <typename S, typename Dot>
inline void unpack_ternary_chunk(const uint8_t* chunk, uint8_t* out) {
  using I = typename S::I;
  constexpr int kParts = kTernaryChunkTables / 2;
  const I one = S::set_i(1), nibble = S::set_i(15), middle = S::set_i(13);
  for (int row = 0; row < kTileRows; row += S::kFloats) {
    const I signs = S::load_bytes(chunk + row);
    I codes[kTernaryChunkTables];  // of 3 weights
    repeat<kParts>([&](auto part) {
      const I magnitudes = S::load_bytes(chunk + (1 + part) * kTileRows + row);
      repeat<2>([&](auto half) {
        constexpr int kTable = 2 * part + half;
        const I size = S::and_i(S::template shift_right<4 * half>(magnitudes), nibble);
        const I sign = S::and_i(S::template shift_right<kTable>(signs), one);
        const I negative = S::sub_i(S::zero_i(), sign);  // all bits, or none
        const I number = S::add_i(S::xor_i(size, negative), sign);
        codes[kTable] = ternary_codes<S>(S::add_i(number, middle));
      });
    });
    repeat<kParts / 2>([&](auto i) {  // 12 weights
      const I* four = codes + 4 * i;
      const I quads[] = {
          S::xor_i(four[0], S::template shift_left<24>(four[1])),
          S::xor_i(S::template shift_right<8>(four[1]), S::template shift_left<16>(four[2])),
          S::xor_i(S::template shift_right<16>(four[2]), S::template shift_left<8>(four[3]))};
      repeat<3>([&](auto j) { codes[3 * i + j] = quads[j]; });
    });
    repeat<kTernaryChunkWeights / kChunkWeights>([&](auto i) {
      store_chunk<S, Dot>(codes[2 * i], codes[2 * i + 1], out + i * kChunkCodes + 4 * row);
    });
  }
}
