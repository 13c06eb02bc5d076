// One tile of 32 rows times the activations of many tokens: an int8 matrix product.
//
// Integers q of Tables::kExact and kExact8 give the bits of multiply_tile.inl. The part of a
// product that falls into one group is
//   scale * (sum over regions of R * unit / 2  +  ((2^b - 1)/2 - zero) * sum_k x_k)
// with R = sum_k (2 u_k - (2^b - 1)) q_k, centred. Those of Tables::kInt8 take codes as they are:
//   scale * (sum over regions of R * unit  -  zero * sum_k x_k),   R = sum_k u_k q_k,
// where two regions that share their unit have one R together.
// R is below 2^30, and below 2^25 for kInt8: 2 * 255 * (60 * 127 + 4 * 8128). Above 2^24 its float
// is rounded, as everywhere.

// Where in a tile a slab begins: in the packed stream, at a chunk (of 8 weights) of a group.
struct SlabCursor {
  const uint8_t* tile;
  int64_t chunk, group, group_begin, group_end;
};

// Codes as bit planes.
template <int kPlanes>
struct PlaneCodes {
  static constexpr int kBits = kPlanes;
  static int64_t group_chunks(const LinearSpec& spec, int64_t g) { return spec.chunks_in(g); }
  static int64_t slab_end(const SlabCursor& at) { return at.chunk + kSlabChunks; }
  // True if all groups end with a slab.
  static bool ends_groups(const LinearSpec& spec) { return kSlabChunks % spec.group_chunks() == 0; }

  // Unpacks chunks of one group; `at` moves on in the packed stream.
  template <typename S, typename Dot>
  static void unpack(const LinearSpec&, SlabCursor& at, int64_t end, uint8_t* codes) {
    for (int64_t c = at.chunk; c < end; ++c, at.tile += kTileRows * kBits, codes += kChunkCodes) {
      for (int64_t line = 0; line < kTileRows * kBits; line += 64) {
        S::prefetch(at.tile + kPrefetchBytes + line);
      }
      unpack_chunk<S, Dot, kBits>(at.tile, codes);
    }
  }
};

// Ternary codes, as of 2 bits. A slab belongs to one group.
struct TernaryCodes {
  static constexpr int kBits = 2;
  static constexpr int kChunks = kTernaryChunkWeights / kChunkWeights;
  static int64_t group_chunks(const LinearSpec& spec, int64_t g) {
    return ceil_div(spec.weights_in(g), kChunkWeights);
  }
  static int64_t slab_end(const SlabCursor& at) {
    static_assert(kSlabChunks % kChunks == 0);
    const int64_t end = at.chunk + kSlabChunks;
    return end < at.group_end ? end : at.group_end;
  }
  static bool ends_groups(const LinearSpec&) { return false; }

  template <typename S, typename Dot>
  static void unpack(const LinearSpec& spec, SlabCursor& at, int64_t end, uint8_t* codes) {
    int64_t rest = spec.weights_in(at.group) - (at.chunk - at.group_begin) * kChunkWeights;
    for (int64_t c = at.chunk; c < end; c += kChunks, codes += kChunks * kChunkCodes) {
      const int64_t weights = rest < kTernaryChunkWeights ? rest : kTernaryChunkWeights;
      unpack_ternary_chunk<S, Dot>(at.tile, codes);
      at.tile += spec.chunk_bytes(weights);
      rest -= weights;
    }
  }
};

struct OnesInHalf {
  uint16_t values[kTileRows];
  constexpr OnesInHalf() : values() {
    for (uint16_t& value : values) value = 0x3c00;
  }
};
constexpr OnesInHalf kOnesInHalf;

