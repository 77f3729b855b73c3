// Many NICs: nothing is lost, nothing is counted twice, whatever their numbers and whichever fails.
#include <algorithm>
#include <map>
#include <random>
#include <thread>

#include "proxy/fabric/sim.h"
#include "proxy/tests/support.h"

namespace pplx::testing {
namespace {

EngineConfig sim_nics(uint64_t seed, size_t nics, const std::string& network) {
  auto config = with_nics(sim(seed), nics);
  config.sim.network = network;
  return config;
}

class NicCounts : public ::testing::TestWithParam<std::pair<size_t, size_t>> {};

// A property: whatever the numbers of NICs, the size and the offsets.
TEST_P(NicCounts, EveryByteArrivesOnceAndNoOther) {
  auto [ours, theirs] = GetParam();
  std::mt19937_64 rng(ours * 16 + theirs);
  TransferEngine a(sim_nics(rng(), ours, "counts")), b(sim_nics(rng(), theirs, "counts"));
  constexpr size_t kSize = 1 << 20;
  auto source = a.allocate(kSize), target = b.allocate(kSize);
  auto remote = a.open(target->descriptor());
  fill_random(source->data(), kSize, rng());
  uint64_t expected = 0, shards = 0;
  for (int round = 0; round < 24; ++round) {
    static constexpr size_t kSizes[] = {0, 1, 255, 4096, 8191, 16385, 65536, 65537, 131073, 700001};
    const size_t size = round < 10 ? kSizes[round] : rng() % (kSize - 4096);
    const size_t from = rng() % (kSize - size), to = rng() % (kSize - size);
    std::memset(target->data(), 0x5a, kSize);
    CompletionCounter done;
    WriteRequest request{source.get(), from, remote.get(), to, size, 1};
    if (round % 2 != 0) {
      request.imm = 2;
      request.imm_per_shard = true;
      shards += a.shards();
    } else {
      ++expected;
    }
    a.write(request, &done);
    b.imm_counter(1).wait(expected);
    b.imm_counter(2).wait(shards);
    ASSERT_EQ(std::memcmp(target->data() + to, source->data() + from, size), 0) << size;
    auto untouched = [](std::byte byte) { return byte == std::byte{0x5a}; };
    ASSERT_TRUE(std::all_of(target->data(), target->data() + to, untouched));
    ASSERT_TRUE(std::all_of(target->data() + to + size, target->data() + kSize, untouched));
    ASSERT_EQ(wait_done(a, done, 1), 1u);
    ASSERT_EQ(done.failed(), 0u);
  }
  EXPECT_EQ(a.shards(), ours);
  for (int i = 0; i < 1000; ++i) b.progress();
  EXPECT_EQ(b.imm_counter(1).value(), expected);
  EXPECT_EQ(b.imm_counter(2).value(), shards);
  for (const auto& nic : a.details().nics) EXPECT_GT(nic.traffic.writes, 0u) << "every NIC takes part";
}

std::vector<std::pair<size_t, size_t>> nic_counts() {
  std::vector<std::pair<size_t, size_t>> counts;
  for (size_t ours = 1; ours <= 8; ++ours) {
    for (size_t theirs : {size_t{1}, size_t{2}, size_t{3}, size_t{8}}) counts.emplace_back(ours, theirs);
  }
  return counts;
}

INSTANTIATE_TEST_SUITE_P(Pairs, NicCounts, ::testing::ValuesIn(nic_counts()), [](const auto& info) {
  return std::to_string(info.param.first) + "_to_" + std::to_string(info.param.second);
});

struct Failure {
  bool local, tells;
};

class FailingNic : public ::testing::TestWithParam<Failure> {
 protected:
  void fail(const TransferEngine& a, const TransferEngine& b, size_t nic) const {
    sim_break_nic("failing", GetParam().local ? a.address() : b.address(), nic, GetParam().tells);
  }
};

TEST_P(FailingNic, LosesNoBytes) {
  for (uint64_t seed = 0; seed < 15; ++seed) {
    TransferEngine a(sim_nics(seed, 3, "failing")), b(sim_nics(seed + 100, 2, "failing"));
    constexpr size_t kParts = 60, kPart = 5000;
    auto source = a.allocate(kParts * kPart), target = b.allocate(kParts * kPart);
    auto remote = a.open(target->descriptor());
    fill_random(source->data(), source->size(), seed);
    CompletionCounter done;
    for (size_t i = 0; i < kParts; ++i) {
      if (i == seed * 4) fail(a, b, seed % 2);
      a.write({source.get(), i * kPart, remote.get(), i * kPart, kPart, {}}, &done);
    }
    ASSERT_EQ(wait_done(a, done, kParts), kParts);
    ASSERT_EQ(done.failed(), 0u) << done.error()->what();
    ASSERT_EQ(std::memcmp(source->data(), target->data(), source->size()), 0);
    // Also for what comes later: large ones in parts, with an immediate, and messages.
    auto late = a.write_future({source.get(), 0, remote.get(), 0, source->size(), 9});
    b.imm_counter(9).wait(1);
    late.get();
    auto sent = a.send(b.address(), {});
    b.recv();
    EXPECT_GT(a.details().peers[0].paths, 0u);
  }
}

// The rule of docs/protocol.md: a write with an immediate either counts once and succeeds, or fails and
// counts at most once; it is never repeated where it may have arrived.
TEST_P(FailingNic, CountsNoImmediateTwice) {
  uint64_t succeeded = 0, failed = 0, retried = 0;
  for (uint64_t seed = 0; seed < 30; ++seed) {
    auto config = sim_nics(seed, 2, "failing");
    config.sim.queue_depth = 16;  // so that some are under way and others wait
    TransferEngine a(config), b(sim_nics(seed + 100, 3, "failing"));
    constexpr uint32_t kWrites = 100;
    auto source = a.allocate(4096), target = b.allocate(4096);
    auto remote = a.open(target->descriptor());
    std::vector<CompletionCounter> done(kWrites);
    for (uint32_t i = 0; i < kWrites; ++i) {
      if (i == 10 + seed) fail(a, b, 0);
      a.write({source.get(), 0, remote.get(), i * 8, 8, i}, &done[i]);
    }
    for (uint32_t i = 0; i < kWrites; ++i) ASSERT_EQ(wait_done(a, done[i], 1), 1u) << i;
    std::this_thread::sleep_for(2ms);
    for (int i = 0; i < 2000; ++i) b.progress();
    for (uint32_t i = 0; i < kWrites; ++i) {
      const uint64_t arrived = b.imm_counter(i).value();
      if (done[i].failed() == 0) {
        ++succeeded;
        ASSERT_EQ(arrived, 1u) << "write " << i << " succeeded";
      } else {
        ++failed;
        ASSERT_LE(arrived, 1u) << "write " << i << " failed";
        ASSERT_EQ(done[i].error()->kind(), ErrorKind::kPeer);
      }
    }
    retried += a.stats().retries;
  }
  EXPECT_GT(retried, 0u);
  EXPECT_GT(failed, 0u) << "some were under way";
  EXPECT_GT(succeeded, failed) << "and most were not";
}

INSTANTIATE_TEST_SUITE_P(Ways, FailingNic,
                         ::testing::Values(Failure{true, true}, Failure{true, false}, Failure{false, true},
                                           Failure{false, false}),
                         [](const auto& info) {
                           return std::string(info.param.local ? "own" : "peers") +
                                  (info.param.tells ? "_known" : "_silent");
                         });

TEST(Nics, TheLastOneIsThePeers) {
  TransferEngine a(sim_nics(1, 2, "last")), b(sim_nics(2, 2, "last"));
  auto source = a.allocate(64), target = b.allocate(64);
  auto remote = a.open(target->descriptor());
  a.remove_nic(0);
  EXPECT_EQ(kind_of([&] { a.remove_nic(1); }), ErrorKind::kInvalidArgument);
  EXPECT_EQ(kind_of([&] { a.remove_nic(2); }), ErrorKind::kInvalidArgument);
  a.write_future({source.get(), 0, remote.get(), 0, 64, 1}).get();
  b.imm_counter(1).wait(1);
  EXPECT_FALSE(a.details().nics[0].error.empty());
  EXPECT_TRUE(a.details().nics[1].error.empty());
  sim_break_nic("last", a.address(), 1, true);
  auto future = a.write_future({source.get(), 0, remote.get(), 0, 64, 1});
  ASSERT_EQ(future.wait_for(10s), std::future_status::ready);
  EXPECT_EQ(kind_of([&] { future.get(); }), ErrorKind::kPeer);
  ASSERT_TRUE(a.wait_until([&] { return !a.details().nics[1].error.empty(); }, Clock::now() + 10s));
  // Memory registered now has a key for none of them, and a peer met now cannot be reached.
  auto later = a.allocate(64);
  EXPECT_EQ(kind_of([&] {
              TransferEngine c(sim_nics(3, 1, "last"));
              a.open(c.allocate(64)->descriptor());
            }),
            ErrorKind::kFabric);
}

TEST(Nics, RemovedOverTcp) {
  auto config = with_nics(provider("tcp"), 3);
  TransferEngine a(config), b(config);
  constexpr size_t kSize = 1 << 20;
  auto source = a.allocate(kSize), target = b.allocate(kSize);
  auto remote = a.open(target->descriptor());
  for (size_t round = 0; round < 3; ++round) {
    if (round > 0) a.remove_nic(round - 1);
    fill_random(source->data(), kSize, round);
    a.write_future({source.get(), 0, remote.get(), 0, kSize, 1}).get();
    b.imm_counter(1).wait(round + 1);
    ASSERT_EQ(std::memcmp(source->data(), target->data(), kSize), 0);
  }
  auto late = a.allocate(kSize);
  a.write_future({late.get(), 0, remote.get(), 0, kSize, 1}).get();
  b.imm_counter(1).wait(4);
}

TEST(Nics, AFullOneDoesNotHoldUpTheOthers) {
  auto config = sim_nics(1, 2, "full");
  config.sim = SimConfig{.network = "full", .queue_depth = 2};
  TransferEngine a(config), b(config);
  auto source = a.allocate(64), target = b.allocate(64);
  auto remote = a.open(target->descriptor());
  CompletionCounter done;
  for (int i = 0; i < 500; ++i) a.write({source.get(), 0, remote.get(), 0, 8, 1}, &done);
  b.imm_counter(1).wait(500);
  EXPECT_EQ(wait_done(a, done, 500), 500u);
  auto nics = a.details().nics;
  EXPECT_EQ(nics[0].traffic.writes, 250u);
  EXPECT_EQ(nics[1].traffic.writes, 250u);
  EXPECT_LE(nics[0].deepest, 4u);
}

TEST(Nics, AreCheckedWhenMade) {
  EXPECT_EQ(kind_of([] { TransferEngine engine(with_nics(local(), 9)); }), ErrorKind::kInvalidArgument);
  EXPECT_EQ(kind_of([] { TransferEngine engine(with_nics(provider("shm"), 2)); }),
            ErrorKind::kInvalidArgument);
}

TEST(Efa, StrangersAreRefusedAndPeersIntroduceThemselves) {
  auto config = efa_like(3);
  config.sim.network = "strangers";
  for (uint64_t seed = 0; seed < 20; ++seed) {
    config.sim.seed = seed;
    TransferEngine a(config), b(config);
    auto source = a.allocate(4096), target = b.allocate(4096), back = b.allocate(4096);
    // b has never heard of a, nor called anything but this.
    auto remote = a.open(target->descriptor());
    CompletionCounter done;
    for (int i = 0; i < 100; ++i) a.write({source.get(), 0, remote.get(), 0, 64, 1}, &done);
    b.imm_counter(1).wait(100);
    ASSERT_EQ(wait_done(a, done, 100), 100u);
    ASSERT_EQ(done.failed(), 0u) << done.error()->what();
    // And the other way at the same time as this way anew.
    b.write_future({back.get(), 0, b.open(source->descriptor()).get(), 0, 64, 2}).get();
    a.imm_counter(2).wait(1);
  }
}

}  // namespace
}  // namespace pplx::testing
