#include "proxy/engine/cores.h"

#include <pthread.h>
#include <sched.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <sstream>
#include <utility>

#include "proxy/error.h"
#include "proxy/log.h"
#include "proxy/topology/placement.h"
#include "proxy/topology/topology.h"

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

// "8-15,40"
std::vector<int> parse_cores(const std::string& text) {
  std::vector<int> cores;
  std::istringstream in(text);
  for (std::string part; std::getline(in, part, ',');) {
    int low = 0, high = 0;
    char dash = 0, more = 0;
    std::istringstream range(part);
    const bool one = static_cast<bool>(range >> low);
    high = low;
    const bool two = one && range >> dash && dash == '-' && range >> high;
    if (!one || (dash != 0 && !two) || range >> more || low < 0 || high < low || high >= CPU_SETSIZE) {
      throw Error(ErrorKind::kInvalidArgument,
                  "PPLX_CORES: must be numbers and ranges of cores such as 8-15,40, is '" + text + "'");
    }
    for (int core = low; core <= high; ++core) cores.push_back(core);
  }
  return cores;
}

std::optional<Topology> this_machine() {
  try {
    const char* file = std::getenv("PPLX_TOPOLOGY");
    return discover_topology(file == nullptr ? "" : file);
  } catch (const Error& error) {
    log(LogLevel::kInfo, error.what());
    return std::nullopt;
  }
}

}  // namespace

std::optional<CoreClaim> CoreClaim::take(std::span<const int> near) {
  cpu_set_t set;
  if (::sched_getaffinity(::getpid(), sizeof set, &set) != 0) return std::nullopt;
  std::vector<int> cores;
  for (int core = CPU_SETSIZE - 1; core >= 0; --core) {
    if (CPU_ISSET(core, &set)) cores.push_back(core);
  }
  if (cores.size() < kFewestCores) return std::nullopt;
  std::vector<int> nearest;
  std::copy_if(cores.begin(), cores.end(), std::back_inserter(nearest),
               [&](int core) { return std::find(near.begin(), near.end(), core) != near.end(); });
  nearest.resize((nearest.size() + kShare - 1) / kShare);
  if (auto claim = take_one_of(nearest)) return claim;
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

std::vector<int> cores_for(const std::string& device) {
  if (const char* chosen = std::getenv("PPLX_CORES"); chosen != nullptr && *chosen != '\0') {
    return parse_cores(chosen);
  }
  if (device.empty()) return {};
  static const std::optional<Topology> topology = this_machine();
  return topology ? cores_near(*topology, device) : std::vector<int>{};
}

bool pin_to_core(int core) noexcept {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(core, &set);
  return ::pthread_setaffinity_np(::pthread_self(), sizeof set, &set) == 0;
}

}  // namespace pplx
