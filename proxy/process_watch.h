// Processes of this host, and whether they have ended.
#pragma once

#include <cstdint>
#include <string>

namespace pplx {

// What tells processes apart, for others.
struct ProcessIdentity {
  // Host, boot and namespace in which `pid` is a process; empty where the system does not say.
  std::string space;
  int32_t pid = 0;

  static ProcessIdentity own();
};

// Of another host, another container or where the system does not say, a process never ends.
class ProcessWatch {
 public:
  ProcessWatch() = default;
  // The process runs now, or has ended just now: later its number may be another's.
  explicit ProcessWatch(const ProcessIdentity& process);
  ProcessWatch(ProcessWatch&& other) noexcept { *this = std::move(other); }
  ProcessWatch& operator=(ProcessWatch&& other) noexcept;
  ~ProcessWatch();

  // Whether nobody needs to ask: it cannot be told.
  bool blind() const noexcept { return pid_ == 0; }
  // Also when nobody has waited for it yet.
  bool ended() const noexcept;

 private:
  int32_t pid_ = 0;
  int descriptor_ = -1;  // a pidfd, whose process's number is never another's
  bool ended_ = false;
};

}  // namespace pplx
