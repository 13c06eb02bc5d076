// Tables of one block of 32 activations: 8 tables of 16 entries, entry e the sum of +-x by its bits.

template <typename S>
void build_block(const float* x, Tables tables, int8_t* entries, float* half_scale,
                 float* chunk_sum, float* block_sum) {
  using N = typename S::Narrow;  // at most 8 lanes: a lane is a table
  using F = typename N::F;
  constexpr int kLanes = N::kFloats;
  const bool exact = tables == Tables::kExact;

  alignas(64) float lanes[kTableWeights][kBlockTables];  // lanes[i][t] = x[4 t + i]
  for (int t = 0; t < kBlockTables; ++t) {
    for (int i = 0; i < kTableWeights; ++i) lanes[i][t] = x[kTableWeights * t + i];
  }

  // What sets the scale: the largest entry, or for exact tables the largest |x|.
  const F zero = N::set(0);
  F largest = zero, poison = zero;  // poison is NaN where an x is infinite or NaN
  for (int t = 0; t < kBlockTables; t += kLanes) {
    F magnitude = zero;
    for (int i = 0; i < kTableWeights; ++i) {
      const F value = N::load_f(lanes[i] + t);
      const F size = N::max(value, N::sub(zero, value));
      magnitude = exact ? N::max(magnitude, size) : N::add(magnitude, size);
      poison = N::fma(value, zero, poison);
    }
    largest = N::max(largest, magnitude);
  }
  const float limit = N::max_of(largest);
  const bool finite = N::sum(poison) == 0 && limit <= __FLT_MAX__;
  const float range = exact ? static_cast<float>(kExactMax) : 127.0f;
  // Below this the inverse would overflow: such a block counts as zero.
  const bool vanishes = !(limit >= range * 0x1p-120f);
  const float inverse = finite && !vanishes ? range / limit : 0.0f;
  const float scale = !finite ? __builtin_nanf("") : vanishes ? 0.0f : limit / range;
  if (inverse == 0) __builtin_memset(lanes, 0, sizeof(lanes));

  alignas(64) int32_t low[8][kBlockTables], high[8][kBlockTables];  // entries 8..15 of every table
  for (int t = 0; t < kBlockTables; t += kLanes) {
    F v[kTableWeights];
    for (int i = 0; i < kTableWeights; ++i) {
      v[i] = N::load_f(lanes[i] + t);
      if (exact) {
        v[i] = N::to_float(N::round_to_int(N::mul(v[i], N::set(inverse))));
        N::store_f(lanes[i] + t, N::mul(v[i], N::set(scale)));  // what the sums must add up
      }
    }
    const F unit = N::set(exact ? 1.0f : inverse);
    const F plus01 = N::add(v[0], v[1]), minus01 = N::sub(v[0], v[1]);
    const F plus32 = N::add(v[3], v[2]), minus32 = N::sub(v[3], v[2]);
    const auto put = [&](int e, F value) {
      if (exact) {
        // 255 is odd: no sum lies half-way, and the low part is within +-127 like its mirror image.
        const F high_part = N::to_float(N::round_to_int(N::mul(value, N::set(1.0f / kExactBase))));
        N::store_i(high[e] + t, N::round_to_int(high_part));
        value = N::fma(high_part, N::set(-static_cast<float>(kExactBase)), value);
      }
      N::store_i(low[e] + t, N::round_to_int(N::mul(value, unit)));
    };
    put(0, N::sub(minus32, plus01));
    put(1, N::add(minus32, minus01));
    put(2, N::sub(minus32, minus01));
    put(3, N::add(minus32, plus01));
    put(4, N::sub(plus32, plus01));
    put(5, N::add(plus32, minus01));
    put(6, N::sub(plus32, minus01));
    put(7, N::add(plus32, plus01));
  }
  N::write_tables(low, entries, exact ? 2 * kTableEntries : kTableEntries);
  if (exact) N::write_tables(high, entries + kTableEntries, 2 * kTableEntries);

  *half_scale = 0.5f * scale;
  *block_sum = 0;
  for (int c = 0; c < kBlockChunks; ++c) {
    float sum = 0;
    for (int t = 2 * c; t < 2 * c + 2; ++t) {
      for (int i = 0; i < kTableWeights; ++i) sum += lanes[i][t];
    }
    chunk_sum[c] = sum;
    *block_sum += sum;
  }
}