// Cuts the slab that begins at `at` into segments, and unpacks it into `codes`. All of these move
// on to the next slab.
template <typename S, typename Dot, typename Code>
int unpack_slab(const LinearSpec& spec, int64_t n_chunks, bool shares_units, SlabCursor& at,
                uint8_t* codes, Segment* segments) {
  const int64_t full_end = Code::slab_end(at);
  const int64_t slab_end = full_end < n_chunks ? full_end : n_chunks;
  int n_segments = 0;
  while (at.chunk < slab_end) {
    const int64_t run_end = slab_end < at.group_end ? slab_end : at.group_end;
    Code::template unpack<S, Dot>(spec, at, run_end, codes);
    while (at.chunk < run_end) {
      const int64_t region = at.chunk / kRegionChunks;
      constexpr int64_t kSharedChunks = kRowRegions * kRegionChunks;
      const bool shared =
          shares_units && at.chunk % kSharedChunks == 0 && at.chunk + kSharedChunks <= run_end;
      const int64_t region_end = (region + (shared ? kRowRegions : 1)) * kRegionChunks;
      const int64_t end = region_end < run_end ? region_end : run_end;
      segments[n_segments++] = {codes,
                                region,
                                static_cast<int>(at.chunk % kRegionChunks),
                                static_cast<int>(end - at.chunk),
                                at.chunk == at.group_begin,
                                nullptr};
      codes += (end - at.chunk) * kChunkCodes;
      at.chunk = end;
    }
    if (run_end < at.group_end) break;
    const bool stored = spec.scale_kind == ScaleKind::kStored;
    segments[n_segments - 1].scales =
        stored ? reinterpret_cast<const uint16_t*>(at.tile) : kOnesInHalf.values;
    at.tile += spec.scale_bytes();
    at.group_begin = at.chunk;
    if (++at.group < spec.n_groups()) at.group_end += Code::group_chunks(spec, at.group);
  }
  return n_segments;
}

// multiply_lanes for kTokens tokens. More than 16 tokens make blocks of at least 8, and so few as 3
// are multiplied with exact integers only.
template <typename S, typename Dot, Tables kTables, int kTokens>
constexpr auto lanes_kernel() -> decltype(&multiply_lanes<S, Dot, kTables, S::kDotTokens>) {
  constexpr bool kOccurs = kTokens <= S::kDotTokens && (kTokens >= 8 || S::kDotTokens < 8 ||
                                                        (kTables != Tables::kInt8 && kTokens >= 4));
  if constexpr (kOccurs) return multiply_lanes<S, Dot, kTables, kTokens>;
  return nullptr;
}

// Fetches `bytes` bytes from `at` on into the first-level cache.
template <typename S>
inline void fetch(const void* at, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) S::prefetch_near(static_cast<const uint8_t*>(at) + i);
}

// y[t, 0..rows) of one tile for the tokens of a block, from their products [12][32] times `scale`.
template <typename S>
void write_rows(const RowView& x, int64_t block, const float* product, float scale, int rows,
                float* y, int64_t stride) {
  const int64_t first = x.blocks.first_token(block);
  const int64_t end = x.blocks.first_token(block + 1);
  for (int64_t t = first; t < end && t < x.blocks.n_tokens; ++t, product += kTileRows) {
    const auto unit = S::set(x.token_unit[block * kTokenLanes + t - first]);
    float partial[kTileRows];
    float* out = rows == kTileRows ? y + t * stride : partial;
    for (int r = 0; r < kTileRows; r += S::kFloats) {
      const auto scaled = S::fma(S::set(scale), S::load_f(product + r), S::set(0));
      S::store_f(out + r, S::mul(scaled, unit));
    }
    for (int r = 0; rows < kTileRows && r < rows; ++r) y[t * stride + r] = partial[r];
  }
}

