#include "ops/linear.h"

#include <algorithm>
#include <cstring>

namespace tmac {

void multiply_tiles(const Linear& w, Luts& luts, int64_t first_region, int64_t n_tokens,
                    int64_t tile_begin, int64_t tile_end, float* y, int64_t stride) {
  const auto multiply = kernels().multiply_tile[table_parts(luts.tables()) - 1][w.spec.bits - 1];
  const int64_t tile_bytes = w.spec.tile_bytes();
  LutView views[kTokensAtOnce];
  for (int64_t t = 0; t < n_tokens; ++t) views[t] = luts.view(t, first_region);
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const int64_t row = tile * kTileRows;
    const int64_t rows = std::min<int64_t>(kTileRows, w.spec.m - row);
    const uint8_t* packed = w.packed + tile * tile_bytes;
    if (rows == kTileRows) {
      multiply(w.spec, packed, views, n_tokens, y + row, stride);
      continue;
    }
    float whole[kTokensAtOnce * kTileRows];
    multiply(w.spec, packed, views, n_tokens, whole, kTileRows);
    for (int64_t t = 0; t < n_tokens; ++t) {
      std::memcpy(y + t * stride + row, whole + t * kTileRows,
                  sizeof(float) * static_cast<size_t>(rows));
    }
  }
}

void linear_forward(const Linear& w, Tables tables, const float* x, int64_t n, float* y,
                    ThreadPool& pool) {
  kernels();  // throws, if it must, before the threads set out
  const LutPlan plan({w.spec});
  Luts luts(tables, plan.n_regions(), std::min(n, kTokensAtOnce));
  pool.run([&](Team& team) {
    for (int64_t first = 0; first < n; first += kTokensAtOnce) {
      const int64_t tokens = std::min(kTokensAtOnce, n - first);
      build_luts(team, plan, luts, tokens, x + first * w.spec.k, w.spec.k);
      team.parallel_for(w.spec.n_tiles(), [&](int64_t begin, int64_t end) {
        multiply_tiles(w, luts, plan.first_region(0), tokens, begin, end, y + first * w.spec.m,
                       w.spec.m);
      });
    }
  });
}

}  // namespace tmac
