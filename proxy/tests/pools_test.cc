// Receive pools whose senders give up, die, or do not keep to the protocol.
#include "proxy/tests/stops.h"
#include "proxy/tests/stranger.h"

namespace pplx::testing {
namespace {

EngineConfig with_timeout(Duration timeout) {
  EngineConfig config = local();
  config.timeout = timeout;
  return config;
}

Bytes words(std::initializer_list<uint64_t> values) {
  ByteWriter out;
  for (uint64_t value : values) out.put(value);
  out.text("");
  return out.take();
}

uint64_t word(const Bytes& body, size_t index) {
  ByteReader in(body, "body");
  for (size_t i = 0; i < index; ++i) in.get<uint64_t>();
  return in.get<uint64_t>();
}

// The first pool of an engine.
constexpr uint64_t kPool = 1;

// Whatever was promised to a sender that has given up comes back.
TEST(Pools, WhoGivesUpLeavesNothingBehind) {
  TransferEngine a(with_timeout(scaled(200ms))), b(local());
  auto pool = b.receive_pool({.buffer_bytes = 64, .buffers = 1});
  auto remote = a.open(pool->descriptor());
  std::shared_ptr<Region> source = a.allocate(64);
  auto& first = lasting_counter();
  a.send(*remote, source, 0, 64, &first);
  const auto held = pool->recv();
  for (int round = 0; round < 3; ++round) {
    auto& late = lasting_counter();
    a.send(*remote, source, 0, 64, &late);
    ASSERT_EQ(wait_done(a, late, 1), 1u);
    ASSERT_EQ(late.failed(), 1u);
    EXPECT_EQ(late.error()->kind(), ErrorKind::kTimeout);
  }
  ASSERT_TRUE(b.wait_until([&] { return pool->waiting() == 0; }, Clock::now() + scaled(10s)));
  pool->release(held.buffer);
  EXPECT_EQ(pool->free_buffers(), 1u);
  auto& last = lasting_counter();
  a.send(*remote, source, 0, 64, &last);
  pool->release(pool->recv().buffer);
  ASSERT_EQ(wait_done(a, last, 1), 1u);
  EXPECT_EQ(last.failed(), 0u) << last.error()->what();
}

// A stop of both sides, while one message waits for a buffer, is not the time that it may wait.
TEST(Pools, AStopOfThisProcessDoesNotCount) {
  EXPECT_TRUE(through_stops(3s, [] {
    TransferEngine a(with_timeout(2s)), b(with_timeout(2s));
    auto pool = b.receive_pool({.buffer_bytes = 64, .buffers = 1});
    auto remote = a.open(pool->descriptor());
    std::shared_ptr<Region> source = a.allocate(64);
    auto &first = lasting_counter(), &second = lasting_counter();
    a.send(*remote, source, 0, 64, &first);
    const auto held = pool->recv();
    a.send(*remote, source, 0, 64, &second);
    std::this_thread::sleep_for(200ms);
    raise(SIGSTOP);
    std::this_thread::sleep_for(100ms);  // both workers have looked at what is late
    pool->release(held.buffer);
    pool->release(pool->recv().buffer);
    return wait_done(a, second, 1) == 1 && second.failed() == 0 && pool->lost() == 0;
  }));
}

// The grant and the sender's timeout may cross.
TEST(Pools, AGrantThatComesTooLateIsReturned) {
  TransferEngine engine(local());
  Stranger stranger(engine);
  stranger.send(kPoolGrant, words({77, 0}));
  EXPECT_EQ(word(stranger.expect(kPoolReturned), 0), 77u);

  auto pool = engine.receive_pool({.buffer_bytes = 64, .buffers = 1});
  const auto remote = engine.open(pool->descriptor());
  stranger.send(kPoolAnnounce, words({kPool, 1, 8}));
  EXPECT_EQ(word(stranger.expect(kPoolGrant), 1), 0u);
  EXPECT_EQ(pool->free_buffers(), 0u);
  auto& done = lasting_counter();
  std::shared_ptr<Region> source = engine.allocate(64);
  engine.send(*remote, source, 0, 64, &done);
  stranger.send(kPoolReturned, words({1}));
  pool->release(pool->recv().buffer);  // whoever waited has it
  EXPECT_EQ(wait_done(engine, done, 1), 1u);
  stranger.send(kPoolReturned, words({1}));
  stranger.send(kPoolFilled, words({kPool, 1}));
  stranger.send(kUser, {});
  engine.recv();
  EXPECT_EQ(pool->free_buffers(), 1u) << "and nobody has it twice";
}

TEST(Pools, TheSameRequestGetsOneBuffer) {
  TransferEngine engine(local());
  auto pool = engine.receive_pool({.buffer_bytes = 64, .buffers = 2});
  Stranger stranger(engine);
  for (int i = 0; i < 3; ++i) stranger.send(kPoolAnnounce, words({kPool, 1, 8}));
  ASSERT_TRUE(engine.wait_until([&] { return engine.stats().errors == 2; }, Clock::now() + scaled(10s)));
  EXPECT_EQ(pool->free_buffers(), 1u);
  stranger.send(kPoolAnnounce, words({kPool, 2, 8}));
  for (int i = 0; i < 3; ++i) stranger.send(kPoolAnnounce, words({kPool, 3, 8}));
  ASSERT_TRUE(engine.wait_until([&] { return engine.stats().errors == 4; }, Clock::now() + scaled(10s)));
  EXPECT_EQ(pool->waiting(), 1u);
  stranger.send(kPoolFilled, words({kPool, 1}));
  pool->release(pool->recv().buffer);
  EXPECT_EQ(pool->waiting(), 0u);
}

// Senders that die after their grant take their buffers with them. Everybody is told when that was the last.
TEST(Pools, AllBuffersLostIsAnErrorOnBothSides) {
  TransferEngine engine(with_timeout(scaled(100ms))), friendly(local());
  auto pool = engine.receive_pool({.buffer_bytes = 64, .buffers = 2});
  auto remote = friendly.open(pool->descriptor());
  std::shared_ptr<Region> source = friendly.allocate(64);
  Stranger dead(engine);
  for (uint64_t request : {1, 2}) {
    dead.send(kPoolAnnounce, words({kPool, request, 8}));
    dead.expect(kPoolGrant);
  }
  const auto refused = [&](const pplx::CompletionCounter& counter) {
    ASSERT_EQ(wait_done(friendly, counter, 1), 1u);
    ASSERT_EQ(counter.failed(), 1u);
    EXPECT_EQ(counter.error()->kind(), ErrorKind::kFabric);
    EXPECT_NE(std::string(counter.error()->what()).find("died or failed"), std::string::npos)
        << counter.error()->what();
  };
  auto& waited = lasting_counter();
  friendly.send(*remote, source, 0, 64, &waited);
  // Long before the deadline.
  EXPECT_EQ(kind_of([&] { pool->recv(scaled(60s)); }), ErrorKind::kFabric);
  EXPECT_EQ(pool->lost(), 2u);
  refused(waited);
  auto& later = lasting_counter();
  friendly.send(*remote, source, 0, 64, &later);
  refused(later);
  EXPECT_EQ(pool->waiting(), 0u);
  // One was slow only.
  dead.send(kPoolFilled, words({kPool, 1}));
  pool->release(pool->recv(scaled(10s)).buffer);
  EXPECT_EQ(pool->lost(), 1u);
  auto& good = lasting_counter();
  friendly.send(*remote, source, 0, 64, &good);
  pool->release(pool->recv(scaled(10s)).buffer);
  ASSERT_EQ(wait_done(friendly, good, 1), 1u);
  EXPECT_EQ(good.failed(), 0u);
}

// What a dead sender has announced besides would cost one buffer after another.
TEST(Pools, TheDeadLoseTheirPlacesInTheQueue) {
  TransferEngine engine(with_timeout(scaled(100ms))), friendly(local());
  auto pool = engine.receive_pool({.buffer_bytes = 64, .buffers = 2});
  auto remote = friendly.open(pool->descriptor());
  std::shared_ptr<Region> source = friendly.allocate(64);
  auto& first = lasting_counter();
  friendly.send(*remote, source, 0, 64, &first);
  const auto held = pool->recv(scaled(10s));
  Stranger dead(engine);
  for (uint64_t request = 1; request <= 5; ++request) dead.send(kPoolAnnounce, words({kPool, request, 8}));
  dead.expect(kPoolGrant);
  auto& waited = lasting_counter();
  friendly.send(*remote, source, 0, 64, &waited);
  ASSERT_TRUE(engine.wait_until([&] { return pool->lost() == 1; }, Clock::now() + scaled(10s)));
  EXPECT_EQ(pool->waiting(), 1u) << "only the living are left";
  pool->release(held.buffer);
  pool->release(pool->recv(scaled(10s)).buffer);
  ASSERT_EQ(wait_done(friendly, waited, 1), 1u);
  EXPECT_EQ(waited.failed(), 0u) << waited.error()->what();
  EXPECT_EQ(pool->lost(), 1u);
}

}  // namespace
}  // namespace pplx::testing
