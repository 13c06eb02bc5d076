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
    reader_regions_.push_back(set->first_region);
    if (spec.encoding != Encoding::kUniform) tokens_at_once_ = kTableTokens;
  }
}

// The activations of the i-th region of a shape. x [shape.k] -> out [region_weights].
void InputPlan::gather(const InputShape& shape, int64_t region, const float* x, float* out) {
  const int64_t chunk_weights = shape.chunk_weights();
  std::memset(out, 0, sizeof(float) * static_cast<size_t>(shape.region_weights()));
  const int64_t group_size = shape.contiguous() ? shape.k : shape.group_size;
  const int64_t group_chunks = ceil_div(group_size, chunk_weights);
  for (int64_t i = 0; i < shape.region_chunks(); ++i) {
    const int64_t chunk = region * shape.region_chunks() + i;
    if (chunk >= shape.n_chunks) return;
    const int64_t group = chunk / group_chunks;
    const int64_t begin = group * group_size + chunk % group_chunks * chunk_weights;
    const int64_t end = std::min(shape.k, (group + 1) * group_size);
    const int64_t n = std::min(chunk_weights, end - begin);
    std::memcpy(out + i * chunk_weights, x + begin, sizeof(float) * static_cast<size_t>(n));
  }
}

}  // namespace tmac
