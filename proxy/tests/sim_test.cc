// The simulated fabric itself: that it disorders, pushes back and loses peers as asked.
#include "proxy/fabric/sim.h"

#include <atomic>
#include <map>
#include <thread>

#include "proxy/tests/support.h"

namespace pplx::testing {
namespace {

// The order in which 64 writes arrive; counters are looked at after every single poll.
std::vector<uint32_t> arrival_order(const EngineConfig& config) {
  constexpr uint32_t kWrites = 64;
  TransferEngine a(config), b(config);
  auto source = a.allocate(4096), target = b.allocate(4096);
  auto remote = a.open(target->descriptor());
  auto& done = lasting_counter();
  std::vector<ImmCounter> counters;
  for (uint32_t i = 0; i < kWrites; ++i) counters.push_back(b.imm_counter(i));
  for (uint32_t i = 0; i < kWrites; ++i) a.write({source.get(), 0, remote.get(), 0, 4096, i}, &done);
  std::vector<uint32_t> order;
  std::vector<bool> seen(kWrites);
  b.wait_until(
      [&] {
        for (uint32_t i = 0; i < kWrites; ++i) {
          if (!seen[i] && counters[i].value() > 0) order.push_back(i), seen[i] = true;
        }
        return order.size() == kWrites;
      },
      Clock::now() + 10s);
  wait_done(a, done, kWrites);
  return order;
}

TEST(Sim, DisordersAsTheSeedSays) {
  auto config = sim(11);
  config.sim.max_delay = 50;
  auto order = arrival_order(config);
  ASSERT_EQ(order.size(), 64u);
  EXPECT_FALSE(std::is_sorted(order.begin(), order.end()));
}

TEST(Sim, PushesBack) {
  auto config = local();
  config.sim.queue_depth = 4;
  TransferEngine a(config), b(config);
  auto source = a.allocate(8), target = b.allocate(8);
  auto remote = a.open(target->descriptor());
  auto& done = lasting_counter();
  for (int i = 0; i < 1000; ++i) a.write({source.get(), 0, remote.get(), 0, 8, 1}, &done);
  EXPECT_EQ(wait_arrived(a, b, 1, 1000), 1000u);
  EXPECT_EQ(wait_done(a, done, 1000), 1000u);
  EXPECT_EQ(done.failed(), 0u);
  EXPECT_GT(a.stats().backpressure, 0u);
}

// Of the tests themselves: one that fails half way leaves writes that the workers go on with.
TEST(Support, WhatATestLeavesBehindIsSafe) {
  auto config = sim(1);
  config.sim.queue_depth = 4;
  TransferEngine a(config), b(config);
  constexpr uint64_t kWrites = 300;
  const pplx::CompletionCounter* left = nullptr;
  {
    auto source = a.allocate(1 << 16), target = b.allocate(1 << 16);
    auto remote = a.open(target->descriptor());
    auto& done = lasting_counter();
    for (uint64_t i = 0; i < kWrites; ++i) a.write({source.get(), 0, remote.get(), 0, 1 << 16, 1}, &done);
    left = &done;
  }
  EXPECT_EQ(wait_arrived(a, b, 1, kWrites), kWrites);
  EXPECT_EQ(wait_done(a, *left, kWrites), kWrites);
  EXPECT_EQ(left->failed(), 0u);
}

TEST(Sim, DeadPeerFailsItsWritesOnly) {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    auto config = sim(seed);
    config.sim.network = "dying";
    config.sim.max_delay = 20;
    TransferEngine a(config), b(config), c(config);
    auto source = a.allocate(4096), at_b = b.allocate(4096), at_c = c.allocate(4096);
    auto to_b = a.open(at_b->descriptor()), to_c = a.open(at_c->descriptor());
    auto& done_b = lasting_counter();
    auto& done_c = lasting_counter();
    for (int i = 0; i < 20; ++i) {
      a.write({source.get(), 0, to_b.get(), 0, 4096, 1}, &done_b);
      a.write({source.get(), 0, to_c.get(), 0, 4096, 1}, &done_c);
    }
    sim_drop_peer("dying", b.address());
    a.write({source.get(), 0, to_b.get(), 0, 4096, 1}, &done_b);
    ASSERT_EQ(wait_done(a, done_b, 21), 21u);
    ASSERT_GE(done_b.failed(), 1u);
    EXPECT_EQ(done_b.error()->kind(), ErrorKind::kPeer);
    c.imm_counter(1).wait(20);
    ASSERT_EQ(wait_done(a, done_c, 20), 20u);
    EXPECT_EQ(done_c.failed(), 0u);

    auto from_b = b.write_future({at_b.get(), 0, b.open(source->descriptor()).get(), 0, 8, 5});
    EXPECT_EQ(from_b.wait_for(5ms), std::future_status::timeout) << "what a dead peer writes vanishes";
    EXPECT_EQ(a.imm_counter(5).value(), 0u);
    b.close();
    EXPECT_THROW(from_b.get(), Error);
  }
}

TEST(Sim, OutstandingWritesTimeOut) {
  auto config = local();
  config.sim.network = "silent";
  config.timeout = 100ms;
  TransferEngine a(config), b(config);
  auto source = a.allocate(8), target = b.allocate(8);
  auto remote = a.open(target->descriptor());
  sim_drop_peer("silent", a.address());
  auto future = a.write_future({source.get(), 0, remote.get(), 0, 8, 1});
  ASSERT_EQ(future.wait_for(5s), std::future_status::ready);
  EXPECT_EQ(kind_of([&] { future.get(); }), ErrorKind::kTimeout);
}

// Memory that only a copy of the caller's own reaches, as a GPU's.
TEST(Sim, MovesDeviceMemoryAsTold) {
  auto config = sim(3);
  std::atomic<uint64_t> copied = 0;
  config.sim.copy = [&](void* to, const void* from, size_t bytes) {
    copied += bytes;
    std::memcpy(to, from, bytes);
  };
  EXPECT_FALSE(TransferEngine(sim(3)).takes_device_memory());
  std::vector<std::byte> from(1000, std::byte{7}), to(1000);
  TransferEngine a(config), b(config);
  EXPECT_TRUE(a.takes_device_memory());
  auto source = a.register_memory(DeviceMemory{.data = from.data(), .size = from.size()});
  auto target = b.register_memory(DeviceMemory{.data = to.data(), .size = to.size()});
  auto remote = a.open(target->descriptor());
  auto& done = lasting_counter();
  a.write({source.get(), 100, remote.get(), 200, 500, 1}, &done);
  b.imm_counter(1).wait(1);
  EXPECT_EQ(wait_done(a, done, 1), 1u);
  EXPECT_EQ(copied, 500u);
  for (size_t i = 0; i < to.size(); ++i) ASSERT_EQ(to[i], std::byte(i >= 200 && i < 700 ? 7 : 0)) << i;
}

TEST(Sim, CloseFromACallback) {
  std::promise<void> closed;
  auto a = std::make_unique<TransferEngine>(local());
  TransferEngine b(local());
  auto source = a->allocate(8), target = b.allocate(8);
  auto remote = a->open(target->descriptor());
  a->write_callback({source.get(), 0, remote.get(), 0, 8, 1}, [&](const Error*) {
    a->close();
    closed.set_value();
  });
  ASSERT_EQ(closed.get_future().wait_for(10s), std::future_status::ready);
  EXPECT_TRUE(a->closed());
}

}  // namespace
}  // namespace pplx::testing
