// One tile of 32 rows of ternary weights times several activation vectors, by lookup in tables of
// 3 activations (layout/lut.h): the weights' sums are the looked-up entries, and nothing is to be
// added for zero points or centres.

template <typename S, int kParts, int kTokens>
struct TernaryProduct {
  using F = typename S::F;
  using I = typename S::I;
  using Trits = typename S::Trits;
  static constexpr int kVectors = kTileRows / S::kFloats;
  static constexpr int kPlaces = ternary_places(Trits::kEntries);  // from region to region
  static constexpr int kPartBytes = kTernaryChunkTables * Trits::kEntries;
  static constexpr int kChunkBytes =
      kTileRows * static_cast<int>(ternary_chunk_row_bytes(kTernaryChunkWeights));

  const LutView* const luts;  // [kTokens]

  // Sums of a region fit int16: layout/lut.h for int8 tables, 32 * 4 * 127 for exact ones.
  inline void add_chunk(Trits (&sums)[kTokens][kParts], const uint8_t* codes, int64_t place,
                        int64_t chunk) const {
    typename Trits::Chunk state(codes);
    repeat<Trits::kSteps>([&](auto step) {
      const auto index = Trits::template index<step>(state);
      repeat<kTokens * kParts>([&](auto i) {
        constexpr int kToken = i / kParts, kPart = i % kParts;
        const LutView lut = luts[kToken].from_region(place, kParts);
        sums[kToken][kPart].template add<step>(index,
                                               lut.entries + (chunk * kParts + kPart) * kPartBytes,
                                               lut.multipliers + chunk * Trits::kWords);
      });
    });
  }

  // The i-th vector of rows, both parts put together.
  static I row(const Trits (&sums)[kParts], int i) {
    I row = sums[0].sum(i);
    if constexpr (kParts == 2) {
      static_assert(kExactBase == 255);
      const I high = sums[1].sum(i);
      row = S::sub_i(S::template add_shifted<8>(row, high), high);
    }
    return row;
  }

  // y [kTokens, 32], rows `stride` apart.
  TMAC_FLATTEN void run(const LinearSpec& spec, const uint8_t* tile, float* y,
                        int64_t stride) const {
    const int64_t n_groups = spec.n_groups();
    const bool stored = spec.scale_kind == ScaleKind::kStored;
    const int64_t full_chunks = spec.group_chunks(), full_bytes = spec.code_bytes(0);
    F acc[kTokens][kVectors];
    for (auto& token : acc) {
      for (F& a : token) a = S::set(0);
    }
    const uint8_t* group_at = tile;
    int64_t chunk = 0;
    for (int64_t g = 0; g < n_groups; ++g) {
      const int64_t group_end = chunk + (g + 1 < n_groups ? full_chunks : spec.chunks_in(g));
      F group[kTokens][kVectors];
      for (auto& token : group) {
        for (F& v : token) v = S::set(0);
      }
      const uint8_t* at = group_at;
      while (chunk < group_end) {
        const int64_t region = chunk / kTernaryRegionChunks;
        const int64_t place = region * kPlaces, region_begin = region * kTernaryRegionChunks;
        const int64_t region_end = region_begin + kTernaryRegionChunks;
        const int64_t end = region_end < group_end ? region_end : group_end;
        Trits sums[kTokens][kParts];
        const auto add_chunks = [&](auto count) {
          prefetch_codes<S>(at, count * kChunkBytes);
          repeat<count>([&](auto i) {
            add_chunk(sums, at + i * kChunkBytes, place, chunk + i - region_begin);
          });
          chunk += count;
          at += count * kChunkBytes;
        };
        while (end - chunk >= 2) add_chunks(std::integral_constant<int, 2>{});
        if (chunk < end) add_chunks(std::integral_constant<int, 1>{});
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t) {
          const F unit = S::set(2 * luts[t].half_unit[place]);
#pragma GCC unroll 8
          for (int i = 0; i < kVectors; ++i) {
            group[t][i] = S::fma(S::to_float(row(sums[t], i)), unit, group[t][i]);
          }
        }
      }
      group_at += g + 1 < n_groups ? full_bytes : spec.code_bytes(g);
      const uint16_t* scales = reinterpret_cast<const uint16_t*>(group_at);
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) {
        const F scale = stored ? S::load_half(scales + i * S::kFloats) : S::set(spec.scale);
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t) acc[t][i] = S::fma(scale, group[t][i], acc[t][i]);
      }
      group_at += spec.scale_bytes();
    }
    store_product<S>(acc, luts, y, stride);
  }
};

template <typename S, int kParts>
void multiply_ternary_tile(const LinearSpec& spec, const uint8_t* tile, const LutView* luts,
                           int64_t n, float* y, int64_t stride) {
  constexpr int kTokens = tokens_fitting<S, S::Trits::kAccumulators * kParts>();
  take_tokens<kTokens>(n, [&](auto tokens, int64_t t) {
    TernaryProduct<S, kParts, tokens>{luts + t}.run(spec, tile, y + t * stride, stride);
  });
}
