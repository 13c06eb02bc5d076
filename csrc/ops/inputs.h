#pragma once

#include <cstdint>

#include "core/aligned.h"
#include "core/thread_pool.h"
#include "kernels/kernels.h"
#include "ops/input_plan.h"

namespace tmac {

// Tokens whose inputs are built and read together, and where these begin among others': with tables
// the first token, with integers the first block.
struct TokenSet {
  TokenSet(int64_t n_tokens, int64_t begin = 0) : n(n_tokens), first(begin) {}

  int64_t n, first;
};

// Memory for the tables of several tokens.
class Luts {
 public:
  Luts(Tables tables, int64_t max_regions, int64_t max_tokens);
  // For a matrix whose regions begin at `first_region`.
  LutView view(int64_t token, int64_t first_region);
  float& token_unit(int64_t token) { return token_unit_.data()[token]; }

 private:
  const int parts_;
  const int64_t max_regions_;
  // The arrays of LutView, each [max_tokens, max_regions, ...].
  AlignedBuffer<int8_t> entries_;
  AlignedBuffer<uint32_t> multipliers_;
  AlignedBuffer<float> half_unit_;
  AlignedBuffer<float> chunk_sum_;
  AlignedBuffer<float> half_sum_;
  AlignedBuffer<float> region_sum_;
  AlignedBuffer<float> token_unit_;  // [max_tokens]
};

// Memory for the integers of several tokens, and for the sums of the threads that read them.
class Rows {
 public:
  Rows(Tables tables, int64_t max_regions, int64_t max_blocks, int64_t threads);
  RowView view(const InputPlan& plan, TokenSet tokens, int64_t first_region);
  RowSums sums(int thread);

 private:
  const int parts_;
  const int64_t max_regions_, max_blocks_;
  AlignedBuffer<uint8_t> regions_;
  AlignedBuffer<RowChunks> chunks_;
  AlignedBuffer<float> token_unit_;
  AlignedBuffer<float> sums_;  // [threads, RowSums]
};

// What matrix products read: the activations of several tokens in the form that the number of
// tokens asks for. All calls about the same activations name the same number.
class Inputs {
 public:
  // `most_tables`: tokens whose tables there is room for, if more than products take at once.
  // `more_blocks`: of integers, beside those of max_tokens.
  Inputs(Tables tables, int64_t max_regions, int64_t max_tokens, int64_t threads,
         int64_t most_tables = 0, int64_t more_blocks = 0);

  Tables tables() const { return tables_; }
  // True if plan.weights_at_once can be built before other activations are known.
  bool builds_early(const InputPlan& plan, int64_t n_tokens) const {
    return plan.regions(n_tokens).contiguous() && tables_ != Tables::kExact8;
  }
  // Builds the regions [begin, end) of `plan` for one of the tokens from all of its activations x
  // [k].
  void build(const InputPlan& plan, TokenSet tokens, int64_t token, int64_t begin, int64_t end,
             const float* x);
  // Builds the regions of weights [begin, end), multiples of plan.weights_at_once or k. Needs
  // builds_early().
  void build_weights(const InputPlan& plan, TokenSet tokens, int64_t token, int64_t begin,
                     int64_t end, const float* x) {
    build(plan, tokens, token, begin / kRegionWeights, ceil_div(end, kRegionWeights), x);
  }
  // All regions of x [n_tokens, k], rows `stride` apart, shared out over the team.
  void build_all(Team& team, const InputPlan& plan, int64_t n_tokens, const float* x,
                 int64_t stride);

  // Copies the integers of chosen[0 .. to.n), some of n_tokens that stand at the beginning, to one
  // block of `to`.
  void gather_block(const InputPlan& plan, int64_t n_tokens, const int32_t* chosen, TokenSet to,
                    int64_t block);

  Luts& luts() { return luts_; }
  Rows& rows() { return rows_; }

 private:
  // Units of a token per activation, for build_piece; stores the inverse if `stores`.
  float choose_unit(const InputPlan& plan, TokenSet tokens, int64_t token, bool stores,
                    const float* x);
  // `place` is for rows.
  void build_piece(const InputPlan& plan, TokenSet tokens, int64_t token, RowPlace place,
                   float to_units, const PieceInput& piece);

  int ternary_places() const { return kernels().ternary_places[static_cast<int>(tables_)]; }

  const Tables tables_;
  Luts luts_;
  Rows rows_;
};

}  // namespace tmac
