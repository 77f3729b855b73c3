#include "proxy/fabric/signal_guard.h"

#include <array>
#include <atomic>
#include <mutex>

#include "proxy/process.h"

namespace pplx {
namespace {

constexpr std::array kSignals = {SIGTERM, SIGQUIT, SIGABRT, SIGBUS, SIGSEGV, SIGHUP};

// Handlers are functions of one argument or of three; as bytes they compare alike.
using Handler = void (*)(int);

struct Change {
  int number = 0;
  Handler installed = nullptr;
  struct sigaction before {};
};

// Read by a forked child, which may not lock: entries are complete before they count.
std::array<Change, kSignals.size()> g_changes;
std::atomic<size_t> g_num_changes{0};

void restore() noexcept {
  for (size_t i = 0; i < g_num_changes.load(); ++i) {
    const Change& change = g_changes[i];
    struct sigaction now {};
    if (sigaction(change.number, nullptr, &now) == 0 && now.sa_handler == change.installed) {
      sigaction(change.number, &change.before, nullptr);
    }
  }
}

}  // namespace

ForkedSignals::ForkedSignals() {
  for (int number : kSignals) {
    struct sigaction action {};
    if (sigaction(number, nullptr, &action) == 0) before_.emplace_back(number, action);
  }
}

ForkedSignals::~ForkedSignals() {
  static std::mutex mutex;
  const std::lock_guard guard(mutex);
  for (const auto& [number, before] : before_) {
    struct sigaction now {};
    if (sigaction(number, nullptr, &now) != 0 || now.sa_handler == before.sa_handler) continue;
    const size_t count = g_num_changes;
    bool known = count == g_changes.size();
    for (size_t i = 0; i < count; ++i) known = known || g_changes[i].number == number;
    if (known) continue;
    if (count == 0) at_fork_in_child(restore);
    g_changes[count] = {.number = number, .installed = now.sa_handler, .before = before};
    g_num_changes = count + 1;
  }
}

}  // namespace pplx
