// Segments of a slab of unpacked codes times the integers of a block of tokens, with the sums in
// registers (multiply_rows.inl says what is added up).

// Weights of each tile that are unpacked together, for all tokens: they stay in the first-level
// cache, or nearly so where it has 32 KB.
constexpr int kSlabRegions = 6;
constexpr int kSlabChunks = kSlabRegions * kRegionChunks;

// The weights that one group has in one region, or in two that share their unit.
struct Segment {
  const uint8_t* codes;  // [2 * chunks][32][4]
  int64_t region;        // the first
  int first_chunk;       // of that region
  int chunks;
  bool begins_group;
  const uint16_t* scales;  // of the group that ends here, or null

  int regions() const { return chunks > kRegionChunks ? kRowRegions : 1; }
  bool whole() const { return chunks % kRegionChunks == 0; }
};

// What one segment needs of each token.
struct SegmentTokens {
  alignas(64) int32_t bias[kTokenLanes];        // what dot products begin at
  alignas(64) int32_t sum[kTokenLanes];         // of the integers
  alignas(64) float x_sum[kTokenLanes];         // of the group that ends here
  alignas(64) float centre_x_sum[kTokenLanes];  // times (2^b - 1)/2 - zero
  // Of a part of a region: its RowRegion's, zeros where the loud quad lies elsewhere.
  alignas(64) uint32_t loud_at[kTokenLanes];
  alignas(64) uint32_t loud[kTokenLanes];
};

// What the next block needs, fetched bit by bit: so many bytes for each quad of weights.
struct Ahead {
  static constexpr int kNumbers = 32, kProduct = kBlockTokens * kTileRows * 4 / kSlabRegions / 16;
  const uint8_t* numbers;
  const uint8_t* product;

  Ahead at(int quad) const { return {numbers + quad * kNumbers, product + quad * kProduct}; }
  template <typename S>
  void fetch(int quad) const {
    S::prefetch_near(numbers + quad * kNumbers);
    S::prefetch_near(product + quad * kProduct);
  }
};

// What a segment needs, from one token on.
struct TokenNumbers {
  const float* unit;
  const int32_t* bias;
  const int32_t* sum;
  const float* x_sum;
  const float* centre_x_sum;
  const uint32_t* loud_at[kRowRegions];
  const uint32_t* loud[kRowRegions];
  int regions;
};

// What the sums of a segment are added to.
enum class AddTo { kZero, kCentre, kGroup };

template <typename S, typename Dot, Tables kTables, int kTokens>
struct RowBlock {
  using I = typename S::I;
  using F = typename S::F;
  static constexpr bool kLoud = kTables == Tables::kInt8;
  static constexpr int kParts = row_parts(kTables);
  static constexpr int kVectors = S::kDotVectors;
  static constexpr int kDots = kTokens / Dot::kTokens;
  static constexpr bool kWidens = Dot::kTokenBytes != kRegionWeights;
  static constexpr int kPartBytes = (kWidens ? kTokens : kBlockTokens) * Dot::kTokenBytes;
  // From the integers of one region to those of the next.
  static constexpr int64_t kRegionBytes =
      kWidens ? kParts * kPartBytes : RowView::region_bytes(kParts);
  // Dot products begin at the bias or at the loud quad's high part.
  static constexpr bool kBegins = kParts == 1 && Dot::kHasTotal;

  // The accumulators. No closure may refer to them: they would be kept in memory.
  using Dots = Dot[kDots][kVectors];

  static inline typename Dot::Codes load(const uint8_t* codes, int v) {
    return Dot::load(codes + v * S::kFloats * kQuadWeights);
  }
  static inline auto broadcast(const int8_t* q, int d) {
    return Dot::broadcast(q + d * Dot::kTokens * Dot::kTokenBytes);
  }

