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

constexpr uint64_t claim_word(uint32_t phase, int64_t next) {
  return (static_cast<uint64_t>(phase) << 32) | static_cast<uint64_t>(next);
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
  const int64_t threads = pool_->threads_;
  uint64_t word = pool_->claims_.load(std::memory_order_acquire);
  int64_t at, size;
  do {
    at = static_cast<int64_t>(word & 0xffffffffu);
    if (static_cast<uint32_t>(word >> 32) != phase_ || at >= n) return false;
    size = threads == 1 ? n : std::max<int64_t>(1, (n - at) / (2 * threads));
  } while (!pool_->claims_.compare_exchange_weak(word, claim_word(phase_, at + size),
                                                 std::memory_order_acq_rel));
  *begin = at;
  *end = at + size;
  return true;
}

void Team::finish(int64_t n, int64_t count) {
  ThreadPool& pool = *pool_;
  if (pool.done_.fetch_add(count, std::memory_order_acq_rel) + count < n) return;
  pool.done_.store(0, std::memory_order_relaxed);
  pool.claims_.store(claim_word(phase_ + 1, 0), std::memory_order_release);
  pool.phase_.advance();
}

void Team::wait_for_phase() { pool_->phase_.wait_past(phase_++, kSpinsInJob); }

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
  first_phase_ = phase_.value();
  open_ = true;
  if (threads_ > 1) started_.advance();
  Team team(this, 0, first_phase_);
  job(team);
  // All phases are done. Whoever is inside only has to notice; nobody enters any more.
  open_.exchange(false);  // not a plain store: emulators of Arm let the load below pass one
  while (inside_.load() != 0) std::this_thread::yield();
}

void ThreadPool::work(int thread) {
  uint32_t seen = 0;
  for (;;) {
    started_.wait_past(seen, kSpinsBetweenJobs);
    seen = started_.value();  // before looking at stopping_: stop() sets that before it advances
    if (stopping_) return;
    // Sequentially consistent with run(): it sees us inside, or we see the job closed.
    inside_.fetch_add(1);
    if (open_.load()) {
      Team team(this, thread, first_phase_);
      (*job_)(team);
    }
    inside_.fetch_sub(1);
  }
}

}  // namespace tmac
