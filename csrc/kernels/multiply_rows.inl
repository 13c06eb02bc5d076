// One tile of 32 rows times the activations of many tokens: an int8 matrix product.
//
// With R = sum_k (2 u_k - (2^b - 1)) q_k, the part of a product that falls into one group is
//   scale * (sum over regions of R * unit / 2  +  ((2^b - 1)/2 - zero) * sum_k x_k),
// summed up in the order of multiply_tile.inl.

// Weights of each tile that are unpacked together, for all tokens: they stay in the first-level
// cache.
constexpr int kSlabRegions = 4;
constexpr int kSlabChunks = kSlabRegions * kRegionChunks;
constexpr int kChunkCodes = kTileRows * kChunkWeights;

// The weights that one group has in one region.
struct Segment {
  const uint8_t* codes;  // [2 * chunks][32][4]
  int64_t region;
  int first_chunk;  // of the region
  int chunks;
  bool begins_group;
  const uint16_t* scales;  // of the group that ends here, or null
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

// From one token on.
struct TokenNumbers {
  const int32_t* bias;
  const int32_t* sum;
  const float* x_sum;
  const float* centre_x_sum;
  const uint32_t* loud_at;
  const uint32_t* loud;
};

// Adds `quads` times 4 products to each of the dots.
template <typename S, typename Dot, int kTokens, int kVectors>
inline void add_quads(Dot (*dots)[kVectors], const uint8_t* codes, const int8_t* q, int quads) {
  const auto add_quad = [&](int quad) {
    typename Dot::Codes w[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      w[v] = Dot::load(codes + quad * kTileRows * 4 + v * S::kFloats * 4);
    }
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) {
      const auto x = Dot::broadcast(q + t * Dot::kTokenBytes + quad * 4);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) dots[t][v].add(w[v], x);
    }
  };
  if constexpr (Dot::kRun >= 2 * kRegionChunks) {
    for (int quad = 0; quad < quads; quad += 2) {
      add_quad(quad);
      add_quad(quad + 1);
    }
  } else {
    for (int quad = 0; quad < quads; quad += Dot::kRun) {
      const int run = quads - quad < Dot::kRun ? quads - quad : Dot::kRun;
#pragma GCC unroll 8
      for (int i = 0; i < run; ++i) add_quad(quad + i);
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) dots[t][v].fold();
      }
    }
  }
}

template <typename S, typename Dot, int kParts, int kTokens>
struct RowBlock {
  using I = typename S::I;
  using F = typename S::F;
  static constexpr int kVectors = S::kDotVectors;
  static constexpr bool kWidens = Dot::kTokenBytes != kRegionWeights;
  static constexpr int kPartBytes = (kWidens ? kTokens : kBlockTokens) * Dot::kTokenBytes;
  static constexpr bool kBegins = kParts == 1 && Dot::kHasTotal;  // dots begin at the bias

  // sum + 2^7 * high parts of the loud quad.
  static inline I add_loud(I sum, const uint8_t* codes, const TokenNumbers& tokens, int t, int v) {
    Dot high;
    high.begin(S::zero_i());
    high.add(Dot::load(codes + tokens.loud_at[t] + v * S::kFloats * kQuadWeights),
             Dot::broadcast_loud(reinterpret_cast<const int8_t*>(tokens.loud + t)));
    high.fold();
    return S::template add_shifted<kLoudShift>(sum, high.sum());
  }