// y[t, 0..rows) of one or two tiles for all tokens; rows of y are `stride` apart.
// `tile` is the packed stream.
template <typename S, typename Code, Tables kTables>
void multiply_rows(const LinearSpec& spec, const uint8_t* tile, const RowView& x,
                   const RowSums& sums, int rows, float* y, int64_t stride) {
  constexpr bool kCentred = kTables != Tables::kInt8;
  constexpr int kBits = Code::kBits;
  using Dot = typename S::template Dot<kBits, kCentred>;
  using Core = typename Dot::Core;
  static constexpr decltype(lanes_kernel<S, Core, kTables, 2>()) kByPairs[] = {
      lanes_kernel<S, Core, kTables, 2>(),  lanes_kernel<S, Core, kTables, 4>(),
      lanes_kernel<S, Core, kTables, 6>(),  lanes_kernel<S, Core, kTables, 8>(),
      lanes_kernel<S, Core, kTables, 10>(), lanes_kernel<S, Core, kTables, 12>(),
  };
  constexpr float kCentre = kCentred ? ((1 << kBits) - 1) * 0.5f : 0;
  constexpr int64_t kTileFloats = kBlockTokens * kTileRows;
  constexpr int64_t kRegionBytes = RowView::region_bytes(row_parts(kTables));
  const float centre = spec.offset_kind == OffsetKind::kNone ? kCentre - spec.zero : kCentre;
  const int n_tiles = rows > kTileRows ? 2 : 1;
  const bool shares_units = !kCentred && x.shares_units;
  const int64_t n_blocks = x.blocks.n_blocks();
  int64_t n_chunks = 0;
  for (int64_t g = 0; g < spec.n_groups(); ++g) n_chunks += Code::group_chunks(spec, g);
  const float scale = spec.scale_kind == ScaleKind::kMatrix ? spec.scale : 1;

  alignas(64) uint8_t codes[kTilesAtOnce][kSlabChunks * kChunkCodes];
  Segment segments[kTilesAtOnce][kSlabChunks];
  SegmentTokens tokens[kSlabChunks];
  SlabCursor at[kTilesAtOnce];
  for (int i = 0; i < n_tiles; ++i) {
    at[i] = {tile + i * spec.tile_bytes(), 0, 0, 0, Code::group_chunks(spec, 0)};
  }
  // Sums of groups that end with their slab need not be kept for each block.
  const bool ends_groups = Code::ends_groups(spec);
  while (at[0].chunk < n_chunks) {
    const int64_t region = at[0].chunk / kRegionChunks;
    int n_segments = 0;
    for (int i = 0; i < n_tiles; ++i) {
      n_segments =
          unpack_slab<S, Dot, Code>(spec, n_chunks, shares_units, at[i], codes[i], segments[i]);
    }
    const bool ends = at[0].chunk >= n_chunks;
    for (int64_t block = 0; block < n_blocks; ++block) {
      const bool turns = block + 1 == n_blocks;
      const int64_t next = turns ? 0 : block + 1;
      const int64_t next_region = turns ? at[0].chunk / kRegionChunks : region;
      const auto* numbers = reinterpret_cast<const uint8_t*>(&x.region(next, next_region));
      prepare_tokens<S, Dot, kCentred>(segments[0], n_segments, x, block, centre,
                                       sums.x_sum + block * kTokenLanes, tokens);
      const int block_tokens = x.blocks.tokens(block);
      for (int i = 0; i < n_tiles; ++i) {
        if (i == 0 && cuts_regions(spec)) {
          fetch<S>(&x.chunks_of(next, next_region), kSlabRegions * sizeof(RowChunks));
        }
        float* product = sums.product + (block * kTilesAtOnce + i) * kTileFloats;
        float* group = sums.group + (ends_groups ? i : block * kTilesAtOnce + i) * kTileFloats;
        const Ahead ahead{numbers + i * kRegionBytes / 2,
                          reinterpret_cast<const uint8_t*>(product + kTilesAtOnce * kTileFloats)};
        if (region == 0) std::memset(product, 0, kTileFloats * sizeof(float));
        for (int64_t t = 0; ends && t < block_tokens; ++t) {
          fetch<S>(y + (x.blocks.first_token(block) + t) * stride + i * kTileRows, 128);
        }
        for (int lane = 0; lane < block_tokens; lane += S::kDotTokens) {
          const int rest = block_tokens - lane;
          const int size = rest < S::kDotTokens ? rest : S::kDotTokens;
          kByPairs[size / 2 - 1](spec.offset_kind, segments[i], n_segments, x, block, tokens, lane,
                                 ahead, product, group);
        }
        if (ends) {
          const int rest = rows - i * kTileRows;
          write_rows<S>(x, block, product, scale, rest < kTileRows ? rest : kTileRows,
                        y + i * kTileRows, stride);
        }
      }
    }
  }
}

// The products and additions of `rounds` rounds over as many accumulators as the kernels use, from
// registers: what the instruction set can do at best. Returns the number of multiply-adds.
template <typename S>
int64_t multiply_peak(int64_t rounds) {
  using Dot = typename S::template Dot<1, true>::Core;
  constexpr int kDots = S::kDotTokens / Dot::kTokens, kVectors = S::kDotVectors;
  alignas(64) const uint8_t bytes[256] = {};
  typename S::I zeros[Dot::kTokens];
  for (auto& zero : zeros) zero = S::zero_i();
  Dot dots[kDots][kVectors];
  for (auto& row : dots) {
    for (Dot& dot : row) dot.begin(zeros);
  }
  const uint8_t* codes = bytes;  // of whatever values, as far as the compiler knows
  asm volatile("" : "+r"(codes));
  typename Dot::Codes w[kVectors];
  for (auto& v : w) v = Dot::load(codes);
  auto x = Dot::broadcast(reinterpret_cast<const int8_t*>(codes));
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 16
    for (int t = 0; t < kDots; ++t) {
      S::opaque(x);  // another factor, as far as the compiler knows
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) dots[t][v].add(w[v], x);
    }
  }
  auto total = S::zero_i();
  for (auto& row : dots) {
    for (Dot& dot : row) total = S::add_i(total, dot.sum(0));
  }
  S::opaque(total);
  return rounds * S::kDotTokens * kVectors * S::kFloats * kQuadWeights * Dot::kQuads;
}
