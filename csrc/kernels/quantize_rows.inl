// Regions of one token as integers (layout/rows.h).

// Integers of a region, dealt out like the activations of its tables: q[half][i][t].
using RegionIntegers = int32_t[kRegionHalves][kTableWeights][kHalfTables];

// Where table t of half a region is in the order of deal_to_tables.
constexpr int dealt_table(int t) { return t % 2 * kHalfChunks + t / 2; }

// The kCount largest of some values that are not negative, in falling order; anything if one is
// NaN.
template <typename N, int kCount>
struct Largest {
  typename N::F values[kCount];  // all lanes alike after add_lanes

  Largest() {
    for (auto& value : values) value = N::set(0);
  }
  // Each lane on its own.
  void add(typename N::F other) {
    for (auto& value : values) {
      const auto less = N::min(value, other);
      value = N::max(value, other);
      other = less;
    }
  }
  // The |x| of the quads of a region.
  void add_region(const HalfRegion* halves) {
    for (int h = 0; h < kRegionHalves; ++h) {
      for (int t = 0; t < kHalfTables; t += N::kFloats) add(N::load_f(halves[h].limit + t));
    }
  }
  // Lanes meet those that differ from them in one bit of their number, from that of `kDistance` on.
  template <int kDistance = 1>
  void add_lanes() {
    if constexpr (kDistance < N::kFloats) {
      typename N::F others[kCount];
      for (int i = 0; i < kCount; ++i) others[i] = N::template swap<kDistance>(values[i]);
      for (const auto& other : others) add(other);
      add_lanes<2 * kDistance>();
    }
  }
};

