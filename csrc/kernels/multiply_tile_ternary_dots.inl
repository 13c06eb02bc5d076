// One tile of 32 rows of ternary weights times 8-bit integers (Tables::kExact8) by dot products, on
// instruction sets where that is faster than looking all sums up in two tables. The integers, and
// so the bits, are those of multiply_tile_ternary.inl.

// The integers of x [96] -> TernaryIntegers, which take the place of the region's multipliers.
template <typename S>
void build_ternary_integers(const float* x, float to_token_units, const LutView& lut) {
  using I = typename S::I;
  using F = typename S::F;
  TernaryIntegers& out = *reinterpret_cast<TernaryIntegers*>(lut.multipliers);
  const F zero = S::set(0);
  F poisons = zero;
  I q[kTernaryRegionWeights / S::kFloats];
  for (I& vector : q) {
    const F values = S::load_f(x);
    poisons = S::fma(values, zero, poisons);
    vector = S::round_to_int(S::mul(values, S::set(to_token_units)));
    x += S::kFloats;
  }
  S::TritDots::write_integers(q, out.q[0], out.sum);
  const bool finite = S::sum(poisons) == 0;
  for (int32_t& not_finite : out.not_finite) not_finite = finite ? 0 : 1;
}

template <typename S, int kTokens>
struct TernaryDotProduct {
  using F = typename S::F;
  using I = typename S::I;
  using N = typename S::Narrow;
  using Dots = typename S::TritDots;
  static constexpr int kVectors = kTileRows / S::kFloats;
  // A dot product takes longer to come out than the next one takes to go in.
  static constexpr int kChains = kTokens < 4 ? 4 / kTokens : 1;
  static constexpr int64_t kChunkBytes = kTileRows * ternary_chunk_row_bytes(kTernaryChunkWeights);

  const LutView* const luts;  // [kTokens]

  const TernaryIntegers* integers(int t) const {
    return reinterpret_cast<const TernaryIntegers*>(luts[t].multipliers);
  }

  // Adds up the integers of the chunks [chunk, end) of a token. Not 0 where an x is not finite: the
  // second of both.
  struct Totals {
    int32_t sum, not_finite;
  };
  inline Totals totals(int t, int64_t chunk, int64_t end) const {
    Totals total{0, 0};
    const auto add = [&](int64_t until) {
      for (; chunk < until; ++chunk) {
        const TernaryIntegers& region = integers(t)[chunk / kTernaryRegionChunks];
        total.sum += region.sum[chunk % kTernaryRegionChunks];
        total.not_finite += region.not_finite[chunk % kTernaryRegionChunks];
      }
    };
    const int64_t whole_end = end / kTernaryRegionChunks * kTernaryRegionChunks;
    const int64_t whole = round_up(chunk, kTernaryRegionChunks);
    if (whole < whole_end) {
      add(whole);
      alignas(64) int32_t lanes[2 * kTernaryRegionChunks];
      constexpr int kNumbers = 2 * kTernaryRegionChunks / N::kFloats;
      static_assert(kNumbers == 1);
      typename N::I sums = N::zero_i();
      for (; chunk < whole_end; chunk += kTernaryRegionChunks) {
        const int32_t* numbers = integers(t)[chunk / kTernaryRegionChunks].sum;
        sums = N::add_i(sums, N::load_i(reinterpret_cast<const uint8_t*>(numbers)));
      }
      N::store_i(lanes, sums);
      for (int i = 0; i < kTernaryRegionChunks; ++i) {
        total.sum += lanes[i];
        total.not_finite += lanes[kTernaryRegionChunks + i];
      }
    }
    add(end);
    return total;
  }

  inline void add_chunk(I (&dots)[kTokens][kVectors][kChains], const uint8_t* codes, int64_t region,
                        int64_t at) const {
    const Dots weights(codes);
    repeat<kTernaryChunkQuads>([&](auto quad) {
      typename S::B w[kVectors];
      repeat<kVectors>([&](auto v) { w[v] = weights.template quad<quad, v>(); });
      repeat<kTokens>([&](auto t) {
        const auto q = Dots::broadcast(integers(t)[region].q[at] + kQuadWeights * quad);
        repeat<kVectors>([&](auto v) {
          I& sum = dots[t][v][quad % kChains];
          sum = S::dot(sum, w[v], q);
        });
      });
    });
  }

