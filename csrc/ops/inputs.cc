#include "ops/inputs.h"

#include <algorithm>
#include <cstring>

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

Rows::Rows(Tables tables, int64_t max_regions, int64_t max_blocks, int64_t threads)
    : parts_(row_parts(tables)),
      max_regions_(max_regions),
      max_blocks_(max_blocks),
      regions_(max_blocks_ * max_regions * RowView::region_bytes(parts_)),
      chunks_(max_blocks_ * max_regions),
      token_unit_(max_blocks_ * kTokenLanes),
      sums_(threads * RowSums::size(max_blocks_)) {}

RowView Rows::view(const InputPlan& plan, TokenSet tokens, int64_t first_region) {
  const int64_t first = tokens.first * max_regions_ + first_region;
  return {regions_.data() + first * RowView::region_bytes(parts_),
          chunks_.data() + first,
          token_unit_.data() + tokens.first * kTokenLanes,
          max_regions_,
          parts_,
          plan.shares_units(),
          {tokens.n}};
}

RowSums Rows::sums(int thread) {
  return RowSums(sums_.data() + thread * RowSums::size(max_blocks_), max_blocks_);
}

namespace {

int64_t count_blocks(Tables tables, int64_t max_tokens, int64_t more) {
  if (max_tokens <= kTableTokens && tables == Tables::kInt8) return 0;
  return RowBlocks{max_tokens}.n_blocks() + more;
}

}  // namespace

Inputs::Inputs(Tables tables, int64_t max_regions, int64_t max_tokens, int64_t threads,
               int64_t most_tables, int64_t more_blocks)
    : tables_(tables),
      luts_(tables, max_regions, std::max(std::min(max_tokens, kTableTokens), most_tables)),
      rows_(tables, max_regions, count_blocks(tables, max_tokens, more_blocks), threads) {}

float Inputs::choose_unit(const InputPlan& plan, TokenSet tokens, int64_t token, bool stores,
                          const float* x) {
  float unit = 1, to_units = 0;
  if (tables_ == Tables::kExact8) {
    const float limit = vector_kernels().max_abs(x, plan.k());
    constexpr float kRange = kInt8Max;
    const bool vanishes = !(limit >= kRange * 0x1p-120f);
    unit = vanishes ? 0 : limit / kRange;
    to_units = vanishes ? 0 : kRange / limit;
  }
  if (!stores) return to_units;
  if (plan.reads_tables(tokens.n)) {
    luts_.token_unit(tokens.first + token) = unit;
  } else {
    const RowView view = rows_.view(plan, tokens, 0);
    const RowPlace place = view.blocks.place(token);
    view.token_unit[place.block * kTokenLanes + place.lane] = unit;
  }
  return to_units;
}

void Inputs::build_piece(const InputPlan& plan, TokenSet tokens, int64_t token, RowPlace place,
                         float to_units, const PieceInput& piece) {
  if (plan.reads_tables(tokens.n)) {
    const Kernels& isa = kernels();
    const auto build = piece.ternary ? isa.build_ternary_region : isa.build_region;
    build(piece.values, tables_, to_units, luts_.view(tokens.first + token, piece.region));
    return;
  }
  const auto quantize = kernels().quantize_row_regions;
  const RowView view = rows_.view(plan, tokens, 0);
  const bool shares_unit = view.shares_units && piece.whole;
  int8_t* out = view.integers_at(place.block, piece.region) + place.lane * kRegionWeights;
  RowRegion* numbers = &view.region(place.block, piece.region);
  RowChunks* chunks = plan.cuts_regions() ? &view.chunks_of(place.block, piece.region) : nullptr;
  quantize(piece.values, tables_, shares_unit, to_units, place.lane, out, numbers, chunks);
  if (token % 2 == 0 && token + 1 == tokens.n) {  // kernels compute the missing token too
    quantize(piece.values, tables_, shares_unit, to_units, place.lane + 1, out + kRegionWeights,
             numbers, chunks);
  }
}

void Inputs::build(const InputPlan& plan, TokenSet tokens, int64_t token, int64_t begin,
                   int64_t end, const float* x) {
  const float to_units = choose_unit(plan, tokens, token, begin == 0 && end > 0, x);
  const RowPlace place = RowBlocks{tokens.n}.place(token);
  plan.regions(tokens.n).each(begin, end, ternary_places(), x, [&](const PieceInput& piece) {
    build_piece(plan, tokens, token, place, to_units, piece);
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

void Inputs::gather_block(const InputPlan& plan, int64_t n_tokens, const int32_t* chosen,
                          TokenSet to, int64_t block) {
  const RowView source = rows_.view(plan, n_tokens, 0), view = rows_.view(plan, to, 0);
  const int64_t first = view.blocks.first_token(block);
  const int lanes = view.blocks.tokens(block);
  RowPlace places[kBlockTokens];
  for (int lane = 0; lane < lanes; ++lane) {
    // The missing token is the last one again.
    places[lane] = source.blocks.place(chosen[std::min(first + lane, to.n - 1)]);
    view.token_unit[block * kTokenLanes + lane] =
        source.token_unit[places[lane].block * kTokenLanes + places[lane].lane];
  }
  const int64_t n_regions = plan.regions(to.n).size();
  for (int64_t region = 0; region < n_regions; ++region) {
    RowRegion& numbers = view.region(block, region);
    int8_t* integers = view.integers_at(block, region);
    for (int lane = 0; lane < lanes; ++lane) {
      const RowPlace from = places[lane];
      const RowRegion& other = source.region(from.block, region);
      numbers.unit[lane] = other.unit[from.lane];
      numbers.sum[lane] = other.sum[from.lane];
      numbers.loud_at[lane] = other.loud_at[from.lane];
      numbers.loud[lane] = other.loud[from.lane];
      for (int part = 0; part < view.parts; ++part) {
        std::memcpy(integers + (part * kBlockTokens + lane) * kRegionWeights,
                    source.integers_at(from.block, region) +
                        (part * kBlockTokens + from.lane) * kRegionWeights,
                    kRegionWeights);
      }
    }
    if (!plan.cuts_regions()) continue;
    RowChunks& chunks = view.chunks_of(block, region);
    for (int lane = 0; lane < lanes; ++lane) {
      const RowChunks& other = source.chunks_of(places[lane].block, region);
      for (int c = 0; c < kRegionChunks; ++c) {
        chunks.sum[c][lane] = other.sum[c][places[lane].lane];
      }
    }
  }
}

}  // namespace tmac
