#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "layout/kv.h"

namespace tmac {

// Keys and values of one sequence, in the layout of layout/kv.h for each layer and head. The memory
// is reserved at once and taken by the system only as positions are written.
class KvCache {
 public:
  KvCache(int64_t n_layers, int64_t n_kv_heads, int64_t head_dim, int64_t n_ctx, KvType keys,
          KvType values);
  ~KvCache();
  KvCache(const KvCache&) = delete;
  KvCache& operator=(const KvCache&) = delete;

  int64_t n_layers() const { return n_layers_; }
  int64_t n_kv_heads() const { return n_kv_heads_; }
  int64_t n_ctx() const { return n_ctx_; }
  // Whether the keys held are turned by Rope::long_inv_freq; the decoder says so with the first
  // token, forks and restored states keep it.
  bool long_rope() const { return long_rope_; }
  void set_long_rope(bool long_rope) { long_rope_ = long_rope; }
  const KvShape& shape() const { return shape_; }
  int64_t nbytes() const { return n_layers_ * n_kv_heads_ * head_bytes(); }

  int64_t pos() const { return pos_; }  // tokens held
  bool has_codes() const { return kv_scaled(shape_.keys) || kv_scaled(shape_.values); }
  // The position that tokens stored at once from `pos` on must end before: what they read in fp16
  // is there until they are done.
  int64_t end_of_pass(int64_t pos) const;
  void advance(int64_t n);
  // Forgets the tokens from `pos` on and, where their block is no more there in fp16, those of that
  // block before them.
  void truncate(int64_t pos);
  KvHead head(int64_t layer, int64_t kv_head);

  // A new cache of `n_ctx` positions that holds the same tokens.
  std::unique_ptr<KvCache> fork(int64_t n_ctx);
  // The tokens held as bytes: a header, then for each layer and head the keys in whole blocks (with
  // zeros at positions that are not held), the values, both once more in fp16 for the positions
  // that the next token reads so, the ranges of keys and those of values.
  int64_t state_bytes();
  void write_state(uint8_t* out);
  // Throws std::invalid_argument for bytes that are not the state of such a cache, or of more
  // positions than this one has; the cache is then unchanged.
  void read_state(const uint8_t* state, int64_t size);

  // A sequence advances in one thread at a time: held during a decoder step.
  class Use {
   public:
    explicit Use(KvCache& cache);  // throws std::runtime_error if another thread holds it
    ~Use() { cache_.in_use_.clear(); }
    Use(const Use&) = delete;

   private:
    KvCache& cache_;
  };

 private:
  // Memory of one head. Keys are in blocks of `block` bytes, their numbers of `bytes` bytes.
  struct Run {
    uint8_t* data;
    int64_t size, block = 0, bytes = 0;
  };
  int64_t near_positions() const { return std::min(capacity_, kNear); }
  int64_t head_bytes() const;
  // Where the first `pos` positions are, in order.
  std::vector<Run> runs(int64_t layer, int64_t kv_head, int64_t pos);

  const int64_t n_layers_, n_kv_heads_, n_ctx_, capacity_;
  const KvShape shape_;
  std::atomic<int64_t> pos_{0};
  int64_t near_held_ = 0;  // the first position whose numbers in fp16 are there, a block's first
  bool long_rope_ = false;
  uint8_t* data_ = nullptr;
  std::atomic_flag in_use_ = ATOMIC_FLAG_INIT;
};

}  // namespace tmac