  // One segment, kTokens tokens from `lane` on, kVectors * kFloats rows from `row` on.
  __attribute__((always_inline)) static inline void multiply(
      const Segment& segment, OffsetKind kind, const uint8_t* codes, const int8_t* q,
      const float* half_unit, TokenNumbers tokens, int row, float* product, float* group) {
    alignas(64) int32_t sums[kParts][kTokens * kVectors * S::kFloats];
    for (int part = 0; part < kParts; ++part) {
      Dot dots[kTokens][kVectors];
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          dots[t][v].begin(kBegins ? S::set_i(tokens.bias[t]) : S::zero_i());
        }
      }
      add_quads<S, Dot, kTokens, kVectors>(dots, codes, q + part * kPartBytes, 2 * segment.chunks);
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          I sum = dots[t][v].sum();
          if constexpr (kParts == 1) sum = add_loud(sum, codes, tokens, t, v);
          S::store_i(sums[part] + (t * kVectors + v) * S::kFloats, sum);
        }
      }
    }
    // By way of memory: compilers that see one long computation run out of registers in its loop.
    asm volatile("" : "+m"(sums));

    const auto sum = [&](int t, int v) {
      const auto load = [&](const int32_t* part) {
        return S::load_i(reinterpret_cast<const uint8_t*>(part + (t * kVectors + v) * S::kFloats));
      };
      I total = load(sums[kParts - 1]);
      if constexpr (kParts == 2) {
        static_assert(kExactBase == 255);
        const I high = load(sums[0]);
        total = S::sub_i(S::template add_shifted<8>(total, high), high);
      }
      if constexpr (!kBegins) total = S::add_i(total, S::set_i(tokens.bias[t]));
      if constexpr (Dot::kHalved) {
        total = S::add_i(S::add_i(total, total), S::set_i(tokens.sum[t]));
      }
      return S::to_float(total);
    };
    // group += sum * unit, and finish(token, vector, address, group)
    const auto flush = [&](const auto& finish) {
      const auto each = [&](const auto& add_to_group) {
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) {
          const F unit = S::set(half_unit[t]);
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) {
            const int at = t * kTileRows + v * S::kFloats;
            finish(t, v, at, add_to_group(sum(t, v), unit, at));
          }
        }
      };
      if (segment.begins_group) {
        each([&](F r, F unit, int) { return S::mul(r, unit); });
      } else {
        each([&](F r, F unit, int at) { return S::fma(r, unit, S::load_f(group + at)); });
      }
    };
    if (segment.scales == nullptr) {
      flush([&](int, int, int at, F value) { S::store_f(group + at, value); });
      return;
    }
    F scale[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      scale[v] = S::load_half(segment.scales + row + v * S::kFloats);
    }
    const auto add_to_product = [&](int t, int v, int at, F value, F total) {
      value = S::add(value, S::set(tokens.centre_x_sum[t]));
      S::store_f(product + at, S::fma(scale[v], value, total));
    };
    if (kind == OffsetKind::kNone) {
      flush([&](int t, int v, int at, F value) {
        add_to_product(t, v, at, value, S::load_f(product + at));
      });
      return;
    }
    F stored[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      stored[v] = S::load_half(segment.scales + kTileRows + row + v * S::kFloats);
    }
    if (kind == OffsetKind::kOffset) {
      flush([&](int t, int v, int at, F value) {
        const F x_sum = S::set(tokens.x_sum[t]);
        add_to_product(t, v, at, value, S::fma(stored[v], x_sum, S::load_f(product + at)));
      });
    } else {
      flush([&](int t, int v, int at, F value) {
        value = S::add(value, S::set(tokens.centre_x_sum[t]));
        value = S::sub(value, S::mul(stored[v], S::set(tokens.x_sum[t])));
        S::store_f(product + at, S::fma(scale[v], value, S::load_f(product + at)));
      });
    }
  }
};

