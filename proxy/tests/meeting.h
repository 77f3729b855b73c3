// Processes, maybe on several hosts, that are the ranks of one test: tests/soft_roce starts them in its
// guests, each with RANK, RANKS, MEET (an address and port of rank 0's host), ADDRESS (its host's) and
// FABRICS.
#pragma once

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdlib>
#include <map>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "proxy/tests/support.h"

namespace pplx::testing {

class Socket {
 public:
  explicit Socket(int fd) : fd_(fd) {}
  ~Socket() {
    if (fd_ >= 0) ::close(fd_);
  }
  Socket(Socket&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Socket& operator=(Socket&&) = delete;
  int fd() const { return fd_; }

  void put(const Bytes& bytes) const {
    const auto size = static_cast<uint32_t>(bytes.size());
    write_all(&size, sizeof size);
    write_all(bytes.data(), bytes.size());
  }
  Bytes get() const {
    uint32_t size = 0;
    read_all(&size, sizeof size);
    if (size > 1 << 20) throw std::runtime_error("a message of the meeting is too long");
    Bytes bytes(size);
    read_all(bytes.data(), bytes.size());
    return bytes;
  }

 private:
  void write_all(const void* data, size_t size) const {
    for (size_t done = 0; done < size;) {
      const auto count = ::send(fd_, static_cast<const char*>(data) + done, size - done, MSG_NOSIGNAL);
      if (count <= 0) throw std::runtime_error("the meeting's connection broke");
      done += static_cast<size_t>(count);
    }
  }
  void read_all(void* data, size_t size) const {
    for (size_t done = 0; done < size;) {
      const auto count = ::recv(fd_, static_cast<char*>(data) + done, size - done, 0);
      if (count <= 0) throw std::runtime_error("the meeting's connection broke");
      done += static_cast<size_t>(count);
    }
  }
  int fd_;
};

// Where ranks find each other; rank 0 holds it.
class Meeting {
 public:
  Meeting(int rank, int ranks, const std::string& where) : rank_(rank), ranks_(ranks) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    const size_t colon = where.find(':');
    if (colon == std::string::npos ||
        inet_pton(AF_INET, where.substr(0, colon).c_str(), &address.sin_addr) != 1) {
      throw std::runtime_error("MEET must be like 10.9.0.1:7001");
    }
    address.sin_port = htons(static_cast<uint16_t>(std::stoi(where.substr(colon + 1))));
    const auto* name = reinterpret_cast<const sockaddr*>(&address);
    if (rank > 0) {
      const auto deadline = Clock::now() + scaled(60s);
      for (;;) {
        Socket socket(::socket(AF_INET, SOCK_STREAM, 0));
        if (::connect(socket.fd(), name, sizeof address) == 0) {
          peers_.push_back(std::move(socket));
          peers_.back().put(Bytes{static_cast<std::byte>(rank)});
          return;
        }
        if (Clock::now() > deadline) throw std::runtime_error("nobody is at " + where);
        std::this_thread::sleep_for(100ms);
      }
    }
    const Socket listener(::socket(AF_INET, SOCK_STREAM, 0));
    const int on = 1;
    ::setsockopt(listener.fd(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (::bind(listener.fd(), name, sizeof address) != 0 || ::listen(listener.fd(), ranks) != 0) {
      throw std::runtime_error("cannot listen at " + where);
    }
    std::map<int, Socket> arrived;
    while (static_cast<int>(arrived.size()) < ranks - 1) {
      Socket socket(::accept(listener.fd(), nullptr, nullptr));
      const Bytes from = socket.get();
      arrived.emplace(std::to_integer<int>(from.at(0)), std::move(socket));
    }
    for (auto& [number, socket] : arrived) peers_.push_back(std::move(socket));
  }

  // Everybody's bytes, in rank order. Also a barrier.
  std::vector<Bytes> gather(const Bytes& own) {
    std::vector<Bytes> all;
    if (rank_ == 0) {
      all.push_back(own);
      for (const Socket& peer : peers_) all.push_back(peer.get());
      for (const Socket& peer : peers_) {
        for (const Bytes& bytes : all) peer.put(bytes);
      }
    } else {
      peers_[0].put(own);
      while (static_cast<int>(all.size()) < ranks_) all.push_back(peers_[0].get());
    }
    return all;
  }

 private:
  int rank_, ranks_;
  std::vector<Socket> peers_;
};

inline std::string variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

class RankTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (variable("RANK").empty()) GTEST_SKIP() << "tests/soft_roce starts it, a process a rank";
    rank_ = std::stoi(variable("RANK"));
    ranks_ = std::stoi(variable("RANKS"));
    std::istringstream names(variable("FABRICS"));
    for (std::string name; names >> name;) fabrics_.push_back(name);
    ASSERT_FALSE(fabrics_.empty());
    meeting_.emplace(rank_, ranks_, variable("MEET"));
  }
  EngineConfig engine(const std::string& fabric) const {
    EngineConfig config = fabric == "verbs" ? verbs() : provider(fabric);
    config.timeout = scaled(30s);
    config.bind_address = variable("ADDRESS");
    config.job = variable("MEET");
    return config;
  }

  int rank_ = 0, ranks_ = 0;
  std::vector<std::string> fabrics_;
  std::optional<Meeting> meeting_;
};

}  // namespace pplx::testing
