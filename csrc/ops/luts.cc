#include "ops/luts.h"

#include <algorithm>
#include <cstring>

namespace tmac {
namespace {

// The activations of one region, zeros where a chunk is padding. x [shape.k] -> out [64].
void gather(const LutShape& shape, int64_t region, const float* x, float* out) {
  std::memset(out, 0, sizeof(float) * kRegionWeights);
  const int64_t group_size = shape.contiguous() ? shape.k : shape.group_size;
  const int64_t group_chunks = ceil_div(group_size, kChunkWeights);
  for (int64_t i = 0; i < kRegionChunks; ++i) {
    const int64_t chunk = region * kRegionChunks + i;
    if (chunk >= shape.n_chunks) return;
    const int64_t group = chunk / group_chunks;
    const int64_t begin = group * group_size + chunk % group_chunks * kChunkWeights;
    const int64_t end = std::min(shape.k, (group + 1) * group_size);
    const int64_t n = std::min<int64_t>(kChunkWeights, end - begin);
    std::memcpy(out + i * kChunkWeights, x + begin, sizeof(float) * static_cast<size_t>(n));
  }
}

}  // namespace

LutPlan::LutPlan(std::initializer_list<LinearSpec> readers) {
  for (const LinearSpec& spec : readers) {
    const LutShape shape(spec);
    auto set = std::find_if(sets_.begin(), sets_.end(),
                            [&](const Set& other) { return other.shape == shape; });
    if (set == sets_.end()) {
      set = sets_.insert(set, {shape, n_regions_});
      n_regions_ += shape.n_regions();
    }
    reader_regions_.push_back(set->first_region);
  }
}

Luts::Luts(Tables tables, int64_t max_regions, int64_t max_tokens)
    : tables_(tables),
      max_regions_(max_regions),
      entries_(max_tokens * max_regions * kRegionTables * table_parts(tables) * kTableEntries),
      multipliers_(max_tokens * max_regions * kRegionHalves * kMultiplierWords),
      half_unit_(max_tokens * max_regions),
      chunk_sum_(max_tokens * max_regions * kRegionChunks),
      region_sum_(max_tokens * max_regions),
      token_unit_(max_tokens) {}

LutView Luts::view(int64_t token, int64_t first_region) {
  const LutView all{entries_.data(),   multipliers_.data(), half_unit_.data(),
                    chunk_sum_.data(), region_sum_.data(),  token_unit_.data()[token]};
  return all.from_region(token * max_regions_ + first_region, table_parts(tables_));
}

void Luts::build(const LutPlan& plan, int64_t token, int64_t begin, int64_t end, const float* x) {
  const Kernels& isa = kernels();
  float unit = 1, to_units = 0;
  if (tables_ == Tables::kExact8) {
    const float limit = isa.max_abs(x, plan.sets_[0].shape.k);
    constexpr float kRange = kInt8Max;
    const bool vanishes = !(limit >= kRange * 0x1p-120f);
    unit = vanishes ? 0 : limit / kRange;
    to_units = vanishes ? 0 : kRange / limit;
  }
  if (begin == 0 && end > 0) token_unit_.data()[token] = unit;
  const LutPlan::Set* set = plan.sets_.data();
  for (int64_t region = begin; region < end; ++region) {
    while (region >= set->first_region + set->shape.n_regions()) ++set;
    const int64_t first = (region - set->first_region) * kRegionWeights;
    float gathered[kRegionWeights];
    const float* values = gathered;
    if (set->shape.contiguous() && first + kRegionWeights <= set->shape.k) {
      values = x + first;
    } else {
      gather(set->shape, region - set->first_region, x, gathered);
    }
    isa.build_region(values, tables_, to_units, view(token, region));
  }
}

void build_luts(Team& team, const LutPlan& plan, Luts& luts, int64_t n_tokens, const float* x,
                int64_t stride) {
  const int64_t n_regions = plan.n_regions();
  team.parallel_for(n_tokens * n_regions, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t token = begin / n_regions, first = begin % n_regions;
      const int64_t last = std::min(n_regions, first + end - begin);
      luts.build(plan, token, first, last, x + token * stride);
      begin += last - first;
    }
  });
}

}  // namespace tmac
