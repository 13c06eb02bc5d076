#pragma once

#include <cstdint>

#include "core/thread_pool.h"
#include "ops/luts.h"

namespace tmac {

// A packed matrix that somebody else owns and keeps alive.
struct Linear {
  LinearSpec spec;
  const uint8_t* packed = nullptr;  // [spec.packed_bytes()]
};

// y[t, 32 * tile...] = w . x_t for the tiles [tile_begin, tile_end) and t < n_tokens, where the
// tables of token t begin at `first_region`. Rows of y are `stride` apart.
void multiply_tiles(const Linear& w, Luts& luts, int64_t first_region, int64_t n_tokens,
                    int64_t tile_begin, int64_t tile_end, float* y, int64_t stride);

// y [n, m] = x [n, k] . w^T
void linear_forward(const Linear& w, Tables tables, const float* x, int64_t n, float* y,
                    ThreadPool& pool);

}  // namespace tmac
