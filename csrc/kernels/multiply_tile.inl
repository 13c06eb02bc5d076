// One tile of 32 rows times several activation vectors, by table lookup: the bit-serial mpGEMM of
// T-MAC (Wei et al., 2024, section 3) on the layout of layout/layout.h.
//
// With beta = +-1 for a set or clear bit, a code is u = (2^b - 1)/2 + sum_p 2^(p-1) beta_p, so
//   sum_k u x = (2^b - 1)/2 * sum_k x  +  1/2 * sum_p 2^p * (signed sums of x, looked up).

// Everything is inlined where speed counts; elsewhere that only costs time to compile.
#if defined(TMAC_NO_FLATTEN) || defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define TMAC_FLATTEN
#else
#define TMAC_FLATTEN __attribute__((flatten))
#endif

// body(0), body(1), ..., body(kCount - 1), written out, each number known to the compiler.
template <int kCount, int kAt = 0, typename Body>
inline void repeat(const Body& body) {
  if constexpr (kAt < kCount) {
    body(std::integral_constant<int, kAt>{});
    repeat<kCount, kAt + 1>(body);
  }
}

// Sums of the lookups within a region, for one of kTokens tokens: all planes and all rows of the
// tile.
template <typename S, int kBits, int kTokens>
struct PlaneSums {
  template <typename Set>
  using SetOf = std::conditional_t<kTokens == 1, Set, typename Set::Several>;
  using Quad = SetOf<typename S::Quad>;
  using Pair = SetOf<typename S::Pair>;
  using Single = SetOf<typename S::Single>;
  static constexpr int kQuads = kBits / 4;
  static constexpr bool kPair = kBits % 4 >= 2;
  static constexpr bool kSingle = kBits % 2 == 1;
  static constexpr int kAccumulators =
      kQuads * Quad::kAccumulators + kPair * Pair::kAccumulators + kSingle * Single::kAccumulators;
  // True if row(i) is not the i-th vector of rows, but the i-th one of DealtRows.
  static constexpr bool kDealt = kBits == 2 && !std::is_void_v<typename S::DealtRows>;

  Quad quads[kQuads > 0 ? kQuads : 1];
  Pair pair;
  Single single;

  // The i-th vector of rows; weighs the sets by 2^(first plane). int8 tables: |row| <=
  // (85 * 127 + 51) * (2^8 - 1) < 2^22; exact tables: each part <= 16 * 4 * 127 * (2^8 - 1), and so
  // |255 * high + low| < 2^30.
  typename S::I row(int i) const {
    if constexpr (kDealt) return pair.rows(i);
    typename S::I total = S::zero_i();
    if constexpr (kQuads > 0) total = quads[0].sum(i);
    if constexpr (kQuads > 1) total = S::template add_shifted<4>(total, quads[1].sum(i));
    if constexpr (kPair) total = S::template add_shifted<4 * kQuads>(total, pair.sum(i));
    if constexpr (kSingle) total = S::template add_shifted<kBits - 1>(total, single.sum(i));
    return total;
  }
};

// Distances, in bytes of the packed stream, at which cache lines are asked for: two pages ahead
// into the second-level cache, so that the page is looked up in time too, and from there into the
// first.
constexpr int64_t kPrefetchBytes = 8192;
constexpr int64_t kPrefetchNearBytes = 1024;

// Asks for what follows the `bytes` bytes at `at`, which are about to be read.
template <typename S>
inline void prefetch_codes(const uint8_t* at, int64_t bytes) {
  for (int64_t line = 0; line < bytes; line += 64) {
    S::prefetch(at + line + kPrefetchBytes);
    S::prefetch_near(at + line + kPrefetchNearBytes);
  }
}

// As many tokens as have their accumulators, so many for each, in registers.
template <typename S, int kAccumulators>
constexpr int tokens_fitting() {
  constexpr int kFit = S::kAccumulators / kAccumulators;
  return kFit >= 8 ? 8 : kFit >= 4 ? 4 : kFit >= 2 ? 2 : 1;
}

template <typename S, int kBits, int kParts>
constexpr int tokens_together() {
  return tokens_fitting<S, PlaneSums<S, kBits, 2>::kAccumulators * kParts>();
}