// All segments of a slab times kTokens tokens of a block from `lane` on.
template <typename S, typename Dot, int kParts, int kTokens>
void multiply_lanes(OffsetKind kind, const Segment* segments, int n_segments, const RowView& x,
                    int64_t block, const SegmentTokens* tokens, int lane, float* product,
                    float* group) {
  using Block = RowBlock<S, Dot, kParts, kTokens>;
  constexpr int kRows = S::kDotVectors * S::kFloats;
  constexpr bool kWidens = Block::kWidens;
  constexpr int kRegionBytes = kParts * Block::kPartBytes;
  const int64_t first_region = segments[0].region;
  alignas(64) int8_t widened[kWidens ? kSlabRegions * kRegionBytes : 1];
  if constexpr (kWidens) {
    for (int64_t r = first_region; r <= segments[n_segments - 1].region; ++r) {
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
      if (row == 0 && lane == 0 && segment.first_chunk == 0) {
        const auto* ahead =
            reinterpret_cast<const uint8_t*>(x.integers_at(block, segment.region + 1));
        for (int line = 0; line < kBlockTokens * kParts; ++line) S::prefetch(ahead + 64 * line);
      }
      const int8_t* q = kWidens ? widened + (segment.region - first_region) * kRegionBytes
                                : x.integers_at(block, segment.region) + lane * kRegionWeights;
      const RowRegion& region = x.region(block, segment.region);
      const bool whole = segment.chunks == kRegionChunks;
      const TokenNumbers numbers{tokens[s].bias + lane,
                                 tokens[s].sum + lane,
                                 tokens[s].x_sum + lane,
                                 tokens[s].centre_x_sum + lane,
                                 (whole ? region.loud_at : tokens[s].loud_at) + lane,
                                 (whole ? region.loud : tokens[s].loud) + lane};
      Block::multiply(segment, kind, segment.codes + kQuadWeights * row,
                      q + segment.first_chunk * kChunkWeights, region.half_unit + lane, numbers,
                      row, product + lane * kTileRows + row, group + lane * kTileRows + row);
    }
  }
}

inline void find_loud(const Segment& segment, const RowRegion& region, SegmentTokens& tokens) {
  const uint32_t begin = static_cast<uint32_t>(segment.first_chunk * kChunkCodes);
  const uint32_t size = static_cast<uint32_t>(segment.chunks * kChunkCodes);
  for (int t = 0; t < kTokenLanes; ++t) {
    const uint32_t at = region.loud_at[t] - begin;
    tokens.loud_at[t] = at < size ? at : 0;
    tokens.loud[t] = at < size ? region.loud[t] : 0;
  }
}

// Fills in what the segments of a slab need of a block's tokens.
template <typename S, typename Dot>
void prepare_tokens(const Segment* segments, int n_segments, const RowView& x, int64_t block,
                    float centre, float* x_sum, SegmentTokens* tokens) {
  using I = typename S::I;
  using F = typename S::F;
  for (int s = 0; s < n_segments; ++s) {
    if (segments[s].chunks == kRegionChunks) continue;
    find_loud(segments[s], x.region(block, segments[s].region), tokens[s]);
  }
  for (int lane = 0; lane < x.blocks.tokens(block); lane += S::kFloats) {
    F running = S::load_f(x_sum + lane);
    for (int s = 0; s < n_segments; ++s) {
      const Segment& segment = segments[s];
      const RowRegion& region = x.region(block, segment.region);
      const F half_unit = S::load_f(region.half_unit + lane);
      const F unit = S::add(half_unit, half_unit);
      if (segment.begins_group) running = S::set(0);
      const auto add_sum = [&](const int32_t* sums) {
        const I sum = S::load_i(reinterpret_cast<const uint8_t*>(sums + lane));
        running = S::add(running, S::mul(S::to_float(sum), unit));
        return sum;
      };
      I sum = S::zero_i();
      if (segment.chunks == kRegionChunks) {
        sum = add_sum(region.region_sum);
      } else {
        for (int c = 0; c < segment.chunks; ++c) {
          sum = S::add_i(sum, add_sum(region.chunk_sum[segment.first_chunk + c]));
        }
      }
      S::store_i(tokens[s].bias + lane, Dot::bias(sum));
      S::store_i(tokens[s].sum + lane, sum);
      S::store_f(tokens[s].x_sum + lane, running);
      S::store_f(tokens[s].centre_x_sum + lane, S::mul(S::set(centre), running));
    }
    S::store_f(x_sum + lane, running);
  }
}

