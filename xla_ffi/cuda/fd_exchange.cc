#include "xla_ffi/cuda/fd_exchange.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "proxy/error.h"

namespace pplx::moe::cuda {
namespace {

using SteadyClock = std::chrono::steady_clock;

constexpr uint32_t kMagic = 0x46505058;  // "XPPF"
// Nothing that is said takes longer; who is silent must not keep the others waiting.
constexpr auto kAnswerLimit = std::chrono::seconds(2);
constexpr int kLook = 50;  // milliseconds between looks at whether to stop

struct Request {
  uint32_t magic;
  uint32_t rank;  // whose memory is wanted
  Token token;
};
static_assert(sizeof(Request) == 24);

struct Address {
  sockaddr_un socket{};
  socklen_t length = 0;
};

Address address_of(const std::string& name) {
  Address address;
  address.socket.sun_family = AF_UNIX;
  const size_t size = std::min(name.size(), sizeof(address.socket.sun_path) - 1);
  std::memcpy(address.socket.sun_path + 1, name.data(), size);
  address.length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + size);
  return address;
}

[[noreturn]] void fail(const std::string& what, int error) {
  throw Error(ErrorKind::kFabric, what + ": " + std::strerror(error));
}

// False when the deadline passes first.
bool ready(int fd, short events, SteadyClock::time_point deadline) {
  while (true) {
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - SteadyClock::now()).count();
    if (left <= 0) return false;
    pollfd wanted{.fd = fd, .events = events, .revents = 0};
    const int found = poll(&wanted, 1, static_cast<int>(std::min<int64_t>(left, 60'000)));
    if (found > 0) return true;
    if (found < 0 && errno != EINTR) return false;
  }
}

bool same_user(int connection) {
  ucred peer{};
  socklen_t length = sizeof(peer);
  return getsockopt(connection, SOL_SOCKET, SO_PEERCRED, &peer, &length) == 0 && length == sizeof(peer) &&
         peer.uid == geteuid();
}

bool receive_all(int fd, void* data, size_t size, SteadyClock::time_point deadline) {
  auto* at = static_cast<std::byte*>(data);
  while (size > 0) {
    if (!ready(fd, POLLIN, deadline)) return false;
    const ssize_t got = recv(fd, at, size, 0);
    if (got == 0 || (got < 0 && errno != EINTR && errno != EAGAIN)) return false;
    if (got < 0) continue;
    at += got;
    size -= static_cast<size_t>(got);
  }
  return true;
}

// Takes as long with a wrong token as with the right one.
bool equal(const Token& a, const Token& b) {
  unsigned difference = 0;
  for (size_t i = 0; i < a.size(); ++i) difference |= static_cast<unsigned>(a[i] ^ b[i]);
  return difference == 0;
}

// A word, and descriptors beside it.
struct Parcel {
  uint32_t magic = 0;
  alignas(cmsghdr) char control[CMSG_SPACE(kMostFds * sizeof(int))] = {};
  iovec data{.iov_base = &magic, .iov_len = sizeof(magic)};
  msghdr message{};

  explicit Parcel(size_t fds) {
    message.msg_iov = &data;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(fds * sizeof(int));
  }
  Parcel(const Parcel&) = delete;
  Parcel& operator=(const Parcel&) = delete;
};

void send_fds(int connection, const std::vector<OwnedFd>& fds) {
  Parcel parcel(fds.size());
  parcel.magic = kMagic;
  cmsghdr* header = CMSG_FIRSTHDR(&parcel.message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(fds.size() * sizeof(int));
  for (size_t i = 0; i < fds.size(); ++i) {
    const int fd = fds[i].get();
    std::memcpy(CMSG_DATA(header) + i * sizeof(int), &fd, sizeof(fd));
  }
  // Whoever asked sees that nothing came if this fails.
  static_cast<void>(sendmsg(connection, &parcel.message, MSG_NOSIGNAL));
}

// Empty where it was anything but what was asked for.
std::vector<OwnedFd> receive_fds(int connection, size_t count) {
  Parcel parcel(kMostFds);
  const ssize_t got = recvmsg(connection, &parcel.message, MSG_CMSG_CLOEXEC);
  std::vector<OwnedFd> fds;
  const cmsghdr* header = got > 0 ? CMSG_FIRSTHDR(&parcel.message) : nullptr;
  if (header != nullptr && header->cmsg_level == SOL_SOCKET && header->cmsg_type == SCM_RIGHTS) {
    for (size_t at = CMSG_LEN(0); at + sizeof(int) <= header->cmsg_len; at += sizeof(int)) {
      int fd = -1;
      std::memcpy(&fd, reinterpret_cast<const char*>(header) + at, sizeof(fd));
      fds.emplace_back(fd);
    }
  }
  const bool whole = got == sizeof(parcel.magic) && parcel.magic == kMagic && fds.size() == count &&
                     (parcel.message.msg_flags & MSG_CTRUNC) == 0;
  if (!whole) fds.clear();
  return fds;
}

void random_bytes(void* data, size_t size) {
  auto* at = static_cast<std::byte*>(data);
  while (size > 0) {
    const ssize_t got = getrandom(at, size, 0);
    if (got < 0 && errno != EINTR) fail("asking the kernel for random bytes", errno);
    if (got <= 0) continue;
    at += got;
    size -= static_cast<size_t>(got);
  }
}

}  // namespace

Token random_token() {
  Token token;
  random_bytes(token.data(), token.size());
  return token;
}

FdServer::FdServer(std::vector<OwnedFd> fds, const Token& token, uint32_t rank)
    : fds_(std::move(fds)), token_(token), rank_(rank), name_("pplx-jax-") {
  if (fds_.empty() || fds_.size() > kMostFds) {
    throw Error(
        ErrorKind::kInvalidArgument,
        std::to_string(fds_.size()) + " file descriptors to hand over, not 1.." + std::to_string(kMostFds));
  }
  std::array<unsigned char, 16> random{};
  random_bytes(random.data(), random.size());
  for (const unsigned char byte : random) {
    constexpr char kDigits[] = "0123456789abcdef";
    name_ += {kDigits[byte >> 4], kDigits[byte & 15]};
  }
  listener_ = OwnedFd(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  const Address address = address_of(name_);
  if (listener_.get() < 0 ||
      bind(listener_.get(), reinterpret_cast<const sockaddr*>(&address.socket), address.length) != 0 ||
      listen(listener_.get(), 128) != 0) {
    fail("opening a Unix socket, over which ranks of this host share GPU memory", errno);
  }
  thread_ = std::thread([this] { serve(); });
}

FdServer::~FdServer() {
  stop_ = true;
  thread_.join();
}

void FdServer::serve() {
  while (!stop_) {
    if (!ready(listener_.get(), POLLIN, SteadyClock::now() + std::chrono::milliseconds(kLook))) continue;
    const OwnedFd connection(accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (connection.get() >= 0) answer(connection.get());
  }
}

void FdServer::answer(int connection) const {
  if (!same_user(connection)) return;
  Request request{};
  if (!receive_all(connection, &request, sizeof(request), SteadyClock::now() + kAnswerLimit)) return;
  if (request.magic != kMagic || request.rank != rank_ || !equal(request.token, token_)) return;
  send_fds(connection, fds_);
}

std::vector<OwnedFd> fetch_fds(const std::string& name, const Token& token, uint32_t rank, size_t count,
                               SteadyClock::time_point deadline) {
  const std::string what = "asking rank " + std::to_string(rank) + " on this host for its GPU memory";
  const OwnedFd connection(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (connection.get() < 0) fail(what, errno);
  const Address address = address_of(name);
  // EAGAIN: its backlog is full.
  while (connect(connection.get(), reinterpret_cast<const sockaddr*>(&address.socket), address.length) != 0) {
    if (errno != EAGAIN && errno != EINTR) {
      fail(what + " (containers with network namespaces of their own cannot; give them one, or nvlink=False)",
           errno);
    }
    if (SteadyClock::now() > deadline) throw Error(ErrorKind::kTimeout, what + ": it accepts no connection");
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  if (!same_user(connection.get())) {
    throw Error(ErrorKind::kFabric, what + ": the process there belongs to another user");
  }
  const Request request{.magic = kMagic, .rank = rank, .token = token};
  if (send(connection.get(), &request, sizeof(request), MSG_NOSIGNAL) != sizeof(request)) fail(what, errno);
  if (!ready(connection.get(), POLLIN, deadline)) {
    throw Error(ErrorKind::kTimeout, what + ": it did not answer in time");
  }
  std::vector<OwnedFd> fds = receive_fds(connection.get(), count);
  if (fds.empty()) {
    throw Error(ErrorKind::kFabric, what + ": it refused, or sent other than " + std::to_string(count) +
                                        " file descriptors (another version of pplx-jax?)");
  }
  return fds;
}

}  // namespace pplx::moe::cuda
