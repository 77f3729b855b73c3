// What fabric "verbs" does beyond what every fabric does. Needs an RDMA device: tests/soft_roce makes one.
#include "proxy/fabric/verbs.h"

#include <unistd.h>

#include <thread>

#include "proxy/tests/support.h"

namespace pplx::testing {
namespace {

class VerbsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (auto why = no_verbs()) GTEST_SKIP() << *why;
  }
};

// Waits for a future while both engines move on.
std::optional<Error> outcome(TransferEngine& engine, std::future<void> future, Duration limit = 20s) {
  engine.wait_until([&] { return future.wait_for(0s) == std::future_status::ready; },
                    Clock::now() + scaled(limit));
  if (future.wait_for(0s) != std::future_status::ready) return Error(ErrorKind::kTimeout, "still under way");
  try {
    future.get();
    return std::nullopt;
  } catch (const Error& error) {
    return error;
  }
}

TEST_F(VerbsTest, NamesItsPortAndGid) {
  TransferEngine engine(verbs());
  EXPECT_NE(engine.fabric_name().find("verbs:" + verbs_ports().front()), std::string::npos)
      << engine.fabric_name();
}

TEST_F(VerbsTest, DevicesPortsAndGidsAreChosen) {
  const std::string port = verbs_ports().front();
  auto config = verbs();
  config.nic = port;
  EXPECT_NO_THROW(TransferEngine{config});
  config.nic = port.substr(0, port.find(':'));
  EXPECT_NO_THROW(TransferEngine{config});
  const auto refused = [](const EngineConfig& bad, ErrorKind kind, const std::string& text) {
    try {
      TransferEngine engine(bad);
      ADD_FAILURE() << text << " was taken";
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), kind) << error.what();
      EXPECT_NE(std::string(error.what()).find(text), std::string::npos) << error.what();
    }
  };
  config.nic = "no_such_device";
  refused(config, ErrorKind::kFabric, "no_such_device");
  config.nic = port + "x";
  refused(config, ErrorKind::kInvalidArgument, "names no RDMA device");
  config = verbs();
  config.verbs.gid_index = 255;
  refused(config, ErrorKind::kFabric, "index 255");
  config.verbs.gid_index = 256;
  refused(config, ErrorKind::kInvalidArgument, "gid_index");
  config = verbs();
  config.bind_address = "192.0.2.77";
  refused(config, ErrorKind::kFabric, "192.0.2.77");
  config = verbs();
  config.verbs.traffic_class = 256;
  refused(config, ErrorKind::kInvalidArgument, "traffic_class");
}

// Two NICs of one engine are two ends of one port here. What was under way on the one that goes is settled
// with the peer, and what had not arrived goes over the other.
TEST_F(VerbsTest, ALostNicLosesNothingAndRepeatsNothing) {
  for (uint64_t round = 0; round < 4; ++round) {
    auto& done = lasting_counter();
    TransferEngine a(with_nics(verbs(), 2)), b(with_nics(verbs(), 2));
    constexpr size_t kWrites = 200, kSize = 5000;
    auto source = a.allocate(kWrites * kSize), target = b.allocate(kWrites * kSize);
    fill_random(source->data(), source->size(), round);
    auto remote = a.open(target->descriptor());
    auto write = [&](size_t i) {
      a.write({source.get(), i * kSize, remote.get(), i * kSize, kSize, 7}, &done);
    };
    for (size_t i = 0; i < kWrites / 2; ++i) write(i);
    wait_done(a, done, 5 + round * 10);  // some are through, others under way
    (round % 2 == 0 ? a : b).remove_nic(round / 2);
    for (size_t i = kWrites / 2; i < kWrites; ++i) write(i);
    ASSERT_EQ(wait_done(a, done, kWrites), kWrites);
    ASSERT_EQ(done.failed(), 0U) << done.error()->what();
    b.imm_counter(7).wait(kWrites);
    std::this_thread::sleep_for(50ms);
    EXPECT_EQ(b.imm_counter(7).value(), kWrites);
    EXPECT_EQ(std::memcmp(target->data(), source->data(), source->size()), 0);
  }
}

TEST_F(VerbsTest, AnEngineThatIsGoneIsNamedWithinTheTimeout) {
  auto config = verbs();
  config.verbs.connect_timeout = scaled(500ms);
  TransferEngine a(config);
  auto source = a.allocate(64);
  auto b = std::make_unique<TransferEngine>(config);
  const auto target = b->allocate(64)->descriptor();
  b.reset();
  auto remote = a.open(target);
  const auto started = Clock::now();
  const auto error = outcome(a, a.write_future({source.get(), 0, remote.get(), 0, 64, 1}));
  ASSERT_TRUE(error);
  EXPECT_EQ(error->kind(), ErrorKind::kPeer) << error->what();
  EXPECT_LT(Clock::now() - started, scaled(5s));
}

