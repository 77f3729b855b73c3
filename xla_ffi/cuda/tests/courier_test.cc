// The host side where it touches no GPU: the courier, with kernels played by threads, and descriptors that
// travel between processes. Runs anywhere.
#include "xla_ffi/cuda/courier.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <array>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "xla_ffi/cuda/fd_exchange.h"
#include "xla_ffi/cuda/tests/fake_device.h"
#include "xla_ffi/registry.h"

namespace pplx::moe::cuda {
namespace {

using namespace std::chrono_literals;
using testing::FakeDevice;

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

// How ranks are set up.
struct Options {
  Duration stall = 20s;
  bool by_proxy = true;
  std::vector<bool> device = {};  // by rank: regions and send buffers out of the CPU's reach; empty: none
  EngineConfig engine = {};
};

// A rank without a GPU: does to its memory what its kernels would.
struct Rank {
  MoeShape shape;
  std::vector<std::unique_ptr<FakeDevice>> devices;
  std::unique_ptr<ExchangeGroup> group;
  Sites sites;
  FindSite site_of_peer;
  HostControl host{};
  std::vector<uint32_t> slots;
  std::vector<uint64_t> arrived_near = std::vector<uint64_t>(4);  // as GDRCopy would map them
  std::unique_ptr<Courier> courier;
  uint64_t next = 0;

