#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
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

// What one thread sees of a running job: a series of phases, the same for every thread.
class Team {
 public:
  int thread() const { return thread_; }
  int threads() const { return threads_; }

  // Calls body(begin, end) over disjoint runs that cover [0, n) and returns when all of them are
  // done. Runs shrink as the work does (guided self-scheduling), so unequal cores finish together;
  // a thread that the system has put aside is not waited for unless it holds a run, and skips the
  // phases it missed. Which thread takes which run is not determined: results must not depend on
  // it. The body must not throw.
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
  struct Shared;
  Team(Shared* shared, int thread, int threads, uint32_t phase)
      : shared_(shared), thread_(thread), threads_(threads), phase_(phase) {}
  bool claim(int64_t n, int64_t* begin, int64_t* end);
  void finish(int64_t n, int64_t count);
  void wait_for_phase();

  Shared* shared_;
  int thread_, threads_;
  uint32_t phase_;  // the one this thread is in
};

// A fixed team of threads: the caller of run() and threads-1 workers. Callers queue up. In a forked
// child, which has no workers, the caller does all of the work.
class ThreadPool {
 public:
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return threads_; }
  // Runs job(team) in every thread that comes in time; the phases of the job are shared out. The
  // job must not throw.
  void run(const std::function<void(Team&)>& job);

 private:
  void work(int thread);
  void stop();

  const int threads_;
  const int64_t process_;
  std::mutex turn_;
  std::unique_ptr<Team::Shared> shared_;
  std::vector<std::thread> workers_;
};

}  // namespace tmac
