// Regions of one token as integers (layout/rows.h).

// Integers of a region, dealt out like the activations of its tables: q[half][i][t].
using RegionIntegers = int32_t[kRegionHalves][kTableWeights][kHalfTables];

// Where table t of half a region is in the order of deal_to_tables.
constexpr int dealt_table(int t) { return t % 2 * kHalfChunks + t / 2; }

// The largest and the second largest of some values that are not negative, in all lanes; anything
// if one is NaN.
template <typename N>
struct Largest {
  typename N::F first = N::set(0), second = N::set(0);

  void add(typename N::F values) {
    second = N::max(second, N::min(first, values));
    first = N::max(first, values);
  }
  // Lanes meet those that differ from them in one bit of their number, from that of `distance` on.
  template <int kDistance = 1>
  void add_lanes() {
    if constexpr (kDistance < N::kFloats) {
      const auto other = N::template swap<kDistance>(second);
      add(N::template swap<kDistance>(first));
      second = N::max(second, other);
      add_lanes<2 * kDistance>();
    }
  }
};

// Of the |x| of a region's quads.
template <typename N>
inline Largest<N> find_largest(const HalfRegion* halves) {
  Largest<N> largest;
  for (int h = 0; h < kRegionHalves; ++h) {
    for (int t = 0; t < kHalfTables; t += N::kFloats) {
      largest.add(N::load_f(halves[h].limit + t));
    }
  }
  largest.add_lanes();
  return largest;
}

// A quad whose largest |x| is `limit`, in the order of deal_to_tables.
template <typename N>
inline int find_quad(const HalfRegion* halves, typename N::F limit) {
  uint32_t found = 0;
  for (int h = 0; h < kRegionHalves; ++h) {
    for (int t = 0; t < kHalfTables; t += N::kFloats) {
      found |= N::equal_lanes(N::load_f(halves[h].limit + t), limit) << (h * kHalfTables + t);
    }
  }
  return found == 0 ? 0 : __builtin_ctz(found);
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

// At most 64 * 32512, which a float holds.
template <typename N>
inline void sum_integers(const RegionIntegers& q, int lane, RowRegion* region, RowChunks* chunks) {
  auto total = N::zero_i();
  for (int h = 0; h < kRegionHalves; ++h) {
    alignas(64) int32_t sums[kHalfTables];
    for (int t = 0; t < kHalfTables; t += N::kFloats) {
      const auto at = [&](int i) {
        return N::load_i(reinterpret_cast<const uint8_t*>(q[h][i] + t));
      };
      const auto sum = N::add_i(N::add_i(at(0), at(1)), N::add_i(at(2), at(3)));
      N::store_i(sums + t, sum);
      total = N::add_i(total, sum);
    }
    for (int c = 0; chunks != nullptr && c < kHalfChunks; ++c) {
      chunks->sum[h * kHalfChunks + c][lane] = sums[c] + sums[kHalfChunks + c];
    }
  }
  region->sum[lane] = static_cast<int32_t>(N::sum(N::to_float(total)));
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

// The activations of one region.
template <typename N>
struct RowInput {
  HalfRegion halves[kRegionHalves];
  typename N::F poison;
  Largest<N> largest;

  void measure(const float* x) {
    poison = N::set(0);
    for (int h = 0; h < kRegionHalves; ++h) {
      N::deal_to_tables(x + h * kRegionWeights / 2, halves[h].lanes);
      measure_half<N>(true, halves[h]);
      for (int t = 0; t < kHalfTables; t += N::kFloats) {
        poison = N::add(poison, N::load_f(halves[h].poison + t));
      }
    }
    largest = find_largest<N>(halves);
  }

  // Writes integers to out [parts][12][64] of the token, the other numbers to lane `lane` of
  // `region` and `chunks`.
  void write(Tables tables, Scale scale, int lane, int8_t* out, RowRegion* region,
             RowChunks* chunks) const {
    region->unit[lane] = tables == Tables::kInt8 ? scale.unit : 0.5f * scale.unit;
    alignas(64) RegionIntegers q;
    if (scale.to_units == 0) {  // also where x is not finite
      std::memset(q, 0, sizeof(q));
    } else if (tables == Tables::kExact) {
      round_exactly<N>(halves, N::lane(largest.first), scale.to_units, q);
    } else {
      round_region<N>(halves, scale.to_units, q);
    }
    sum_integers<N>(q, lane, region, chunks);
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
      write_loud(q, find_quad<N>(halves, largest.first), lane, out, region);
    }
  }
};

// x [2][64]; to_token_units is for Tables::kExact8. To `out`, `region` and `chunks` of the first.
template <typename S>
TMAC_FLATTEN void quantize_row_regions(const float* x, Tables tables, bool shares_unit,
                                       float to_token_units, int lane, int8_t* out,
                                       RowRegion* region, RowChunks* chunks) {
  using N = typename S::Narrow;
  RowInput<N> inputs[kRowRegions];
  for (int i = 0; i < kRowRegions; ++i) inputs[i].measure(x + i * kRegionWeights);
  Scale scales[kRowRegions];
  if (tables == Tables::kExact8) {
    for (int i = 0; i < kRowRegions; ++i) {
      scales[i] = choose_token_scale(N::sum(inputs[i].poison), to_token_units);
    }
  } else if (tables == Tables::kExact) {
    for (int i = 0; i < kRowRegions; ++i) {
      scales[i] = choose_scale(N::lane(inputs[i].largest.first), N::sum(inputs[i].poison),
                               kExactMultiplier * kExactMax);
    }
  } else {
    typename N::F limits[kRowRegions], poisons[kRowRegions];
    for (int i = 0; i < kRowRegions; ++i) {
      // The loud quad has 8128 / 127 = 64 times the range of the others.
      const auto least = N::mul(inputs[i].largest.first, N::set(1.0f / 64));
      limits[i] = N::max(inputs[i].largest.second, least);
      poisons[i] = inputs[i].poison;
    }
    if (shares_unit) {
      static_assert(kRowRegions == 2);
      limits[0] = N::max(limits[0], limits[1]);
      poisons[0] = N::add(poisons[0], poisons[1]);
    }
    for (int i = 0; i < kRowRegions; ++i) {
      const bool shared = shares_unit && i > 0;
      scales[i] =
          shared ? scales[0] : choose_scale(N::lane(limits[i]), N::sum(poisons[i]), kInt8Max);
    }
  }
  const int64_t stride = RowView::region_bytes(row_parts(tables));
  for (int i = 0; i < kRowRegions; ++i) {
    auto* numbers = reinterpret_cast<RowRegion*>(reinterpret_cast<uint8_t*>(region) + i * stride);
    inputs[i].write(tables, scales[i], lane, out + i * stride, numbers,
                    chunks == nullptr ? nullptr : chunks + i);
  }
}
