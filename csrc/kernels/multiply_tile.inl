// One tile of 32 rows times one activation vector, by table lookup: the bit-serial mpGEMV of T-MAC
// (Wei et al., 2024, section 3) on the layout of layout/layout.h.
//
// With beta = +-1 for a set or clear bit, a code is u = (2^b - 1)/2 + sum_p 2^(p-1) beta_p, so
//   sum_k u x = (2^b - 1)/2 * sum_k x  +  1/2 * sum_p 2^p * (signed sums of x, looked up).

// Sums of the lookups of one run of chunks, for all planes and all rows of the tile.
template <typename S, int kBits>
struct PlaneSums {
  static constexpr int kQuads = kBits / 4;
  static constexpr bool kPair = kBits % 4 >= 2;
  static constexpr bool kSingle = kBits % 2 == 1;
  static constexpr int kQuadVectors = 4 * kTileRows / S::kBytes;
  static constexpr int kPairVectors = 2 * kTileRows / S::kBytes;
  static constexpr int kSingleVectors = kTileRows / S::kBytes1;
  static constexpr int kFloatVectors = kTileRows / S::kFloats;

  typename S::Quad quads[kQuads > 0 ? kQuads : 1][kQuadVectors];
  typename S::Pair pairs[kPairVectors];
  typename S::Single singles[kSingleVectors];

  // Weighs the sets by 2^(first plane). |row i| <= (2^b - 1) * 4 tables * 127 < 2^17 a block,
  // so 255 * high + low fits int32.
  typename S::I row(int i) const {
    typename S::I total = S::zero_i();
    if constexpr (kQuads > 0) total = quads[0][i].sum(0);
    if constexpr (kQuads > 1) total = S::template add_shifted<4>(total, quads[1][i].sum(0));
    if constexpr (kPair) {
      constexpr int kEach = S::kBytes / 2 / S::kFloats;
      total = S::template add_shifted<4 * kQuads>(total, pairs[i / kEach].sum(i % kEach));
    }
    if constexpr (kSingle) {
      constexpr int kEach = S::kBytes1 / S::kFloats;
      total = S::template add_shifted<kBits - 1>(total, singles[i / kEach].sum(i % kEach));
    }
    return total;
  }
};

// Adds one chunk: `codes` [32 * bits] against tables number 0 and 1 of `entries`, both of which
// stand `stride` bytes apart; sums[part] takes the part-th byte of every entry.
template <typename S, int kBits, int kParts>
inline void add_chunk(PlaneSums<S, kBits>* sums, const uint8_t* codes, const int8_t* entries) {
  using Sums = PlaneSums<S, kBits>;
  typename S::B even[kParts], odd[kParts];
  for (int part = 0; part < kParts; ++part) {
    even[part] = S::table(entries + part * kTableEntries);
    odd[part] = S::table(entries + (kParts + part) * kTableEntries);
  }
  const auto add_vector = [&](auto&& accumulator_of) {
    const typename S::B b = S::load(codes);
    const typename S::B low = S::low(b), high = S::high(b);
    for (int part = 0; part < kParts; ++part) {
      accumulator_of(sums[part]).add(S::lookup(even[part], low));
      accumulator_of(sums[part]).add(S::lookup(odd[part], high));
    }
    codes += S::kBytes;
  };
#pragma GCC unroll 8
  for (int q = 0; q < Sums::kQuads; ++q) {
#pragma GCC unroll 8
    for (int v = 0; v < Sums::kQuadVectors; ++v) {
      add_vector([&](Sums& s) -> auto& { return s.quads[q][v]; });
    }
  }
  if constexpr (Sums::kPair) {
#pragma GCC unroll 8
    for (int v = 0; v < Sums::kPairVectors; ++v) {
      add_vector([&](Sums& s) -> auto& { return s.pairs[v]; });
    }
  }
  if constexpr (Sums::kSingle) {
#pragma GCC unroll 8
    for (int v = 0; v < Sums::kSingleVectors; ++v) {
      const typename S::B1 b = S::load1(codes);
      const typename S::B1 low = S::low(b), high = S::high(b);
      for (int part = 0; part < kParts; ++part) {
        sums[part].singles[v].add(S::lookup(S::narrow(even[part]), low),
                                  S::lookup(S::narrow(odd[part]), high));
      }
      codes += S::kBytes1;
    }
  }
}