// Cuts the slab that begins at chunk `chunk` of group `group`, and at `tile` of the packed stream,
// into segments, and unpacks it into `codes`. All of these move on to the next slab.
struct SlabCursor {
  const uint8_t* tile;
  int64_t chunk, group, group_begin, group_end;
};

template <typename S, typename Dot, int kBits>
int unpack_slab(const LinearSpec& spec, SlabCursor& at, uint8_t* codes, Segment* segments) {
  const int64_t n_chunks = spec.n_chunks();
  const int64_t slab_end = at.chunk + kSlabChunks < n_chunks ? at.chunk + kSlabChunks : n_chunks;
  int n_segments = 0;
  while (at.chunk < slab_end) {
    Segment& segment = segments[n_segments++];
    const int64_t region = at.chunk / kRegionChunks;
    const int64_t region_end = (region + 1) * kRegionChunks;
    const int64_t end = region_end < at.group_end ? region_end : at.group_end;
    segment.codes = codes;
    segment.region = region;
    segment.first_chunk = static_cast<int>(at.chunk % kRegionChunks);
    segment.chunks = static_cast<int>(end - at.chunk);
    segment.begins_group = at.chunk == at.group_begin;
    segment.scales = nullptr;
    for (; at.chunk < end; ++at.chunk, at.tile += kTileRows * kBits, codes += kChunkCodes) {
      for (int64_t line = 0; line < kTileRows * kBits; line += 64) {
        S::prefetch(at.tile + kPrefetchBytes + line);
      }
      unpack_chunk<S, Dot, kBits>(at.tile, codes);
    }
    if (at.chunk < at.group_end) continue;
    segment.scales = reinterpret_cast<const uint16_t*>(at.tile);
    at.tile += spec.scale_bytes();
    at.group_begin = at.chunk;
    if (++at.group < spec.n_groups()) at.group_end += spec.chunks_in(at.group);
  }
  return n_segments;
}

// multiply_lanes for kTokens tokens. More than 16 tokens make blocks of at least 8.
template <typename S, typename Dot, int kParts, int kTokens>
constexpr auto lanes_kernel() -> decltype(&multiply_lanes<S, Dot, kParts, S::kDotTokens>) {
  constexpr bool kOccurs = kTokens <= S::kDotTokens && (kTokens >= 8 || S::kDotTokens < 8);
  if constexpr (kOccurs) return multiply_lanes<S, Dot, kParts, kTokens>;
  return nullptr;
}

