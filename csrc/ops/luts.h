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
  int64_t n_spans() const { return ceil_div(n_chunks, kSpanChunks); }
};

// The tables that the readers of one activation vector need: one set for each distinct shape.
class LutPlan {
 public:
  LutPlan(std::initializer_list<LinearSpec> readers);

  int64_t n_spans() const { return n_spans_; }
  // True if each span can be built as soon as its own 32 activations are known.
  bool contiguous() const { return sets_.size() == 1 && sets_[0].shape.contiguous(); }
  // Where the tables of the i-th reader begin.
  int64_t first_span(size_t reader) const { return reader_spans_[reader]; }

 private:
  friend class Luts;
  struct Set {
    LutShape shape;
    int64_t first_span;
  };
  std::vector<Set> sets_;
  std::vector<int64_t> reader_spans_;
  int64_t n_spans_ = 0;
};

// Memory for the tables of several tokens.
class Luts {
 public:
  Luts(Tables tables, int64_t max_spans, int64_t max_tokens);

  Tables tables() const { return tables_; }
  LutView view(int64_t token, int64_t first_span);
  // Builds span `span` of `plan` for `token` from all of its activations x [k].
  void build(const LutPlan& plan, int64_t token, int64_t span, const float* x);
  // Builds the spans of weights [begin, end), multiples of 32 or k. Needs plan.contiguous().
  void build_range(const LutPlan& plan, int64_t token, int64_t begin, int64_t end, const float* x);

 private:
  Tables tables_;
  int64_t max_spans_;
  AlignedBuffer<int8_t> entries_;    // [max_tokens, max_spans, 8, table_bytes]
  AlignedBuffer<float> half_scale_;  // [max_tokens, max_spans, 2]
  AlignedBuffer<float> chunk_sum_;   // [max_tokens, max_spans, 4]
  AlignedBuffer<float> block_sum_;   // [max_tokens, max_spans, 2]
};

// All tables of x [n_tokens, k], rows `stride` apart, shared out over the team.
void build_luts(Team& team, const LutPlan& plan, Luts& luts, int64_t n_tokens, const float* x,
                int64_t stride);

}  // namespace tmac
