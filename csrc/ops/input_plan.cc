#include "ops/input_plan.h"

#include <algorithm>
#include <cstring>

namespace tmac {

bool InputShape::operator==(const InputShape& o) const {
  const auto same_order = [&] {
    if (order == o.order) return true;
    return order != nullptr && o.order != nullptr && std::equal(order, order + k, o.order);
  };
  return k == o.k && group_size == o.group_size && piece == o.piece && same_order();
}

void InputRegions::add_reader(const InputShape& shape) {
  auto set = std::find_if(sets_.begin(), sets_.end(),
                          [&](const Set& other) { return other.shape == shape; });
  if (set == sets_.end()) {
    set = sets_.insert(set, {shape, size_});
    size_ += shape.n_regions();
  }
  reader_regions_.push_back(set->first_region);
}

bool InputRegions::operator==(const InputRegions& o) const {
  const auto same = [](const Set& a, const Set& b) {
    return a.first_region == b.first_region && a.shape == b.shape;
  };
  return size_ == o.size_ && reader_regions_ == o.reader_regions_ &&
         std::equal(sets_.begin(), sets_.end(), o.sets_.begin(), o.sets_.end(), same);
}

namespace {

// With int8 tables one bit plane is looked up faster than it is multiplied, on every instruction
// set that this was timed on.
bool prefers_tables_for(const LinearSpec& spec, Tables tables) {
  return spec.encoding == Encoding::kUniform && spec.bits == 1 && tables == Tables::kInt8;
}

// Tokens up to which tables are faster than the integers that give the same bits (docs/kernels.md),
// or kTableTokens. Integers of Tables::kInt8 give other bits.
int64_t most_table_tokens(const LinearSpec& spec, Tables tables) {
  if (spec.encoding != Encoding::kUniform || tables == Tables::kInt8) return kTableTokens;
  if (tables == Tables::kExact) return spec.bits <= 2 ? kTableTokens : 5;
  return spec.bits == 1 ? kTableTokens : spec.bits == 2 ? 5 : 3;
}

}  // namespace

InputPlan::InputPlan(Tables tables, std::initializer_list<Linear> readers, FewTokens few)
    : k_(readers.begin()->spec.k) {
  int64_t most_tables = 0;
  for (const Linear& w : readers) {
    tables_.add_reader(InputShape::of_tables(w));
    rows_.add_reader(InputShape::of_rows(w));
    cuts_regions_ |= tmac::cuts_regions(w.spec);
    shares_units_ &= can_share_units(w.spec);
    serves_rows_ &= tmac::serves_rows(w.spec, tables);
    prefers_tables_ &= prefers_tables_for(w.spec, tables);
    most_tables = std::max(most_tables, most_table_tokens(w.spec, tables));
  }
  if (few == FewTokens::kFastest && serves_rows_) table_tokens_ = most_tables;
}

bool InputPlan::operator==(const InputPlan& o) const {
  return k_ == o.k_ && tables_ == o.tables_ && rows_ == o.rows_ &&
         table_tokens_ == o.table_tokens_ && serves_rows_ == o.serves_rows_ &&
         prefers_tables_ == o.prefers_tables_ && cuts_regions_ == o.cuts_regions_ &&
         shares_units_ == o.shares_units_;
}

// The activations of a shape's piece. x [shape.k] -> out [piece_weights].
void InputRegions::gather(const InputShape& shape, int64_t piece, const float* x, float* out) {
  const int64_t chunk_weights = shape.chunk_weights();
  std::memset(out, 0, sizeof(float) * static_cast<size_t>(shape.piece_weights()));
  const int64_t group_size = shape.group_size == 0 ? shape.k : shape.group_size;
  const int64_t group_chunks = ceil_div(group_size, chunk_weights);
  for (int64_t i = 0; i < shape.piece_chunks(); ++i) {
    const int64_t chunk = piece * shape.piece_chunks() + i;
    if (chunk >= shape.n_chunks) return;
    const int64_t group = chunk / group_chunks;
    const int64_t begin = group * group_size + chunk % group_chunks * chunk_weights;
    const int64_t end = std::min(shape.k, (group + 1) * group_size);
    const int64_t n = std::min(chunk_weights, end - begin);
    float* chunk_out = out + i * chunk_weights;
    if (shape.order == nullptr) {
      std::memcpy(chunk_out, x + begin, sizeof(float) * static_cast<size_t>(n));
    } else {
      for (int64_t j = 0; j < n; ++j) chunk_out[j] = x[shape.order[begin + j]];
    }
  }
}

}  // namespace tmac
