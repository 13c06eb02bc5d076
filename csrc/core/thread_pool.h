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

// What one thread sees of a running job.
class Team {
 public:
  int thread() const { return thread_; }
  int threads() const;

  // Calls body(begin, end) over disjoint runs that cover [0, n), then waits for the whole team.
  // Runs shrink as the work does (guided self-scheduling), so unequal cores finish together.
  // Which thread takes which run is not determined; results must not depend on it.
  template <typename Body>
  void parallel_for(int64_t n, const Body& body) {
    int64_t begin, end;
    while (claim(n, &begin, &end)) body(begin, end);
    barrier();
  }

 private:
  friend class ThreadPool;
  Team(class ThreadPool* pool, int thread) : pool_(pool), thread_(thread) {}
  bool claim(int64_t n, int64_t* begin, int64_t* end);
  void barrier();

  ThreadPool* pool_;
  int thread_;
};

// A fixed team of threads: the caller of run() and threads-1 workers. Callers queue up.
class ThreadPool {
 public:
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return threads_; }
  void run(const std::function<void(Team&)>& job);

 private:
  friend class Team;
  void work(int thread);
  void stop();

  const int threads_;
  std::mutex turn_;
  const std::function<void(Team&)>* job_ = nullptr;
  bool stopping_ = false;
  Event started_;
  Event phase_;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int> arrived_{0};
  std::vector<std::thread> workers_;
};

inline int Team::threads() const { return pool_->threads_; }

}  // namespace tmac
