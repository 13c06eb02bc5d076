// One region of one token as integers (layout/rows.h).

// Integers of a region, dealt out like the activations of its tables: q[half][i][t].
using RegionIntegers = int32_t[kRegionHalves][kTableWeights][kHalfTables];

// Where table t of half a region is in the order of deal_to_tables.
constexpr int dealt_table(int t) { return t % 2 * kHalfChunks + t / 2; }

// The largest and the second largest of some values that are not negative, as the bits of floats,
// which compare like integers; NaNs are larger than all others.
struct Largest {
  int32_t first, second;
};

inline int32_t max_of(int32_t a, int32_t b) { return a < b ? b : a; }
inline int32_t min_of(int32_t a, int32_t b) { return a < b ? a : b; }
inline Largest merge(Largest a, Largest b) {
  return {max_of(a.first, b.first), max_of(min_of(a.first, b.first), max_of(a.second, b.second))};
}

// Of the |x| of a region's quads.
inline Largest find_largest(const HalfRegion* halves) {
  int32_t low[kHalfTables], high[kHalfTables];
  std::memcpy(low, halves[0].limit, sizeof(low));
  std::memcpy(high, halves[1].limit, sizeof(high));
  const auto four = [&](const int32_t* sizes) {
    return merge({max_of(sizes[0], sizes[1]), min_of(sizes[0], sizes[1])},
                 {max_of(sizes[2], sizes[3]), min_of(sizes[2], sizes[3])});
  };
  return merge(merge(four(low), four(low + 4)), merge(four(high), four(high + 4)));
}

// A quad whose largest |x| has the bits `limit`, in the order of deal_to_tables.
inline int find_quad(const HalfRegion* halves, int32_t limit) {
  int32_t sizes[kHalfTables], at = 0;
  for (int h = 0; h < kRegionHalves; ++h) {
    std::memcpy(sizes, halves[h].limit, sizeof(sizes));
    for (int t = 0; t < kHalfTables; ++t) {
      const int32_t found = sizes[t] == limit ? h * kHalfTables + t : 0;
      at = found > at ? found : at;
    }
  }
  return at;
}

// All with one step.
template <typename N>
inline void round_region(const HalfRegion* halves, float to_units, RegionIntegers& q) {
  for (int h = 0; h < kRegionHalves; ++h) {
    for (int i = 0; i < kTableWeights; ++i) {
      for (int t = 0; t < kHalfTables; t += N::kFloats) {
        const auto x = N::load_f(halves[h].lanes[i] + t);
        N::store_i(q[h][i] + t, N::round_to_int(N::mul(x, N::set(to_units))));
      }
    }
  }
}

// With a step for each quad: it is a table of 4 (build_lut.inl).
template <typename N>
inline void round_exactly(const HalfRegion* halves, float limit, float to_units,
                          RegionIntegers& q) {
  for (int h = 0; h < kRegionHalves; ++h) {
    for (int t = 0; t < kHalfTables; t += N::kFloats) {
      const auto units = multipliers_of<N>(N::load_f(halves[h].limit + t), limit, kExactMultiplier);
      const auto inverse_step = N::div(N::set(to_units), units);
      for (int i = 0; i < kTableWeights; ++i) {
        const auto x = N::load_f(halves[h].lanes[i] + t);
        const auto steps = N::to_float(N::round_to_int(N::mul(x, inverse_step)));
        N::store_i(q[h][i] + t, N::round_to_int(N::mul(steps, units)));
      }
    }
  }
}

template <typename N>
inline void sum_chunks(const RegionIntegers& q, int lane, RowRegion* region, RowChunks* chunks) {
  int32_t total = 0;
  for (int h = 0; h < kRegionHalves; ++h) {
    alignas(64) int32_t sums[kHalfTables];
    for (int t = 0; t < kHalfTables; t += N::kFloats) {
      const auto at = [&](int i) {
        return N::load_i(reinterpret_cast<const uint8_t*>(q[h][i] + t));
      };
      N::store_i(sums + t, N::add_i(N::add_i(at(0), at(1)), N::add_i(at(2), at(3))));
    }
    for (int c = 0; c < kHalfChunks; ++c) {
      const int32_t sum = sums[c] + sums[kHalfChunks + c];
      if (chunks != nullptr) chunks->sum[h * kHalfChunks + c][lane] = sum;
      total += sum;
    }
  }
  region->sum[lane] = total;
}

