// The host side where it touches no GPU: the courier, with kernels played by threads, and descriptors that
// travel between processes. Runs anywhere.
#include "xla_ffi/cuda/courier.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "xla_ffi/cuda/fd_exchange.h"
#include "xla_ffi/registry.h"

namespace pplx::moe::cuda {
namespace {

using namespace std::chrono_literals;

MoeShape shape_of(int32_t rank, int32_t ranks) {
  return {.rank = rank,
          .num_ranks = ranks,
          .num_experts = 4,
          .experts_per_rank = 2,
          .hidden = 8,
          .max_tokens = 4,
          .chunk = 4};
}

bool eventually(const std::function<bool()>& ready) {
  const auto deadline = Clock::now() + 10s;
  while (!ready() && Clock::now() < deadline) std::this_thread::sleep_for(1ms);
  return ready();
}

// A rank without a GPU: does to pinned memory what its kernels would.
struct Rank {
  MoeShape shape;
  std::unique_ptr<ExchangeGroup> group;
  Sites sites;
  HostControl host{};
  std::vector<uint32_t> slots;
  std::unique_ptr<Courier> courier;
  uint64_t next = 0;

  Rank(int32_t rank, int32_t ranks, Duration stall) : shape(shape_of(rank, ranks)), slots(4 * ranks) {
    GroupConfig config;
    config.name = "test";
    config.rank = rank;
    config.num_ranks = ranks;
    config.depth = 2;
    config.region_bytes = buffer_sizes(shape).region_bytes;
    config.staging_bytes = config.region_bytes * ranks;
    config.stall_timeout = config.first_stall_timeout = stall;
    group = std::make_unique<ExchangeGroup>(config);
    sites.index(Kind::kCombine, 7, "layer");
  }
  // All ranks but `direct` by proxy.
  void start(const std::vector<bool>& by_proxy) {
    courier = std::make_unique<Courier>(CourierConfig{.group = *group,
                                                      .shape = shape,
                                                      .sites = sites,
                                                      .host = host,
                                                      .slots = slots.data(),
                                                      .by_proxy = by_proxy});
  }
  size_t region_bytes() const { return group->config().region_bytes; }
  std::byte* place(std::span<std::byte> memory, uint64_t number, uint32_t peer) const {
    return memory.data() + (number % 4 * shape.num_ranks + peer) * region_bytes();
  }
  // `rows` rows to each peer, which say who sent them where in which exchange.
  uint64_t send(uint32_t rows, uint32_t tokens = 4) {
    const uint64_t number = next++;
    for (int32_t peer = 0; peer < shape.num_ranks; ++peer) {
      const auto value = static_cast<unsigned char>(16 * shape.rank + peer + 64 * (number % 3));
      std::memset(place(group->staging(), number, peer) + sizeof(RegionHeader), value,
                  rows * shape.home_stride());
      slots[number % 4 * shape.num_ranks + peer] = rows;
    }
    Submission& submission = host.submissions[number % 4];
    submission.kind = static_cast<uint32_t>(Kind::kCombine);
    submission.site = 0;
    submission.tokens = tokens;
    std::atomic_ref(submission.epoch).store(number + 1, std::memory_order_release);
    return number;
  }
  bool arrived(uint64_t number) {
    return std::atomic_ref(host.arrived[number % 4]).load(std::memory_order_acquire) >= number + 1;
  }
  bool aborted() { return std::atomic_ref(host.abort).load(std::memory_order_acquire) != 0; }
  void check(uint64_t number, uint32_t source, uint32_t rows) {
    const std::byte* region = place(group->regions(), number, source);
    RegionHeader header;
    std::memcpy(&header, region, sizeof(header));
    EXPECT_EQ(header.exchange, number);
    EXPECT_EQ(header.source, source);
    EXPECT_EQ(header.slots, rows);
    for (int64_t i = 0; i < rows * shape.home_stride(); ++i) {
      ASSERT_EQ(static_cast<unsigned>(region[sizeof(header) + i]),
                16 * source + shape.rank + 64 * (number % 3));
    }
  }
};

class CourierTest : public ::testing::Test {
 protected:
  void open(int32_t count, Duration stall = 20s, bool by_proxy = true) {
    std::vector<Bytes> endpoints;
    for (int32_t rank = 0; rank < count; ++rank) {
      ranks_.push_back(std::make_unique<Rank>(rank, count, stall));
      endpoints.push_back(ranks_.back()->group->endpoint());
    }
    for (auto& rank : ranks_) {
      rank->group->connect(endpoints);
      std::vector<bool> proxied(count, by_proxy);
      proxied[rank->shape.rank] = false;
      rank->start(proxied);
    }
  }
  void TearDown() override {
    for (auto& rank : ranks_) {
      rank->courier.reset();
      rank->group->close();
    }
  }
  Rank& at(int32_t rank) { return *ranks_[rank]; }
  void fault(Rank& rank, Fault fault, uint32_t culprit) {
    FaultRecord& record = rank.host.failure;
    record.fault = fault;
    record.kind = static_cast<uint32_t>(Kind::kCombine);
    record.culprit = culprit;
    std::atomic_ref(record.complete).store(1, std::memory_order_release);
  }

