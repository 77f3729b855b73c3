// Many NICs: nothing is lost, nothing is counted twice, whatever their numbers and whichever fails.
#include <algorithm>
#include <map>
#include <random>
#include <thread>

#include "proxy/bytes.h"
#include "proxy/fabric/sim.h"
#include "proxy/tests/support.h"

namespace pplx::testing {
namespace {

EngineConfig sim_nics(uint64_t seed, size_t nics, const std::string& network) {
  auto config = with_nics(sim(seed), nics);
  config.sim.network = network;
  return config;
}

EngineConfig efa_nics(uint64_t seed, size_t nics, const std::string& network) {
  auto config = with_nics(efa_like(seed), nics);
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
    auto& done = lasting_counter();
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
  EngineConfig (*network)(uint64_t seed, size_t nics, const std::string& name) = sim_nics;
};

class FailingNic : public ::testing::TestWithParam<Failure> {
 protected:
  void fail(const TransferEngine& a, const TransferEngine& b, size_t nic) const {
    sim_break_nic("failing", GetParam().local ? a.address() : b.address(), nic, GetParam().tells);
  }
};

TEST_P(FailingNic, LosesNoBytes) {
  for (uint64_t seed = 0; seed < 15; ++seed) {
    TransferEngine a(GetParam().network(seed, 3, "failing")), b(GetParam().network(seed + 100, 2, "failing"));
    constexpr size_t kParts = 60, kPart = 5000;
    auto source = a.allocate(kParts * kPart), target = b.allocate(kParts * kPart);
    auto remote = a.open(target->descriptor());
    fill_random(source->data(), source->size(), seed);
    auto& done = lasting_counter();
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
    auto config = GetParam().network(seed, 2, "failing");
    config.sim.queue_depth = 16;  // so that some are under way and others wait
    TransferEngine a(config), b(GetParam().network(seed + 100, 3, "failing"));
    constexpr uint32_t kWrites = 100;
    auto source = a.allocate(4096), target = b.allocate(4096);
    auto remote = a.open(target->descriptor());
    a.write_future({source.get(), 0, remote.get(), 0, 8, kWrites}).get();  // they know each other now
    std::vector<pplx::CompletionCounter*> done;
    for (uint32_t i = 0; i < kWrites; ++i) done.push_back(&lasting_counter());
    for (uint32_t i = 0; i < kWrites; ++i) {
      if (i == 10 + seed) fail(a, b, 0);
      a.write({source.get(), 0, remote.get(), i * 8, 8, i}, done[i]);
    }
    for (uint32_t i = 0; i < kWrites; ++i) ASSERT_EQ(wait_done(a, *done[i], 1), 1u) << i;
    std::this_thread::sleep_for(2ms);
    for (int i = 0; i < 2000; ++i) b.progress();
    for (uint32_t i = 0; i < kWrites; ++i) {
      const uint64_t arrived = b.imm_counter(i).value();
      if (done[i]->failed() == 0) {
        ++succeeded;
        ASSERT_EQ(arrived, 1u) << "write " << i << " succeeded";
      } else {
        ++failed;
        ASSERT_LE(arrived, 1u) << "write " << i << " failed";
        ASSERT_EQ(done[i]->error()->kind(), ErrorKind::kPeer);
        ASSERT_NE(std::string(done[i]->error()->what()).find("may have arrived and been counted, or not"),
                  std::string::npos)
            << done[i]->error()->what();
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
                                           Failure{false, false}, Failure{true, true, efa_nics},
                                           Failure{false, true, efa_nics}),
                         [](const auto& info) {
                           return std::string(info.param.network == efa_nics ? "efa_" : "") +
                                  (info.param.local ? "own" : "peers") +
                                  (info.param.tells ? "_known" : "_silent");
                         });

// Sums up what an engine has sent and what its peer must find: writes of all kinds with few values of
// immediates, so that counts alone would not tell which of them are missing, and messages.
class Traffic {
 public:
  Traffic(TransferEngine& from, TransferEngine& to, uint64_t seed)
      : from_(from),
        to_(to),
        rng_(seed),
        source_(from.allocate(kSlots * kSlot)),
        target_(to.allocate(kSlots * kSlot)) {
    remote_ = from.open(target_->descriptor());
    fill_random(source_->data(), source_->size(), seed);
  }

  void send(uint64_t i) {
    const size_t slot = i % kSlots * kSlot, length = rng_() % 4 == 0 ? kSlot : rng_() % 3000;
    WriteRequest request{source_.get(), slot, remote_.get(), slot, length, static_cast<uint32_t>(rng_() % 3)};
    request.imm_per_shard = rng_() % 4 == 0;
    expected_[*request.imm] += request.imm_per_shard ? from_.shards() : 1;
    longest_[slot] = std::max(longest_[slot], length);
    from_.write(request, &done_);
    ++writes_;
    if (i % 8 != 0) return;
    const std::byte payload[2] = {static_cast<std::byte>(i), static_cast<std::byte>(i >> 8)};
    from_.send(to_.address(), payload);
    ++messages_;
  }

  void check() {
    ASSERT_EQ(wait_done(from_, done_, writes_), writes_);
    ASSERT_EQ(done_.failed(), 0u) << done_.error()->what();
    for (auto [imm, count] : expected_) to_.imm_counter(imm).wait(count);
    for (auto [slot, length] : longest_) {
      ASSERT_EQ(std::memcmp(source_->data() + slot, target_->data() + slot, length), 0);
    }
    std::map<Bytes, int, BytesLess> seen;
    for (size_t i = 0; i < messages_; ++i) ++seen[to_.recv().payload];
    for (const auto& [payload, count] : seen) ASSERT_EQ(count, 1);
  }
  // Later, when whatever was on its way twice has come.
  void check_again() {
    for (auto [imm, count] : expected_) ASSERT_EQ(to_.imm_counter(imm).value(), count);
    ASSERT_EQ(kind_of([&] { to_.recv(0s); }), ErrorKind::kTimeout) << "a message came twice";
  }

 private:
  static constexpr size_t kSlots = 40, kSlot = 90000;
  TransferEngine &from_, &to_;
  std::mt19937_64 rng_;
  std::shared_ptr<Region> source_, target_;
  std::shared_ptr<RemoteRegion> remote_;
  pplx::CompletionCounter& done_ = lasting_counter();
  std::map<uint32_t, uint64_t> expected_;
  std::map<size_t, size_t> longest_;
  uint64_t writes_ = 0;
  size_t messages_ = 0;
};

// The invariant P69 of docs/protocol.md for networks that fence: as long as one way is left, everything
// arrives once, whichever NICs fail on either side, whatever was under way then and whichever acknowledgement
// was lost.
TEST(FencedNics, LoseNothingAndRepeatNothing) {
  uint64_t retried = 0;
  for (uint64_t seed = 0; seed < property_runs(60); ++seed) {
    std::mt19937_64 rng(seed);
    const std::string network = "fenced " + std::to_string(seed);
    const size_t nics[2] = {2 + rng() % 3, 2 + rng() % 3};
    auto configure = [&](size_t count) {
      auto config = fenced(sim_nics(rng(), count, network));
      config.sim.queue_depth = 4 + rng() % 60;
      return config;
    };
    TransferEngine a(configure(nics[0])), b(configure(nics[1]));
    Traffic there(a, b, seed), back(b, a, seed + 1000);
    constexpr uint64_t kWrites = 120;
    std::map<uint64_t, std::pair<size_t, size_t>> failures;  // when, whose, which; one a side is left
    for (size_t side = 0; side < 2; ++side) {
      for (size_t nic = rng() % 2; nic + 1 < nics[side]; ++nic) failures[rng() % kWrites] = {side, nic};
    }
    for (uint64_t i = 0; i < kWrites; ++i) {
      if (auto failure = failures.find(i); failure != failures.end()) {
        auto [side, nic] = failure->second;
        TransferEngine& victim = side == 0 ? a : b;
        if (rng() % 3 == 0) {
          victim.remove_nic(nic);
        } else {
          sim_break_nic(network, victim.address(), nic, rng() % 2 == 0);
        }
      }
      there.send(i);
      back.send(i);
    }
    there.check();
    back.check();
    ASSERT_FALSE(HasFatalFailure()) << "seed " << seed;
    std::this_thread::sleep_for(1ms);
    for (int i = 0; i < 300; ++i) a.progress(), b.progress();
    there.check_again();
    back.check_again();
    ASSERT_FALSE(HasFatalFailure()) << "seed " << seed;
    retried += a.stats().retries + b.stats().retries;
  }
  EXPECT_GT(retried, 100u);
}

// A peer that cannot tell what came, or does not answer, leaves an error that says so.
TEST(FencedNics, WithoutAVerdictItIsAnError) {
  auto config = fenced(sim_nics(1, 2, "no verdict"));
  config.timeout = 300ms;
  auto deaf = config;
  deaf.sim.stall_every = 1;
  deaf.sim.stall_polls = UINT32_MAX;
  TransferEngine a(config), b(deaf);
  auto source = a.allocate(64), target = b.allocate(64);
  auto remote = a.open(target->descriptor());
  std::vector<std::future<void>> writes;
  for (int i = 0; i < 8; ++i) writes.push_back(a.write_future({source.get(), 0, remote.get(), 0, 64, 1}));
  a.remove_nic(0);
  bool doubted = false;
  for (auto& write : writes) {
    ASSERT_EQ(write.wait_for(10s), std::future_status::ready);
    try {
      write.get();
      FAIL() << "nothing arrived";
    } catch (const Error& error) {
      const std::string text = error.what();
      if (text.find("did not say in time whether it arrived") == std::string::npos) continue;
      doubted = true;
      EXPECT_EQ(error.kind(), ErrorKind::kPeer);
      EXPECT_NE(text.find("NIC 0 failed"), std::string::npos) << text;
    }
  }
  EXPECT_TRUE(doubted);
  EXPECT_EQ(b.imm_counter(1).value(), 0u);
}

// Buffers of messages that were given up come back with the NIC that held them.
TEST(Nics, AbandonedMessagesGiveTheirBuffersBack) {
  auto config = sim_nics(1, 2, "abandoned");
  config.timeout = 100ms;
  auto deaf = config;
  deaf.sim.stall_every = 1;
  deaf.sim.stall_polls = UINT32_MAX;
  TransferEngine a(config), b(deaf);
  std::vector<std::future<void>> sent;
  for (int i = 0; i < 20; ++i) sent.push_back(a.send(b.address(), {}));
  for (auto& message : sent) {
    ASSERT_EQ(message.wait_for(10s), std::future_status::ready) << "also those that never got a buffer";
    EXPECT_EQ(kind_of([&] { message.get(); }), ErrorKind::kTimeout);
  }
  EXPECT_EQ(a.details().peers[0].traffic.outstanding, 0u);
  auto held = a.send(b.address(), {});
  EXPECT_EQ(a.details().peers[0].traffic.outstanding, 0u) << "all 16 buffers of the peer are taken";
  a.remove_nic(0);
  ASSERT_TRUE(
      a.wait_until([&] { return a.details().peers[0].traffic.outstanding == 1; }, Clock::now() + 10s));
}

// Whoever is told of a failure may get to know further peers at once. For AddressSanitizer above all.
TEST(Nics, PeersMayBeMetWhileOneIsLost) {
  auto config = sim_nics(1, 2, "met");
  auto deaf = config;
  deaf.sim.stall_every = 1;
  deaf.sim.stall_polls = UINT32_MAX;
  struct Meets final : CompletionSink {
    void complete(const Error* error) noexcept override {
      if (error == nullptr) return;
      for (; !unmet.empty(); unmet.pop_back()) met.push_back(engine->open(unmet.back()));
    }
    TransferEngine* engine = nullptr;
    std::vector<RegionDescriptor> unmet;
    std::vector<std::shared_ptr<RemoteRegion>> met;
  } meets;  // before the engines: it outlives its operations
  TransferEngine a(config), b(deaf);
  std::vector<std::unique_ptr<TransferEngine>> others;
  meets.engine = &a;
  constexpr size_t kOthers = 12;
  auto small = sim_nics(2, 1, "met");
  std::vector<std::shared_ptr<Region>> regions;
  for (size_t i = 0; i < kOthers; ++i) {
    others.push_back(std::make_unique<TransferEngine>(small));
    regions.push_back(others.back()->allocate(64));
    meets.unmet.push_back(regions.back()->descriptor());
  }
  auto source = a.allocate(64), target = b.allocate(64);
  auto remote = a.open(target->descriptor());
  for (int i = 0; i < 4; ++i) a.write({source.get(), 0, remote.get(), 0, 64, 1}, &meets);
  a.remove_nic(0);
  ASSERT_EQ(meets.met.size(), kOthers);
  for (auto& one : meets.met) a.write_future({source.get(), 0, one.get(), 0, 64, 1}).get();
}

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
  auto& done = lasting_counter();
  for (int i = 0; i < 500; ++i) a.write({source.get(), 0, remote.get(), 0, 8, 1}, &done);
  EXPECT_EQ(wait_arrived(a, b, 1, 500), 500u);
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

// The network that stands for EFA is as strict.
TEST(Efa, HasItsLimits) {
  auto config = efa_like(1);
  config.sim.network = "limits";
  TransferEngine a(config), b(config);
  EXPECT_LT(a.max_message(), 8192u);
  auto source = a.allocate(4096), target = b.allocate(4096);
  auto remote = a.open(target->descriptor());
  constexpr uint32_t kWrites = 200;
  auto& done = lasting_counter();
  std::vector<ImmCounter> counters;
  for (uint32_t i = 0; i < kWrites; ++i) counters.push_back(b.imm_counter(i));
  for (uint32_t i = 0; i < kWrites; ++i) a.write({source.get(), 0, remote.get(), 0, 4096, i}, &done);
  uint32_t seen = 0;
  bool overtaken = false;
  b.wait_until(
      [&] {
        seen = 0;
        for (uint32_t i = 0; i < kWrites; ++i) {
          seen += counters[i].value() > 0 ? 1 : 0;
          overtaken = overtaken || (counters[i].value() > 0 && seen <= i);
        }
        return seen == kWrites;
      },
      Clock::now() + 10s);
  EXPECT_TRUE(overtaken) << "it has no order";
  ASSERT_EQ(wait_done(a, done, kWrites), uint64_t{kWrites});
  EXPECT_GT(a.stats().backpressure, 0u) << "its queues are short";
  EXPECT_LE(a.details().nics[0].deepest, 64u);
  // Writes without bytes need memory that is there.
  b.drop(target);
  auto refused = a.write_future({nullptr, 0, remote.get(), 0, 0, 1});
  ASSERT_TRUE(
      a.wait_until([&] { return refused.wait_for(0s) == std::future_status::ready; }, Clock::now() + 10s));
  EXPECT_EQ(kind_of([&] { refused.get(); }), ErrorKind::kFabric);
}

TEST(Efa, AGreetingMayBeLost) {
  auto config = efa_like(3);
  config.sim.network = "lost greeting";
  config.sim.lose_messages = 1;
  TransferEngine a(config), b(config);
  auto source = a.allocate(64), target = b.allocate(64);
  auto write = a.write_future({source.get(), 0, a.open(target->descriptor()).get(), 0, 64, 1});
  ASSERT_EQ(write.wait_for(8s), std::future_status::ready) << "it is repeated after a second";
  write.get();
  b.imm_counter(1).wait(1);
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
    auto& done = lasting_counter();
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
