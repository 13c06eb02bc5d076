// One tile of 32 rows of binary-coded weights times several activation vectors: LUT-GEMM (Park et
// al., 2024, section 3) on the layout "bcq-m32".
//
// With beta = +-1 for a set or clear bit, a weight is w = sum_p alpha_p beta_p + offset, so
//   sum_k w x = sum_p alpha_p * (signed sums of x, looked up)  +  offset * sum_k x.

template <typename S, int kBits, int kParts, int kTokens>
struct BcqProduct {
  using F = typename S::F;
  using I = typename S::I;
  static constexpr int kVectors = kTileRows / S::kFloats;
  static constexpr int64_t kChunkBytes = kTileRows * kBits;

  const LutView* const luts;  // [kTokens]

  // y [kTokens, 32], rows `stride` apart.
  TMAC_FLATTEN void run(const LinearSpec& spec, const uint8_t* tile, float* y,
                        int64_t stride) const {
    // A plane at a time: more tokens have their sums in registers then, and the codes of a region
    // stay in the first-level cache.
    const SegmentSums<S, 1, kParts, kTokens, kChunkBytes> sums{luts};

    F acc[kTokens][kVectors], group[kBits][kTokens][kVectors];
    for (int t = 0; t < kTokens; ++t) {
      for (int i = 0; i < kVectors; ++i) {
        acc[t][i] = S::set(0);
        for (auto& plane : group) plane[t][i] = S::set(0);
      }
    }
    float x_sum[kTokens] = {};
    const auto segment = [&](const uint8_t* at, int64_t region, int64_t chunk, int64_t end,
                             bool begins, const uint16_t* constants) {
      repeat<kBits>([&](auto p) {
        I rows[kTokens][kVectors];
        sums.add(at + p * kTileRows, at + p * (kHalfChunks * kTileRows), chunk, end, rows);
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t) {
          const F unit = S::set(2 * luts[t].half_unit[region]);
#pragma GCC unroll 8
          for (int i = 0; i < kVectors; ++i) {
            group[p][t][i] = S::fma(S::to_float(rows[t][i]), unit, group[p][t][i]);
          }
        }
      });
      sums.add_activations(region, chunk, end, begins, x_sum);
      if (constants == nullptr) return;
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) {
        repeat<kBits>([&](auto p) {
          const F scale = S::load_half(constants + p * kTileRows + i * S::kFloats);
#pragma GCC unroll 8
          for (int t = 0; t < kTokens; ++t) {
            acc[t][i] = S::fma(scale, group[p][t][i], acc[t][i]);
            group[p][t][i] = S::set(0);
          }
        });
        const F offset = S::load_half(constants + kBits * kTileRows + i * S::kFloats);
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t) {
          acc[t][i] = S::fma(offset, S::set(x_sum[t]), acc[t][i]);
        }
      }
    };
    walk_groups<kChunkBytes>(spec, tile, segment);
    store_product<S>(acc, luts, y, stride);
  }
};

template <typename S, int kBits, int kParts>
void multiply_bcq_tile(const LinearSpec& spec, const uint8_t* tile, const LutView* luts, int64_t n,
                       float* y, int64_t stride) {
  take_tokens<tokens_together<S, 1, kParts>()>(n, [&](auto tokens, int64_t t) {
    BcqProduct<S, kBits, kParts, tokens>{luts + t}.run(spec, tile, y + t * stride, stride);
  });
}