  // The factors that there are fewer of stay in registers.
  static inline void add_quad(const uint8_t* codes, const int8_t* q, Dots& dots) {
    if constexpr (kDots < kVectors * Dot::kQuads) {
      decltype(broadcast(q, 0)) x[kDots];
#pragma GCC unroll 16
      for (int d = 0; d < kDots; ++d) x[d] = broadcast(q, d);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        const auto w = load(codes, v);
#pragma GCC unroll 16
        for (int d = 0; d < kDots; ++d) dots[d][v].add(w, x[d]);
      }
    } else {
      typename Dot::Codes w[kVectors];
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) w[v] = load(codes, v);
#pragma GCC unroll 16
      for (int d = 0; d < kDots; ++d) {
        const auto x = broadcast(q, d);
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) dots[d][v].add(w[v], x);
      }
    }
  }

  static inline void add_two(const uint8_t* codes, const int8_t* q, int quad, const Ahead& ahead,
                             Dots& dots) {
    ahead.template fetch<S>(quad);
#pragma GCC unroll 2
    for (int i = quad; i < quad + 2; i += Dot::kQuads) {
      add_quad(codes + i * kQuadCodes, q + i * kQuadWeights, dots);
    }
  }

  // Adds `quads` times 4 products to each. There are some: the compiler need not keep what dots
  // begin at.
  static inline void add_quads(const uint8_t* codes, const int8_t* q, int quads, const Ahead& ahead,
                               Dots& dots) {
    int quad = 0;
    if constexpr (Dot::kRun == kMostQuads) {
      do {
        add_two(codes, q, quad, ahead, dots);
        quad += 2;
      } while (quad < quads);
    } else {
      constexpr int kStep = Dot::kRun < 2 ? 2 : Dot::kRun;
      do {
        const int end = quads - quad < kStep ? quads : quad + kStep;
        do {
          add_two(codes, q, quad, ahead, dots);
          quad += 2;
        } while (quad < end);
#pragma GCC unroll 16
        for (int d = 0; d < kDots; ++d) {
#pragma GCC unroll 16
          for (int v = 0; v < kVectors; ++v) dots[d][v].fold();
        }
      } while (quad < quads);
    }
  }

  // What the products of the integers come on top of.
  static inline I base(const uint8_t* codes, const TokenNumbers& tokens, int t, int v) {
    I sum = S::zero_i();
    if constexpr (kLoud) {
      const auto add_loud = [&](int i) {
        sum = Dot::add_loud(sum, codes + v * S::kFloats * kQuadWeights, tokens.loud_at[i][t],
                            reinterpret_cast<const int8_t*>(tokens.loud[i] + t));
      };
      add_loud(0);
      if (tokens.regions == 2) add_loud(1);
      sum = S::template shift_left<kLoudShift>(sum);
    }
    if constexpr (Dot::kBiased) sum = S::add_i(sum, S::set_i(tokens.bias[t]));
    return sum;
  }

  static inline void add_up(const uint8_t* codes, const int8_t* q, int quads,
                            const TokenNumbers& tokens, const Ahead& ahead, Dots& dots) {
#pragma GCC unroll 16
    for (int d = 0; d < kDots; ++d) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        I bases[Dot::kTokens];
#pragma GCC unroll 2
        for (int t = 0; t < Dot::kTokens; ++t) {
          bases[t] = kBegins ? base(codes, tokens, d * Dot::kTokens + t, v) : S::zero_i();
        }
        dots[d][v].begin(bases);
      }
    }
    int region = 0;
    do {
      const int before = region * 2 * kRegionChunks;
      const Ahead after{ahead.numbers + region * RowView::region_bytes(kParts),
                        ahead.product + before * Ahead::kProduct};
      add_quads(codes + before * kQuadCodes, q + region * kRegionBytes, quads, after, dots);
    } while (kLoud && ++region < tokens.regions);
  }

  // The sum of a token's products.
  static inline F sum(const Dots& dots, const int32_t* high, const uint8_t* codes,
                      const TokenNumbers& tokens, int t, int v) {
    I total = dots[t / Dot::kTokens][v].sum(t % Dot::kTokens);
    if constexpr (kParts == 2) {
      static_assert(kExactBase == 255);
      const I upper =
          S::load_i(reinterpret_cast<const uint8_t*>(high + (t * kVectors + v) * S::kFloats));
      total = S::sub_i(S::template add_shifted<8>(total, upper), upper);
    }
    if constexpr (!kBegins) total = S::add_i(total, base(codes, tokens, t, v));
    if constexpr (Dot::kHalved) {
      total = S::add_i(S::add_i(total, total), S::set_i(tokens.sum[t]));
    }
    return S::to_float(total);
  }

  // finish(token, vector, address, what sums are added to + sum * unit)
  template <AddTo kAddTo, typename Finish>
  static inline void flush(const Dots& dots, const int32_t* high, const uint8_t* codes,
                           const TokenNumbers& tokens, const float* group, const Finish& finish) {
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) {
      const F unit = S::set(tokens.unit[t]);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        const int at = t * kTileRows + v * S::kFloats;
        const F value = sum(dots, high, codes, tokens, t, v);
        if constexpr (kAddTo == AddTo::kZero) {
          finish(t, v, at, S::mul(value, unit));
        } else if constexpr (kAddTo == AddTo::kCentre) {
          finish(t, v, at, S::fma(value, unit, S::set(tokens.centre_x_sum[t])));
        } else {
          finish(t, v, at, S::fma(value, unit, S::load_f(group + at)));
        }
      }
    }
  }

  template <typename Finish>
  static inline void flush(const Segment& segment, const Dots& dots, const int32_t* high,
                           const uint8_t* codes, const TokenNumbers& tokens, const float* group,
                           const Finish& finish) {
    if (segment.begins_group) {
      flush<AddTo::kZero>(dots, high, codes, tokens, group, finish);
    } else {
      flush<AddTo::kGroup>(dots, high, codes, tokens, group, finish);
    }
  }

  // One segment, kTokens tokens from `lane` on, kVectors * kFloats rows from `row` on.
  __attribute__((always_inline)) static inline void multiply(const Segment& segment,
                                                             OffsetKind kind, const uint8_t* codes,
                                                             const int8_t* q, TokenNumbers tokens,
                                                             Ahead ahead, int row, float* product,
                                                             float* group) {
    const int quads = 2 * segment.chunks / tokens.regions;
    alignas(64) int32_t high[kParts == 2 ? kTokens * kVectors * S::kFloats : 1];
    Dots dots;
    if constexpr (kParts == 2) {
      add_up(codes, q, quads, tokens, ahead, dots);
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) {
          S::store_i(high + (t * kVectors + v) * S::kFloats,
                     dots[t / Dot::kTokens][v].sum(t % Dot::kTokens));
        }
      }
      q += kPartBytes;
      ahead.numbers += 2 * kRegionChunks * Ahead::kNumbers;
    }
    add_up(codes, q, quads, tokens, ahead, dots);
    // Nothing that goes with the sums is loaded before: there are no registers for it in the loop.
    asm volatile("" : "+r"(tokens.unit), "+r"(product), "+r"(group));
    asm volatile("" : "+r"(tokens.sum), "+r"(tokens.x_sum), "+r"(tokens.centre_x_sum));

    if (segment.scales == nullptr) {
      flush(segment, dots, high, codes, tokens, group,
            [&](int, int, int at, F value) { S::store_f(group + at, value); });
      return;
    }
    F scale[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      scale[v] = S::load_half(segment.scales + row + v * S::kFloats);
    }
    const auto centred = [&](int t, F value) {
      return kLoud ? value : S::add(value, S::set(tokens.centre_x_sum[t]));
    };
    if (kind == OffsetKind::kNone) {
      const auto add_to_product = [&](int v, int at, F value) {
        S::store_f(product + at, S::fma(scale[v], value, S::load_f(product + at)));
      };
      if (kLoud && segment.begins_group) {
        flush<AddTo::kCentre>(dots, high, codes, tokens, group,
                              [&](int, int v, int at, F value) { add_to_product(v, at, value); });
      } else {
        flush(segment, dots, high, codes, tokens, group, [&](int t, int v, int at, F value) {
          add_to_product(v, at, S::add(value, S::set(tokens.centre_x_sum[t])));
        });
      }
      return;
    }
    F stored[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      stored[v] = S::load_half(segment.scales + kTileRows + row + v * S::kFloats);
    }
    if (kind == OffsetKind::kOffset) {
      flush(segment, dots, high, codes, tokens, group, [&](int t, int v, int at, F value) {
        const F total = S::fma(stored[v], S::set(tokens.x_sum[t]), S::load_f(product + at));
        S::store_f(product + at, S::fma(scale[v], centred(t, value), total));
      });
    } else {
      flush(segment, dots, high, codes, tokens, group, [&](int t, int v, int at, F value) {
        value = S::sub(centred(t, value), S::mul(stored[v], S::set(tokens.x_sum[t])));
        S::store_f(product + at, S::fma(scale[v], value, S::load_f(product + at)));
      });
    }
  }
};