// Distance, in bytes of the packed stream, at which the next cache lines are asked for.
constexpr int64_t kPrefetchBytes = 2048;

template <typename S, int kBits, int kParts>
void multiply_tile(const LinearSpec& spec, const uint8_t* tile, const LutView& lut, float* y) {
  using Sums = PlaneSums<S, kBits>;
  using F = typename S::F;
  constexpr int kVectors = Sums::kFloatVectors;
  constexpr int64_t kChunkBytes = kTileRows * kBits;
  constexpr float kHalf = ((1 << kBits) - 1) * 0.5f;

  const int64_t n_groups = spec.n_groups();
  const int64_t full_chunks = spec.group_chunks();
  const bool constant_zero = spec.offset_kind == OffsetKind::kNone;
  const float centre = constant_zero ? kHalf - spec.zero : kHalf;

  F acc[kVectors];
  for (F& a : acc) a = S::set(0);
  const uint8_t* at = tile;
  int64_t chunk = 0;
  for (int64_t g = 0; g < n_groups; ++g) {
    const int64_t group_end = chunk + (g + 1 < n_groups ? full_chunks : spec.chunks_in(g));
    F group[kVectors];
    for (F& v : group) v = S::set(0);
    float x_sum = 0;
    while (chunk < group_end) {
      const int64_t block = chunk / kBlockChunks;
      const int64_t block_end = (block + 1) * kBlockChunks;
      Sums sums[kParts];
      if (chunk + kBlockChunks == block_end && block_end <= group_end) {
        for (int i = 0; i < kBlockChunks; ++i) {
          for (int64_t line = 0; line < kChunkBytes; line += 64) {
            S::prefetch(at + line + kPrefetchBytes);
          }
          add_chunk<S, kBits, kParts>(sums, at,
                                      lut.entries + (chunk + i) * 2 * kParts * kTableEntries);
          at += kChunkBytes;
        }
        x_sum += lut.block_sum[block];
        chunk = block_end;
      } else {
        const int64_t end = block_end < group_end ? block_end : group_end;
        for (; chunk < end; ++chunk, at += kChunkBytes) {
          add_chunk<S, kBits, kParts>(sums, at, lut.entries + chunk * 2 * kParts * kTableEntries);
          x_sum += lut.chunk_sum[chunk];
        }
      }
      const F unit = S::set(lut.half_scale[block]);
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) {
        typename S::I row = sums[0].row(i);
        if constexpr (kParts == 2) {
          static_assert(kExactBase == 255);
          const typename S::I high = sums[1].row(i);
          row = S::sub_i(S::template add_shifted<8>(row, high), high);
        }
        group[i] = S::fma(S::to_float(row), unit, group[i]);
      }
    }
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(at);
    const F sum = S::set(x_sum), shift = S::set(centre * x_sum);
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      F value = S::add(group[i], shift);
      if (!constant_zero) {
        const F stored = S::load_half(scales + kTileRows + i * S::kFloats);
        if (spec.offset_kind == OffsetKind::kOffset) {
          acc[i] = S::fma(stored, sum, acc[i]);
        } else {
          value = S::sub(value, S::mul(stored, sum));
        }
      }
      acc[i] = S::fma(S::load_half(scales + i * S::kFloats), value, acc[i]);
    }
    at += spec.scale_bytes();
  }
  for (int i = 0; i < kVectors; ++i) S::store_f(y + i * S::kFloats, acc[i]);
}