TEST_F(VerbsTest, AClosedPeerIsKnownAtOnce) {
  TransferEngine a(verbs());
  auto b = std::make_unique<TransferEngine>(verbs());
  auto source = a.allocate(64);
  auto target = b->allocate(64);
  auto remote = a.open(target->descriptor());
  ASSERT_FALSE(outcome(a, a.write_future({source.get(), 0, remote.get(), 0, 64, 1})));
  b->close();
  std::this_thread::sleep_for(50ms);
  const auto error = outcome(a, a.write_future({source.get(), 0, remote.get(), 0, 64, 1}));
  ASSERT_TRUE(error);
  EXPECT_EQ(error->kind(), ErrorKind::kPeer);
  EXPECT_NE(std::string(error->what()).find("closed its engine"), std::string::npos) << error->what();
}

// A refused write stops its queue pair. What was behind it goes over the next one, exactly once.
TEST_F(VerbsTest, ReconnectsAfterARefusedWrite) {
  TransferEngine a(verbs()), b(verbs());
  constexpr size_t kWrites = 40, kSize = 3000;
  auto source = a.allocate(kWrites * kSize);
  fill_random(source->data(), source->size(), 1);
  auto target = b.allocate(kWrites * kSize);
  auto remote = a.open(target->descriptor());
  for (int round = 1; round <= 3; ++round) {
    std::memset(target->data(), 0, target->size());
    auto doomed = b.allocate(kSize);
    auto to_doomed = a.open(doomed->descriptor());
    b.drop(doomed);
    auto& before = lasting_counter();
    auto& after = lasting_counter();
    auto write = [&](size_t i, pplx::CompletionCounter& done) {
      a.write({source.get(), i * kSize, remote.get(), i * kSize, kSize, 7}, &done);
    };
    for (size_t i = 0; i < kWrites / 2; ++i) write(i, before);
    auto refused = a.write_future({source.get(), 0, to_doomed.get(), 0, kSize, 9});
    for (size_t i = kWrites / 2; i < kWrites; ++i) write(i, after);
    const auto error = outcome(a, std::move(refused));
    ASSERT_TRUE(error);
    EXPECT_EQ(error->kind(), ErrorKind::kFabric) << error->what();
    EXPECT_NE(std::string(error->what()).find(std::to_string(getpid())), std::string::npos) << error->what();
    ASSERT_EQ(wait_done(a, before, kWrites / 2), kWrites / 2);
    ASSERT_EQ(wait_done(a, after, kWrites / 2), kWrites / 2);
    EXPECT_EQ(before.failed(), 0U) << before.error()->what();
    EXPECT_EQ(after.failed(), 0U) << after.error()->what();
    b.imm_counter(7).wait(kWrites * static_cast<uint64_t>(round));
    EXPECT_EQ(std::memcmp(target->data(), source->data(), source->size()), 0);
    EXPECT_EQ(b.imm_counter(7).value(), kWrites * static_cast<uint64_t>(round));
    EXPECT_EQ(b.imm_counter(9).value(), 0U);
  }
}

// One engine stays while others come, write, are written to, and go.
TEST_F(VerbsTest, PeersComeAndGo) {
  TransferEngine stays(verbs());
  auto at_home = stays.allocate(64);
  for (uint64_t round = 1; round <= 5; ++round) {
    TransferEngine guest(verbs());
    auto source = guest.allocate(64);
    auto remote = guest.open(at_home->descriptor());
    ASSERT_FALSE(outcome(guest, guest.write_future({source.get(), 0, remote.get(), 0, 64, 1})));
    stays.imm_counter(1).wait(round);
    if (round % 2 == 0) continue;  // with every other one the stayer never connects itself
    auto back = stays.open(source->descriptor());
    ASSERT_FALSE(outcome(stays, stays.write_future({at_home.get(), 0, back.get(), 0, 64, 2})));
    guest.imm_counter(2).wait(1);
  }
}

TEST_F(VerbsTest, BothSidesBeginAtOnce) {
  for (int round = 0; round < 5; ++round) {
    TransferEngine a(verbs(2)), b(verbs(2));
    auto at_a = a.allocate(4096), at_b = b.allocate(4096);
    auto to_b = a.open(at_b->descriptor()), to_a = b.open(at_a->descriptor());
    auto other = std::async(std::launch::async, [&] {
      for (int i = 0; i < 20; ++i) b.write({at_b.get(), 0, to_a.get(), 0, 64, 2});
      b.imm_counter(1).wait(20);
    });
    for (int i = 0; i < 20; ++i) a.write({at_a.get(), 0, to_b.get(), 0, 64, 1});
    a.imm_counter(2).wait(20);
    other.get();
  }
}

}  // namespace
}  // namespace pplx::testing
