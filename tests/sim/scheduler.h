// Virtual time and the fibers that live in it. One OS thread runs everything: a fiber runs until it sleeps or
// waits, then the one that is due next takes over and the clock jumps to its time. Whatever is left to chance
// is drawn from the seed, so that a seed is one history.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <queue>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "tests/sim/random.h"

namespace pplx::sim {

using Nanoseconds = int64_t;
inline constexpr Nanoseconds kForever = INT64_MAX;
inline constexpr Nanoseconds kMicrosecond = 1000, kMillisecond = 1'000'000, kSecond = 1'000'000'000;

// The simulation cannot go on: everybody waits for somebody, or time is up.
struct Stuck : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Scheduler {
 public:
  explicit Scheduler(uint64_t seed);
  ~Scheduler();
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  // The one whose fiber runs; null outside of any.
  static Scheduler* current() noexcept { return running_; }

  // Before run(), or from a fiber. What a fiber spawns itself belongs to its process.
  uint64_t spawn(uint32_t process, std::function<void()> body);
  // Until every fiber has ended, but for those of processes that are frozen for ever. Throws Stuck, and what
  // a fiber has thrown.
  void run(Nanoseconds limit);

  // Of the fiber that runs.
  Nanoseconds now() const noexcept { return now_; }
  uint64_t fiber() const noexcept;
  uint32_t process() const noexcept;
  void sleep(Nanoseconds duration);
  // Until wake() for `on`, or the time; whether it was woken. Wakes that nobody waits for are lost.
  bool wait(const void* on, Nanoseconds until = kForever);
  void wake_one(const void* on);
  void wake_all(const void* on);
  void join(uint64_t fiber);

  // No fiber of the process runs before `until`: kForever is its death. What it had begun stays as it is.
  void freeze(uint32_t process, Nanoseconds until);

  Random& random() noexcept { return random_; }
  // Of which fiber ran when, and of whatever was added: equal histories have equal digests.
  void add_to_digest(uint64_t value) noexcept { digest_ = (digest_ ^ value) * 0x9E3779B97F4A7C15ULL; }
  uint64_t digest() const noexcept { return digest_; }
  uint64_t switches() const noexcept { return switches_; }

 private:
  struct Fiber;
  struct Due {
    Nanoseconds time;
    uint64_t order;  // among those of one time
    Fiber* fiber;
    uint64_t sleep;  // Fiber::sleeps as it was: whoever has been woken since is not due any more
    bool operator<(const Due& other) const noexcept {
      return time != other.time ? time > other.time : order > other.order;
    }
  };

  static void enter();
  void finish();
  void push(Fiber& fiber, Nanoseconds time);
  void suspend();
  Fiber* next();
  void resume(Fiber& to);
  static void jump(Fiber& from, Fiber& to);
  static void switching(Fiber& from, const Fiber& to);
  static void switched(const Fiber& to);
  void wake(Fiber& fiber);
  Nanoseconds frozen_until(uint32_t process) const;

  static Scheduler* running_;
  std::unique_ptr<Fiber> main_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<void*> stacks_;  // of fibers that have ended
  std::priority_queue<Due> due_;
  std::unordered_map<const void*, std::vector<Fiber*>> waiting_;
  std::vector<Nanoseconds> frozen_;  // by process
  Fiber* active_ = nullptr;
  Fiber* spawner_ = nullptr;
  std::exception_ptr thrown_;
  Nanoseconds now_ = 0, limit_ = kForever;
  uint64_t order_ = 0, switches_ = 0, living_ = 0;
  uint64_t digest_ = 0xcbf29ce484222325ULL;
  Random random_;
};

}  // namespace pplx::sim
