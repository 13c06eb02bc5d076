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

// Zeros at the positions of a block of keys that are not held, from `held` on. Rows of a block are
// numbers of `bytes` bytes of its positions.
void clear_lanes(uint8_t* block, int64_t size, int64_t bytes, int64_t held) {
  const int64_t row = kKeyBlock * bytes, begin = held * bytes;
  for (int64_t i = 0; i < size; i += row) {
    std::memset(block + i + begin, 0, static_cast<size_t>(row - begin));
  }
}

}  // namespace

std::vector<KvCache::Run> KvCache::runs(int64_t layer, int64_t kv_head, int64_t pos) {
  const KvHead at = head(layer, kv_head);
  const int64_t near = near_from(pos), first_near = near % kNear;
  const int64_t key = shape_.vector_bytes(shape_.keys), near_key = shape_.near_bytes(shape_.keys);
  const int64_t near_value = shape_.near_bytes(shape_.values);
  std::vector<Run> all{
      {at.keys, round_up(pos, kKeyBlock) * key, kKeyBlock * key, kv_scaled(shape_.keys) ? 1 : 2},
      {at.values, pos * shape_.vector_bytes(shape_.values)},
      {at.near_keys + first_near * near_key, round_up(pos - near, kKeyBlock) * near_key,
       kKeyBlock * near_key, 2},
      {at.near_values + first_near * near_value, (pos - near) * near_value}};
  const auto ranges = [&](uint16_t* first, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      all.push_back({reinterpret_cast<uint8_t*>(first + i * at.capacity), pos * 2});
    }
  };
  ranges(at.key_ranges, shape_.ranges(shape_.keys));
  ranges(at.value_ranges, shape_.ranges(shape_.values));
  return all;
}

int64_t KvCache::state_bytes() {
  int64_t of_head = 0;
  for (const Run& run : runs(0, 0, pos_)) of_head += run.size;
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
  const int64_t held = pos_ % kKeyBlock;
  for (int64_t i = 0; i < n_layers_ * n_kv_heads_; ++i) {
    for (const Run& run : runs(i / n_kv_heads_, i % n_kv_heads_, pos_)) {
      std::memcpy(out, run.data, static_cast<size_t>(run.size));
      out += run.size;
      if (run.block != 0 && held != 0) clear_lanes(out - run.block, run.block, run.bytes, held);
    }
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
  near_held_ = near_from(header.pos);
  long_rope_ = header.long_rope == 1;
  state += sizeof(header);
  for (int64_t i = 0; i < n_layers_ * n_kv_heads_; ++i) {
    for (const Run& run : runs(i / n_kv_heads_, i % n_kv_heads_, pos_)) {
      std::memcpy(run.data, state, static_cast<size_t>(run.size));
      state += run.size;
    }
  }
}

std::unique_ptr<KvCache> KvCache::fork(int64_t n_ctx) {
  check_argument(n_ctx >= pos_, "a fork of ", pos_, " tokens does not fit into ", n_ctx,
                 " positions");
  auto copy = std::make_unique<KvCache>(n_layers_, n_kv_heads_, shape_.head_dim, n_ctx, shape_.keys,
                                        shape_.values);
  copy->pos_ = pos_.load();
  copy->near_held_ = near_from(pos_);
  copy->long_rope_ = long_rope_;
  for (int64_t i = 0; i < n_layers_ * n_kv_heads_; ++i) {
    const auto from = runs(i / n_kv_heads_, i % n_kv_heads_, pos_);
    const auto to = copy->runs(i / n_kv_heads_, i % n_kv_heads_, pos_);
    for (size_t run = 0; run < from.size(); ++run) {
      std::memcpy(to[run].data, from[run].data, static_cast<size_t>(from[run].size));
    }
  }
  return copy;
}

}  // namespace tmac
