#pragma once

#include <cstdint>
#include <initializer_list>
#include <vector>

#include "core/aligned.h"
#include "core/thread_pool.h"
#include "kernels/kernels.h"

namespace tmac {

// Tokens whose tables are built and read together: they stay in the second-level cache while the
// weights stream past once.
constexpr int64_t kTokensAtOnce = 32;

// How a matrix wants its input cut into chunks. Matrices of equal shape can share their tables.
struct LutShape {
  int64_t k = 0;
  int64_t group_size = 0;  // 0: chunk c is weights 8c..8c+7; else each group starts a new chunk

  int64_t n_chunks = 0;

  explicit LutShape(const LinearSpec& spec)
      : k(spec.k),
        group_size(spec.contiguous_chunks() ? 0 : spec.group_size),
        n_chunks(spec.n_chunks()) {}
  bool operator==(const LutShape& o) const { return k == o.k && group_size == o.group_size; }
  bool contiguous() const { return group_size == 0; }
  int64_t n_regions() const { return ceil_div(n_chunks, kRegionChunks); }
};

// The tables that the readers of one activation vector need: one set for each distinct shape.
class LutPlan {
 public:
  LutPlan(std::initializer_list<LinearSpec> readers);

  int64_t n_regions() const { return n_regions_; }
  // True if region i is weights 64 i..64 i + 63 for all readers.
  bool contiguous() const { return sets_.size() == 1 && sets_[0].shape.contiguous(); }
  // Where the tables of the i-th reader begin.
  int64_t first_region(size_t reader) const { return reader_regions_[reader]; }

 private:
  friend class Luts;
  struct Set {
    LutShape shape;
    int64_t first_region;
  };
  std::vector<Set> sets_;
  std::vector<int64_t> reader_regions_;
  int64_t n_regions_ = 0;
};

// Memory for the tables of several tokens.
class Luts {
 public:
  Luts(Tables tables, int64_t max_regions, int64_t max_tokens);

  Tables tables() const { return tables_; }
  LutView view(int64_t token, int64_t first_region);
  // True if a region can be built before the activations of other regions are known.
  bool builds_early(const LutPlan& plan) const {
    return plan.contiguous() && tables_ != Tables::kExact8;
  }
  // Builds the regions [begin, end) of `plan` for `token` from all of its activations x [k].
  void build(const LutPlan& plan, int64_t token, int64_t begin, int64_t end, const float* x);
  // Builds the regions of weights [begin, end), multiples of 64 or k. Needs builds_early(plan).
  void build_weights(const LutPlan& plan, int64_t token, int64_t begin, int64_t end,
                     const float* x) {
    build(plan, token, begin / kRegionWeights, ceil_div(end, kRegionWeights), x);
  }

 private:
  Tables tables_;
  int64_t max_regions_;
  // The arrays of LutView, each [max_tokens, max_regions, ...].
  AlignedBuffer<int8_t> entries_;
  AlignedBuffer<uint32_t> multipliers_;
  AlignedBuffer<float> half_unit_;
  AlignedBuffer<float> chunk_sum_;
  AlignedBuffer<float> region_sum_;
  AlignedBuffer<float> token_unit_;  // [max_tokens]
};

// All tables of x [n_tokens, k], rows `stride` apart, shared out over the team.
void build_luts(Team& team, const LutPlan& plan, Luts& luts, int64_t n_tokens, const float* x,
                int64_t stride);

}  // namespace tmac
