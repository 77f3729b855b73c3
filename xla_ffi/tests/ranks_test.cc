// One rank of a group whose ranks are processes, maybe on several hosts: steps over one fabric give the same
// bytes as over another, and those of the oracle. tests/soft_roce starts one a rank, on guests with
// Soft-RoCE:
//   RANK=0 RANKS=2 MEET=10.9.0.1:7001 ADDRESS=10.9.0.1 FABRICS="verbs tcp" pplx_rank_tests
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <sstream>

#include "xla_ffi/tests/support.h"

namespace pplx::moe {
namespace {

// tests/soft_roce gives emulated machines more time.
int time_scale() {
  const char* text = std::getenv("PPLX_TEST_TIME_SCALE");
  return text == nullptr ? 1 : static_cast<int>(std::ceil(std::max(1.0, std::atof(text))));
}

using namespace pplx::moe::testing;

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
      const auto deadline = Clock::now() + 60s * time_scale();
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

std::string variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

class RanksTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (variable("RANK").empty())
      GTEST_SKIP() << "started by tests/soft_roce with RANK, RANKS, MEET, ADDRESS, FABRICS";
    rank_ = std::stoi(variable("RANK"));
    ranks_ = std::stoi(variable("RANKS"));
    meeting_.emplace(rank_, ranks_, variable("MEET"));
  }

  EngineConfig engine(const std::string& fabric) const {
    EngineConfig config = provider(fabric);
    config.bind_address = variable("ADDRESS");
    config.verbs.ack_timeout = 14;
    config.job = variable("MEET");
    return config;
  }

  // All outputs of a few steps.
  std::vector<Outputs> outcome(const Problem& problem, const std::string& fabric, int steps, uint64_t seed) {
    GroupConfig config = group_config(problem, rank_, engine(fabric));
    config.name = fabric;
    Member member(problem.shape(rank_), config);
    member.group.connect(meeting_->gather(member.group.endpoint()));
    std::vector<Outputs> outputs(static_cast<size_t>(steps));
    for (int step = 0; step < steps; ++step) {
      const auto inputs = random_step(problem, seed + static_cast<uint64_t>(step));
      const auto error =
          run_step(problem, member, inputs[static_cast<size_t>(rank_)], outputs[static_cast<size_t>(step)]);
      if (error) throw *error;
    }
    meeting_->gather({});  // nobody closes before all are through
    return outputs;
  }

  int rank_ = 0, ranks_ = 0;
  std::optional<Meeting> meeting_;
};

TEST_F(RanksTest, EveryFabricGivesTheOraclesBytes) {
  const int steps = variable("STEPS").empty() ? 4 : std::stoi(variable("STEPS"));
  for (const Problem& problem :
       {Problem{.ranks = ranks_, .experts = 7, .top_k = 3, .hidden = 64, .max_tokens = 16, .chunk = 6},
        Problem{.ranks = ranks_,
        .experts = 2 * ranks_,
        .top_k = 2,
        .hidden = 256,
        .max_tokens = 24,
        .depth = 2,
        .dtype = DType::kBFloat16}}) {
    std::vector<std::vector<Outputs>> outcomes;
    std::istringstream fabrics(variable("FABRICS"));
    for (std::string fabric; fabrics >> fabric;) {
      const auto started = Clock::now();
      outcomes.push_back(outcome(problem, fabric, steps, 11));
      const std::chrono::duration<double> taken = Clock::now() - started;
      std::printf("rank %d: %d steps over %s in %.1f s\n", rank_, steps, fabric.c_str(), taken.count());
      for (int step = 0; step < steps; ++step) {
        const auto at = static_cast<size_t>(step);
        ASSERT_EQ(outcomes.back()[at].bytes(), outcomes.front()[at].bytes()) << fabric << ", step " << step;
        const auto wanted = oracle(problem, random_step(problem, 11 + static_cast<uint64_t>(step)));
        expect_equal(outcomes.back()[at], wanted[static_cast<size_t>(rank_)], fabric);
      }
    }
    ASSERT_GE(outcomes.size(), 1U) << "FABRICS is empty";
  }
}

}  // namespace
}  // namespace pplx::moe
