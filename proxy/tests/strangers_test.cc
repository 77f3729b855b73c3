// What comes from those who are no engines of this job, or not sound ones.
#include "proxy/tests/stranger.h"

namespace pplx::testing {
namespace {

TEST(Strangers, CannotFillMemoryWithBarriers) {
  TransferEngine engine(local());
  Stranger stranger(engine);
  ByteWriter out;
  out.put(uint64_t{1});  // group
  out.put(uint32_t{0});  // generation
  out.put(uint64_t{1});  // number
  const Bytes body = out.take();
  constexpr uint32_t kLimit = 65536, kMore = 10;
  for (uint32_t i = 0; i < kLimit + kMore; ++i) stranger.send(nth(stranger.address(), i), kBarrier, body);
  ASSERT_TRUE(engine.wait_until([&] { return engine.stats().errors >= kMore; }, Clock::now() + 10s));
  EXPECT_EQ(engine.stats().errors, kMore);
  stranger.send(nth(stranger.address(), 3), kBarrier, body);  // known already
  stranger.send(stranger.address(), kUser, {});
  engine.recv();
  EXPECT_EQ(engine.stats().errors, kMore);
}

TEST(Strangers, MessagesThatComeTwiceCountOnce) {
  TransferEngine engine(local());
  Stranger stranger(engine);
  for (uint64_t number : {1, 2, 2, 1, 9000, 9000, 3, 4}) {
    stranger.send(stranger.address(), kUser, Bytes(static_cast<size_t>(number % 100)), number);
  }
  // Senders keep within 4096 numbers, so that 20000 says that whatever is missing so far will never come.
  for (uint64_t number = 20000; number < 30000; ++number) {
    stranger.send(stranger.address(), kBarrier, {}, number);  // malformed, which is what they are
  }
  stranger.send(stranger.address(), kUser, Bytes(77), 5);
  stranger.send(stranger.address(), kUser, Bytes(78), 30000);
  std::vector<size_t> sizes;
  for (int i = 0; i < 6; ++i) sizes.push_back(engine.recv().payload.size());
  EXPECT_EQ(sizes, (std::vector<size_t>{1, 2, 0, 3, 4, 78}));
}

// A pool's place is for those whom it can answer.
TEST(Strangers, WhoCannotBeAnsweredGetsNoBuffer) {
  TransferEngine engine(local()), friendly(local());
  auto pool = engine.receive_pool({.buffer_bytes = 64, .buffers = 1, .max_waiting = 1});
  auto remote = friendly.open(pool->descriptor());
  Stranger stranger(engine);
  PeerAddress elsewhere = stranger.address();
  elsewhere.fabric = "libfabric";
  ByteWriter out;
  out.put(uint64_t{1});  // the pool
  out.put(uint64_t{1});  // request
  out.put(uint64_t{8});  // length
  out.text("");
  const Bytes announce = out.take();
  for (int i = 0; i < 5; ++i) stranger.send(elsewhere, kPoolAnnounce, announce);
  ASSERT_TRUE(engine.wait_until([&] { return engine.stats().errors == 5; }, Clock::now() + 10s));
  EXPECT_EQ(pool->free_buffers(), 1u);
  EXPECT_EQ(pool->waiting(), 0u);
  auto& done = lasting_counter();
  std::shared_ptr<Region> source = friendly.allocate(64);
  friendly.send(*remote, source, 0, 64, &done);
  pool->release(pool->recv().buffer);
  EXPECT_EQ(wait_done(friendly, done, 1), 1u);
  EXPECT_EQ(done.failed(), 0u);
}

TEST(Strangers, QuestionsAboutNicsAreChecked) {
  TransferEngine engine(local());
  Stranger stranger(engine);
  auto ask = [&](uint8_t its_nic, uint8_t our_nic) {
    ByteWriter out;
    out.put(uint64_t{1});
    out.put(its_nic);
    out.put(our_nic);
    stranger.send(stranger.address(), kAsk, out.take());
  };
  ask(0, 1);
  ask(1, 0);
  ask(0, 0);  // answered: it cannot tell
  stranger.send(stranger.address(), kVerdict, Bytes(3));
  ASSERT_TRUE(engine.wait_until([&] { return engine.stats().errors >= 3; }, Clock::now() + 10s));
  stranger.send(stranger.address(), kUser, {});
  engine.recv();
  EXPECT_EQ(engine.stats().errors, 3u);
}

TEST(Strangers, OfAnotherJobAreDropped) {
  EngineConfig config = local();
  config.job = "mine";
  TransferEngine engine(config);
  Stranger stranger(engine);
  stranger.send(stranger.address(), kUser, {});
  ASSERT_TRUE(engine.wait_until([&] { return engine.stats().errors == 1; }, Clock::now() + 10s));
  EXPECT_EQ(kind_of([&] { engine.recv(20ms); }), ErrorKind::kTimeout);
  PeerAddress member = stranger.address();
  member.job = job_hash("mine");
  stranger.send(member, kUser, {});
  engine.recv();
}

class JobTest : public ::testing::TestWithParam<FabricCase> {};

TEST_P(JobTest, EnginesOfDifferentJobsRefuseEachOther) {
  auto config = GetParam().config;
  config.job = "one";
  TransferEngine a(config), same(config);
  if (shm_needs_processes(a)) GTEST_SKIP() << a.fabric_name();
  config.job = "another";
  TransferEngine b(config);
  config.job = "";
  TransferEngine none(config);
  auto at_same = same.allocate(64), at_b = b.allocate(64), at_none = none.allocate(64),
       source = a.allocate(64);
  auto refused = [&](auto&& call, const TransferEngine& other) {
    try {
      call();
      ADD_FAILURE() << "it was let in";
    } catch (const Error& error) {
      const std::string text = error.what();
      EXPECT_EQ(error.kind(), ErrorKind::kPeer) << text;
      EXPECT_NE(text.find("different jobs"), std::string::npos) << text;
      for (const TransferEngine* side : std::initializer_list<const TransferEngine*>{&a, &other}) {
        EXPECT_NE(text.find(decode_address(side->address().bytes()).label()), std::string::npos) << text;
      }
    }
  };
  refused([&] { a.open(at_b->descriptor()); }, b);
  refused([&] { a.open(at_none->descriptor()); }, none);
  refused([&] { a.send(b.address(), {}); }, b);
  refused([&] { b.send(a.address(), {}); }, b);
  refused([&] { a.peer_group({a.address(), b.address()}, 1); }, b);
  a.write_future({source.get(), 0, a.open(at_same->descriptor()).get(), 0, 64, 1}).get();
  same.imm_counter(1).wait(1);
}

INSTANTIATE_TEST_SUITE_P(Fabrics, JobTest, ::testing::ValuesIn(all_fabrics()), case_name);

}  // namespace
}  // namespace pplx::testing
