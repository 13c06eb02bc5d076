// The tables of one region of 64 activations (layout/lut.h).

// A value for each table of half a region: those that the low nibbles of its 4 chunks index, then
// those of the high nibbles.
using TableRow = float[kHalfTables];

struct HalfRegion {
  alignas(64) TableRow lanes[kTableWeights];  // lanes[i][t] = x[i] of table t
  alignas(64) TableRow limit;                 // the largest entry; of exact tables the largest |x|
  alignas(64) TableRow poison;                // NaN where an x is infinite or NaN
};

// One vector of a row of tables: the second half of the row on top of the first where a vector has
// no room for both. Its lanes are put together by halving too: all instruction sets do the same.
template <typename N, typename Combine>
inline typename N::F fold_row(const TableRow& row, const Combine& combine) {
  static_assert(N::kFloats == kHalfTables || 2 * N::kFloats == kHalfTables);
  if constexpr (N::kFloats == kHalfTables) return N::load_f(row);
  return combine(N::load_f(row), N::load_f(row + kHalfTables / 2));
}

template <typename N>
inline float sum_of_row(const TableRow& row) {
  return N::sum(fold_row<N>(row, [](auto a, auto b) { return N::add(a, b); }));
}

template <typename N>
inline float largest_of_row(const TableRow& row) {
  return N::largest(fold_row<N>(row, [](auto a, auto b) { return N::max(a, b); }));
}

template <typename N>
inline void measure_half(bool exact, HalfRegion& half) {
  using F = typename N::F;
  for (int t = 0; t < kHalfTables; t += N::kFloats) {
    const F zero = N::set(0);
    F limit = zero, poison = zero;
    for (int i = 0; i < kTableWeights; ++i) {
      const F value = N::load_f(half.lanes[i] + t);
      const F size = N::max(value, N::sub(zero, value));
      limit = exact ? N::max(limit, size) : N::add(limit, size);
      poison = N::fma(value, zero, poison);
    }
    N::store_f(half.limit + t, limit);
    N::store_f(half.poison + t, poison);
  }
}

// Calls put(e, entry) for entries 8 to 15 of as many tables as N has lanes.
template <typename N, typename Put>
inline void upper_entries(const HalfRegion& half, int t, const Put& put) {
  using F = typename N::F;
  F v[kTableWeights];
  for (int i = 0; i < kTableWeights; ++i) v[i] = N::load_f(half.lanes[i] + t);
  const F plus01 = N::add(v[0], v[1]), minus01 = N::sub(v[0], v[1]);
  const F plus32 = N::add(v[3], v[2]), minus32 = N::sub(v[3], v[2]);
  put(0, N::sub(minus32, plus01));
  put(1, N::add(minus32, minus01));
  put(2, N::sub(minus32, minus01));
  put(3, N::add(minus32, plus01));
  put(4, N::sub(plus32, plus01));
  put(5, N::add(plus32, minus01));
  put(6, N::sub(plus32, minus01));
  put(7, N::add(plus32, plus01));
}

// int8 tables: entry = round(sum * inverse step).
template <typename N>
inline void write_half(const HalfRegion& half, const TableRow& inverse_step, int8_t* out) {
  alignas(64) int32_t entries[8][kHalfTables];
  for (int t = 0; t < kHalfTables; t += N::kFloats) {
    const auto scale = N::load_f(inverse_step + t);
    upper_entries<N>(half, t, [&](int e, typename N::F sum) {
      N::store_i(entries[e] + t, N::round_to_int(N::mul(sum, scale)));
    });
  }
  N::write_tables(entries, out);
}

// Exact tables of activations that are integers (steps) by now: low parts, then high parts.
template <typename N>
inline void write_half_exact(const HalfRegion& half, int8_t* out) {
  using F = typename N::F;
  alignas(64) int32_t low[8][kHalfTables], high[8][kHalfTables];
  for (int t = 0; t < kHalfTables; t += N::kFloats) {
    upper_entries<N>(half, t, [&](int e, F sum) {
      // 255 is odd: no sum lies half-way, and the low part is within +-127 like its mirror image.
      const F upper = N::to_float(N::round_to_int(N::mul(sum, N::set(1.0f / kExactBase))));
      N::store_i(high[e] + t, N::round_to_int(upper));
      N::store_i(low[e] + t,
                 N::round_to_int(N::fma(upper, N::set(-static_cast<float>(kExactBase)), sum)));
    });
  }
  N::write_tables(low, out);
  N::write_tables(high, out + kHalfTables * kTableEntries);
}

template <typename N>
inline void choose_multipliers(const HalfRegion& half, float limit, int most, float to_units,
                               TableRow& multiplier, TableRow& inverse_step) {
  for (int t = 0; t < kHalfTables; t += N::kFloats) {
    const auto chosen = multipliers_of<N>(N::load_f(half.limit + t), limit, most);
    N::store_f(multiplier + t, chosen);
    N::store_f(inverse_step + t, N::div(N::set(to_units), chosen));
  }
}

