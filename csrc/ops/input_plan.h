#pragma once

#include <cstdint>
#include <initializer_list>
#include <vector>

#include "layout/lut.h"
#include "layout/rows.h"

namespace tmac {

// Products of more tokens unpack the weights and multiply them with integers; those of up to this
// many look up tables, unless integers give the same bits sooner. Who cannot multiply integers, or
// had better not, takes no more tokens at once.
constexpr int64_t kTableTokens = 16;
// Tokens whose inputs are built and read together: weights stream past once for all of them.
constexpr int64_t kTokensAtOnce = 512;

// What is built at once from the activations.
enum class Piece {
  kRegion,         // the tables of a region
  kTernaryRegion,  // the same for ternary weights
  kRowRegions,     // integers (layout/rows.h)
};
constexpr int64_t kMostPieceWeights = kRowRegionsWeights;
static_assert(kMostPieceWeights >= kTernaryRegionWeights);

// How a matrix wants its input ordered and cut into chunks. Matrices of equal shape can share their
// input.
struct InputShape {
  int64_t k = 0;
  int64_t group_size = 0;  // 0: chunks follow each other; else each group starts a new chunk
  Piece piece = Piece::kRegion;
  const int32_t* order = nullptr;  // of Linear

  int64_t n_chunks = 0;

  static InputShape of_tables(const Linear& w) {
    const LinearSpec& spec = w.spec;
    return {spec.k, spec.contiguous_chunks() ? 0 : spec.group_size,
            spec.ternary() ? Piece::kTernaryRegion : Piece::kRegion, w.order, spec.n_chunks()};
  }
  static InputShape of_rows(const Linear& w) {
    InputShape shape = of_tables(w);
    shape.piece = Piece::kRowRegions;
    if (w.spec.ternary()) {
      shape.group_size = 0;
      shape.n_chunks = ceil_div(w.spec.k, kChunkWeights);
    }
    return shape;
  }
  bool operator==(const InputShape& o) const;
  // True if weights and chunks follow each other as the activations do.
  bool contiguous() const { return group_size == 0 && order == nullptr; }
  bool ternary() const { return piece == Piece::kTernaryRegion; }
  int64_t chunk_weights() const { return ternary() ? kTernaryChunkWeights : kChunkWeights; }
  int64_t piece_chunks() const {
    switch (piece) {
      case Piece::kTernaryRegion:
        return kTernaryRegionChunks;
      case Piece::kRowRegions:
        return kRowRegions * kRegionChunks;
      default:
        return kRegionChunks;
    }
  }
  int64_t piece_weights() const { return chunk_weights() * piece_chunks(); }
  // Regions that a piece counts as. Ternary tables may take up the memory of several others.
  int64_t piece_regions() const {
    switch (piece) {
      case Piece::kTernaryRegion:
        return kTernaryMostPlaces;
      case Piece::kRowRegions:
        return kRowRegions;
      default:
        return 1;
    }
  }
  int64_t n_regions() const { return ceil_div(n_chunks, piece_chunks()) * piece_regions(); }
};

// A piece, ready to be built.
struct PieceInput {
  int64_t region;  // where it goes: its first
  bool ternary;
  bool whole;           // no chunk of it lies behind the end of the row
  const float* values;  // [piece_weights], zeros for padding
};

// The regions that the readers of one activation vector need: one set for each distinct shape.
class InputRegions {
 public:
  void add_reader(const InputShape& shape);

  int64_t size() const { return size_; }
  // True if region i is weights 64 i..64 i + 63 for all readers.
  bool contiguous() const {
    return sets_.size() == 1 && sets_[0].shape.contiguous() && !sets_[0].shape.ternary();
  }
  bool operator==(const InputRegions& o) const;
  // Where the regions of the i-th reader begin.
  int64_t first(size_t reader) const { return reader_regions_[reader]; }

  // Calls visit(PieceInput) for the pieces that begin in the regions [begin, end) of x [k]. Ternary
  // regions stand `ternary_places` apart.
  template <typename Visit>
  void each(int64_t begin, int64_t end, int64_t ternary_places, const float* x,
            const Visit& visit) const {
    const Set* set = sets_.data();
    for (int64_t region = begin; region < end; ++region) {
      while (region >= set->first_region + set->shape.n_regions()) ++set;
      const InputShape& shape = set->shape;
      const int64_t at = region - set->first_region;
      if (at % shape.piece_regions() != 0) continue;
      const int64_t i = at / shape.piece_regions();
      const int64_t place = shape.ternary() ? set->first_region + i * ternary_places : region;
      const int64_t first = i * shape.piece_weights();
      if (shape.contiguous() && first + shape.piece_weights() <= shape.k) {
        visit(PieceInput{place, shape.ternary(), true, x + first});
      } else {
        float gathered[kMostPieceWeights];
        gather(shape, i, x, gathered);
        const bool whole = (i + 1) * shape.piece_chunks() <= shape.n_chunks;
        visit(PieceInput{place, shape.ternary(), whole, gathered});
      }
    }
  }

 private:
  struct Set {
    InputShape shape;
    int64_t first_region;
  };
  static void gather(const InputShape& shape, int64_t piece, const float* x, float* out);

  std::vector<Set> sets_;
  std::vector<int64_t> reader_regions_;
  int64_t size_ = 0;
};

// Who decides whether products of up to kTableTokens tokens look up tables.
enum class FewTokens { kTables, kFastest };

// What the readers of one activation vector of k need of it, as tables and as integers.
class InputPlan {
 public:
  InputPlan(Tables tables, std::initializer_list<Linear> readers,
            FewTokens few = FewTokens::kFastest);

  int64_t k() const { return k_; }
  // True if products of so many tokens look up tables, else they multiply integers.
  bool reads_tables(int64_t n_tokens) const { return n_tokens <= table_tokens_; }
  // Tiles that one product works on together: what threads should be dealt.
  int64_t tiles_at_once(int64_t n_tokens) const {
    return reads_tables(n_tokens) ? 1 : kTilesAtOnce;
  }
  // Weights whose inputs are built together, if they are contiguous.
  int64_t weights_at_once(int64_t n_tokens) const {
    return reads_tables(n_tokens) ? kRegionWeights : kRowRegionsWeights;
  }
  // True if what is built for the readers of one serves those of the other.
  bool operator==(const InputPlan& o) const;
  const InputRegions& regions(int64_t n_tokens) const {
    return reads_tables(n_tokens) ? tables_ : rows_;
  }
  // Of one token, whatever their number.
  int64_t most_regions() const {
    return tables_.size() > rows_.size() ? tables_.size() : rows_.size();
  }
  // True if all readers can multiply integers; if all are faster with tables.
  bool serves_rows() const { return serves_rows_; }
  bool prefers_tables() const { return prefers_tables_; }
  // True if groups of a reader end within a region of integers; if regions share units.
  bool cuts_regions() const { return cuts_regions_; }
  bool shares_units() const { return shares_units_; }

 private:
  int64_t k_;
  InputRegions tables_, rows_;
  int64_t table_tokens_ = kTableTokens;
  bool serves_rows_ = true, prefers_tables_ = true;
  bool cuts_regions_ = false, shares_units_ = true;
};

}  // namespace tmac