  std::vector<std::unique_ptr<Rank>> ranks_;
};

TEST_F(CourierTest, CarriesWhatKernelsPacked) {
  open(3);
  for (uint32_t step = 0; step < 50; ++step) {
    for (auto& rank : ranks_) rank->send((step + rank->shape.rank) % 5);
    for (auto& rank : ranks_) {
      ASSERT_TRUE(eventually([&] { return rank->arrived(step); }));
      for (uint32_t source = 0; source < 3; ++source) {
        if (source != static_cast<uint32_t>(rank->shape.rank)) rank->check(step, source, (step + source) % 5);
      }
    }
  }
}

TEST_F(CourierTest, SendsTheNextWhileOneIsUnderWay) {
  open(2);
  at(0).send(1);
  at(0).send(2);
  at(1).send(3);
  EXPECT_TRUE(eventually([&] { return at(0).arrived(0) && at(1).arrived(0); }));
  std::this_thread::sleep_for(20ms);
  EXPECT_FALSE(at(0).arrived(1));
  at(1).send(4);
  EXPECT_TRUE(eventually([&] { return at(0).arrived(1) && at(1).arrived(1); }));
  at(0).check(1, 1, 4);
  at(1).check(1, 0, 2);
}

TEST_F(CourierTest, RanksAtDifferentCallsBothSaySo) {
  open(2);
  at(0).send(1, 4);
  at(1).send(1, 3);
  for (auto& rank : ranks_) {
    ASSERT_TRUE(eventually([&] { return rank->aborted(); }));
    EXPECT_EQ(rank->group->failure()->kind(), ErrorKind::kMismatch);
  }
  EXPECT_FALSE(at(0).arrived(0));
}

TEST_F(CourierTest, AKernelsFailureEndsAllRanksWaits) {
  open(2, 20s, false);
  fault(at(0), Fault::kMalformed, 1);
  ASSERT_TRUE(eventually([&] { return at(0).aborted() && at(1).aborted(); }));
  EXPECT_EQ(at(0).group->failure()->kind(), ErrorKind::kPeer);
  const std::string text = at(0).group->failure()->what();
  EXPECT_NE(text.find("combine 'layer'"), std::string::npos) << text;
  EXPECT_NE(text.find("rank 1"), std::string::npos) << text;
}

TEST_F(CourierTest, AKernelThatGivesUpIsToldWhoIsMissing) {
  open(3);
  at(0).send(1);
  at(2).send(1);
  fault(at(0), Fault::kTimeout, 2);  // the first whom it happened to wait for
  ASSERT_TRUE(eventually([&] { return at(0).group->failure().has_value(); }));
  EXPECT_EQ(at(0).group->failure()->kind(), ErrorKind::kTimeout);
  const std::string text = at(0).group->failure()->what();
  EXPECT_NE(text.find("rank 1"), std::string::npos) << text;
}

TEST_F(CourierTest, ANoticeGetsThePeersOwnWords) {
  open(2, 20s, false);
  fault(at(1), Fault::kNotice, 0);
  at(0).group->fail(Error(ErrorKind::kTimeout, "the reason"), 0);
  ASSERT_TRUE(eventually([&] { return at(1).aborted(); }));
  EXPECT_NE(std::string(at(1).group->failure()->what()).find("the reason"), std::string::npos);
}

TEST_F(CourierTest, APeerThatClosedWillNotCome) {
  open(2, 20s, false);
  at(1).group->count_sent(3);
  at(1).courier.reset();
  at(1).group->close();
  std::atomic_ref(at(0).host.entered).store(3);  // exchange 2, which was sent
  std::this_thread::sleep_for(50ms);
  EXPECT_FALSE(at(0).group->failure());
  std::atomic_ref(at(0).host.entered).store(4);
  ASSERT_TRUE(eventually([&] { return at(0).aborted(); }));
  EXPECT_NE(std::string(at(0).group->failure()->what()).find("has closed the group"), std::string::npos);
}

class FdExchange : public ::testing::Test {
 protected:
  void SetUp() override {
    int ends[2];
    ASSERT_EQ(pipe(ends), 0);
    read_ = OwnedFd(ends[0]);
    server_ = std::make_unique<FdServer>(OwnedFd(ends[1]), token_, 3);
  }
  const Token token_ = random_token();
  OwnedFd read_;
  std::unique_ptr<FdServer> server_;
};

TEST_F(FdExchange, HandsOutItsDescriptor) {
  for (char sent = 'a'; sent < 'f'; ++sent) {
    const OwnedFd got = fetch_fd(server_->name(), token_, 3, Clock::now() + 5s);
    char received = 0;
    ASSERT_EQ(write(got.get(), &sent, 1), 1);
    ASSERT_EQ(read(read_.get(), &received, 1), 1);
    EXPECT_EQ(received, sent);
  }
}

TEST_F(FdExchange, RefusesWhoeverDoesNotKnowTheToken) {
  EXPECT_THROW(fetch_fd(server_->name(), random_token(), 3, Clock::now() + 5s), Error);
  EXPECT_THROW(fetch_fd(server_->name(), token_, 2, Clock::now() + 5s), Error);
  EXPECT_NO_THROW(fetch_fd(server_->name(), token_, 3, Clock::now() + 5s));
}

TEST_F(FdExchange, EndsWithItsServer) {
  const std::string name = server_->name();
  server_.reset();
  EXPECT_THROW(fetch_fd(name, token_, 3, Clock::now() + 5s), Error);
}

}  // namespace
}  // namespace pplx::moe::cuda
