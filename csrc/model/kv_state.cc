// What a KV cache holds, as bytes: copies and saved states.
#include <cstring>
#include <vector>

#include "core/check.h"
#include "model/kv_cache.h"

namespace tmac {
namespace {

constexpr char kMagic[8] = {'T', 'M', 'A', 'C', 'K', 'V', '2', 0};

struct StateHeader {
  char magic[8];
  int64_t n_layers, n_kv_heads, head_dim, keys_bits, values_bits, pos, long_rope;
};
static_assert(sizeof(StateHeader) == 64);

// Zeros at the positions of a block of keys that are not held, from `held` on.
void clear_lanes(const KvShape& shape, uint8_t* block, int64_t held) {
  const int64_t bytes = shape.keys == KvType::kF16 ? 2 : 1, row = kKeyBlock * bytes;
  const int64_t rows = kKeyBlock * shape.vector_bytes(shape.keys) / row;
  for (int64_t i = 0; i < rows; ++i) {
    std::memset(block + i * row + held * bytes, 0, static_cast<size_t>(row - held * bytes));
  }
}

}  // namespace

void KvCache::each_run(int64_t layer, int64_t kv_head, int64_t pos,
                       const std::function<void(uint8_t*, int64_t)>& visit) {
  const KvHead at = head(layer, kv_head);
  visit(at.keys, round_up(pos, kKeyBlock) * shape_.vector_bytes(shape_.keys));
  visit(at.values, pos * shape_.vector_bytes(shape_.values));
  const auto ranges = [&](uint16_t* first, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      visit(reinterpret_cast<uint8_t*>(first + i * at.capacity), pos * 2);
    }
  };
  ranges(at.key_ranges, shape_.ranges(shape_.keys));
  ranges(at.value_ranges, shape_.ranges(shape_.values));
}

int64_t KvCache::state_bytes() const {
  const int64_t ranges = shape_.ranges(shape_.keys) + shape_.ranges(shape_.values);
  const int64_t of_head = round_up(pos_, kKeyBlock) * shape_.vector_bytes(shape_.keys) +
                          pos_ * (shape_.vector_bytes(shape_.values) + ranges * 2);
  return static_cast<int64_t>(sizeof(StateHeader)) + n_layers_ * n_kv_heads_ * of_head;
}

void KvCache::write_state(uint8_t* out) {
  StateHeader header{{},
                     n_layers_,
                     n_kv_heads_,
                     shape_.head_dim,
                     kv_bits(shape_.keys),
                     kv_bits(shape_.values),
                     pos_,
                     pos_ > 0 && long_rope_ ? 1 : 0};
  std::memcpy(header.magic, kMagic, sizeof(kMagic));
  std::memcpy(out, &header, sizeof(header));
  out += sizeof(header);
  const int64_t block = kKeyBlock * shape_.vector_bytes(shape_.keys);
  for (int64_t i = 0; i < n_layers_ * n_kv_heads_; ++i) {
    uint8_t* keys_end = out + ceil_div(pos_, kKeyBlock) * block;
    each_run(i / n_kv_heads_, i % n_kv_heads_, pos_, [&](uint8_t* run, int64_t size) {
      std::memcpy(out, run, static_cast<size_t>(size));
      out += size;
    });
    if (pos_ % kKeyBlock != 0) clear_lanes(shape_, keys_end - block, pos_ % kKeyBlock);
  }
}

void KvCache::read_state(const uint8_t* state, int64_t size) {
  StateHeader header;
  check_argument(size >= static_cast<int64_t>(sizeof(header)), "a KV state has at least ",
                 sizeof(header), " bytes, not ", size);
  std::memcpy(&header, state, sizeof(header));
  check_argument(std::memcmp(header.magic, kMagic, sizeof(kMagic)) == 0 &&
                     (header.long_rope == 0 || header.long_rope == 1),
                 "these bytes are not the state of a KV cache");
  check_argument(header.n_layers == n_layers_ && header.n_kv_heads == n_kv_heads_ &&
                     header.head_dim == shape_.head_dim,
                 "the KV state is that of another model: ", header.n_layers, " layers, ",
                 header.n_kv_heads, " heads of ", header.head_dim, "; this cache has ", n_layers_,
                 ", ", n_kv_heads_, " of ", shape_.head_dim);
  check_argument(
      header.keys_bits == kv_bits(shape_.keys) && header.values_bits == kv_bits(shape_.values),
      "the KV state has keys of ", header.keys_bits, " bits and values of ", header.values_bits,
      ", this cache ", kv_bits(shape_.keys), " and ", kv_bits(shape_.values));
  check_argument(header.pos >= 0 && header.pos <= n_ctx_, "the KV state holds ", header.pos,
                 " tokens; this cache has room for ", n_ctx_);
  const int64_t before = pos_;
  pos_ = header.pos;
  const int64_t expected = state_bytes();
  if (size != expected) pos_ = before;
  check_argument(size == expected, "a KV state of ", header.pos, " tokens has ", expected,
                 " bytes, not ", size);
  long_rope_ = header.long_rope == 1;
  state += sizeof(header);
  for (int64_t i = 0; i < n_layers_ * n_kv_heads_; ++i) {
    each_run(i / n_kv_heads_, i % n_kv_heads_, pos_, [&](uint8_t* run, int64_t run_size) {
      std::memcpy(run, state, static_cast<size_t>(run_size));
      state += run_size;
    });
  }
}

std::unique_ptr<KvCache> KvCache::fork(int64_t n_ctx) {
  check_argument(n_ctx >= pos_, "a fork of ", pos_, " tokens does not fit into ", n_ctx,
                 " positions");
  auto copy = std::make_unique<KvCache>(n_layers_, n_kv_heads_, shape_.head_dim, n_ctx, shape_.keys,
                                        shape_.values);
  copy->pos_ = pos_.load();
  copy->long_rope_ = long_rope_;
  for (int64_t i = 0; i < n_layers_ * n_kv_heads_; ++i) {
    std::vector<uint8_t*> targets;
    copy->each_run(i / n_kv_heads_, i % n_kv_heads_, pos_,
                   [&](uint8_t* run, int64_t) { targets.push_back(run); });
    size_t next = 0;
    each_run(i / n_kv_heads_, i % n_kv_heads_, pos_, [&](const uint8_t* run, int64_t size) {
      std::memcpy(targets[next++], run, static_cast<size_t>(size));
    });
  }
  return copy;
}

}  // namespace tmac
