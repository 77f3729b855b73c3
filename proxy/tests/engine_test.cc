// What every fabric must do, whatever order it delivers in.
#include <algorithm>
#include <atomic>
#include <thread>

#include "proxy/tests/support.h"

namespace pplx::testing {
namespace {

using EngineTest = PairTest;

TEST_P(EngineTest, WritesOfEverySizeAndOffset) {
  constexpr size_t kSize = (1 << 20) + 3;
  auto source = a.allocate(kSize + 64);
  auto target = b.allocate(kSize + 64);
  fill_random(source->data(), source->size(), 1);
  auto remote = a.open(target->descriptor());
  EXPECT_EQ(remote->size(), target->size());
  auto counter = b.imm_counter(7);
  uint64_t expected = 0;
  for (size_t size : {size_t{0}, size_t{1}, size_t{8191}, size_t{16385}, kSize}) {
    for (auto [from, to] : {std::pair<size_t, size_t>{0, 0}, {3, 0}, {0, 61}, {17, 5}}) {
      std::memset(target->data(), 0, target->size());
      auto& done = lasting_counter();
      a.write({source.get(), from, remote.get(), to, size, 7}, &done);
      counter.wait(++expected);
      ASSERT_EQ(std::memcmp(target->data() + to, source->data() + from, size), 0) << size;
      ASSERT_TRUE(std::all_of(target->data(), target->data() + to, [](auto b) { return b == std::byte{0}; }));
      ASSERT_TRUE(std::all_of(target->data() + to + size, target->data() + target->size(),
                              [](auto b) { return b == std::byte{0}; }));
      ASSERT_EQ(wait_done(a, done, 1), 1u);
      ASSERT_EQ(done.failed(), 0u);
    }
  }
  EXPECT_EQ(counter.value(), expected);
}

TEST_P(EngineTest, CountsEveryImmediateOnce) {
  // Where few may be outstanding the two sides take turns, which is slow on a busy machine.
  const uint64_t writes = a.config().sim.queue_depth < 64 ? 500 : 3000;
  auto source = a.allocate(4096);
  auto target = b.allocate(4096);
  auto remote = a.open(target->descriptor());
  auto& done = lasting_counter();
  for (uint64_t i = 0; i < writes; ++i) {
    a.write({source.get(), 0, remote.get(), i % 64 * 8, 8, static_cast<uint32_t>(i % 3)}, &done);
  }
  for (uint32_t imm = 0; imm < 3; ++imm) {
    const uint64_t share = (writes + 2 - imm) / 3;
    EXPECT_EQ(wait_arrived(a, b, imm, share), share);
  }
  EXPECT_EQ(wait_done(a, done, writes), writes);
  EXPECT_EQ(done.failed(), 0u);
  std::this_thread::sleep_for(20ms);
  for (int i = 0; i < 1000; ++i) b.progress();
  uint64_t total = 0;
  for (uint32_t imm = 0; imm < 3; ++imm) total += b.imm_counter(imm).value();
  EXPECT_EQ(total, writes);
  EXPECT_EQ(b.stats().immediates, writes);
  EXPECT_EQ(a.stats().writes, writes);
  EXPECT_EQ(a.stats().write_bytes, writes * 8);
}

TEST_P(EngineTest, BytesAreThereWhenTheImmediateIs) {
  constexpr size_t kSlots = 64, kSlot = 3000;
  auto source = a.allocate(kSlots * kSlot);
  auto target = b.allocate(kSlots * kSlot);
  auto remote = a.open(target->descriptor());
  std::vector<ImmCounter> counters;
  for (uint32_t i = 0; i < kSlots; ++i) counters.push_back(b.imm_counter(1000 + i));
  for (uint64_t round = 1; round <= 10; ++round) {
    fill_random(source->data(), source->size(), round);
    auto& done = lasting_counter();
    for (uint32_t i = 0; i < kSlots; ++i) {
      a.write({source.get(), i * kSlot, remote.get(), i * kSlot, kSlot, 1000 + i}, &done);
    }
    std::vector<bool> seen(kSlots);
    size_t left = kSlots;
    auto check = [&] {
      for (size_t i = 0; i < kSlots; ++i) {
        if (seen[i] || counters[i].value() < round) continue;
        seen[i] = true;
        --left;
        EXPECT_EQ(std::memcmp(target->data() + i * kSlot, source->data() + i * kSlot, kSlot), 0);
      }
      return left == 0;
    };
    ASSERT_TRUE(b.wait_until(check, Clock::now() + 20s)) << left << " immediates are missing";
    ASSERT_EQ(wait_done(a, done, kSlots), kSlots);  // before the source is filled anew
  }
}

TEST_P(EngineTest, ScatterWritesEveryEntry) {
  TransferEngine c(GetParam().config);
  auto source = a.allocate(1 << 16);
  fill_random(source->data(), source->size(), 5);
  auto at_b = b.allocate(1 << 16), at_c = c.allocate(1 << 16), at_a = a.allocate(1 << 16);
  std::vector<std::shared_ptr<const RemoteRegion>> remotes = {
      a.open(at_b->descriptor()), a.open(at_c->descriptor()), a.open(at_a->descriptor())};
  std::vector<ScatterEntry> entries;
  for (size_t i = 0; i < 3; ++i) entries.push_back({i * 5000, remotes[i], i * 100, 5000 + i});
  auto& done = lasting_counter();
  a.scatter(*source, entries, 9, &done);
  b.imm_counter(9).wait(1);
  c.imm_counter(9).wait(1);
  a.imm_counter(9).wait(1);
  EXPECT_EQ(std::memcmp(at_b->data(), source->data(), 5000), 0);
  EXPECT_EQ(std::memcmp(at_c->data() + 100, source->data() + 5000, 5001), 0);
  EXPECT_EQ(std::memcmp(at_a->data() + 200, source->data() + 10000, 5002), 0);
  EXPECT_EQ(wait_done(a, done, 3), 3u);
  EXPECT_EQ(done.failed(), 0u);

  entries[2].length = 1 << 17;
  EXPECT_EQ(kind_of([&] { a.scatter(*source, entries, 9, nullptr); }), ErrorKind::kInvalidArgument);
  EXPECT_EQ(a.stats().writes, 3u) << "a bad entry must leave the others unsent";
}

TEST_P(EngineTest, WritesToItself) {
  auto source = a.allocate(100000);
  auto target = a.allocate(100000);
  fill_random(source->data(), source->size(), 6);
  auto remote = a.open(target->descriptor());
  auto future = a.write_future({source.get(), 0, remote.get(), 0, source->size(), 3});
  a.imm_counter(3).wait(1);
  EXPECT_EQ(std::memcmp(target->data(), source->data(), source->size()), 0);
  ASSERT_EQ(future.wait_for(10s), std::future_status::ready);
  future.get();
}

TEST_P(EngineTest, FuturesAndCallbacksNeedNoPolling) {
  auto source = a.allocate(8);
  auto target = b.allocate(8);
  auto remote = a.open(target->descriptor());
  auto future = a.write_future({source.get(), 0, remote.get(), 0, 8, 1});
  ASSERT_EQ(future.wait_for(10s), std::future_status::ready);
  future.get();

  std::promise<std::thread::id> ran, ran_again;
  a.write_callback({source.get(), 0, remote.get(), 0, 8, 1}, [&](const Error* error) {
    EXPECT_EQ(error, nullptr);
    ran.set_value(std::this_thread::get_id());
    throw std::runtime_error("must not stop anything");
  });
  a.write_callback({source.get(), 0, remote.get(), 0, 8, 1}, [&](const Error*) {
    a.stats();  // the engine may be called from here
    a.write({source.get(), 0, remote.get(), 0, 8, 2});
    ran_again.set_value(std::this_thread::get_id());
  });
  auto thread = ran.get_future().get();
  EXPECT_NE(thread, std::this_thread::get_id());
  EXPECT_EQ(thread, ran_again.get_future().get());
  b.imm_counter(2).wait(1);
}

TEST_P(EngineTest, ManyThreadsWriteAtOnce) {
  constexpr int kThreads = 4, kWrites = 500;
  auto source = a.allocate(64);
  auto target = b.allocate(64);
  auto remote = a.open(target->descriptor());
  auto& done = lasting_counter();
  std::vector<std::future<void>> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.push_back(std::async(std::launch::async, [&, t] {
      for (int i = 0; i < kWrites; ++i) {
        a.write({source.get(), 0, remote.get(), static_cast<size_t>(t) * 8, 8, static_cast<uint32_t>(t)},
                &done);
      }
    }));
  }
  for (uint32_t t = 0; t < kThreads; ++t) EXPECT_EQ(wait_arrived(a, b, t, kWrites), uint64_t{kWrites});
  for (auto& thread : threads) thread.get();
  EXPECT_EQ(wait_done(a, done, kThreads * kWrites), uint64_t{kThreads * kWrites});
  EXPECT_EQ(done.failed(), 0u);
}

TEST_P(EngineTest, RefusesWhatIsOutOfRange) {
  auto source = a.allocate(4096);
  auto target = b.allocate(4096);
  auto remote = a.open(target->descriptor());
  auto refused = [&](WriteRequest request) {
    EXPECT_EQ(kind_of([&] { a.write(request); }), ErrorKind::kInvalidArgument);
  };
  refused({source.get(), 0, remote.get(), 0, 4097, {}});
  refused({source.get(), 1, remote.get(), 0, 4096, {}});
  refused({source.get(), 0, remote.get(), 1, 4096, {}});
  refused({source.get(), 0, remote.get(), 4097, 0, {}});
  refused({source.get(), SIZE_MAX, remote.get(), 0, 2, {}});
  refused({source.get(), 0, remote.get(), SIZE_MAX, 2, {}});
  refused({nullptr, 0, remote.get(), 0, 1, {}});
  refused({source.get(), 0, nullptr, 0, 1, {}});
  refused({target.get(), 0, remote.get(), 0, 1, {}});
  refused({source.get(), 0, remote.get(), 0, 1, 0xFFFFFFFF});
  EXPECT_EQ(kind_of([&] { b.register_memory(nullptr, 8); }), ErrorKind::kInvalidArgument);
  EXPECT_EQ(kind_of([&] { b.allocate(0); }), ErrorKind::kInvalidArgument);
  EXPECT_EQ(a.stats().writes, 0u);
}

TEST_P(EngineTest, ReservedImmediatesCountOnlyWhileWatched) {
  constexpr uint32_t kImm = kReservedImmediate | 5;
  auto source = a.allocate(8);
  auto target = b.allocate(8);
  auto remote = a.open(target->descriptor());
  auto write = [&](uint32_t imm) { a.write({source.get(), 0, remote.get(), 0, 8, imm}); };
  write(kImm);
  ASSERT_TRUE(b.wait_until([&] { return b.stats().unknown_immediates == 1; }, Clock::now() + 10s));
  auto counter = b.watch(kImm);
  EXPECT_EQ(counter.value(), 0u);
  write(kImm);
  counter.wait(1);
  b.unwatch(kImm);
  write(kImm);
  ASSERT_TRUE(b.wait_until([&] { return b.stats().unknown_immediates == 2; }, Clock::now() + 10s));
  EXPECT_EQ(counter.value(), 1u);
  EXPECT_EQ(b.watch(kImm).value(), 0u);

  write(12);  // a user value counts whether or not anybody asked
  ASSERT_TRUE(b.wait_until([&] { return b.stats().immediates == 2; }, Clock::now() + 10s));
  EXPECT_EQ(b.imm_counter(12).value(), 1u);
  EXPECT_EQ(kind_of([&] { b.imm_counter(kImm); }), ErrorKind::kInvalidArgument);
  EXPECT_EQ(kind_of([&] { b.watch(12); }), ErrorKind::kInvalidArgument);
  EXPECT_EQ(kind_of([&] { b.watch(0xFFFFFFFF); }), ErrorKind::kInvalidArgument);
}

TEST_P(EngineTest, WaitsEndAtTheirDeadline) {
  auto started = Clock::now();
  EXPECT_EQ(kind_of([&] { b.imm_counter(1).wait(1, 50ms); }), ErrorKind::kTimeout);
  EXPECT_EQ(kind_of([&] { b.recv(50ms); }), ErrorKind::kTimeout);
  EXPECT_LT(Clock::now() - started, 5s);
}

TEST_P(EngineTest, CloseEndsWhatIsUnderWay) {
  auto source = a.allocate(1 << 20);
  auto target = b.allocate(1 << 20);
  auto remote = a.open(target->descriptor());
  auto back = b.open(source->descriptor());
  auto& done = lasting_counter();
  for (int i = 0; i < 50; ++i) a.write({source.get(), 0, remote.get(), 0, source->size(), 1}, &done);
  auto waiter =
      std::async(std::launch::async, [&] { return kind_of([&] { a.imm_counter(99).wait(1, 60s); }); });
  std::this_thread::sleep_for(5ms);
  auto started = Clock::now();
  a.close();
  a.close();
  EXPECT_LT(Clock::now() - started, 5s);
  EXPECT_TRUE(a.closed());
  EXPECT_EQ(done.done(), 50u) << "every completion is told, late or not";
  if (done.failed() > 0) {
    EXPECT_EQ(done.error()->kind(), ErrorKind::kClosed);
  }
  EXPECT_EQ(waiter.get(), ErrorKind::kClosed);
  EXPECT_EQ(kind_of([&] { a.write({source.get(), 0, remote.get(), 0, 1, 1}); }), ErrorKind::kClosed);
  EXPECT_EQ(kind_of([&] { a.allocate(8); }), ErrorKind::kClosed);
  EXPECT_EQ(kind_of([&] { a.recv(); }), ErrorKind::kClosed);
  source->data()[0] = std::byte{1};  // still ours

  auto late = b.write_future({target.get(), 0, back.get(), 0, 8, 1});
  if (late.wait_for(scaled(15s)) != std::future_status::ready)
    FAIL() << "a write to a closed engine must end";
  EXPECT_THROW(late.get(), Error);
}

TEST_P(EngineTest, WritesToUnregisteredMemoryTouchNothing) {
  auto source = a.allocate(4096);
  std::memset(source->data(), 1, 4096);
  std::vector<std::byte> memory(4096);
  auto target = b.register_memory(memory.data(), memory.size());
  auto remote = a.open(target->descriptor());
  a.write({source.get(), 0, remote.get(), 0, 8, 1});
  b.imm_counter(1).wait(1);
  target.reset();
  std::memset(memory.data(), 0, memory.size());
  auto future = a.write_future({source.get(), 0, remote.get(), 0, 4096, 1});
  ASSERT_TRUE(
      a.wait_until([&] { return future.wait_for(0s) == std::future_status::ready; }, Clock::now() + 15s));
  EXPECT_THROW(future.get(), Error);
  EXPECT_EQ(b.imm_counter(1).value(), 1u);
  EXPECT_TRUE(std::all_of(memory.begin(), memory.end(), [](auto byte) { return byte == std::byte{0}; }));
}

TEST_P(EngineTest, KeepaliveLivesAsLongAsTheRegion) {
  auto memory = std::make_shared<std::vector<std::byte>>(64);
  std::weak_ptr<std::vector<std::byte>> watch = memory;
  auto region = a.register_memory(memory->data(), memory->size(), memory);
  memory.reset();
  a.close();
  EXPECT_FALSE(watch.expired());
  region.reset();
  EXPECT_TRUE(watch.expired());
}

}  // namespace

INSTANTIATE_TEST_SUITE_P(Fabrics, EngineTest, ::testing::ValuesIn(all_fabrics()), case_name);

}  // namespace pplx::testing
