#include "ops/luts.h"

#include <algorithm>
#include <cstring>

namespace tmac {
namespace {

// The 32 activations of one span, zeros where a chunk is padding. x [shape.k] -> out [32].
void gather(const LutShape& shape, int64_t span, const float* x, float* out) {
  std::memset(out, 0, sizeof(float) * kSpanWeights);
  const int64_t group_size = shape.contiguous() ? shape.k : shape.group_size;
  const int64_t group_chunks = ceil_div(group_size, kChunkWeights);
  for (int64_t i = 0; i < kSpanChunks; ++i) {
    const int64_t chunk = span * kSpanChunks + i;
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
      set = sets_.insert(set, {shape, n_spans_});
      n_spans_ += shape.n_spans();
    }
    reader_spans_.push_back(set->first_span);
  }
}

Luts::Luts(Tables tables, int64_t max_spans, int64_t max_tokens)
    : tables_(tables),
      max_spans_(max_spans),
      entries_(max_tokens * max_spans * kSpanTables * table_bytes(tables)),
      half_scale_(max_tokens * max_spans * kSpanBlocks),
      chunk_sum_(max_tokens * max_spans * kSpanChunks),
      block_sum_(max_tokens * max_spans * kSpanBlocks) {}

LutView Luts::view(int64_t token, int64_t first_span) {
  const LutView all{entries_.data(), half_scale_.data(), chunk_sum_.data(), block_sum_.data()};
  return all.from_span(token * max_spans_ + first_span, tables_);
}

void Luts::build(const LutPlan& plan, int64_t token, int64_t span, const float* x) {
  const LutPlan::Set* set = plan.sets_.data();
  while (span >= set->first_span + set->shape.n_spans()) ++set;
  const int64_t begin = (span - set->first_span) * kSpanWeights;
  float gathered[kSpanWeights];
  const float* values = gathered;
  if (set->shape.contiguous() && begin + kSpanWeights <= set->shape.k) {
    values = x + begin;
  } else {
    gather(set->shape, span - set->first_span, x, gathered);
  }
  kernels().build_span(values, tables_, view(token, span));
}

void Luts::build_range(const LutPlan& plan, int64_t token, int64_t begin, int64_t end,
                       const float* x) {
  for (int64_t b = begin / kSpanWeights; b < ceil_div(end, kSpanWeights); ++b) {
    build(plan, token, b, x);
  }
}

void build_luts(Team& team, const LutPlan& plan, Luts& luts, int64_t n_tokens, const float* x,
                int64_t stride) {
  const int64_t n_spans = plan.n_spans();
  team.parallel_for(n_tokens * n_spans, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      luts.build(plan, i / n_spans, i % n_spans, x + i / n_spans * stride);
    }
  });
}

}  // namespace tmac