// All segments of a slab times kTokens tokens of a block from `lane` on.
template <typename S, typename Dot, Tables kTables, int kTokens>
TMAC_FLATTEN void multiply_lanes(OffsetKind kind, const Segment* segments, int n_segments,
                                 const RowView& x, int64_t block, const SegmentTokens* tokens,
                                 int lane, const Ahead& ahead, float* product, float* group) {
  using Block = RowBlock<S, Dot, kTables, kTokens>;
  constexpr int kParts = Block::kParts;
  constexpr int kRows = S::kDotVectors * S::kFloats;
  constexpr bool kWidens = Block::kWidens;
  constexpr int64_t kRegionBytes = Block::kRegionBytes;
  const int64_t first_region = segments[0].region;
  alignas(64) int8_t widened[kWidens ? kSlabRegions * kRegionBytes : 1];
  if constexpr (kWidens) {
    const Segment& last = segments[n_segments - 1];
    for (int64_t r = first_region; r < last.region + last.regions(); ++r) {
      for (int i = 0; i < kParts * kTokens; ++i) {
        const int part = i / kTokens, t = i % kTokens;
        Dot::widen(x.integers_at(block, r) + (part * kBlockTokens + lane + t) * kRegionWeights,
                   widened + (r - first_region) * kRegionBytes + i * Dot::kTokenBytes);
      }
    }
  }
  for (int row = 0; row < kTileRows; row += kRows) {
    for (int s = 0; s < n_segments; ++s) {
      const Segment& segment = segments[s];
      const int8_t* q = kWidens ? widened + (segment.region - first_region) * kRegionBytes
                                : x.integers_at(block, segment.region) + lane * kRegionWeights;
      const int regions = kTables == Tables::kInt8 ? segment.regions() : 1;
      const RowRegion& region = x.region(block, segment.region);
      const RowRegion& next = x.region(block, segment.region + regions - 1);
      const bool whole = segment.whole();
      const TokenNumbers numbers{
          region.unit + lane,
          tokens[s].bias + lane,
          tokens[s].sum + lane,
          tokens[s].x_sum + lane,
          tokens[s].centre_x_sum + lane,
          {(whole ? region.loud_at : tokens[s].loud_at) + lane, next.loud_at + lane},
          {(whole ? region.loud : tokens[s].loud) + lane, next.loud + lane},
          regions};
      const int64_t at = segment.region - first_region;
      const Ahead rest{ahead.numbers + at * RowView::region_bytes(kParts),
                       ahead.product + at * 2 * kRegionChunks * Ahead::kProduct};
      Block::multiply(segment, kind, segment.codes + kQuadWeights * row,
                      q + segment.first_chunk * kChunkWeights, numbers,
                      rest.at(2 * segment.first_chunk), row, product + lane * kTileRows + row,
                      group + lane * kTileRows + row);
    }
  }
}

