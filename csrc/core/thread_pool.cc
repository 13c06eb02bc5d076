#include "core/thread_pool.h"

#include <algorithm>
#include <string>
#include <system_error>

#include "core/check.h"

#if defined(_WIN32)
#include <process.h>
#else
#include <unistd.h>
#endif

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace tmac {
namespace {

int64_t process_id() {
#if defined(_WIN32)
  return _getpid();
#else
  return getpid();
#endif
}

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

struct Team::Shared {
  // The job, its first phase, and whether workers may still enter it; how many are inside.
  const std::function<void(Team&)>* job = nullptr;
  uint32_t first_phase = 0;
  std::atomic<bool> open{false};
  std::atomic<int> inside{0};
  std::atomic<bool> stopping{false};
  Event started;

  // The phase under way: its number in the upper half, the next index to claim in the lower.
  alignas(64) std::atomic<uint64_t> claims{0};
  alignas(64) std::atomic<int64_t> done{0};  // indices finished
  alignas(64) Event phase;                   // its number
};

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

// Three quarters of an equal share of the rest: where a run begins, weights are not yet on their
// way from memory, so there are few of them.
bool Team::claim(int64_t n, int64_t* begin, int64_t* end) {
  uint64_t word = shared_->claims.load(std::memory_order_acquire);
  int64_t at, size;
  do {
    at = static_cast<int64_t>(word & 0xffffffffu);
    if (static_cast<uint32_t>(word >> 32) != phase_ || at >= n) return false;
    size = threads_ == 1 ? n : std::max<int64_t>(1, (n - at) * 3 / (4 * threads_));
  } while (!shared_->claims.compare_exchange_weak(word, claim_word(phase_, at + size),
                                                  std::memory_order_acq_rel));
  *begin = at;
  *end = at + size;
  return true;
}

void Team::finish(int64_t n, int64_t count) {
  if (shared_->done.fetch_add(count, std::memory_order_acq_rel) + count < n) return;
  shared_->done.store(0, std::memory_order_relaxed);
  shared_->claims.store(claim_word(phase_ + 1, 0), std::memory_order_release);
  shared_->phase.advance();
}

void Team::wait_for_phase() { shared_->phase.wait_past(phase_++, kSpinsInJob); }

ThreadPool::ThreadPool(int threads)
    : threads_(threads), process_(process_id()), shared_(std::make_unique<Team::Shared>()) {
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

ThreadPool::~ThreadPool() {
  if (process_id() == process_) {
    stop();
    return;
  }
  // A forked child: nobody is there to join, and what the workers waited on still counts them.
  for (std::thread& worker : workers_) worker.detach();
  shared_.release();
}

void ThreadPool::stop() {
  shared_->stopping = true;
  shared_->started.advance();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run(const std::function<void(Team&)>& job) {
  std::lock_guard<std::mutex> turn(turn_);
  Team::Shared& s = *shared_;
  s.job = &job;
  s.first_phase = s.phase.value();
  s.open = true;
  if (threads_ > 1) s.started.advance();
  Team team(&s, 0, threads_, s.first_phase);
  job(team);
  // All phases are done. Whoever is inside only has to notice; nobody enters any more.
  s.open.exchange(false);  // not a plain store: emulators of Arm let the load below pass one
  while (s.inside.load() != 0) std::this_thread::yield();
}

void ThreadPool::work(int thread) {
  Team::Shared& s = *shared_;
  uint32_t seen = 0;
  for (;;) {
    s.started.wait_past(seen, kSpinsBetweenJobs);
    seen = s.started.value();  // before looking at stopping: stop() sets that before it advances
    if (s.stopping) return;
    // Sequentially consistent with run(): it sees us inside, or we see the job closed.
    s.inside.fetch_add(1);
    if (s.open.load()) {
      Team team(&s, thread, threads_, s.first_phase);
      (*s.job)(team);
    }
    s.inside.fetch_sub(1);
  }
}

}  // namespace tmac
