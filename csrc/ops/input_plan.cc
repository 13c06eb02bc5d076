#include "ops/input_plan.h"

#include <algorithm>
#include <cstring>

namespace tmac {

InputPlan::InputPlan(std::initializer_list<LinearSpec> readers) {
  for (const LinearSpec& spec : readers) {
    const InputShape shape(spec);
    auto set = std::find_if(sets_.begin(), sets_.end(),
                            [&](const Set& other) { return other.shape == shape; });
    if (set == sets_.end()) {
      set = sets_.insert(set, {shape, n_regions_});
      n_regions_ += shape.n_regions();
    }
    cuts_regions_ |= tmac::cuts_regions(spec);
    reader_regions_.push_back(set->first_region);
  }
}

// The activations of one region of a shape. x [shape.k] -> out [64].
void InputPlan::gather(const InputShape& shape, int64_t region, const float* x, float* out) {
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

}  // namespace tmac