  // Adds the products of the chunks [chunk, end) at `at` to the sums of a group.
  inline void add_run(const uint8_t* at, int64_t chunk, int64_t end,
                      F (&group)[kTokens][kVectors]) const {
    Totals total[kTokens];
    for (int t = 0; t < kTokens; ++t) total[t] = totals(t, chunk, end);
    I dots[kTokens][kVectors][kChains];
    repeat<kTokens * kVectors * kChains>([&](auto i) {
      dots[i / kChains / kVectors][i / kChains % kVectors][i % kChains] = S::zero_i();
    });
    const auto add_chunks = [&](auto count) {
      prefetch_codes<S>(at, count * kChunkBytes);
      repeat<count>([&](auto i) {
        add_chunk(dots, at + i * kChunkBytes, chunk / kTernaryRegionChunks,
                  chunk % kTernaryRegionChunks + i);
      });
      chunk += count;
      at += count * kChunkBytes;
    };
    if (chunk % 2 != 0 && chunk < end) add_chunks(std::integral_constant<int, 1>{});
    while (end - chunk >= 2) add_chunks(std::integral_constant<int, 2>{});
    if (chunk < end) add_chunks(std::integral_constant<int, 1>{});
    repeat<kTokens>([&](auto t) {
      const F unit = S::set(total[t].not_finite == 0 ? 1 : __builtin_nanf(""));
      repeat<kVectors>([&](auto v) {
        I sum = S::sub_i(dots[t][v][0], S::set_i(total[t].sum));
        for (int i = 1; i < kChains; ++i) sum = S::add_i(sum, dots[t][v][i]);
        group[t][v] = S::fma(S::to_float(sum), unit, group[t][v]);
      });
    });
  }

  // y [kTokens, 32], rows `stride` apart.
  TMAC_FLATTEN void run(const LinearSpec& spec, const uint8_t* tile, float* y,
                        int64_t stride) const {
    const int64_t n_groups = spec.n_groups();
    const bool stored = spec.scale_kind == ScaleKind::kStored;
    const int64_t full_chunks = spec.group_chunks(), full_bytes = spec.code_bytes(0);
    // Sums of these are floats without rounding, whatever is added first. Those of longer groups
    // are rounded region by region.
    constexpr int64_t kExactChunks = (1 << 24) / (kInt8Max * kTernaryChunkWeights);
    const int64_t run = full_chunks > kExactChunks ? kTernaryRegionChunks : full_chunks;
    F acc[kTokens][kVectors];
    for (auto& token : acc) {
      for (F& a : token) a = S::set(0);
    }
    int64_t chunk = 0;
    for (int64_t g = 0; g < n_groups; ++g) {
      const int64_t group_end = chunk + (g + 1 < n_groups ? full_chunks : spec.chunks_in(g));
      F group[kTokens][kVectors];
      for (auto& token : group) {
        for (F& v : token) v = S::set(0);
      }
      const uint8_t* at = tile;
      while (chunk < group_end) {
        const int64_t end = chunk + run < group_end ? chunk + run : group_end;
        add_run(at, chunk, end, group);
        at += (end - chunk) * kChunkBytes;
        chunk = end;
      }
      tile += g + 1 < n_groups ? full_bytes : spec.code_bytes(g);
      const uint16_t* scales = reinterpret_cast<const uint16_t*>(tile);
      repeat<kVectors>([&](auto v) {
        const F scale = stored ? S::load_half(scales + v * S::kFloats) : S::set(spec.scale);
        repeat<kTokens>([&](auto t) { acc[t][v] = S::fma(scale, group[t][v], acc[t][v]); });
      });
      tile += spec.scale_bytes();
    }
    store_product<S>(acc, luts, y, stride);
  }
};

template <typename S>
void multiply_ternary_integers(const LinearSpec& spec, const uint8_t* tile, const LutView* luts,
                               int64_t n, float* y, int64_t stride) {
  constexpr int kTokens = tokens_fitting<S, kTileRows / S::kFloats>();
  take_tokens<kTokens>(n, [&](auto tokens, int64_t t) {
    TernaryDotProduct<S, tokens>{luts + t}.run(spec, tile, y + t * stride, stride);
  });
}

// Exact8 as the instruction set likes it best.
template <typename S>
constexpr bool kMultipliesTrits = !std::is_void_v<typename S::TritDots>;
template <typename S>
constexpr int kTablePlaces = ternary_places(S::Trits::kEntries);
template <typename S>
constexpr int kExact8Places = kMultipliesTrits<S> ? 1 : kTablePlaces<S>;

template <typename S>
void build_ternary(const float* x, Tables tables, float to_token_units, const LutView& lut) {
  if constexpr (kMultipliesTrits<S>) {
    if (tables == Tables::kExact8) {
      build_ternary_integers<S>(x, to_token_units, lut);
      return;
    }
  }
  build_ternary_region<S>(x, tables, to_token_units, lut);
}

template <typename S>
constexpr auto exact8_ternary_tile() -> Kernels::MultiplyTile {
  if constexpr (kMultipliesTrits<S>) return multiply_ternary_integers<S>;
  return multiply_ternary_tile<S, 2>;
}