// Calls segment(at, region, chunk, end, begins, constants) for the codes of each group in each
// region, chunks [chunk, end) of the row; `begins` where a group does, `constants` those of the
// group that ends here, or null.
template <int64_t kChunkBytes, typename Segment>
inline void walk_groups(const LinearSpec& spec, const uint8_t* tile, const Segment& segment) {
  const int64_t n_groups = spec.n_groups(), full_chunks = spec.group_chunks();
  const int64_t scale_bytes = spec.scale_bytes();
  const uint8_t* at = tile;
  int64_t chunk = 0;
  for (int64_t g = 0; g < n_groups; ++g) {
    const int64_t begin = chunk;
    const int64_t chunks_end = chunk + (g + 1 < n_groups ? full_chunks : spec.chunks_in(g));
    while (chunk < chunks_end) {
      const int64_t region = chunk / kRegionChunks, region_end = (region + 1) * kRegionChunks;
      const int64_t end = region_end < chunks_end ? region_end : chunks_end;
      const uint8_t* after = at + (end - chunk) * kChunkBytes;
      const bool ends = end == chunks_end;
      segment(at, region, chunk, end, chunk == begin,
              ends ? reinterpret_cast<const uint16_t*>(after) : nullptr);
      at = after;
      chunk = end;
    }
    at += scale_bytes;
  }
}

// y [kTokens, 32], rows `stride` apart, = acc in the unit of each token.
template <typename S, int kTokens, int kVectors>
inline void store_product(const typename S::F (&acc)[kTokens][kVectors], const LutView* luts,
                          float* y, int64_t stride) {
  for (int t = 0; t < kTokens; ++t) {
    const auto unit = S::set(luts[t].token_unit[0]);
    for (int i = 0; i < kVectors; ++i) {
      S::store_f(y + t * stride + i * S::kFloats, S::mul(acc[t][i], unit));
    }
  }
}

// Calls product(tokens, first) for the tokens [t, n), kTogether of them at a time, of the rest half
// as many, and so on.
template <int kTogether, typename Product>
inline void take_tokens(int64_t n, const Product& product, int64_t t = 0) {
  for (; t + kTogether <= n; t += kTogether) {
    product(std::integral_constant<int, kTogether>{}, t);
  }
  if constexpr (kTogether > 1) {
    if (t < n) take_tokens<kTogether / 2>(n, product, t);
  }
}

// Sums of one segment of a tile whose chunks are kChunkBytes apart: of kBits planes in sets, which
// may be some of those that a chunk has.
template <typename S, int kBits, int kParts, int kTokens, int64_t kChunkBytes>
struct SegmentSums {
  using I = typename S::I;
  using Sums = PlaneSums<S, kBits, kTokens>;
  static constexpr int kVectors = kTileRows / S::kFloats;

  const LutView* const luts;  // [kTokens]

  // Adds the kChunks chunks at `codes` to the sums; they are chunk `first` and what follows of a
  // half region.
  template <int kChunks>
  inline void add_chunks(Sums (&sums)[kTokens][kParts], const uint8_t* codes, int64_t half,
                         int first) const {
    const auto add_set = [&](const uint8_t* at, auto set_of) {
      using Set = std::remove_reference_t<decltype(set_of(sums[0][0]))>;
      constexpr int kTaken = kChunks < Set::kChunks ? kChunks : Set::kChunks;
      constexpr int kVectors =
          Set::kVectors < S::kVectorsTogether ? Set::kVectors : S::kVectorsTogether;
      constexpr int kSteps = Set::kVectors / kVectors;
      repeat<kChunks / kTaken * kSteps>([&](auto step) {
        constexpr int kFirst = step % kSteps * kVectors, kChunk = step / kSteps * kTaken;
        decltype(Set::template load<kTaken>(at, 0, 0, 0)) index[kVectors];
        repeat<kVectors>([&](auto v) {
          index[v] = Set::template load<kTaken>(at + kChunk * kChunkBytes, kChunkBytes, kFirst + v,
                                                first + kChunk);
        });
        repeat<kTokens * kParts * kVectors>([&](auto i) {
          constexpr int kVector = i % kVectors, kPart = i / kVectors % kParts;
          constexpr int kToken = i / kVectors / kParts;
          const LutView& lut = luts[kToken];
          set_of(sums[kToken][kPart])
              .template add<kTaken>(
                  kFirst + kVector, index[kVector],
                  lut.entries + (half * kParts + kPart) * kHalfTables * kTableEntries,
                  lut.multipliers + half * kMultiplierWords, first + kChunk);
        });
      });
    };
    if constexpr (Sums::kQuads > 0) {
      add_set(codes, [](Sums& s) -> auto& { return s.quads[0]; });
    }
    if constexpr (Sums::kQuads > 1) {
      add_set(codes + 4 * kTileRows, [](Sums& s) -> auto& { return s.quads[1]; });
    }
    codes += Sums::kQuads * 4 * kTileRows;
    if constexpr (Sums::kPair) {
      add_set(codes, [](Sums& s) -> auto& { return s.pair; });
      codes += 2 * kTileRows;
    }
    if constexpr (Sums::kSingle) {
      add_set(codes, [](Sums& s) -> auto& { return s.single; });
    }
  }