// The low bytes, in the order of weights.
inline void write_bytes(const RegionIntegers& q, int8_t* out) {
  for (int h = 0; h < kRegionHalves; ++h) {
    uint32_t dealt[kHalfTables], words[kHalfTables];
    for (int t = 0; t < kHalfTables; ++t) {
      const auto byte = [&](int i) { return static_cast<uint32_t>(q[h][i][t]) & 255; };
      dealt[t] = byte(0) | byte(1) << 8 | byte(2) << 16 | byte(3) << 24;
    }
    for (int t = 0; t < kHalfTables; ++t) words[t] = dealt[dealt_table(t)];
    std::memcpy(out + h * kRegionWeights / 2, words, sizeof(words));
  }
}

// Splits the loud quad, of a region whose bytes are written already.
inline void write_loud(const RegionIntegers& q, int quad, int lane, int8_t* out,
                       RowRegion* region) {
  const int half = quad / kHalfTables, at = quad % kHalfTables;
  int8_t low[kQuadWeights], high[kQuadWeights];
  for (int i = 0; i < kQuadWeights; ++i) {
    const int32_t value = q[half][i][at];
    high[i] = static_cast<int8_t>((value + kLoudBase / 2) >> kLoudShift);
    low[i] = static_cast<int8_t>(value - high[i] * kLoudBase);
  }
  const int table = half * kHalfTables + at % kHalfChunks * 2 + at / kHalfChunks;
  std::memcpy(out + table * kQuadWeights, low, sizeof(low));
  std::memcpy(&region->loud[lane], high, sizeof(high));
  region->loud_at[lane] = static_cast<uint32_t>(table * kQuadCodes);
}

// x [64]; to_token_units is for Tables::kExact8. Integers go to out [parts][12][64] of the token,
// the other numbers to lane `lane` of `region` and `chunks`.
template <typename S>
TMAC_FLATTEN void quantize_row(const float* x, Tables tables, float to_token_units, int lane,
                               int8_t* out, RowRegion* region, RowChunks* chunks) {
  using N = typename S::Narrow;
  HalfRegion halves[kRegionHalves];
  auto poisons = N::set(0);
  for (int h = 0; h < kRegionHalves; ++h) {
    N::deal_to_tables(x + h * kRegionWeights / 2, halves[h].lanes);
    measure_half<N>(true, halves[h]);
    for (int t = 0; t < kHalfTables; t += N::kFloats) {
      poisons = N::add(poisons, N::load_f(halves[h].poison + t));
    }
  }
  const float poison = N::sum(poisons);
  const Largest largest = find_largest(halves);
  float limit, rest;
  std::memcpy(&limit, &largest.first, sizeof(limit));
  std::memcpy(&rest, &largest.second, sizeof(rest));
  Scale scale;
  if (tables == Tables::kExact8) {
    scale = choose_token_scale(poison, to_token_units);
  } else if (tables == Tables::kExact) {
    scale = choose_scale(limit, poison, kExactMultiplier * kExactMax);
  } else {
    const float least = limit * (1.0f / 64);  // 8128 / 127
    scale = choose_scale(rest > least ? rest : least, poison, kInt8Max);
  }
  region->unit[lane] = tables == Tables::kInt8 ? scale.unit : 0.5f * scale.unit;

  alignas(64) RegionIntegers q;
  if (scale.to_units == 0) {  // also where x is not finite
    std::memset(q, 0, sizeof(q));
  } else if (tables == Tables::kExact) {
    round_exactly<N>(halves, limit, scale.to_units, q);
  } else {
    round_region<N>(halves, scale.to_units, q);
  }
  sum_chunks<N>(q, lane, region, chunks);
  if (tables == Tables::kExact) {
    alignas(64) RegionIntegers high;
    for (int h = 0; h < kRegionHalves; ++h) {
      for (int i = 0; i < kTableWeights; ++i) {
        for (int t = 0; t < kHalfTables; ++t) {
          int32_t& low = q[h][i][t];
          const int32_t half = low < 0 ? -(kExactBase / 2) : kExactBase / 2;
          high[h][i][t] = (low + half) / kExactBase;
          low -= high[h][i][t] * kExactBase;
        }
      }
    }
    write_bytes(high, out);
    out += kBlockTokens * kRegionWeights;
  }
  write_bytes(q, out);
  if (tables == Tables::kInt8) {
    write_loud(q, find_quad(halves, largest.first), lane, out, region);
  }
}
