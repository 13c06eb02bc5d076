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
      half_sum_(max_tokens * max_regions * kRegionHalves),
      region_sum_(max_tokens * max_regions),
      token_unit_(max_tokens) {}

LutView Luts::view(int64_t token, int64_t first_region) {
  const LutView all{entries_.data(),  multipliers_.data(), half_unit_.data(), chunk_sum_.data(),
                    half_sum_.data(), region_sum_.data(),  &token_unit(token)};
  return all.from_region(token * max_regions_ + first_region, parts_);
}

Rows::Rows(Tables tables, int64_t max_regions, int64_t max_tokens, int64_t threads)
    : parts_(row_parts(tables)),
      max_regions_(max_regions),
      max_blocks_(max_tokens <= kTableTokens && tables == Tables::kInt8
                      ? 0
                      : RowBlocks{max_tokens}.n_blocks()),
      regions_(max_blocks_ * max_regions * RowView::region_bytes(parts_)),
      chunks_(max_blocks_ * max_regions),
      token_unit_(max_blocks_ * kTokenLanes),
      sums_(threads * RowSums::size(max_blocks_)) {}

RowView Rows::view(const InputPlan& plan, int64_t n_tokens, int64_t first_region) {
  return {regions_.data() + first_region * RowView::region_bytes(parts_),
          chunks_.data() + first_region,
          token_unit_.data(),
          max_regions_,
          parts_,
          plan.shares_units(),
          {n_tokens}};
}

float& Rows::token_unit(int64_t n_tokens, int64_t token) {
  const RowPlace place = RowBlocks{n_tokens}.place(token);
  return token_unit_.data()[place.block * kTokenLanes + place.lane];
}

RowSums Rows::sums(int thread) {
  return RowSums(sums_.data() + thread * RowSums::size(max_blocks_), max_blocks_);
}

Inputs::Inputs(Tables tables, int64_t max_regions, int64_t max_tokens, int64_t threads,
               int64_t most_tables)
    : tables_(tables),
      luts_(tables, max_regions, std::max(std::min(max_tokens, kTableTokens), most_tables)),
      rows_(tables, max_regions, max_tokens, threads) {}

float Inputs::choose_unit(const InputPlan& plan, int64_t n_tokens, int64_t token, bool stores,
                          const float* x) {
  float unit = 1, to_units = 0;
  if (tables_ == Tables::kExact8) {
    const float limit = vector_kernels().max_abs(x, plan.k());
    constexpr float kRange = kInt8Max;
    const bool vanishes = !(limit >= kRange * 0x1p-120f);
    unit = vanishes ? 0 : limit / kRange;
    to_units = vanishes ? 0 : kRange / limit;
  }
  if (stores) {
    (plan.reads_tables(n_tokens) ? luts_.token_unit(token) : rows_.token_unit(n_tokens, token)) =
        unit;
  }
  return to_units;
}

void Inputs::build_piece(const InputPlan& plan, int64_t n_tokens, int64_t token, RowPlace place,
                         float to_units, const PieceInput& piece) {
  if (plan.reads_tables(n_tokens)) {
    const Kernels& isa = kernels();
    const auto build = piece.ternary ? isa.build_ternary_region : isa.build_region;
    build(piece.values, tables_, to_units, luts_.view(token, piece.region));
    return;
  }
  const auto quantize = kernels().quantize_row_regions;
  const RowView view = rows_.view(plan, n_tokens, 0);
  const bool shares_unit = view.shares_units && piece.whole;
  int8_t* out = view.integers_at(place.block, piece.region) + place.lane * kRegionWeights;
  RowRegion* numbers = &view.region(place.block, piece.region);
  RowChunks* chunks = plan.cuts_regions() ? &view.chunks_of(place.block, piece.region) : nullptr;
  quantize(piece.values, tables_, shares_unit, to_units, place.lane, out, numbers, chunks);
  if (token % 2 == 0 && token + 1 == n_tokens) {  // kernels compute the missing token too
    quantize(piece.values, tables_, shares_unit, to_units, place.lane + 1, out + kRegionWeights,
             numbers, chunks);
  }
}

void Inputs::build(const InputPlan& plan, int64_t n_tokens, int64_t token, int64_t begin,
                   int64_t end, const float* x) {
  const float to_units = choose_unit(plan, n_tokens, token, begin == 0 && end > 0, x);
  const RowPlace place = RowBlocks{n_tokens}.place(token);
  plan.regions(n_tokens).each(begin, end, ternary_places(), x, [&](const PieceInput& piece) {
    build_piece(plan, n_tokens, token, place, to_units, piece);
  });
}

void Inputs::build_all(Team& team, const InputPlan& plan, int64_t n_tokens, const float* x,
                       int64_t stride) {
  // Tokens whose numbers stand side by side are built together.
  const RowBlocks blocks{n_tokens};
  const bool apart = plan.reads_tables(n_tokens);
  const int64_t n_blocks = apart ? n_tokens : blocks.n_blocks();
  const InputRegions& regions = plan.regions(n_tokens);
  const int64_t n_regions = regions.size(), places = ternary_places();
  team.parallel_for(n_blocks * n_regions, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t block = begin / n_regions, first = begin % n_regions;
      const int64_t last = std::min(n_regions, first + end - begin);
      const int64_t token = apart ? block : blocks.first_token(block);
      const int64_t n = apart ? 1 : std::min(blocks.first_token(block + 1), n_tokens) - token;
      float to_units[kBlockTokens];
      for (int64_t t = 0; t < n; ++t) {
        to_units[t] = choose_unit(plan, n_tokens, token + t, first == 0, x + (token + t) * stride);
      }
      for (int64_t region = first; region < last; ++region) {
        for (int64_t t = 0; t < n; ++t) {
          regions.each(region, region + 1, places, x + (token + t) * stride,
                       [&](const PieceInput& piece) {
                         build_piece(plan, n_tokens, token + t, {block, static_cast<int>(t)},
                                     to_units[t], piece);
                       });
        }
      }
      begin += last - first;
    }
  });
}

}  // namespace tmac
