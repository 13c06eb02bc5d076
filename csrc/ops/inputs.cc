#include "ops/inputs.h"

#include <algorithm>

namespace tmac {

Luts::Luts(Tables tables, int64_t max_regions, int64_t max_tokens)
    : parts_(table_parts(tables)),
      max_regions_(max_regions),
      entries_(max_tokens * max_regions * kRegionTables * parts_ * kTableEntries),
      multipliers_(max_tokens * max_regions * kRegionHalves * kMultiplierWords),
      half_unit_(max_tokens * max_regions),
      chunk_sum_(max_tokens * max_regions * kRegionChunks),
      region_sum_(max_tokens * max_regions),
      token_unit_(max_tokens) {}

LutView Luts::view(int64_t token, int64_t first_region) {
  const LutView all{entries_.data(),   multipliers_.data(), half_unit_.data(),
                    chunk_sum_.data(), region_sum_.data(),  &token_unit(token)};
  return all.from_region(token * max_regions_ + first_region, parts_);
}

Rows::Rows(Tables tables, int64_t max_regions, int64_t max_tokens, int64_t threads)
    : parts_(row_parts(tables)),
      max_regions_(max_regions),
      max_blocks_(reads_tables(max_tokens) ? 0 : RowBlocks{max_tokens}.n_blocks()),
      integers_(max_blocks_ * max_regions * parts_ * kBlockTokens * kRegionWeights),
      regions_(max_blocks_ * max_regions),
      token_unit_(max_blocks_ * kTokenLanes),
      sums_(threads * RowSums::size(max_blocks_)) {}

RowView Rows::view(int64_t n_tokens, int64_t first_region) {
  return {integers_.data() + first_region * parts_ * kBlockTokens * kRegionWeights,
          regions_.data() + first_region,
          token_unit_.data(),
          max_regions_,
          parts_,
          {n_tokens}};
}

RowSums Rows::sums(int thread) {
  return RowSums(sums_.data() + thread * RowSums::size(max_blocks_), max_blocks_);
}

Inputs::Inputs(Tables tables, int64_t max_regions, int64_t max_tokens, int64_t threads)
    : tables_(tables),
      luts_(tables, max_regions, std::min(max_tokens, kTableTokens)),
      rows_(tables, max_regions, max_tokens, threads) {}

void Inputs::build(const InputPlan& plan, int64_t n_tokens, int64_t token, int64_t begin,
                   int64_t end, const float* x) {
  float unit = 1, to_units = 0;
  if (tables_ == Tables::kExact8) {
    const float limit = kernels().max_abs(x, plan.k());
    constexpr float kRange = kInt8Max;
    const bool vanishes = !(limit >= kRange * 0x1p-120f);
    unit = vanishes ? 0 : limit / kRange;
    to_units = vanishes ? 0 : kRange / limit;
  }
  const bool sets_unit = begin == 0 && end > 0;
  if (reads_tables(n_tokens)) {
    if (sets_unit) luts_.token_unit(token) = unit;
    const Kernels& isa = kernels();
    plan.each_region(
        begin, end, isa.ternary_places, x, [&](int64_t region, bool ternary, const float* values) {
          const auto build_region = ternary ? isa.build_ternary_region : isa.build_region;
          build_region(values, tables_, to_units, luts_.view(token, region));
        });
    return;
  }
  const RowView view = rows_.view(n_tokens, 0);
  const int64_t block = view.blocks.block_of(token);
  const int lane = static_cast<int>(token - view.blocks.first_token(block));
  if (sets_unit) view.token_unit[block * kTokenLanes + lane] = unit;
  const bool fill_pair = token % 2 == 0 && token + 1 == n_tokens;
  plan.each_region(begin, end, 1, x, [&](int64_t region, bool, const float* values) {
    int8_t* out = view.integers_at(block, region) + lane * kRegionWeights;
    RowRegion* numbers = &view.region(block, region);
    kernels().quantize_row(values, tables_, to_units, lane, out, numbers);
    if (fill_pair) {  // kernels compute the missing token too
      kernels().quantize_row(values, tables_, to_units, lane + 1, out + kRegionWeights, numbers);
    }
  });
}

void Inputs::build_all(Team& team, const InputPlan& plan, int64_t n_tokens, const float* x,
                       int64_t stride) {
  const int64_t n_regions = plan.n_regions();
  team.parallel_for(n_tokens * n_regions, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t token = begin / n_regions, first = begin % n_regions;
      const int64_t last = std::min(n_regions, first + end - begin);
      build(plan, n_tokens, token, first, last, x + token * stride);
      begin += last - first;
    }
  });
}

}  // namespace tmac