  // The i-th vector of rows, both parts put together.
  static I row(const Sums (&sums)[kParts], int i) {
    I row = sums[0].row(i);
    if constexpr (kParts == 2) {
      static_assert(kExactBase == 255);
      const I high = sums[1].row(i);
      row = S::sub_i(S::template add_shifted<8>(row, high), high);
    }
    return row;
  }

  // rows [kTokens, kVectors] of the chunks [chunk, end) of one region, which are whole halves of
  // it. As many bytes as are read count as read from `stream` on.
  inline void add_halves(const uint8_t* at, const uint8_t* stream, int64_t chunk, int64_t end,
                         I (&rows)[kTokens][kVectors]) const {
    Sums sums[kTokens][kParts];
    for (int64_t half = chunk / kHalfChunks; half < end / kHalfChunks; ++half) {
      prefetch_codes<S>(stream, kHalfChunks * kTileRows * kBits);
      add_chunks<kHalfChunks>(sums, at, half, 0);
      at += kHalfChunks * kChunkBytes;
      stream += kHalfChunks * kChunkBytes;
    }
    repeat<kTokens * kVectors>(
        [&](auto i) { rows[i / kVectors][i % kVectors] = row(sums[i / kVectors], i % kVectors); });
  }

  // The same for any chunks of one region.
  __attribute__((noinline)) void add_pieces(const uint8_t* at, int64_t chunk, int64_t end,
                                            I (&rows)[kTokens][kVectors]) const {
    static_assert(kTokens == 1);
    Sums sums[1][kParts];
    while (chunk < end) {
      const int64_t half = chunk / kHalfChunks;
      const int first = static_cast<int>(chunk % kHalfChunks);
      const int taken = first % 2 == 0 && end - chunk >= 2 ? 2 : 1;
      if (taken == 2) {
        add_chunks<2>(sums, at, half, first);
      } else {
        add_chunks<1>(sums, at, half, first);
      }
      chunk += taken;
      at += taken * kChunkBytes;
    }
    for (int i = 0; i < kVectors; ++i) rows[0][i] = row(sums[0], i);
  }

  // rows of the chunks [chunk, end) of one region.
  inline void add(const uint8_t* at, const uint8_t* stream, int64_t chunk, int64_t end,
                  I (&rows)[kTokens][kVectors]) const {
    if (chunk % kHalfChunks == 0 && end % kHalfChunks == 0) [[likely]] {
      add_halves(at, stream, chunk, end, rows);
      return;
    }
    using OneToken = SegmentSums<S, kBits, kParts, 1, kChunkBytes>;
    for (int t = 0; t < kTokens; ++t) {
      I one[1][kVectors];
      OneToken{luts + t}.add_pieces(at, chunk, end, one);
      for (int i = 0; i < kVectors; ++i) rows[t][i] = one[0][i];
    }
  }

  // Adds the sums of the activations of the chunks [chunk, end) of one region, the first of a group
  // or not.
  inline void add_activations(int64_t region, int64_t chunk, int64_t end, bool begins,
                              float (&x_sum)[kTokens]) const {
    const int64_t half = chunk / kHalfChunks;
    if (end - chunk == kRegionChunks) {
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) {
        x_sum[t] = (begins ? 0 : x_sum[t]) + luts[t].region_sum[region];
      }
    } else if (begins && chunk % kHalfChunks == 0 && end - chunk == kHalfChunks) {
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) x_sum[t] = luts[t].half_sum[half];
    } else {
      add_chunk_sums(chunk, end, begins, x_sum);
    }
  }
  __attribute__((noinline)) void add_chunk_sums(int64_t chunk, int64_t end, bool begins,
                                                float (&x_sum)[kTokens]) const {
    for (int t = 0; t < kTokens; ++t) {
      if (begins) x_sum[t] = 0;
      for (int64_t c = chunk; c < end; ++c) x_sum[t] += luts[t].chunk_sum[c];
    }
  }
};

