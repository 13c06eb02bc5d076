#include "core/thread_pool.h"

#include <algorithm>
#include <string>
#include <system_error>

#include "core/check.h"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace tmac {
namespace {

// Within a job the others are microseconds away; between two tokens the caller samples and
// decodes text, well under a millisecond. Past that a waiting thread gives its core back.
constexpr int kSpinsInJob = 4000;
constexpr int kSpinsBetweenJobs = 20000;

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");
#endif
}

}  // namespace

void Event::advance() {
  value_.fetch_add(1);
  // Sequentially consistent with wait_past: either we see the parked thread, or it sees the value.
  if (parked_.load() != 0) {
    std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
  }
}

void Event::wait_past(uint32_t old, int spins) {
  for (int i = 0; i < spins; ++i) {
    if (value() != old) return;
    relax();
  }
  std::unique_lock<std::mutex> lock(mutex_);
  parked_.fetch_add(1);
  wake_.wait(lock, [&] { return value_.load() != old; });
  parked_.fetch_sub(1);
}

bool Team::claim(int64_t n, int64_t* begin, int64_t* end) {
  int64_t at = pool_->next_.load(std::memory_order_relaxed);
  int64_t size;
  do {
    if (at >= n) return false;
    size = std::max<int64_t>(1, (n - at) / (2 * pool_->threads_));
    if (pool_->threads_ == 1) size = n - at;
  } while (!pool_->next_.compare_exchange_weak(at, at + size, std::memory_order_relaxed));
  *begin = at;
  *end = at + size;
  return true;
}

void Team::barrier() {
  ThreadPool& pool = *pool_;
  const uint32_t phase = pool.phase_.value();
  if (pool.arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == pool.threads_) {
    pool.arrived_.store(0, std::memory_order_relaxed);
    pool.next_.store(0, std::memory_order_relaxed);
    pool.phase_.advance();
  } else {
    pool.phase_.wait_past(phase, kSpinsInJob);
  }
}

ThreadPool::ThreadPool(int threads) : threads_(threads) {
  check_argument(threads >= 1 && threads <= 1024, "threads must be 1 to 1024, not ", threads);
  workers_.reserve(static_cast<size_t>(threads - 1));
  try {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
  } catch (const std::system_error& error) {
    stop();
    throw std::runtime_error("cannot start " + std::to_string(threads) +
                             " threads: " + error.what());
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  stopping_ = true;
  started_.advance();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run(const std::function<void(Team&)>& job) {
  std::lock_guard<std::mutex> turn(turn_);
  job_ = &job;
  if (threads_ > 1) started_.advance();
  Team team(this, 0);
  job(team);
  team.barrier();
}

void ThreadPool::work(int thread) {
  for (uint32_t seen = 0;; ++seen) {
    started_.wait_past(seen, kSpinsBetweenJobs);
    if (stopping_) return;
    Team team(this, thread);
    (*job_)(team);
    team.barrier();
  }
}

}  // namespace tmac
