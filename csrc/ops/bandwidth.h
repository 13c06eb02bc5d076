#pragma once

#include <cstdint>

#include "core/thread_pool.h"

namespace tmac {

// Bytes per second that the pool's threads fetch from a buffer of `n_bytes`: the best of several
// passes over it. A buffer much larger than the last-level cache measures memory, a smaller one the
// cache that holds it. Throws std::invalid_argument if n_bytes < 1 MiB.
double read_bandwidth(int64_t n_bytes, ThreadPool& pool);

// Multiply-adds of int8 per second that the pool's threads reach with the active instruction set,
// from registers: the best of several passes.
double multiply_peak(ThreadPool& pool);

}  // namespace tmac