// y[t, 0..rows) of one or two tiles for all tokens; rows of y are `stride` apart. `tile` is the
// packed stream.
template <typename S, int kBits, int kParts>
void multiply_rows(const LinearSpec& spec, const uint8_t* tile, const RowView& x,
                   const RowSums& sums, int rows, float* y, int64_t stride) {
  using Dot = typename S::template Dot<kBits>;
  using Core = typename Dot::Core;
  static constexpr decltype(lanes_kernel<S, Core, kParts, 2>()) kByPairs[] = {
      lanes_kernel<S, Core, kParts, 2>(),  lanes_kernel<S, Core, kParts, 4>(),
      lanes_kernel<S, Core, kParts, 6>(),  lanes_kernel<S, Core, kParts, 8>(),
      lanes_kernel<S, Core, kParts, 10>(), lanes_kernel<S, Core, kParts, 12>(),
  };
  constexpr float kCentre = ((1 << kBits) - 1) * 0.5f;
  const float centre = spec.offset_kind == OffsetKind::kNone ? kCentre - spec.zero : kCentre;
  constexpr int64_t kTileFloats = kBlockTokens * kTileRows;
  const int n_tiles = rows > kTileRows ? 2 : 1;
  const int64_t n_blocks = x.blocks.n_blocks(), n_chunks = spec.n_chunks();
  for (int64_t i = 0; i < n_blocks * kTilesAtOnce * kTileFloats; ++i) sums.product[i] = 0;

  alignas(64) uint8_t codes[kTilesAtOnce][kSlabChunks * kChunkCodes];
  Segment segments[kTilesAtOnce][kSlabChunks];
  SegmentTokens tokens[kSlabChunks];
  SlabCursor at[kTilesAtOnce];
  for (int i = 0; i < n_tiles; ++i) {
    at[i] = {tile + i * spec.tile_bytes(), 0, 0, 0, spec.chunks_in(0)};
  }
  while (at[0].chunk < n_chunks) {
    int n_segments = 0;
    for (int i = 0; i < n_tiles; ++i) {
      n_segments = unpack_slab<S, Dot, kBits>(spec, at[i], codes[i], segments[i]);
    }
    for (int64_t block = 0; block < n_blocks; ++block) {
      prepare_tokens<S, Dot>(segments[0], n_segments, x, block, centre,
                             sums.x_sum + block * kTokenLanes, tokens);
      const int block_tokens = x.blocks.tokens(block);
      for (int i = 0; i < n_tiles; ++i) {
        const int64_t floats_at = (block * kTilesAtOnce + i) * kTileFloats;
        for (int lane = 0; lane < block_tokens; lane += S::kDotTokens) {
          const int rest = block_tokens - lane;
          const int size = rest < S::kDotTokens ? rest : S::kDotTokens;
          kByPairs[size / 2 - 1](spec.offset_kind, segments[i], n_segments, x, block, tokens, lane,
                                 sums.product + floats_at, sums.group + floats_at);
        }
      }
    }
  }

  for (int64_t block = 0; block < n_blocks; ++block) {
    for (int64_t t = x.blocks.first_token(block);
         t < x.blocks.first_token(block + 1) && t < x.blocks.n_tokens; ++t) {
      const int64_t lane = t - x.blocks.first_token(block);
      const typename S::F unit = S::set(x.token_unit[block * kTokenLanes + lane]);
      for (int i = 0; i < n_tiles; ++i) {
        const float* product =
            sums.product + (block * kTilesAtOnce + i) * kTileFloats + lane * kTileRows;
        float* out = y + t * stride + i * kTileRows;
        float partial[kTileRows];
        const int tile_rows = rows - i * kTileRows < kTileRows ? rows - i * kTileRows : kTileRows;
        float* whole = tile_rows == kTileRows ? out : partial;
        for (int r = 0; r < kTileRows; r += S::kFloats) {
          S::store_f(whole + r, S::mul(S::load_f(product + r), unit));
        }
        for (int r = 0; tile_rows < kTileRows && r < tile_rows; ++r) out[r] = partial[r];
      }
    }
  }
}

// The products and additions of `rounds` rounds over as many accumulators as the kernels use, from
// registers: what the instruction set can do at best. Returns the number of multiply-adds.
template <typename S>
int64_t multiply_peak(int64_t rounds) {
  using Dot = typename S::template Dot<1>::Core;
  constexpr int kTokens = S::kDotTokens, kVectors = S::kDotVectors;
  alignas(64) const uint8_t bytes[64] = {};
  Dot dots[kTokens][kVectors];
  for (auto& row : dots) {
    for (Dot& dot : row) dot.begin(S::zero_i());
  }
  typename Dot::Codes w[kVectors];
  for (auto& v : w) {
    v = Dot::load(bytes);
    S::opaque(v);
  }
  auto x = Dot::broadcast(reinterpret_cast<const int8_t*>(bytes));
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) {
      S::opaque(x);  // another factor, as far as the compiler knows
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) dots[t][v].add(w[v], x);
    }
  }
  auto total = S::zero_i();
  for (auto& row : dots) {
    for (Dot& dot : row) total = S::add_i(total, dot.sum());
  }
  S::opaque(total);
  return rounds * kTokens * kVectors * S::kFloats * 4;
}
