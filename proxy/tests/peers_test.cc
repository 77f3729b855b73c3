// Peers that fall silent, lose a cable or leave for good: nobody else suffers, and no memory is touched that
// its owner has been told is free.
#include <atomic>
#include <deque>
#include <thread>

#include "proxy/fabric/sim.h"
#include "proxy/tests/support.h"

namespace pplx::testing {
namespace {

EngineConfig sim_network(const std::string& network, size_t nics = 1) {
  EngineConfig config = local();
  config.fabric = "sim";
  config.sim.network = network;
  return nics > 1 ? with_nics(config, nics) : config;
}

// Takes nothing.
EngineConfig deaf(EngineConfig config) {
  config.sim.stall_every = 1;
  config.sim.stall_polls = UINT32_MAX;
  return config;
}

ErrorKind ends(pplx::TransferEngine& engine, std::future<void>& future, Duration limit = 10s) {
  engine.wait_until([&] { return future.wait_for(0s) == std::future_status::ready; },
                    Clock::now() + scaled(limit));
  if (future.wait_for(0s) != std::future_status::ready) {
    ADD_FAILURE() << "it has not ended";
    return ErrorKind::kRouting;
  }
  return kind_of([&] { future.get(); });
}

bool soon(pplx::TransferEngine& engine, const std::function<bool()>& ready, Duration limit = 10s) {
  return engine.wait_until(ready, Clock::now() + scaled(limit));
}

// Keeps an engine from all progress, as if its process were stopped: whoever tells a completion holds its
// lock.
class Frozen {
 public:
  explicit Frozen(TransferEngine& engine) {
    static auto* held = new std::deque<Holds>;  // sinks outlive all engines
    holds_ = &held->emplace_back();
    auto own = engine.allocate(8);
    engine.write({own.get(), 0, engine.open(own->descriptor()).get(), 0, 8, std::nullopt}, holds_);
    while (!holds_->begun) std::this_thread::sleep_for(1ms);
  }
  ~Frozen() { thaw(); }
  void thaw() { holds_->over = true; }

