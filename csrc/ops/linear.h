#pragma once

#include <algorithm>
#include <cstdint>

#include "core/thread_pool.h"
#include "ops/inputs.h"

namespace tmac {

// y[t, 32 * tile...] = w . x_t for the tiles [tile_begin, tile_end) and t < tokens.n, where w is a
// reader of the plan that the inputs were built for. Rows of y are `stride` apart.
void multiply_tiles(const Team& team, const Linear& w, Inputs& inputs, const InputPlan& plan,
                    size_t reader, TokenSet tokens, int64_t tile_begin, int64_t tile_end, float* y,
                    int64_t stride);

// The same for the tables of tokens[0 .. n_tokens), at most kTableTokens of those that the inputs
// have room for: y[i] belongs to tokens[i].
void look_up_tiles(const Linear& w, Inputs& inputs, const InputPlan& plan, size_t reader,
                   const int32_t* tokens, int64_t n_tokens, int64_t tile_begin, int64_t tile_end,
                   float* y, int64_t stride);

// Calls work(begin, end) over runs of tiles that the team shares out, `at_once` tiles to a piece.
template <typename Work>
void for_tiles(Team& team, int64_t n_tiles, int64_t at_once, const Work& work) {
  team.parallel_for(ceil_div(n_tiles, at_once), [&](int64_t begin, int64_t end) {
    work(begin * at_once, std::min(end * at_once, n_tiles));
  });
}

// y [n, m] = x [n, k] . w^T
void linear_forward(const Linear& w, Tables tables, const float* x, int64_t n, float* y,
                    ThreadPool& pool);

}  // namespace tmac
