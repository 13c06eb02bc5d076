#pragma once

#include <cstdint>
#include <initializer_list>
#include <vector>

#include "layout/region.h"

namespace tmac {

// How a matrix wants its input cut into chunks. Matrices of equal shape can share their input.
struct InputShape {
  int64_t k = 0;
  int64_t group_size = 0;  // 0: chunk c is weights 8c..8c+7; else each group starts a new chunk

  int64_t n_chunks = 0;

  explicit InputShape(const LinearSpec& spec)
      : k(spec.k),
        group_size(spec.contiguous_chunks() ? 0 : spec.group_size),
        n_chunks(spec.n_chunks()) {}
  bool operator==(const InputShape& o) const { return k == o.k && group_size == o.group_size; }
  bool contiguous() const { return group_size == 0; }
  int64_t n_regions() const { return ceil_div(n_chunks, kRegionChunks); }
};

// The regions that the readers of one activation vector need: one set for each distinct shape.
class InputPlan {
 public:
  InputPlan(std::initializer_list<LinearSpec> readers);

  int64_t k() const { return sets_[0].shape.k; }
  int64_t n_regions() const { return n_regions_; }
  // True if region i is weights 64 i..64 i + 63 for all readers.
  bool contiguous() const { return sets_.size() == 1 && sets_[0].shape.contiguous(); }
  // True if groups of a reader end within a region.
  bool cuts_regions() const { return cuts_regions_; }
  // Where the regions of the i-th reader begin.
  int64_t first_region(size_t reader) const { return reader_regions_[reader]; }

  // Calls visit(region, values [64]) for the regions [begin, end) of x [k]; zeros are padding.
  template <typename Visit>
  void each_region(int64_t begin, int64_t end, const float* x, const Visit& visit) const {
    const Set* set = sets_.data();
    for (int64_t region = begin; region < end; ++region) {
      while (region >= set->first_region + set->shape.n_regions()) ++set;
      const int64_t first = (region - set->first_region) * kRegionWeights;
      if (set->shape.contiguous() && first + kRegionWeights <= set->shape.k) {
        visit(region, x + first);
      } else {
        float gathered[kRegionWeights];
        gather(set->shape, region - set->first_region, x, gathered);
        visit(region, gathered);
      }
    }
  }

 private:
  struct Set {
    InputShape shape;
    int64_t first_region;
  };
  static void gather(const InputShape& shape, int64_t region, const float* x, float* out);

  std::vector<Set> sets_;
  std::vector<int64_t> reader_regions_;
  int64_t n_regions_ = 0;
  bool cuts_regions_ = false;
};

}  // namespace tmac
