#include "proxy/engine/cores.h"

#include <pthread.h>
#include <sched.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstddef>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

namespace pplx {
namespace {

constexpr size_t kFewestCores = 8;
constexpr size_t kShare = 4;  // one core in so many may be a worker's

// A bound, never listening socket of the abstract namespace is a lock that dies with its process and leaves
// no file behind.
int lock_socket(int core) {
  int socket = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (socket < 0) return -1;
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  const std::string name = "pplx-jax.core." + std::to_string(core);
  std::memcpy(address.sun_path + 1, name.data(), name.size());
  auto length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  if (::bind(socket, reinterpret_cast<const sockaddr*>(&address), length) == 0) return socket;
  ::close(socket);
  return -1;
}

}  // namespace

std::optional<CoreClaim> CoreClaim::take() {
  cpu_set_t set;
  if (::sched_getaffinity(::getpid(), sizeof set, &set) != 0) return std::nullopt;
  std::vector<int> cores;
  for (int core = CPU_SETSIZE - 1; core >= 0; --core) {
    if (CPU_ISSET(core, &set)) cores.push_back(core);
  }
  if (cores.size() < kFewestCores) return std::nullopt;
  return take_one_of(std::span(cores).first(cores.size() / kShare));
}

std::optional<CoreClaim> CoreClaim::take_one_of(std::span<const int> cores) {
  for (int core : cores) {
    if (int socket = lock_socket(core); socket >= 0) return CoreClaim(core, socket);
  }
  return std::nullopt;
}

CoreClaim::CoreClaim(CoreClaim&& other) noexcept
    : core_(other.core_), socket_(std::exchange(other.socket_, -1)) {}

CoreClaim& CoreClaim::operator=(CoreClaim&& other) noexcept {
  std::swap(core_, other.core_);
  std::swap(socket_, other.socket_);
  return *this;
}

CoreClaim::~CoreClaim() {
  if (socket_ >= 0) ::close(socket_);
}

bool pin_to_core(int core) noexcept {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(core, &set);
  return ::pthread_setaffinity_np(::pthread_self(), sizeof set, &set) == 0;
}

}  // namespace pplx
