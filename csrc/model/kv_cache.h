#pragma once

#include <atomic>
#include <cstdint>

namespace tmac {

// Keys and values of one sequence in binary16, each [n_layers, n_kv_heads, n_ctx, head_dim].
// The memory is reserved at once and taken by the system only as positions are written.
class KvCache {
 public:
  KvCache(int64_t n_layers, int64_t n_kv_heads, int64_t head_dim, int64_t n_ctx);
  ~KvCache();
  KvCache(const KvCache&) = delete;
  KvCache& operator=(const KvCache&) = delete;

  int64_t n_layers() const { return n_layers_; }
  int64_t n_kv_heads() const { return n_kv_heads_; }
  int64_t head_dim() const { return head_dim_; }
  int64_t n_ctx() const { return n_ctx_; }
  int64_t nbytes() const;

  int64_t pos() const { return pos_; }  // tokens held
  void advance(int64_t n) { pos_ += n; }
  void truncate(int64_t pos);

  // [n_ctx, head_dim] of one layer and head.
  uint16_t* keys(int64_t layer, int64_t kv_head) { return head(data_, layer, kv_head); }
  uint16_t* values(int64_t layer, int64_t kv_head) { return head(data_ + half(), layer, kv_head); }

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
  int64_t half() const { return n_layers_ * n_kv_heads_ * n_ctx_ * head_dim_; }
  uint16_t* head(uint16_t* base, int64_t layer, int64_t kv_head) const {
    return base + (layer * n_kv_heads_ + kv_head) * n_ctx_ * head_dim_;
  }

  const int64_t n_layers_, n_kv_heads_, head_dim_, n_ctx_;
  std::atomic<int64_t> pos_{0};
  uint16_t* data_ = nullptr;
  std::atomic_flag in_use_ = ATOMIC_FLAG_INIT;
};

}  // namespace tmac
