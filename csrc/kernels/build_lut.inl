// Tables of one span of 32 activations: 8 tables of 16 entries, entry e the sum of +-x by its bits.

template <typename S>
void build_span(const float* x, Tables tables, const LutView& lut) {
  using N = typename S::Narrow;  // at most 8 lanes: a lane is a table
  using F = typename N::F;
  constexpr int kStep = N::kFloats;
  const bool exact = tables == Tables::kExact;

  alignas(64) float lanes[kTableWeights][kSpanTables];  // lanes[i][t] = x[4 t + i]
  for (int t = 0; t < kSpanTables; ++t) {
    for (int i = 0; i < kTableWeights; ++i) lanes[i][t] = x[kTableWeights * t + i];
  }

  // What sets the scale: the largest entry, or for exact tables the largest |x|.
  alignas(64) float magnitude[kSpanTables], poison[kSpanTables];
  for (int t = 0; t < kSpanTables; t += kStep) {
    const F zero = N::set(0);
    F m = zero, p = zero;
    for (int i = 0; i < kTableWeights; ++i) {
      const F value = N::load_f(lanes[i] + t);
      const F size = N::max(value, N::sub(zero, value));
      m = exact ? N::max(m, size) : N::add(m, size);
      p = N::fma(value, zero, p);  // NaN where an x is infinite or NaN
    }
    N::store_f(magnitude + t, m);
    N::store_f(poison + t, p);
  }
  const float range = exact ? static_cast<float>(kExactMax) : 127.0f;
  alignas(64) float inverse[kSpanTables], scale[kSpanTables];  // of each table's block
  for (int block = 0; block < kSpanBlocks; ++block) {
    float limit = 0, poisoned = 0;
    for (int t = block * kBlockTables; t < (block + 1) * kBlockTables; ++t) {
      limit = magnitude[t] > limit ? magnitude[t] : limit;
      poisoned += poison[t];
    }
    const bool finite = poisoned == 0 && limit <= __FLT_MAX__;
    // Below this the inverse would overflow: such a block counts as zero.
    const bool vanishes = !(limit >= range * 0x1p-120f);
    const float block_scale = !finite ? __builtin_nanf("") : vanishes ? 0.0f : limit / range;
    for (int t = block * kBlockTables; t < (block + 1) * kBlockTables; ++t) {
      inverse[t] = finite && !vanishes ? range / limit : 0.0f;
      scale[t] = block_scale;
      if (inverse[t] != 0) continue;
      for (auto& row : lanes) row[t] = 0;
    }
    lut.half_scale[block] = 0.5f * block_scale;
  }

  alignas(64) int32_t low[8][kSpanTables], high[8][kSpanTables];  // entries 8..15 of every table
  for (int t = 0; t < kSpanTables; t += kStep) {
    const F to_units = N::load_f(inverse + t);
    F v[kTableWeights];
    for (int i = 0; i < kTableWeights; ++i) {
      v[i] = N::load_f(lanes[i] + t);
      if (exact) {
        v[i] = N::to_float(N::round_to_int(N::mul(v[i], to_units)));
        N::store_f(lanes[i] + t, N::mul(v[i], N::load_f(scale + t)));  // what the sums add up
      }
    }
    const F plus01 = N::add(v[0], v[1]), minus01 = N::sub(v[0], v[1]);
    const F plus32 = N::add(v[3], v[2]), minus32 = N::sub(v[3], v[2]);
    const auto put = [&](int e, F value) {
      if (exact) {
        // 255 is odd: no sum lies half-way, and the low part is within +-127 like its mirror image.
        const F high_part = N::to_float(N::round_to_int(N::mul(value, N::set(1.0f / kExactBase))));
        N::store_i(high[e] + t, N::round_to_int(high_part));
        value = N::fma(high_part, N::set(-static_cast<float>(kExactBase)), value);
      } else {
        value = N::mul(value, to_units);
      }
      N::store_i(low[e] + t, N::round_to_int(value));
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
  N::write_tables(low, lut.entries, table_bytes(tables));
  if (exact) N::write_tables(high, lut.entries + kTableEntries, table_bytes(tables));

  for (int c = 0; c < kSpanChunks; ++c) {
    float sum = 0;
    for (int t = 2 * c; t < 2 * c + 2; ++t) {
      for (int i = 0; i < kTableWeights; ++i) sum += lanes[i][t];
    }
    lut.chunk_sum[c] = sum;
  }
  for (int block = 0; block < kSpanBlocks; ++block) {
    float sum = 0;
    for (int c = 0; c < kBlockChunks; ++c) sum += lut.chunk_sum[block * kBlockChunks + c];
    lut.block_sum[block] = sum;
  }
}
