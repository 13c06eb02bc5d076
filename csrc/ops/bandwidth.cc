#include "ops/bandwidth.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <stdexcept>

#include "core/aligned.h"
#include "core/check.h"
#include "kernels/kernels.h"

namespace tmac {
namespace {

constexpr int kPasses = 8;
constexpr int64_t kPeakRounds = 4096;  // some 20 microseconds
constexpr int64_t kMinBytes = int64_t{1} << 20;
constexpr int64_t kLineWords = 8;      // a cache line: what memory hands out at least
constexpr int kLinesAtOnce = 8;        // independent chains of additions, so that fetches overlap
constexpr int64_t kBlockWords = 4096;  // what a thread takes at least: 32 KiB

// The sum of the first word of each cache line. One load a line keeps more lines in flight than
// baseline vector loads of all of its bytes would: as many as the widest vectors of any CPU do.
uint64_t sum_lines(const uint64_t* words, int64_t n_words) {
  uint64_t sums[kLinesAtOnce] = {};
  for (int64_t i = 0; i < n_words; i += kLinesAtOnce * kLineWords) {
    for (int line = 0; line < kLinesAtOnce; ++line) sums[line] += words[i + line * kLineWords];
  }
  uint64_t total = 0;
  for (const uint64_t sum : sums) total += sum;
  return total;
}

}  // namespace

double read_bandwidth(int64_t n_bytes, ThreadPool& pool) {
  check_argument(n_bytes >= kMinBytes, "nbytes must be at least ", kMinBytes, ", not ", n_bytes);
  const int64_t n_blocks = n_bytes / (kBlockWords * static_cast<int64_t>(sizeof(uint64_t)));
  const int64_t n_words = n_blocks * kBlockWords;
  AlignedBuffer<uint64_t> words(n_words);
  // Written first: pages that were never written may all be one page of zeros.
  pool.run([&](Team& team) {
    team.parallel_for(n_blocks, [&](int64_t begin, int64_t end) {
      std::fill(words.data() + begin * kBlockWords, words.data() + end * kBlockWords, 1);
    });
  });
  double fastest = 0;
  std::atomic<uint64_t> total{0};  // checked below: no read can be optimised away
  for (int pass = 0; pass < kPasses; ++pass) {
    const auto start = std::chrono::steady_clock::now();
    pool.run([&](Team& team) {
      team.parallel_for(n_blocks, [&](int64_t begin, int64_t end) {
        total += sum_lines(words.data() + begin * kBlockWords, (end - begin) * kBlockWords);
      });
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    const int64_t bytes = n_words * static_cast<int64_t>(sizeof(uint64_t));
    fastest = std::max(fastest, static_cast<double>(bytes) / seconds.count());
  }
  if (total != static_cast<uint64_t>(n_words / kLineWords) * kPasses) {
    throw std::runtime_error("read_bandwidth: memory does not hold what was written to it");
  }
  return fastest;
}

double multiply_peak(ThreadPool& pool) {
  const auto run = kernels().multiply_peak;
  const int64_t n_pieces = 64 * pool.threads();
  double fastest = 0;
  for (int pass = 0; pass < kPasses; ++pass) {
    std::atomic<int64_t> products{0};
    const auto start = std::chrono::steady_clock::now();
    pool.run([&](Team& team) {
      team.parallel_for(n_pieces, [&](int64_t begin, int64_t end) {
        products += run((end - begin) * kPeakRounds);
      });
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    fastest = std::max(fastest, static_cast<double>(products) / seconds.count());
  }
  return fastest;
}

}  // namespace tmac