 private:
  struct Holds final : CompletionSink {
    void complete(const Error* /*error*/) noexcept override {
      begun = true;
      while (!over) std::this_thread::sleep_for(1ms);
    }
    std::atomic<bool> begun{false}, over{false};
  };
  Holds* holds_;
};

// Memory that says when it is given back.
struct Lent {
  explicit Lent(size_t size) : bytes(std::make_shared<std::vector<std::byte>>(size)), alive(bytes) {}
  std::shared_ptr<Region> with(pplx::TransferEngine& engine) {
    auto lent = std::exchange(bytes, nullptr);
    return engine.register_memory(lent->data(), lent->size(), lent);
  }
  std::shared_ptr<std::vector<std::byte>> bytes;
  std::weak_ptr<std::vector<std::byte>> alive;
};

// ---- the memory of operations that were given up
// -------------------------------------------------------------

class GivenUp : public ::testing::TestWithParam<FabricCase> {};

// Also for AddressSanitizer: what is late lands in the memory that it was given, or comes from there.
TEST_P(GivenUp, MemoryStaysUntilTheFabricIsDoneWithIt) {
  auto config = GetParam().config;
  config.timeout = scaled(1s);
  pplx::TransferEngine a(config);
  TransferEngine b(GetParam().config);
  const size_t kSize = GetParam().name == "tcp" ? 32 << 20 : 1 << 20;  // sockets hold a lot
  Lent lent(kSize);
  auto region = lent.with(a);
  auto remote = a.open(b.allocate(kSize)->descriptor());
  a.write_future({region.get(), 0, remote.get(), 0, 8, std::nullopt}).get();
  auto arrived = b.imm_counter(7);
  Frozen frozen(b);
  auto read = a.read_future({region.get(), 0, remote.get(), 0, kSize});
  auto written = a.write_future({region.get(), 0, remote.get(), 0, kSize, 7});
  EXPECT_EQ(kind_of([&] { read.get(); }), ErrorKind::kTimeout);
  EXPECT_EQ(kind_of([&] { written.get(); }), ErrorKind::kTimeout);
  region.reset();
  std::this_thread::sleep_for(50ms);
  EXPECT_FALSE(lent.alive.expired()) << "the fabric still reads and writes there";
  EXPECT_EQ(arrived.value(), 0u);
  frozen.thaw();
  ASSERT_TRUE(soon(b, [&] { return arrived.value() == 1; })) << "both land late";
  EXPECT_TRUE(soon(b, [&] { return lent.alive.expired(); })) << "and that is the end of it";
  EXPECT_EQ(a.details().registrations, 0u);
}

INSTANTIATE_TEST_SUITE_P(Fabrics, GivenUp,
                         ::testing::Values(FabricCase{"local", local()}, FabricCase{"sim", sim(1)},
                                           FabricCase{"tcp", provider("tcp")}),
                         case_name);

TEST(GivenUpMemory, MemoryOfAFailedPeersOperationsStaysUntilTheEngineCloses) {
  auto config = sim_network("failed");
  pplx::TransferEngine a(config);
  TransferEngine b(deaf(config));
  Lent lent(64);
  auto region = lent.with(a);
  auto remote = a.open(b.allocate(64)->descriptor());
  auto read = a.read_future({region.get(), 0, remote.get(), 0, 64});
  ASSERT_TRUE(soon(a, [&] { return a.details().peers[0].traffic.outstanding == 1; }));
  EXPECT_TRUE(a.remove_peer(b.address()));
  EXPECT_EQ(ends(a, read), ErrorKind::kPeer);
  region.reset();
  std::this_thread::sleep_for(50ms);
  EXPECT_FALSE(lent.alive.expired());
  a.close();
  EXPECT_TRUE(lent.alive.expired());
}

TEST(GivenUpMemory, MemoryComesBackWithTheNic) {
  auto config = sim_network("with the nic", 2);
  config.timeout = 100ms;
  pplx::TransferEngine a(config);
  TransferEngine b(deaf(config));
  Lent lent(64);
  auto region = lent.with(a);
  auto remote = a.open(b.allocate(64)->descriptor());
  auto first = a.write_future({region.get(), 0, remote.get(), 0, 64, std::nullopt});
  auto second = a.write_future({region.get(), 0, remote.get(), 0, 64, std::nullopt});
  EXPECT_EQ(ends(a, first), ErrorKind::kTimeout);
  EXPECT_EQ(ends(a, second), ErrorKind::kTimeout);
  region.reset();
  a.remove_nic(0);
  std::this_thread::sleep_for(50ms);
  EXPECT_FALSE(lent.alive.expired()) << "the other has one";
  a.close();
  EXPECT_TRUE(lent.alive.expired());
}

// ---- a NIC that takes everything and brings nothing
// ----------------------------------------------------------

TEST(Unplugged, ANicIsTakenOutWhenOthersGoOn) {
  for (const bool own : {true, false}) {
    auto config = sim_network("unplugged", 2);
    config.timeout = scaled(1s);
    TransferEngine a(config), b(config);
    auto source = a.allocate(64), target = b.allocate(64);
    auto remote = a.open(target->descriptor());
    auto write = [&] { return a.write_future({source.get(), 0, remote.get(), 0, 64, std::nullopt}); };
    for (int i = 0; i < 4; ++i) write().get();
    sim_unplug_nic("unplugged", own ? a.address() : b.address(), 1);
    std::vector<std::future<void>> writes;
    // The first ones may have come upon a peer that stopped in their midst: it takes what comes after them.
    for (int i = 0; i < 12; ++i) {
      if (i == 6) {
        for (auto& one : writes) soon(a, [&] { return one.wait_for(0s) == std::future_status::ready; });
        std::this_thread::sleep_for(50ms);
        EXPECT_EQ(a.details().peers[0].paths, 2u);
      }
      writes.push_back(write());
    }
    int late = 0;
    for (auto& one : writes) {
      try {
        soon(a, [&] { return one.wait_for(0s) == std::future_status::ready; });
        one.get();
      } catch (const Error& error) {
        EXPECT_EQ(error.kind(), ErrorKind::kTimeout) << error.what();
        ++late;
      }
    }
    EXPECT_EQ(late, 6);
    ASSERT_TRUE(soon(a, [&] { return a.details().peers[0].paths == 1; })) << "the path is taken out";
    for (int i = 0; i < 10; ++i) {
      auto one = write();
      EXPECT_NO_THROW(one.get()) << "nothing goes that way any more";
    }
  }
}

// Without any completion nobody knows whether it is the NIC or the peer.
TEST(Unplugged, ASilentPeerKeepsItsPaths) {
  auto config = sim_network("silent", 2);
  config.timeout = 100ms;
  TransferEngine a(config), b(deaf(config));
  auto source = a.allocate(64), target = b.allocate(64);
  auto remote = a.open(target->descriptor());
  for (int i = 0; i < 4; ++i) {
    auto write = a.write_future({source.get(), 0, remote.get(), 0, 64, std::nullopt});
    EXPECT_EQ(ends(a, write), ErrorKind::kTimeout);
  }
  EXPECT_EQ(a.details().peers[0].paths, 2u);
}

// The held part of a long write takes its path late, and its timeout is that of the whole.
TEST(Unplugged, APathIsNotJudgedByWhatHasJustTakenIt) {
  auto config = sim_network("late", 2);
  config.timeout = scaled(3s);
  TransferEngine a(config), b(config);
  constexpr size_t kSize = 1 << 20;
  auto source = a.allocate(kSize), target = b.allocate(kSize);
  auto remote = a.open(target->descriptor());
  const auto on_nic = [&](size_t nic) { return a.details().nics[nic].traffic.writes; };
  Frozen frozen(b);
  auto whole = a.write_future({source.get(), 0, remote.get(), 0, kSize, 7});
  std::this_thread::sleep_for(scaled(1s));
  ASSERT_EQ(on_nic(0) + on_nic(1), 1u) << "the part with the immediate waits for the other";
  const size_t second = on_nic(0) == 1 ? 1 : 0;
  sim_unplug_nic("late", b.address(), second);
  frozen.thaw();
  ASSERT_TRUE(soon(a, [&] { return on_nic(second) == 1; }));
  auto other = a.write_future({source.get(), 0, remote.get(), 0, 64, std::nullopt});
  other.get();
  EXPECT_EQ(ends(a, whole), ErrorKind::kTimeout);
  std::this_thread::sleep_for(50ms);
  EXPECT_EQ(a.details().peers[0].paths, 2u);
}

// The peer's last path goes with the NIC while an earlier lost one still has operations on that NIC.
TEST(Unplugged, WhatALostPathStillHoldsEndsWithItsNic) {
  auto config = sim_network("stranded");
  config.timeout = scaled(1s);
  pplx::TransferEngine a(config);
  TransferEngine b(sim_network("stranded", 2));
  Lent lent(64);
  auto region = lent.with(a);
  auto remote = a.open(b.allocate(64)->descriptor());
  auto& done = lasting_counter();
  sim_unplug_nic("stranded", b.address(), 1);
  uint64_t writes = 0;
  ASSERT_TRUE(soon(a, [&] {
    std::this_thread::sleep_for(5ms);
    a.write({region.get(), 0, remote.get(), 0, 64, std::nullopt}, &done);
    ++writes;
    return a.details().peers[0].paths == 1;
  }));
  EXPECT_GT(a.details().peers[0].traffic.outstanding, 0u);
  sim_break_nic("stranded", a.address(), 0, true);
  ASSERT_TRUE(soon(a, [&] { return done.done() == writes; }));
  region.reset();
  EXPECT_TRUE(soon(b, [&] { return lent.alive.expired(); })) << "the NIC is closed and holds nothing";
}

// ---- messages
// ------------------------------------------------------------------------------------------------

TEST(SilentPeers, DoNotKeepMessagesFromOthers) {
  auto config = sim_network("messages");
  TransferEngine a(config), healthy(config);
  std::vector<std::unique_ptr<TransferEngine>> silent;
  std::vector<std::future<void>> lost;
  for (int i = 0; i < 9; ++i) {
    silent.push_back(std::make_unique<TransferEngine>(deaf(config)));
    for (int message = 0; message < 20; ++message) lost.push_back(a.send(silent.back()->address(), {}));
  }
  const auto begin = Clock::now();
  for (int i = 0; i < 40; ++i) {
    const std::byte payload[1] = {static_cast<std::byte>(i)};
    a.send(healthy.address(), payload);
  }
  for (int i = 0; i < 40; ++i) {
    const Message message = healthy.recv(5s);
    ASSERT_EQ(message.payload.size(), 1u);
    EXPECT_EQ(message.payload[0], static_cast<std::byte>(i));
  }
  EXPECT_LT(Clock::now() - begin, scaled(5s)) << "long before the silent ones' timeout";
}

TEST(SilentPeers, DoNotKeepMessagesFromOthersOverManyNics) {
  auto config = sim_network("messages of nics", 3);
  TransferEngine a(config), healthy(config);
  a.remove_nic(0);
  std::vector<std::unique_ptr<TransferEngine>> silent;
  std::vector<std::future<void>> lost;
  for (int i = 0; i < 4; ++i) {
    silent.push_back(std::make_unique<TransferEngine>(deaf(config)));
    for (int message = 0; message < 20; ++message) lost.push_back(a.send(silent.back()->address(), {}));
  }
  for (int i = 0; i < 30; ++i) a.send(healthy.address(), {});
  for (int i = 0; i < 30; ++i) healthy.recv(5s);
}

// ---- peers that leave
// ----------------------------------------------------------------------------------------

class RemovedPeer : public PairTest {};

TEST_P(RemovedPeer, IsForgottenAndMayBeMetAnew) {
  auto source = a.allocate(4096), target = b.allocate(4096);
  auto remote = a.open(target->descriptor());
  a.write_future({source.get(), 0, remote.get(), 0, 4096, 1}).get();
  a.send(b.address(), {}).get();
  ASSERT_EQ(a.details().peers.size(), 1u);
  EXPECT_TRUE(a.remove_peer(b.address()));
  EXPECT_FALSE(a.remove_peer(b.address())) << "nothing is left of it";
  EXPECT_TRUE(a.details().peers.empty());
  auto refused = a.write_future({source.get(), 0, remote.get(), 0, 8, 1});
  EXPECT_EQ(ends(a, refused), ErrorKind::kPeer);
  std::this_thread::sleep_for(30ms);  // until the fabric has forgotten it, too
  std::optional<Error> failed;
  for (int attempt = 0; attempt < 100; ++attempt) {
    try {
      remote = a.open(target->descriptor());
      failed.reset();
      break;
    } catch (const Error& error) {
      failed = error;
      std::this_thread::sleep_for(20ms);
    }
  }
  ASSERT_FALSE(failed) << failed->what();
  fill_random(source->data(), source->size(), 1);
  auto again = a.write_future({source.get(), 0, remote.get(), 0, 4096, 2});
  b.imm_counter(2).wait(1);
  EXPECT_EQ(std::memcmp(source->data(), target->data(), source->size()), 0);
  again.get();
  a.send(b.address(), {}).get();
  b.recv();
  b.recv();
}

// Whatever is under way then: it ends, and everything else goes on.
TEST_P(RemovedPeer, EndsWhatIsUnderWayAndHarmsNobodyElse) {
  pplx::TransferEngine third(GetParam().config);
  std::vector<std::byte> there(4096);
  auto other = third.register_memory(there.data(), there.size());
  auto source = a.allocate(4096), target = b.allocate(4096);
  auto remote = a.open(target->descriptor());
  auto elsewhere = a.open(other->descriptor());
  auto& mine = lasting_counter();
  auto& others = lasting_counter();
  constexpr uint64_t kWrites = 40;
  for (uint64_t i = 0; i < kWrites; ++i) {
    a.write({source.get(), 0, remote.get(), 0, 4096, 1}, &mine);
    a.write({source.get(), 0, elsewhere.get(), 0, 4096, 1}, &others);
    if (i != kWrites / 2) continue;
    EXPECT_TRUE(a.remove_peer(b.address()));
  }
  EXPECT_EQ(wait_done(a, mine, kWrites), kWrites);
  EXPECT_EQ(wait_done(a, others, kWrites), kWrites);
  EXPECT_GE(mine.failed(), kWrites / 2 - 1);
  EXPECT_EQ(others.failed(), 0u);
  EXPECT_EQ(mine.error()->kind(), ErrorKind::kPeer) << mine.error()->what();
  third.imm_counter(1).wait(kWrites);
}

INSTANTIATE_TEST_SUITE_P(Fabrics, RemovedPeer, ::testing::ValuesIn(all_fabrics()), case_name);

TEST(RemovedPeers, LeaveRoomForNewSenders) {
  auto config = sim_network("come and go", 2);
  TransferEngine a(config);
  for (int i = 0; i < 50; ++i) {
    TransferEngine guest(config);
    guest.send(a.address(), {}).get();
    a.recv();
    EXPECT_TRUE(a.remove_peer(guest.address())) << "its messages were remembered";
    EXPECT_FALSE(a.remove_peer(guest.address()));
  }
  EXPECT_EQ(kind_of([&] { a.remove_peer(Address(Bytes(3))); }), ErrorKind::kInvalidArgument);
}

// One NIC may need longer than another to forget it.
TEST(RemovedPeers, AreMetAnewOnAllPaths) {
  auto config = sim_network("anew", 2);
  TransferEngine b(config);
  config.sim.leave_polls = 64;
  TransferEngine a(config);
  auto target = b.allocate(64);
  int refused = 0;
  for (int round = 0; round < 20; ++round) {
    std::shared_ptr<RemoteRegion> remote;
    const auto limit = Clock::now() + scaled(10s);
    while (remote == nullptr && Clock::now() < limit) {
      try {
        remote = a.open(target->descriptor());
      } catch (const Error& error) {
        ASSERT_EQ(error.kind(), ErrorKind::kPeer) << error.what();
        ++refused;
        a.progress();
      }
    }
    ASSERT_NE(remote, nullptr);
    ASSERT_EQ(a.details().peers.size(), 1u);
    EXPECT_EQ(a.details().peers[0].paths, 2u) << round;
    EXPECT_TRUE(a.remove_peer(b.address()));
    std::this_thread::sleep_for(11ms);  // until the fabric is told
  }
  EXPECT_GT(refused, 0);
}

}  // namespace
}  // namespace pplx::testing
