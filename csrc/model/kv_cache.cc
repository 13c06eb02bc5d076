#include "model/kv_cache.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "core/check.h"

#if defined(_WIN32)
#define NOMINMAX
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#undef near
#else
#include <sys/mman.h>
#endif

namespace tmac {
namespace {

// Zeros, whose pages are taken when they are first written; null where there is no room. Windows
// counts them at once, against the memory and the page file.
void* reserve(size_t bytes) {
#if defined(_WIN32)
  return VirtualAlloc(nullptr, bytes, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE);
#else
  int flags = MAP_PRIVATE | MAP_ANONYMOUS;
#ifdef MAP_NORESERVE
  flags |= MAP_NORESERVE;
#endif
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  return memory == MAP_FAILED ? nullptr : memory;
#endif
}

void give_back(void* memory, size_t bytes) {
#if defined(_WIN32)
  (void)bytes;
  VirtualFree(memory, 0, MEM_RELEASE);
#else
  munmap(memory, bytes);
#endif
}

int64_t checked(int64_t size) {
  check_argument(size >= 1 && size <= int64_t{1} << 24, "KV cache sizes must be 1 to 2^24, not ",
                 size);
  return size;
}

}  // namespace

KvCache::KvCache(int64_t n_layers, int64_t n_kv_heads, int64_t head_dim, int64_t n_ctx, KvType keys,
                 KvType values)
    : n_layers_(checked(n_layers)),
      n_kv_heads_(checked(n_kv_heads)),
      n_ctx_(checked(n_ctx)),
      capacity_(round_up(n_ctx, kAttendBlock)),
      shape_{keys, values, checked(head_dim)} {
  const double bytes = 4.0 * static_cast<double>(n_layers) * static_cast<double>(n_kv_heads) *
                       static_cast<double>(shape_.dims()) * static_cast<double>(capacity_);
  check_argument(bytes < 0x1p46, "a KV cache of ", n_ctx, " positions does not fit into memory");
  void* memory = reserve(static_cast<size_t>(nbytes()));
  if (memory == nullptr) {
    throw std::runtime_error("cannot reserve " + std::to_string(nbytes() >> 20) +
                             " MiB for the KV cache; choose a smaller context");
  }
  data_ = static_cast<uint8_t*>(memory);
}

KvCache::~KvCache() { give_back(data_, static_cast<size_t>(nbytes())); }

int64_t KvCache::head_bytes() const {
  const int64_t ranges = shape_.ranges(shape_.keys) + shape_.ranges(shape_.values);
  const int64_t near = shape_.near_bytes(shape_.keys) + shape_.near_bytes(shape_.values);
  return capacity_ * (shape_.vector_bytes(shape_.keys) + shape_.vector_bytes(shape_.values) +
                      ranges * static_cast<int64_t>(sizeof(uint16_t))) +
         near_positions() * near;
}

KvHead KvCache::head(int64_t layer, int64_t kv_head) {
  uint8_t* keys = data_ + (layer * n_kv_heads_ + kv_head) * head_bytes();
  uint8_t* values = keys + capacity_ * shape_.vector_bytes(shape_.keys);
  uint8_t* near_keys = values + capacity_ * shape_.vector_bytes(shape_.values);
  uint8_t* near_values = near_keys + near_positions() * shape_.near_bytes(shape_.keys);
  auto* ranges = reinterpret_cast<uint16_t*>(near_values +
                                             near_positions() * shape_.near_bytes(shape_.values));
  return {keys,        values, near_keys,
          near_values, ranges, ranges + capacity_ * shape_.ranges(shape_.keys),
          capacity_};
}

int64_t KvCache::end_of_pass(int64_t pos) const {
  return has_codes() ? near_from(pos) + kNear : n_ctx_;
}

void KvCache::advance(int64_t n) {
  pos_ += n;
  near_held_ = std::max(near_held_, round_up(pos_, kAttendBlock) - kNear);
}

void KvCache::truncate(int64_t pos) {
  check_argument(pos >= 0 && pos <= pos_, "cannot truncate to ", pos, ": the cache holds ", pos_,
                 " tokens");
  if (has_codes() && near_from(pos) < near_held_) pos = near_held_ = near_from(pos);
  pos_ = pos;
}

KvCache::Use::Use(KvCache& cache) : cache_(cache) {
  if (cache.in_use_.test_and_set()) {
    throw std::runtime_error("this KV cache is in use by another thread");
  }
}

}  // namespace tmac
