// File descriptors from one process to another of the same host and user, over a Unix socket in the abstract
// namespace. Needs no privilege, unlike reading them through ptrace, and leaves no file behind.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

#include "xla_ffi/cuda/memory.h"

namespace pplx::moe::cuda {

// Whoever knows it is one of the group's ranks; also tells memory of this process from others'.
using Token = std::array<std::byte, 16>;
Token random_token();

// At most so many are handed over together.
inline constexpr size_t kMostFds = 4;

// Hands descriptors to whoever asks with the right token, until it is destroyed.
class FdServer {
 public:
  FdServer(std::vector<OwnedFd> fds, const Token& token, uint32_t rank);
  ~FdServer();
  FdServer(const FdServer&) = delete;
  FdServer& operator=(const FdServer&) = delete;
  // Of the socket, without the leading zero.
  const std::string& name() const noexcept { return name_; }

 private:
  void serve();
  void answer(int connection) const;

  const std::vector<OwnedFd> fds_;
  const Token token_;
  const uint32_t rank_;
  std::string name_;
  OwnedFd listener_;
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

// What the server `name` of `rank` hands out, which are `count`. Throws kFabric, or kTimeout at the deadline.
std::vector<OwnedFd> fetch_fds(const std::string& name, const Token& token, uint32_t rank, size_t count,
                               std::chrono::steady_clock::time_point deadline);

}  // namespace pplx::moe::cuda