  Rank(int32_t rank, int32_t ranks, const Options& options) : shape(shape_of(rank, ranks)), slots(4 * ranks) {
    GroupConfig config;
    config.name = "test";
    config.rank = rank;
    config.num_ranks = ranks;
    config.depth = 2;
    config.region_bytes = buffer_sizes(shape).region_bytes;
    config.staging_bytes = config.region_bytes * ranks;
    config.stall_timeout = config.first_stall_timeout = options.stall;
    config.engine = options.engine;
    config.engine.sim.copy = FakeDevice::copy;
    const auto place = [this](TransferEngine& engine, size_t regions, size_t staging) {
      const auto made = [&](size_t bytes) {
        devices.push_back(std::make_unique<FakeDevice>(bytes));
        return engine.register_memory(DeviceMemory{.data = devices.back()->data(), .size = bytes});
      };
      return GroupBuffers{.regions = made(regions), .staging = made(staging), .readable = false};
    };
    const bool device = !options.device.empty() && options.device[rank];
    group = std::make_unique<ExchangeGroup>(config, device ? place : PlaceBuffers());
    sites.index(Kind::kCombine, 7, "layer");
  }
  // All ranks but `direct` by proxy.
  void start(const std::vector<bool>& by_proxy) {
    courier = std::make_unique<Courier>(CourierConfig{.group = *group,
                                                      .shape = shape,
                                                      .sites = sites,
                                                      .host = host,
                                                      .slots = slots.data(),
                                                      .by_proxy = by_proxy,
                                                      .site_of_peer = site_of_peer,
                                                      .arrived_near = arrived_near.data()});
  }
  size_t region_bytes() const { return group->config().region_bytes; }
  std::byte* place(std::span<std::byte> memory, uint64_t number, uint32_t peer) const {
    return FakeDevice::inside(memory.data() + (number % 4 * shape.num_ranks + peer) * region_bytes());
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
  void open(int32_t count, const Options& options = {}) {
    std::vector<Bytes> endpoints;
    for (int32_t rank = 0; rank < count; ++rank) {
      ranks_.push_back(std::make_unique<Rank>(rank, count, options));
      endpoints.push_back(ranks_.back()->group->endpoint());
    }
    for (auto& rank : ranks_) {
      rank->group->connect(endpoints);
      std::vector<bool> proxied(count, options.by_proxy);
      proxied[rank->shape.rank] = false;
      rank->start(proxied);
    }
  }
  void close() {
    for (auto& rank : ranks_) {
      rank->courier.reset();
      rank->group->close();
    }
    ranks_.clear();
  }
  void TearDown() override { close(); }
  // Steps with other numbers of rows each, looked at on every rank.
  void exchange(uint32_t steps) {
    const auto count = static_cast<uint32_t>(ranks_.size());
    for (uint32_t step = 0; step < steps && !HasFatalFailure(); ++step) {
      for (auto& rank : ranks_) rank->send((step + rank->shape.rank) % 5);
      for (auto& rank : ranks_) {
        ASSERT_TRUE(eventually([&] { return rank->arrived(step); })) << step;
        for (uint32_t source = 0; source < count; ++source) {
          if (source != static_cast<uint32_t>(rank->shape.rank))
            rank->check(step, source, (step + source) % 5);
        }
      }
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
  exchange(50);
}

EngineConfig disordered(uint64_t seed, size_t nics) {
  EngineConfig config;
  config.fabric = "sim";
  config.nics.resize(nics);
  config.sim.seed = seed;
  config.sim.network = "couriers";
  config.sim.reorder = true;
  config.sim.max_delay = 4;
  config.sim.max_pieces = 3;
  return config;
}

// Nothing here reads or writes a device's memory but the network and who plays the device. Ranks may differ.
TEST_F(CourierTest, CarriesWhatLiesInGpuMemory) {
  for (const std::vector<bool>& device :
       {std::vector{true, true, true}, std::vector{true, false, true}, std::vector{false, true, false}}) {
    open(3, {.device = device});
    exchange(50);
    close();
  }
}

TEST_F(CourierTest, CarriesWhatLiesInGpuMemoryInAnyOrder) {
  for (uint64_t seed = 0; seed < 8; ++seed) {
    open(3, {.device = {true, seed % 2 == 0, false}, .engine = disordered(seed, 1 + seed % 3)});
    exchange(12);
    close();
  }
}

// Ranks that NVLink reaches get a header by the host.
TEST_F(CourierTest, HeadersAloneGoToGpuMemoryToo) {
  open(3, {.device = {true, true, false}});
  for (auto& rank : ranks_) {
    rank->courier.reset();
    std::vector<bool> proxied(3, true);
    proxied[rank->shape.rank] = false;
    if (rank->shape.rank < 2) proxied[1 - rank->shape.rank] = false;
    rank->start(proxied);
  }
  for (uint64_t step = 0; step < 10; ++step) {
    for (auto& rank : ranks_) rank->send(2);
    for (auto& rank : ranks_) ASSERT_TRUE(eventually([&] { return rank->arrived(step); }));
    at(2).check(step, 0, 2);
    at(0).check(step, 2, 2);
    at(0).check(step, 1, 0);
  }
}

TEST_F(CourierTest, TellsKernelsNearAndFar) {
  open(2);
  for (uint64_t step = 0; step < 9; ++step) {
    for (auto& rank : ranks_) rank->send(1);
    for (auto& rank : ranks_) {
      ASSERT_TRUE(eventually([&] { return rank->arrived(step); }));
      EXPECT_EQ(std::atomic_ref(rank->arrived_near[step % 4]).load(), step + 1);
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

// Over NVLink a kernel sees another call's tag, whose name only that rank knows.
TEST_F(CourierTest, AMismatchSeenByAKernelNamesBothCalls) {
  open(2, {.by_proxy = false});
  at(1).sites.index(Kind::kCombine, 9, "gate");
  at(0).courier.reset();
  at(0).site_of_peer = [&](uint32_t rank, Kind kind, uint64_t tag) -> std::optional<Site> {
    return rank == 1 ? at(1).sites.find(kind, tag) : std::nullopt;
  };
  at(0).start({false, false});
  FaultRecord& record = at(0).host.failure;
  record.theirs.kind = static_cast<uint8_t>(Kind::kCombine);
  record.theirs.tag = 9;
  record.theirs.tokens = 3;
  fault(at(0), Fault::kMismatch, 1);
  for (auto& rank : ranks_) {
    ASSERT_TRUE(eventually([&] { return rank->aborted(); }));
    EXPECT_EQ(rank->group->failure()->kind(), ErrorKind::kMismatch);
    const std::string text = rank->group->failure()->what();
    EXPECT_NE(text.find("combine 'layer'"), std::string::npos) << text;
    EXPECT_NE(text.find("combine 'gate' (T=3"), std::string::npos) << text;
  }
}

TEST_F(CourierTest, AKernelsFailureEndsAllRanksWaits) {
  open(2, {.by_proxy = false});
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
  open(2, {.by_proxy = false});
  fault(at(1), Fault::kNotice, 0);
  at(0).group->fail(Error(ErrorKind::kTimeout, "the reason"), 0);
  ASSERT_TRUE(eventually([&] { return at(1).aborted(); }));
  EXPECT_NE(std::string(at(1).group->failure()->what()).find("the reason"), std::string::npos);
}

TEST_F(CourierTest, APeerThatClosedWillNotCome) {
  open(2, {.by_proxy = false});
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
    std::vector<OwnedFd> ends;
    for (OwnedFd& read : read_) {
      int both[2];
      ASSERT_EQ(pipe(both), 0);
      read = OwnedFd(both[0]);
      ends.emplace_back(both[1]);
    }
    server_ = std::make_unique<FdServer>(std::move(ends), token_, 3);
  }
  std::vector<OwnedFd> fetch(const Token& token, uint32_t rank, size_t count = 2) const {
    return fetch_fds(server_->name(), token, rank, count, Clock::now() + 5s);
  }
  const Token token_ = random_token();
  std::array<OwnedFd, 2> read_;
  std::unique_ptr<FdServer> server_;
};

TEST_F(FdExchange, HandsOutItsDescriptors) {
  for (char sent = 'a'; sent < 'f'; ++sent) {
    const std::vector<OwnedFd> got = fetch(token_, 3);
    ASSERT_EQ(got.size(), 2U);
    for (size_t i = 0; i < 2; ++i) {
      const char each = static_cast<char>(sent + i);
      char received = 0;
      ASSERT_EQ(write(got[i].get(), &each, 1), 1);
      ASSERT_EQ(read(read_[i].get(), &received, 1), 1);
      EXPECT_EQ(received, each);
    }
  }
}

TEST_F(FdExchange, AnotherNumberThanAgreedIsRefused) {
  EXPECT_THROW(fetch(token_, 3, 1), Error);
  EXPECT_THROW(fetch(token_, 3, 3), Error);
  EXPECT_THROW(FdServer({}, token_, 3), Error);
  EXPECT_NO_THROW(fetch(token_, 3));
}

TEST_F(FdExchange, RefusesWhoeverDoesNotKnowTheToken) {
  EXPECT_THROW(fetch(random_token(), 3), Error);
  EXPECT_THROW(fetch(token_, 2), Error);
  EXPECT_NO_THROW(fetch(token_, 3));
}

TEST_F(FdExchange, EndsWithItsServer) {
  const std::string name = server_->name();
  server_.reset();
  EXPECT_THROW(fetch_fds(name, token_, 3, 2, Clock::now() + 5s), Error);
}

}  // namespace
}  // namespace pplx::moe::cuda
