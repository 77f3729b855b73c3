// Time in which this process did not run.
#pragma once

#include <chrono>
#include <utility>

namespace pplx {

// A process that is stopped (by a debugger, or with its job), or has no core, hears nobody: no peer is to
// blame for that time.
class Presence {
 public:
  using Time = std::chrono::steady_clock::time_point;
  using Duration = std::chrono::nanoseconds;
  // Longer than this between two looks it was absent.
  static constexpr auto kAbsent = std::chrono::milliseconds(100);

  // How much of the time since the last look is not to be counted.
  Duration absent(Time now) {
    const Time last = std::exchange(looked_, now);
    return last == Time() || now - last <= kAbsent ? Duration::zero() : now - last - kAbsent;
  }

 private:
  Time looked_{};
};

}  // namespace pplx
