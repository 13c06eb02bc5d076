#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "core/thread_pool.h"

namespace tmac {

inline void require(bool ok, const std::string& text) {
  if (!ok) throw std::runtime_error(text);
}

// One job of three phases over n indices. Each adds 1 to every element of its array exactly once,
// and sees all of what the phase before wrote, whichever thread wrote it.
inline void check_one_job(ThreadPool& pool, int64_t n) {
  std::vector<std::vector<int32_t>> arrays(3, std::vector<int32_t>(static_cast<size_t>(n)));
  std::atomic<int64_t> wrong{0};
  pool.run([&](Team& team) {
    if (team.thread() < 0 || team.thread() >= team.threads()) ++wrong;
    for (size_t phase = 0; phase < arrays.size(); ++phase) {
      team.parallel_for(n, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const size_t other = static_cast<size_t>((i * 7 + n / 2) % n);
          if (phase > 0 && arrays[phase - 1][other] != 1) ++wrong;
          ++arrays[phase][static_cast<size_t>(i)];
        }
      });
    }
  });
  for (const auto& array : arrays) {
    for (const int32_t count : array) wrong += count != 1;
  }
  require(wrong == 0, "an index was missed, visited twice, or not visible in the next phase");
}

// Teams of several sizes, more threads than cores among them, short and long loops, several callers
// at once, and pools that end while their workers spin or sleep. Throws std::runtime_error.
inline void stress_thread_pool(int rounds) {
  for (const int threads : {1, 2, 3, 8}) {
    ThreadPool pool(threads);
    for (const int64_t n : {1, 2, 7, 1000}) {
      for (int i = 0; i < rounds; ++i) check_one_job(pool, n);
    }
    std::vector<std::thread> callers;
    std::atomic<int> failures{0};
    for (int caller = 0; caller < 4; ++caller) {
      callers.emplace_back([&] {
        try {
          for (int i = 0; i < rounds; ++i) check_one_job(pool, 100);
        } catch (const std::runtime_error&) {
          ++failures;
        }
      });
    }
    for (std::thread& caller : callers) caller.join();
    require(failures == 0, "callers at once disturb each other");
  }
  for (int i = 0; i < rounds; ++i) {
    ThreadPool pool(1 + i % 4);
    if (i % 2 == 0) pool.run([](Team&) {});
    if (i % 64 == 3) std::this_thread::sleep_for(std::chrono::milliseconds(20));  // all parked
  }
}

}  // namespace tmac