// The quads of a region whose largest |x| is `limit`: bits in the order of deal_to_tables.
template <typename N>
inline uint32_t find_quads(const HalfRegion* halves, typename N::F limit) {
  uint32_t found = 0;
  for (int h = 0; h < kRegionHalves; ++h) {
    for (int t = 0; t < kHalfTables; t += N::kFloats) {
      found |= N::equal_lanes(N::load_f(halves[h].limit + t), limit) << (h * kHalfTables + t);
    }
  }
  return found;
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

// Splits a loud quad, of a region whose bytes are written already, and returns its table in the
// region. The upper parts go to high [4].
inline int split_loud(const RegionIntegers& q, int quad, int8_t* out, void* high) {
  const int half = quad / kHalfTables, at = quad % kHalfTables;
  int8_t low[kQuadWeights], upper[kQuadWeights];
  for (int i = 0; i < kQuadWeights; ++i) {
    const int32_t value = q[half][i][at];
    upper[i] = static_cast<int8_t>((value + kLoudBase / 2) >> kLoudShift);
    low[i] = static_cast<int8_t>(value - upper[i] * kLoudBase);
  }
  const int table = half * kHalfTables + at % kHalfChunks * 2 + at / kHalfChunks;
  std::memcpy(out + table * kQuadWeights, low, sizeof(low));
  std::memcpy(high, upper, sizeof(upper));
  return table;
}

// Where the numbers of one token go, in one region.
struct RowOutput {
  int8_t* integers;  // [parts][12][64] of the token
  RowRegion* region;
  RowChunks* chunks;  // or null
  int lane;

  RowOutput next(int64_t region_bytes) const {
    auto* after = reinterpret_cast<uint8_t*>(region) + region_bytes;
    return {integers + region_bytes, reinterpret_cast<RowRegion*>(after),
            chunks == nullptr ? nullptr : chunks + 1, lane};
  }
};

// The activations of one region.
template <typename N>
struct RowInput {
  HalfRegion halves[kRegionHalves];
  typename N::F poison;
  alignas(64) RegionIntegers q;

  void measure(const float* x) {
    poison = N::set(0);
    for (int h = 0; h < kRegionHalves; ++h) {
      N::deal_to_tables(x + h * kRegionWeights / 2, halves[h].lanes);
      measure_half<N>(true, halves[h]);
      for (int t = 0; t < kHalfTables; t += N::kFloats) {
        poison = N::add(poison, N::load_f(halves[h].poison + t));
      }
    }
  }

  // With one step, in one part.
  void write(Scale scale, float unit, const RowOutput& out) {
    out.region->unit[out.lane] = unit;
    if (scale.to_units == 0) {  // also where x is not finite
      std::memset(q, 0, sizeof(q));
    } else {
      round_region<N>(halves, scale.to_units, q);
    }
    sum_integers<N>(q, out.lane, out.region, out.chunks);
    write_bytes(q, out.integers);
  }

  void write_exact(const RowOutput& out) {
    Largest<N, 1> largest;
    largest.add_region(halves);
    largest.add_lanes();
    const float limit = N::lane(largest.values[0]);
    const Scale scale = choose_scale(limit, N::sum(poison), kExactMultiplier * kExactMax);
    out.region->unit[out.lane] = 0.5f * scale.unit;
    if (scale.to_units == 0) {
      std::memset(q, 0, sizeof(q));
    } else {
      round_exactly<N>(halves, limit, scale.to_units, q);
    }
    sum_integers<N>(q, out.lane, out.region, out.chunks);
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
    write_bytes(high, out.integers);
    write_bytes(q, out.integers + kBlockTokens * kRegionWeights);
  }
};

// Tables::kInt8: kRegions regions with one unit, and with as many loud quads, wherever they lie.
template <typename N, int kRegions>
inline void write_loud_regions(RowInput<N>* inputs, const RowOutput& out) {
  constexpr int64_t kRegionBytes = RowView::region_bytes(1);
  Largest<N, kRegions + 1> largest;
  auto poison = N::set(0);
  for (int r = 0; r < kRegions; ++r) {
    largest.add_region(inputs[r].halves);
    poison = N::add(poison, inputs[r].poison);
  }
  largest.add_lanes();
  // Loud quads have 8128 / 127 = 64 times the range of the others.
  const auto least = N::mul(largest.values[0], N::set(1.0f / 64));
  const float limit = N::lane(N::max(largest.values[kRegions], least));
  const Scale scale = choose_scale(limit, N::sum(poison), kInt8Max);
  RowOutput outs[kRegions];
  uint32_t rest = 0;  // quads that are not loud yet, of all regions
  for (int r = 0; r < kRegions; ++r) {
    outs[r] = r == 0 ? out : outs[r - 1].next(kRegionBytes);
    inputs[r].write(scale, scale.unit, outs[r]);
    rest |= 0xffffu << (r * kRegionTables);
  }
  for (int i = 0; i < kRegions; ++i) {
    uint32_t found = 0;
    for (int r = 0; r < kRegions; ++r) {
      found |= find_quads<N>(inputs[r].halves, largest.values[i]) << (r * kRegionTables);
    }
    found &= rest;
    const int quad = __builtin_ctz(found == 0 ? rest : found);  // none is found among NaNs
    rest &= ~(1u << quad);
    const int r = quad / kRegionTables;
    RowRegion* region = outs[i].region;
    const int table =
        split_loud(inputs[r].q, quad % kRegionTables, outs[r].integers, &region->loud[out.lane]);
    region->loud_at[out.lane] = static_cast<uint32_t>((r * kRegionTables + table) * kQuadCodes);
  }
}

// x [2][64]; to_token_units is for Tables::kExact8. To `out`, `region` and `chunks` of the first.
template <typename S>
TMAC_FLATTEN void quantize_row_regions(const float* x, Tables tables, bool shares_unit,
                                       float to_token_units, int lane, int8_t* out,
                                       RowRegion* region, RowChunks* chunks) {
  using N = typename S::Narrow;
  static_assert(kRowRegions == 2);
  const RowOutput first{out, region, chunks, lane};
  const RowOutput second = first.next(RowView::region_bytes(row_parts(tables)));
  RowInput<N> inputs[kRowRegions];
  for (int i = 0; i < kRowRegions; ++i) inputs[i].measure(x + i * kRegionWeights);
  if (tables == Tables::kInt8 && shares_unit) {
    write_loud_regions<N, 2>(inputs, first);
    return;
  }
  for (int i = 0; i < kRowRegions; ++i) {
    const RowOutput& one = i == 0 ? first : second;
    if (tables == Tables::kInt8) {
      write_loud_regions<N, 1>(inputs + i, one);
    } else if (tables == Tables::kExact) {
      inputs[i].write_exact(one);
    } else {
      const Scale scale = choose_token_scale(N::sum(inputs[i].poison), to_token_units);
      inputs[i].write(scale, 0.5f * scale.unit, one);
    }
  }
}