// The loud quads that lie in a part of a region.
template <typename S>
inline void find_loud(const Segment& segment, const RowRegion& region, int lane,
                      SegmentTokens& tokens) {
  const auto load = [&](const uint32_t* from) {
    return S::load_i(reinterpret_cast<const uint8_t*>(from + lane));
  };
  const auto store = [&](uint32_t* to, typename S::I value) {
    S::store_i(reinterpret_cast<int32_t*>(to + lane), value);
  };
  const auto at = S::sub_i(load(region.loud_at), S::set_i(segment.first_chunk * kChunkCodes));
  const auto rest = S::sub_i(S::set_i(segment.chunks * kChunkCodes - 1), at);
  // 1 where one of them is negative, which both cannot be.
  const auto outside = S::add_i(S::template shift_right<31>(at), S::template shift_right<31>(rest));
  const auto inside = S::sub_i(outside, S::set_i(1));
  store(tokens.loud_at, S::and_i(at, inside));
  store(tokens.loud, S::and_i(load(region.loud), inside));
}

// Fills in what the segments of a slab need of a block's tokens.
template <typename S, typename Dot, bool kCentred>
void prepare_tokens(const Segment* segments, int n_segments, const RowView& x, int64_t block,
                    float centre, float* x_sum, SegmentTokens* tokens) {
  using I = typename S::I;
  using F = typename S::F;
  for (int lane = 0; lane < x.blocks.tokens(block); lane += S::kFloats) {
    F running = S::load_f(x_sum + lane);
    for (int s = 0; s < n_segments; ++s) {
      const Segment& segment = segments[s];
      const RowRegion& region = x.region(block, segment.region);
      const F sum_unit = S::load_f(region.unit + lane);
      const F unit = kCentred ? S::add(sum_unit, sum_unit) : sum_unit;
      if (segment.begins_group) running = S::set(0);
      const auto add_sum = [&](const int32_t* sums) {
        const I sum = S::load_i(reinterpret_cast<const uint8_t*>(sums + lane));
        running = S::add(running, S::mul(S::to_float(sum), unit));
        return sum;
      };
      I sum = S::zero_i();
      if (segment.whole()) {
        sum = add_sum(region.sum);
        if (segment.regions() == 2) {
          sum = S::add_i(sum, add_sum(x.region(block, segment.region + 1).sum));
        }
      } else {
        if constexpr (!kCentred) find_loud<S>(segment, region, lane, tokens[s]);
        const RowChunks& chunks = x.chunks_of(block, segment.region);
        for (int c = 0; c < segment.chunks; ++c) {
          sum = S::add_i(sum, add_sum(chunks.sum[segment.first_chunk + c]));
        }
      }
      if constexpr (Dot::Core::kBiased) S::store_i(tokens[s].bias + lane, Dot::bias(sum));
      if constexpr (Dot::Core::kHalved) S::store_i(tokens[s].sum + lane, sum);
      S::store_f(tokens[s].x_sum + lane, running);
      S::store_f(tokens[s].centre_x_sum + lane, S::mul(S::set(centre), running));
    }
    S::store_f(x_sum + lane, running);
  }
}
