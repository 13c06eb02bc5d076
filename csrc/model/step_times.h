#pragma once

#include <array>
#include <chrono>
#include <cstddef>

namespace tmac {

// What a step spends its time on.
enum class Part {
  kEmbed,
  kInputs,     // norms, and the tables or integers that products read
  kQkv,        // products, as all that follow unless said otherwise
  kStore,      // rope, keys and values into the cache
  kAttention,  // and the inputs of its output where they are built at once
  kOut,
  kGateUp,  // activation and, where they are built at once, the inputs of down
  kDown,
  kExperts,  // of a layer with a router: all of its feed-forward
  kHead,
  kCount,
};

// Seconds of each part, as one thread of the team sees them: it waits for the others at the end of
// each phase.
class StepTimes {
 public:
  static constexpr std::array<const char*, static_cast<size_t>(Part::kCount)> kNames = {
      "embedding",        "norms and tables", "q, k, v", "keys and values", "attention",
      "attention output", "gate and up",      "down",    "experts",         "head"};

  void begin() { last_ = Clock::now(); }
  void end(Part part) {
    const Clock::time_point now = Clock::now();
    seconds_[static_cast<size_t>(part)] += std::chrono::duration<double>(now - last_).count();
    last_ = now;
  }
  const auto& seconds() const { return seconds_; }

 private:
  using Clock = std::chrono::steady_clock;
  std::array<double, static_cast<size_t>(Part::kCount)> seconds_{};
  Clock::time_point last_;
};

}  // namespace tmac