template <typename S, int kBits, int kParts, int kTokens>
struct TileProduct {
  using F = typename S::F;
  using I = typename S::I;
  static constexpr int kVectors = kTileRows / S::kFloats;
  static constexpr int64_t kChunkBytes = kTileRows * kBits;

  const LutView* const luts;  // [kTokens]

  // y [kTokens, 32], rows `stride` apart.
  TMAC_FLATTEN void run(const LinearSpec& spec, const uint8_t* tile, float* y,
                        int64_t stride) const {
    constexpr float kHalf = ((1 << kBits) - 1) * 0.5f;
    const bool constant_zero = spec.offset_kind == OffsetKind::kNone;
    const float centre = constant_zero ? kHalf - spec.zero : kHalf;
    const SegmentSums<S, kBits, kParts, kTokens, kChunkBytes> sums{luts};

    // Several tokens have no registers for all this: it is read where it is needed.
    const F none[kTokens][kVectors] = {};
    F acc[kTokens][kVectors], group[kTokens][kVectors];
    for (auto& token : acc) {
      for (F& value : token) value = S::set(0);
    }
    float x_sum[kTokens] = {};
    const auto segment = [&](const uint8_t* at, int64_t region, int64_t chunk, int64_t end,
                             bool begins, const uint16_t* scales) {
      I rows[kTokens][kVectors];
      sums.add(at, at, chunk, end, rows);
      sums.add_activations(region, chunk, end, begins, x_sum);
      const F(*before)[kVectors] = begins ? none : group;
      const float* x_sums = x_sum;
      asm volatile("" : "+r"(before), "+r"(x_sums) : : "memory");
      // finish(token, vector, sum of the group so far)
      const auto flush = [&](const auto& finish) {
        repeat<kTokens>([&](auto t) {
          const F unit = S::set(luts[t].half_unit[region]);
          repeat<kVectors>(
              [&](auto i) { finish(t, i, S::fma(S::to_float(rows[t][i]), unit, before[t][i])); });
        });
      };
      if (scales == nullptr) {
        flush([&](int t, int i, F value) { group[t][i] = value; });
        return;
      }
      const F centres = S::set(centre);
      const auto centred = [&](int t, F value) {
        return S::add(value, S::mul(centres, S::set(x_sums[t])));
      };
      const Constants scale(scales);
      if (spec.offset_kind == OffsetKind::kNone) {
        flush([&](int t, int i, F value) {
          acc[t][i] = S::fma(scale.values[i], centred(t, value), acc[t][i]);
        });
        return;
      }
      const Constants stored(scales + kTileRows);
      if (spec.offset_kind == OffsetKind::kOffset) {
        flush([&](int t, int i, F value) {
          const F total = S::fma(stored.values[i], S::set(x_sums[t]), acc[t][i]);
          acc[t][i] = S::fma(scale.values[i], centred(t, value), total);
        });
      } else {
        flush([&](int t, int i, F value) {
          value = S::sub(centred(t, value), S::mul(stored.values[i], S::set(x_sums[t])));
          acc[t][i] = S::fma(scale.values[i], value, acc[t][i]);
        });
      }
    };
    walk_groups<kChunkBytes>(spec, tile, segment);
    if constexpr (Sums::kDealt) {
      for (auto& token : acc) S::DealtRows::gather(token);
    }
    store_product<S>(acc, luts, y, stride);
  }

 private:
  using Sums = PlaneSums<S, kBits, kTokens>;
  // The scales or the offsets of a group, in the order of the sums.
  struct Constants {
    F values[kVectors];
    explicit Constants(const uint16_t* at) {
      for (int i = 0; i < kVectors; ++i) values[i] = S::load_half(at + i * S::kFloats);
      if constexpr (Sums::kDealt) S::DealtRows::deal(values);
    }
  };
};

template <typename S, int kBits, int kParts>
void multiply_tile(const LinearSpec& spec, const uint8_t* tile, const LutView* luts, int64_t n,
                   float* y, int64_t stride) {
  take_tokens<tokens_together<S, kBits, kParts>()>(n, [&](auto tokens, int64_t t) {
    TileProduct<S, kBits, kParts, tokens>{luts + t}.run(spec, tile, y + t * stride, stride);
  });
}
