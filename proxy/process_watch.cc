#include "proxy/process_watch.h"

#include <poll.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <filesystem>
#include <fstream>
#include <system_error>
#include <utility>

namespace pplx {

ProcessIdentity ProcessIdentity::own() {
  ProcessIdentity own{.space = "", .pid = getpid()};
  std::array<char, 128> host{};
  std::string boot;
  std::ifstream("/proc/sys/kernel/random/boot_id") >> boot;
  std::error_code error;
  const auto space = std::filesystem::read_symlink("/proc/self/ns/pid", error);
  if (!boot.empty() && !error && gethostname(host.data(), host.size() - 1) == 0) {
    own.space = std::string(host.data()) + ' ' + boot + ' ' + space.string();
  }
  return own;
}

ProcessWatch::ProcessWatch(const ProcessIdentity& process) {
  const ProcessIdentity own = ProcessIdentity::own();
  if (own.space.empty() || process.space != own.space || process.pid <= 0 || process.pid == own.pid) return;
  pid_ = process.pid;
#ifdef SYS_pidfd_open
  descriptor_ = static_cast<int>(syscall(SYS_pidfd_open, pid_, 0));
  ended_ = descriptor_ < 0 && errno == ESRCH;
#endif
}

ProcessWatch& ProcessWatch::operator=(ProcessWatch&& other) noexcept {
  std::swap(pid_, other.pid_);
  std::swap(descriptor_, other.descriptor_);
  std::swap(ended_, other.ended_);
  return *this;
}

ProcessWatch::~ProcessWatch() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

bool ProcessWatch::ended() const noexcept {
  if (blind() || ended_) return ended_;
  if (descriptor_ < 0) return kill(pid_, 0) != 0 && errno == ESRCH;  // before Linux 5.3, or not permitted
  pollfd end{.fd = descriptor_, .events = POLLIN, .revents = 0};
  return poll(&end, 1, 0) == 1 && (end.revents & POLLIN) != 0;
}

}  // namespace pplx