// Turns the activations into whole numbers of steps.
template <typename N>
inline void round_half(HalfRegion& half, const TableRow& inverse_step) {
  for (auto& row : half.lanes) {
    for (int t = 0; t < kHalfTables; t += N::kFloats) {
      const auto steps = N::mul(N::load_f(row + t), N::load_f(inverse_step + t));
      N::store_f(row + t, N::to_float(N::round_to_int(steps)));
    }
  }
}

template <typename N>
inline void sum_tables(const HalfRegion& half, TableRow& sums) {
  for (int t = 0; t < kHalfTables; t += N::kFloats) {
    auto sum = N::load_f(half.lanes[0] + t);
    for (int i = 1; i < kTableWeights; ++i) sum = N::add(sum, N::load_f(half.lanes[i] + t));
    N::store_f(sums + t, sum);
  }
}

// The largest multiplier M with which the largest entries add up to at most kLimitSum * 127 units:
// M * (sum of all limits / the largest) <= kLimitSum. All 16 alike leave 5.
inline int largest_multiplier(float limit, float sum) {
  constexpr int kLeast = kLimitSum / kRegionTables;
  const float fits = static_cast<float>(kLimitSum) * (limit / sum);
  if (!(fits > kLeast)) return kLeast;
  return fits < kMaxMultiplier ? static_cast<int>(fits) : kMaxMultiplier;
}

// x [64]; to_token_units is for Tables::kExact8.
template <typename S>
void build_region(const float* x, Tables tables, float to_token_units, const LutView& lut) {
  using N = typename S::Narrow;  // at most 8 lanes: a lane is a table
  const bool exact = tables != Tables::kInt8;

  HalfRegion halves[kRegionHalves];
  float limit = 0, limit_sum = 0, poison = 0;
  for (HalfRegion& half : halves) {
    N::deal_to_tables(x, half.lanes);
    x += kHalfChunks * kChunkWeights;
    measure_half<N>(exact, half);
    const float largest = largest_of_row<N>(half.limit);
    limit = largest > limit ? largest : limit;
    limit_sum += sum_of_row<N>(half.limit);
    poison += sum_of_row<N>(half.poison);
  }
  const int most = tables == Tables::kInt8    ? largest_multiplier(limit, limit_sum)
                   : tables == Tables::kExact ? kExactMultiplier
                                              : 1;
  Scale scale = choose_scale(limit, poison, most * (exact ? kExactMax : kInt8Max));
  if (tables == Tables::kExact8) {
    scale = choose_token_scale(poison, to_token_units);
  }
  lut.half_unit[0] = 0.5f * scale.unit;

  const float sum_unit = exact ? scale.unit : 1;
  float region_sum = 0;
  for (int h = 0; h < kRegionHalves; ++h) {
    HalfRegion& half = halves[h];
    alignas(64) TableRow multiplier, inverse_step;
    for (int t = 0; t < kHalfTables; t += N::kFloats) {
      N::store_f(multiplier + t, N::set(1));
      N::store_f(inverse_step + t, N::set(scale.to_units));
    }
    if (scale.to_units == 0) {
      for (auto& row : half.lanes) {
        for (float& value : row) value = 0;
      }
    } else if (most > 1) {
      choose_multipliers<N>(half, limit, most, scale.to_units, multiplier, inverse_step);
    }
    int8_t* entries = lut.entries + h * kHalfTables * table_parts(tables) * kTableEntries;
    if (exact) {
      round_half<N>(half, inverse_step);
      write_half_exact<N>(half, entries);
    } else {
      write_half<N>(half, inverse_step, entries);
    }
    alignas(64) int32_t multipliers[kHalfTables];
    alignas(64) TableRow sums;
    sum_tables<N>(half, sums);
    for (int t = 0; t < kHalfTables; t += N::kFloats) {
      N::store_i(multipliers + t, N::round_to_int(N::load_f(multiplier + t)));
      if (exact) N::store_f(sums + t, N::mul(N::load_f(sums + t), N::load_f(multiplier + t)));
    }
    S::write_multipliers(multipliers, lut.multipliers + h * kMultiplierWords);
    float half_sum = 0;
    for (int c = 0; c < kHalfChunks; ++c) {
      const float chunk_sum = (sums[c] + sums[kHalfChunks + c]) * sum_unit;
      lut.chunk_sum[h * kHalfChunks + c] = chunk_sum;
      half_sum += chunk_sum;
    }
    lut.half_sum[h] = half_sum;
    region_sum += sum_of_row<N>(sums);
  }
  lut.region_sum[0] = region_sum * sum_unit;
}
