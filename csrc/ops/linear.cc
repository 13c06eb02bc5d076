#include "ops/linear.h"

#include <algorithm>
#include <cstring>

namespace tmac {
namespace {

Kernels::MultiplyTile kernel_of(const LinearSpec& spec, Tables tables) {
  const Kernels& isa = kernels();
  if (spec.ternary()) return isa.multiply_ternary_tile[static_cast<int>(tables)];
  const int parts = table_parts(tables);
  if (spec.bcq()) return isa.multiply_bcq_tile[parts - 1][spec.bits - 1];
  return isa.multiply_tile[parts - 1][spec.bits - 1];
}

template <typename TokenAt>
void look_up(const Linear& w, Inputs& inputs, int64_t first_region, const TokenAt& token_at,
             int64_t n_tokens, int64_t tile_begin, int64_t tile_end, float* y, int64_t stride) {
  const auto multiply = kernel_of(w.spec, inputs.tables());
  LutView views[kTableTokens];
  for (int64_t t = 0; t < n_tokens; ++t) views[t] = inputs.luts().view(token_at(t), first_region);
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const int64_t row = tile * kTileRows;
    const int64_t rows = std::min<int64_t>(kTileRows, w.spec.m - row);
    const uint8_t* packed = w.packed + tile * w.spec.tile_bytes();
    if (rows == kTileRows) {
      multiply(w.spec, packed, views, n_tokens, y + row, stride);
      continue;
    }
    float whole[kTableTokens * kTileRows];
    multiply(w.spec, packed, views, n_tokens, whole, kTileRows);
    for (int64_t t = 0; t < n_tokens; ++t) {
      std::memcpy(y + t * stride + row, whole + t * kTileRows,
                  sizeof(float) * static_cast<size_t>(rows));
    }
  }
}

}  // namespace

void look_up_tiles(const Linear& w, Inputs& inputs, const InputPlan& plan, size_t reader,
                   const int32_t* tokens, int64_t n_tokens, int64_t tile_begin, int64_t tile_end,
                   float* y, int64_t stride) {
  look_up(
      w, inputs, plan.regions(n_tokens).first(reader), [&](int64_t i) { return tokens[i]; },
      n_tokens, tile_begin, tile_end, y, stride);
}

void multiply_tiles(const Team& team, const Linear& w, Inputs& inputs, const InputPlan& plan,
                    size_t reader, TokenSet tokens, int64_t tile_begin, int64_t tile_end, float* y,
                    int64_t stride) {
  const int64_t first_region = plan.regions(tokens.n).first(reader);
  if (plan.reads_tables(tokens.n)) {
    look_up(
        w, inputs, first_region, [&](int64_t i) { return tokens.first + i; }, tokens.n, tile_begin,
        tile_end, y, stride);
    return;
  }
  const RowView view = inputs.rows().view(plan, tokens, first_region);
  const auto kind = static_cast<size_t>(inputs.tables());
  const auto multiply = w.spec.ternary() ? kernels().multiply_ternary_rows[kind]
                                         : kernels().multiply_rows[kind][w.spec.bits - 1];
  const RowSums sums = inputs.rows().sums(team.thread());
  const int64_t row_end = std::min(tile_end * kTileRows, w.spec.m);
  for (int64_t tile = tile_begin; tile < tile_end; tile += kTilesAtOnce) {
    const int64_t row = tile * kTileRows;
    const int64_t rows = std::min<int64_t>(kTilesAtOnce * kTileRows, row_end - row);
    multiply(w.spec, w.packed + tile * w.spec.tile_bytes(), view, sums, static_cast<int>(rows),
             y + row, stride);
  }
}

void linear_forward(const Linear& w, Tables tables, const float* x, int64_t n, float* y,
                    ThreadPool& pool) {
  kernels();  // throws, if it must, before the threads set out
  const InputPlan plan(tables, {w});
  const bool looks_up = !plan.serves_rows() || plan.prefers_tables();
  const int64_t at_once = std::min(n, looks_up ? kTableTokens : kTokensAtOnce);
  Inputs inputs(tables, plan.most_regions(), at_once, pool.threads());
  const int64_t k = w.spec.k, m = w.spec.m;
  pool.run([&](Team& team) {
    for (int64_t first = 0; first < n; first += at_once) {
      const int64_t tokens = std::min(at_once, n - first);
      inputs.build_all(team, plan, tokens, x + first * k, k);
      const int64_t tiles = plan.tiles_at_once(tokens);
      for_tiles(team, w.spec.n_tiles(), tiles, [&](int64_t begin, int64_t end) {
        multiply_tiles(team, w, inputs, plan, 0, tokens, begin, end, y + first * m, m);
      });
    }
  });
}

}  // namespace tmac
