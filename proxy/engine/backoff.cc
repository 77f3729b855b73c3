#include "proxy/engine/backoff.h"

#include <sched.h>
#include <sys/prctl.h>
#include <time.h>

#include <algorithm>
#include <thread>

namespace pplx {
namespace {

struct Limits {
  unsigned spins, yields;
};

// With few cores the thread waited for most likely needs this one, and a thread that yields is not always
// passed over: benchmarks/exchange_cpu.py takes half as long on two cores with early naps.
Limits limits() {
  unsigned cores = std::thread::hardware_concurrency();
  if (cores <= 4) return {32, 64};
  return {2000, 2000};
}

inline void pause_core() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

void back_off(unsigned idle) {
  static const Limits kLimits = limits();
  if (idle < kLimits.spins) {
    for (int i = 0; i < 4; ++i) pause_core();
  } else if (idle < kLimits.spins + kLimits.yields) {
    sched_yield();
  } else {
    unsigned naps = idle - kLimits.spins - kLimits.yields;
    timespec nap{0, std::min(200'000L, 50'000L + 2'000L * static_cast<long>(std::min(naps, 1000U)))};
    // The default slack of 50 us would make this nap several times as long. The thread is not ours: put it
    // back.
    prctl(PR_SET_TIMERSLACK, 1000UL, 0, 0, 0);
    nanosleep(&nap, nullptr);
    prctl(PR_SET_TIMERSLACK, 0UL, 0, 0, 0);
  }
}

}  // namespace pplx
