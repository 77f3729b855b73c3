// Keeps the process's signal handlers as they are while a library loads or starts.
#pragma once

#include <signal.h>

#include <initializer_list>
#include <utility>
#include <vector>

namespace pplx {

// Debian's libfabric pulls in libinfinipath, whose load-time constructor makes SIGINT, SIGTERM, SIGSEGV and
// more print nothing and exit(1); the shm provider takes SIGINT as well. A host program's handlers (Python's
// Ctrl-C, faulthandler) are not a library's to change: what was set at construction is set again at the end.
class SignalGuard {
 public:
  SignalGuard(std::initializer_list<int> signals) {
    for (int number : signals) {
      struct sigaction action {};
      if (sigaction(number, nullptr, &action) == 0) saved_.emplace_back(number, action);
    }
  }
  SignalGuard(const SignalGuard&) = delete;
  SignalGuard& operator=(const SignalGuard&) = delete;
  ~SignalGuard() {
    for (const auto& [number, action] : saved_) sigaction(number, &action, nullptr);
  }

 private:
  std::vector<std::pair<int, struct sigaction>> saved_;
};

// Takes the handlers that a library installs during its life away from forked children: shm's remove the
// files of the parent's endpoints when the child is told to end.
class ForkedSignals {
 public:
  ForkedSignals();   // looks at what is set
  ~ForkedSignals();  // notes what has changed
  ForkedSignals(const ForkedSignals&) = delete;
  ForkedSignals& operator=(const ForkedSignals&) = delete;

 private:
  std::vector<std::pair<int, struct sigaction>> before_;
};

}  // namespace pplx
