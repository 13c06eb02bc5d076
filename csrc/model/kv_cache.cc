#include "model/kv_cache.h"

#include <sys/mman.h>

#include <stdexcept>
#include <string>

#include "core/check.h"

namespace tmac {

KvCache::KvCache(int64_t n_layers, int64_t n_kv_heads, int64_t head_dim, int64_t n_ctx)
    : n_layers_(n_layers), n_kv_heads_(n_kv_heads), head_dim_(head_dim), n_ctx_(n_ctx) {
  for (const int64_t size : {n_layers, n_kv_heads, head_dim, n_ctx}) {
    check_argument(size >= 1 && size <= int64_t{1} << 24, "KV cache sizes must be 1 to 2^24, not ",
                   size);
  }
  const double bytes = 4.0 * static_cast<double>(n_layers) * static_cast<double>(n_kv_heads) *
                       static_cast<double>(head_dim) * static_cast<double>(n_ctx);
  check_argument(bytes < 0x1p46, "a KV cache of ", n_ctx, " positions does not fit into memory");
  int flags = MAP_PRIVATE | MAP_ANONYMOUS;
#ifdef MAP_NORESERVE
  flags |= MAP_NORESERVE;
#endif
  void* memory = mmap(nullptr, static_cast<size_t>(nbytes()), PROT_READ | PROT_WRITE, flags, -1, 0);
  if (memory == MAP_FAILED) {
    throw std::runtime_error("cannot reserve " + std::to_string(nbytes() >> 20) +
                             " MiB for the KV cache; choose a smaller context");
  }
  data_ = static_cast<uint16_t*>(memory);
}

KvCache::~KvCache() { munmap(data_, static_cast<size_t>(nbytes())); }

int64_t KvCache::nbytes() const { return 2 * 2 * half(); }

void KvCache::truncate(int64_t pos) {
  check_argument(pos >= 0 && pos <= pos_, "cannot truncate to ", pos, ": the cache holds ", pos_,
                 " tokens");
  pos_ = pos;
}

KvCache::Use::Use(KvCache& cache) : cache_(cache) {
  if (cache.in_use_.test_and_set()) {
    throw std::runtime_error("this KV cache is in use by another thread");
  }
}

}  // namespace tmac
