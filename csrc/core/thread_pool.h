#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace tmac {

// A counter that threads wait on: they spin for a bounded time, then park.
class Event {
 public:
  uint32_t value() const { return value_.load(std::memory_order_acquire); }
  void advance();
  void wait_past(uint32_t old, int spins);

 private:
  std::atomic<uint32_t> value_{0};
  std::atomic<int> parked_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

class ThreadPool;

// What one thread sees of a running job: a series of phases, the same for every thread.
class Team {
 public:
  int thread() const { return thread_; }
  int threads() const;

  // Calls body(begin, end) over disjoint runs that cover [0, n) and returns when all of them are
  // done. Runs shrink as the work does (guided self-scheduling), so unequal cores finish
  // together; a thread that the system has put aside is not waited for unless it holds a run, and
  // skips the phases it missed. Which thread takes which run is not determined: results must not
  // depend on it.
  template <typename Body>
  void parallel_for(int64_t n, const Body& body) {
    if (n < 1) return;
    int64_t begin, end;
    while (claim(n, &begin, &end)) {
      body(begin, end);
      finish(n, end - begin);
    }
    wait_for_phase();
  }

 private:
  friend class ThreadPool;
  Team(ThreadPool* pool, int thread, uint32_t phase)
      : pool_(pool), thread_(thread), phase_(phase) {}
  bool claim(int64_t n, int64_t* begin, int64_t* end);
  void finish(int64_t n, int64_t count);
  void wait_for_phase();

  ThreadPool* pool_;
  int thread_;
  uint32_t phase_;  // the one this thread is in
};

// A fixed team of threads: the caller of run() and threads-1 workers. Callers queue up.
class ThreadPool {
 public:
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return threads_; }
  // Runs job(team) in every thread that comes in time; the phases of the job are shared out.
  void run(const std::function<void(Team&)>& job);

 private:
  friend class Team;
  void work(int thread);
  void stop();

  const int threads_;
  std::mutex turn_;

  // The job, its first phase, and whether workers may still enter it; how many are inside.
  const std::function<void(Team&)>* job_ = nullptr;
  uint32_t first_phase_ = 0;
  std::atomic<bool> open_{false};
  std::atomic<int> inside_{0};
  std::atomic<bool> stopping_{false};
  Event started_;

  // The phase under way: its number in the upper half, the next index to claim in the lower.
  alignas(64) std::atomic<uint64_t> claims_{0};
  alignas(64) std::atomic<int64_t> done_{0};  // indices finished
  alignas(64) Event phase_;                   // its number
  std::vector<std::thread> workers_;
};

inline int Team::threads() const { return pool_->threads_; }

}  // namespace tmac
