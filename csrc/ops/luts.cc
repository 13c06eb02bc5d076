#include "ops/luts.h"

#include <algorithm>
#include <cstring>

namespace tmac {
namespace {

// The 32 activations of one block, zeros where a chunk is padding. x [shape.k] -> out [32].
void gather(const LutShape& shape, int64_t block, const float* x, float* out) {
  std::memset(out, 0, sizeof(float) * kBlockWeights);
  const int64_t group_size = shape.contiguous() ? shape.k : shape.group_size;
  const int64_t group_chunks = ceil_div(group_size, kChunkWeights);
  const int64_t n_chunks = shape.n_chunks();
  for (int64_t i = 0; i < kBlockChunks; ++i) {
    const int64_t chunk = block * kBlockChunks + i;
    if (chunk >= n_chunks) return;
    const int64_t group = chunk / group_chunks;
    const int64_t begin = group * group_size + chunk % group_chunks * kChunkWeights;
    const int64_t end = std::min(shape.k, (group + 1) * group_size);
    const int64_t n = std::min<int64_t>(kChunkWeights, end - begin);
    std::memcpy(out + i * kChunkWeights, x + begin, sizeof(float) * static_cast<size_t>(n));
  }
}

}  // namespace

int64_t LutShape::n_chunks() const {
  if (contiguous()) return ceil_div(k, kChunkWeights);
  const int64_t whole_groups = ceil_div(k, group_size) - 1;
  return whole_groups * ceil_div(group_size, kChunkWeights) +
         ceil_div(k - whole_groups * group_size, kChunkWeights);
}

LutPlan::LutPlan(std::initializer_list<LinearSpec> readers) {
  for (const LinearSpec& spec : readers) {
    const LutShape shape(spec);
    auto set = std::find_if(sets_.begin(), sets_.end(),
                            [&](const Set& other) { return other.shape == shape; });
    if (set == sets_.end()) {
      set = sets_.insert(set, {shape, n_blocks_});
      n_blocks_ += shape.n_blocks();
    }
    reader_blocks_.push_back(set->first_block);
  }
}

Luts::Luts(Tables tables, int64_t max_blocks, int64_t max_tokens)
    : tables_(tables),
      max_blocks_(max_blocks),
      entries_(max_tokens * max_blocks * kBlockTables * table_bytes(tables)),
      half_scale_(max_tokens * max_blocks),
      chunk_sum_(max_tokens * max_blocks * kBlockChunks),
      block_sum_(max_tokens * max_blocks) {}

LutView Luts::view(int64_t token, int64_t first_block) {
  const int64_t at = token * max_blocks_ + first_block;
  return {entries_.data() + at * kBlockTables * table_bytes(tables_), half_scale_.data() + at,
          chunk_sum_.data() + at * kBlockChunks, block_sum_.data() + at};
}

void Luts::build(const LutPlan& plan, int64_t token, int64_t block, const float* x) {
  const LutPlan::Set* set = plan.sets_.data();
  while (block >= set->first_block + set->shape.n_blocks()) ++set;
  const LutView lut = view(token, block);
  const int64_t begin = (block - set->first_block) * kBlockWeights;
  float gathered[kBlockWeights];
  const float* values = gathered;
  if (set->shape.contiguous() && begin + kBlockWeights <= set->shape.k) {
    values = x + begin;
  } else {
    gather(set->shape, block - set->first_block, x, gathered);
  }
  kernels().build_block(values, tables_, lut.entries, lut.half_scale, lut.chunk_sum,
                        lut.block_sum);
}

void Luts::build_range(const LutPlan& plan, int64_t token, int64_t begin, int64_t end,
                       const float* x) {
  for (int64_t b = begin / kBlockWeights; b < ceil_div(end, kBlockWeights); ++b) {
    build(plan, token, b, x);
  }
}

}  // namespace tmac
