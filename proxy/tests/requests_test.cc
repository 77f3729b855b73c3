// Reads, pages, scatters to groups, cancellation, watch words, receive pools, statistics and timeline.
#include <algorithm>
#include <atomic>
#include <numeric>
#include <set>
#include <thread>

#include "proxy/tests/support.h"

namespace pplx::testing {
namespace {

using RequestTest = PairTest;

TEST_P(RequestTest, ReadsOfEverySizeAndOffset) {
  constexpr size_t kSize = (1 << 19) + 5;
  auto here = a.allocate(kSize + 64), there = b.allocate(kSize + 64);
  fill_random(there->data(), there->size(), 1);
  auto remote = a.open(there->descriptor());
  for (size_t size : {size_t{1}, size_t{8191}, size_t{16385}, kSize}) {
    std::memset(here->data(), 0, here->size());
    a.read_future({here.get(), 3, remote.get(), 17, size}).get();
    ASSERT_EQ(std::memcmp(here->data() + 3, there->data() + 17, size), 0) << size;
    ASSERT_TRUE(std::all_of(here->data() + 3 + size, here->data() + here->size(),
                            [](auto byte) { return byte == std::byte{0}; }));
  }
  EXPECT_EQ(a.stats().reads, 4u);
  EXPECT_EQ(kind_of([&] { a.read({here.get(), 0, remote.get(), 65, kSize}); }), ErrorKind::kInvalidArgument);
  EXPECT_EQ(kind_of([&] { a.read({nullptr, 0, remote.get(), 0, 1}); }), ErrorKind::kInvalidArgument);
  EXPECT_EQ(kind_of([&] { a.read({here.get(), 0, nullptr, 0, 1}); }), ErrorKind::kInvalidArgument);
}

TEST_P(RequestTest, PagesGoWhereTheirListsSay) {
  constexpr size_t kPage = 1500, kPages = 40;
  auto source = a.allocate(kPage * kPages + 100), target = b.allocate(2 * kPage * kPages);
  fill_random(source->data(), source->size(), 2);
  auto remote = a.open(target->descriptor());
  std::vector<uint64_t> from(kPages), to(kPages);
  std::iota(from.begin(), from.end(), 0);
  std::iota(to.begin(), to.end(), 0);
  std::mt19937_64 rng(3);
  std::shuffle(from.begin(), from.end(), rng);
  std::shuffle(to.begin(), to.end(), rng);
  from[7] = from[8];  // a page may be read twice
  uint64_t expected = 0;
  for (size_t group : {size_t{0}, size_t{1}, size_t{7}, size_t{40}, size_t{100}}) {
    std::memset(target->data(), 0, target->size());
    auto& done = lasting_counter();
    a.paged_write({.source = source.get(),
                   .source_pages = {.offset = 100, .stride = 0, .pages = from},
                   .target = remote.get(),
                   .target_pages = {.offset = 9, .stride = 2 * kPage - 1, .pages = to},
                   .count = kPages,
                   .page_bytes = kPage,
                   .imm = 5,
                   .group = group},
                  &done);
    expected += group == 0 ? 1 : (kPages + group - 1) / group;
    b.imm_counter(5).wait(expected);
    for (size_t i = 0; i < kPages; ++i) {
      ASSERT_EQ(std::memcmp(target->data() + 9 + to[i] * (2 * kPage - 1),
                            source->data() + 100 + from[i] * kPage, kPage),
                0);
    }
    ASSERT_EQ(wait_done(a, done, 1), 1u);
    ASSERT_EQ(done.failed(), 0u);
  }
  // Contiguous on both sides: one write. None at all: an immediate all the same.
  const uint64_t before = a.stats().writes;
  auto& done = lasting_counter();
  a.paged_write(
      {.source = source.get(), .target = remote.get(), .count = kPages, .page_bytes = kPage, .imm = 5},
      &done);
  EXPECT_EQ(a.stats().writes, before + 1);
  a.paged_write({.source = source.get(), .target = remote.get(), .count = 0, .page_bytes = kPage, .imm = 5},
                &done);
  b.imm_counter(5).wait(expected + 2);
  EXPECT_EQ(wait_done(a, done, 2), 2u);
  for (int i = 0; i < 500; ++i) b.progress();
  EXPECT_EQ(b.imm_counter(5).value(), expected + 2);

  auto refused = [&](PagedWriteRequest request) {
    EXPECT_EQ(kind_of([&] { a.paged_write(request); }), ErrorKind::kInvalidArgument);
  };
  std::vector<uint64_t> outside = {0, 1'000'000}, huge = {UINT64_MAX}, two = {0, 1};
  refused({.source = source.get(),
           .source_pages = {.pages = outside},
           .target = remote.get(),
           .count = 2,
           .page_bytes = kPage});
  refused({.source = source.get(),
           .target = remote.get(),
           .target_pages = {.pages = huge},
           .count = 1,
           .page_bytes = kPage});
  refused({.source = source.get(),
           .source_pages = {.pages = two},
           .target = remote.get(),
           .count = 3,
           .page_bytes = kPage});
  refused({.source = source.get(), .target = remote.get(), .count = 1, .page_bytes = 0});
  refused({.source = nullptr, .target = remote.get(), .count = 1, .page_bytes = 8});
}

TEST_P(RequestTest, ScattersToTheMembersOfAGroup) {
  std::vector<Address> members = {b.address(), a.address()};
  auto group = a.peer_group(members, 3);
  auto at_a = a.allocate(1000), at_b = b.allocate(1000), source = a.allocate(1000);
  fill_random(source->data(), 1000, 4);
  std::vector<RegionDescriptor> descriptors = {at_b->descriptor(), at_a->descriptor()};
  auto targets = a.open(*group, descriptors);
  EXPECT_EQ(targets->size(), 2u);
  std::vector<GroupEntry> entries = {{0, 0, 100, 300}, {1, 300, 0, 200}};
  auto& done = lasting_counter();
  a.scatter(*source, *targets, entries, 6, &done);
  b.imm_counter(6).wait(1);
  a.imm_counter(6).wait(1);
  EXPECT_EQ(std::memcmp(at_b->data() + 100, source->data(), 300), 0);
  EXPECT_EQ(std::memcmp(at_a->data(), source->data() + 300, 200), 0);
  EXPECT_EQ(wait_done(a, done, 2), 2u);
  std::vector<GroupEntry> outside = {{2, 0, 0, 1}};
  EXPECT_EQ(kind_of([&] { a.scatter(*source, *targets, outside, 6); }), ErrorKind::kInvalidArgument);
  std::swap(descriptors[0], descriptors[1]);
  EXPECT_EQ(kind_of([&] { a.open(*group, descriptors); }), ErrorKind::kInvalidArgument);
}

TEST_P(RequestTest, WaitsWithoutAThread) {
  auto source = a.allocate(8), target = b.allocate(8);
  auto remote = a.open(target->descriptor());
  auto counter = b.imm_counter(1);
  auto& one = lasting_counter();
  auto& three = lasting_counter();
  auto& message = lasting_counter();
  b.when(counter, 3, &three);
  b.when(counter, 1, &one);
  b.when_message(&message);
  a.write({source.get(), 0, remote.get(), 0, 8, 1});
  a.send(b.address(), {});
  // Nobody polls b but its worker.
  auto soon = [](auto&& ready) {
    for (int i = 0; i < 2000 && !ready(); ++i) std::this_thread::sleep_for(5ms);
    return ready();
  };
  ASSERT_TRUE(soon([&] { return one.done() == 1 && message.done() == 1; }));
  EXPECT_EQ(three.done(), 0u);
  auto& cancelled = lasting_counter();
  auto& late = lasting_counter();
  const uint64_t id = b.new_id();
  b.when(counter, 100, &cancelled, id);
  EXPECT_EQ(b.cancel(id), 1u);
  EXPECT_EQ(cancelled.error()->kind(), ErrorKind::kCancelled);
  b.when(counter, 1, &late);
  EXPECT_EQ(late.done(), 1u) << "it has been reached already";
  b.close();
  EXPECT_EQ(three.error()->kind(), ErrorKind::kClosed);
}

TEST_P(RequestTest, AWatchWordPostsItsWritesOnceAnIncrement) {
  auto source = a.allocate(64), target = b.allocate(64);
  std::shared_ptr<RemoteRegion> remote = a.open(target->descriptor());
  std::memset(source->data(), 7, 64);
  auto told = std::make_shared<std::atomic<uint64_t>>(0);
  WatchConfig config;
  config.writes = {{source, 0, remote, 0, 32, 1}, {source, 32, remote, 32, 32, 2}};
  config.changed = [told](uint64_t value) { *told = value; };
  auto word = a.watch_word(config);
  auto writer = std::async(std::launch::async, [&] {
    for (int i = 0; i < 50; ++i) {
      std::atomic_ref<uint64_t>(*word->word()).fetch_add(1, std::memory_order_release);
      if (i % 10 == 0) std::this_thread::sleep_for(1ms);
    }
  });
  b.imm_counter(1).wait(50);
  b.imm_counter(2).wait(50);
  writer.get();
  EXPECT_EQ(target->data()[0], std::byte{7});
  EXPECT_EQ(target->data()[63], std::byte{7});
  EXPECT_EQ(word->seen(), 50u);
  EXPECT_EQ(word->posted(), 100u);
  EXPECT_TRUE(a.wait_until([&] { return word->completed() == 100 && *told == 50; }, Clock::now() + 10s));
  EXPECT_FALSE(word->error());
  std::atomic_ref<uint64_t>(*word->word()).store(3);
  EXPECT_TRUE(a.wait_until([&] { return word->error().has_value(); }, Clock::now() + 10s)) << "it went back";
  EXPECT_EQ(word->error()->kind(), ErrorKind::kInvalidArgument);
  word.reset();
  uint64_t words[2] = {};
  WatchConfig crooked;
  crooked.word = reinterpret_cast<uint64_t*>(reinterpret_cast<char*>(words) + 4);
  EXPECT_EQ(kind_of([&] { a.watch_word(crooked); }), ErrorKind::kInvalidArgument);
}

TEST_P(RequestTest, PoolsHoldSendersBackAndLoseNothing) {
  constexpr size_t kBuffer = 20000, kMessages = 100;
  auto pool = b.receive_pool({.buffer_bytes = kBuffer, .buffers = 3});
  auto remote = a.open(pool->descriptor());
  EXPECT_EQ(remote->buffer_bytes(), kBuffer);
  std::shared_ptr<Region> source = a.allocate(kBuffer * kMessages);
  fill_random(source->data(), source->size(), 5);
  auto& done = lasting_counter();
  for (size_t i = 0; i < kMessages; ++i) a.send(*remote, source, i * kBuffer, 1 + i * 199, &done);
  std::set<size_t> seen;
  for (size_t i = 0; i < kMessages; ++i) {
    auto message = pool->recv();
    EXPECT_EQ(message.from, a.address());
    ASSERT_EQ((message.bytes.size() - 1) % 199, 0u);
    size_t number = (message.bytes.size() - 1) / 199;
    ASSERT_TRUE(seen.insert(number).second);
    ASSERT_EQ(std::memcmp(message.bytes.data(), source->data() + number * kBuffer, message.bytes.size()), 0);
    ASSERT_LE(pool->free_buffers(), 2u);
    pool->release(message.buffer);
    EXPECT_EQ(kind_of([&] { pool->release(message.buffer); }), ErrorKind::kInvalidArgument);
  }
  EXPECT_EQ(wait_done(a, done, kMessages), kMessages);
  EXPECT_EQ(done.failed(), 0u) << done.error()->what();
  EXPECT_EQ(pool->lost(), 0u);
  EXPECT_EQ(kind_of([&] { pool->recv(20ms); }), ErrorKind::kTimeout);
  EXPECT_EQ(kind_of([&] { a.send(*remote, source, 0, kBuffer + 1, nullptr); }), ErrorKind::kInvalidArgument);
}

TEST_P(RequestTest, AFullPoolRefuses) {
  auto pool = b.receive_pool({.buffer_bytes = 64, .buffers = 1, .max_waiting = 2});
  auto remote = a.open(pool->descriptor());
  std::shared_ptr<Region> source = a.allocate(64);
  auto& done = lasting_counter();
  for (int i = 0; i < 5; ++i) a.send(*remote, source, 0, 64, &done);
  ASSERT_TRUE(a.wait_until([&] { return done.failed() == 2; }, Clock::now() + 10s));
  EXPECT_EQ(done.error()->kind(), ErrorKind::kFabric);
  for (int i = 0; i < 3; ++i) pool->release(pool->recv().buffer);
  EXPECT_EQ(wait_done(a, done, 5), 5u);
  EXPECT_EQ(done.failed(), 2u);
  pool.reset();
  auto& gone = lasting_counter();
  a.send(*remote, source, 0, 64, &gone);
  EXPECT_EQ(wait_done(a, gone, 1), 1u);
  EXPECT_EQ(gone.failed(), 1u) << "there is no pool any more";
}

TEST_P(RequestTest, StatisticsAndTimeline) {
  auto source = a.allocate(4096), target = b.allocate(4096);
  auto remote = a.open(target->descriptor());
  EXPECT_EQ(a.timeline().find("\"ph\":\"b\""), std::string::npos);
  a.start_timeline(64);
  auto& done = lasting_counter();
  for (int i = 0; i < 200; ++i) a.write({source.get(), 0, remote.get(), 0, 4096, 1}, &done);
  b.imm_counter(1).wait(200);
  ASSERT_EQ(wait_done(a, done, 200), 200u);
  auto details = a.details();
  uint64_t writes = 0, bytes = 0, samples = 0;
  for (const auto& nic : details.nics) {
    writes += nic.traffic.writes;
    bytes += nic.traffic.write_bytes;
    samples += nic.latency.count();
    EXPECT_GT(nic.latency.quantile(0.5), 0u);
    EXPECT_LE(nic.latency.quantile(0.5), nic.latency.quantile(0.99));
    EXPECT_LE(nic.deepest, nic.queue_depth);
  }
  EXPECT_EQ(writes, 200u);
  EXPECT_EQ(bytes, 200u * 4096);
  EXPECT_GE(samples, 200u);
  ASSERT_EQ(details.peers.size(), 1u);
  EXPECT_EQ(details.peers[0].traffic.write_bytes, bytes);
  // Peers that must know each other may still be greeting.
  const auto outstanding = [&] { return a.details().peers[0].traffic.outstanding; };
  const auto until = Clock::now() + 10s;
  while (outstanding() != 0 && Clock::now() < until) a.progress();
  EXPECT_EQ(outstanding(), 0u);
  a.stop_timeline();
  std::string json = a.timeline();
  size_t events = 0;
  for (size_t at = 0; (at = json.find("\"ph\":\"b\"", at)) != std::string::npos; ++at) ++events;
  EXPECT_LE(events, 64u);
  EXPECT_GE(events, 1u);
  EXPECT_EQ(kind_of([&] { a.start_timeline(0); }), ErrorKind::kInvalidArgument);
}

INSTANTIATE_TEST_SUITE_P(Fabrics, RequestTest, ::testing::ValuesIn(all_fabrics()), case_name);

// Few may be under way, so that most of what is posted has not begun.
TEST(Cancel, TakesBackWhatHasNotBegun) {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    auto config = sim(seed);
    config.sim.queue_depth = 4;
    config.sim.max_write = 1000;
    TransferEngine a(config), b(config);
    auto source = a.allocate(100'000), target = b.allocate(100'000);
    auto remote = a.open(target->descriptor());
    fill_random(source->data(), source->size(), seed);
    const uint64_t id = a.new_id(), other = a.new_id();
    auto& first = lasting_counter();
    auto& paged = lasting_counter();
    auto& kept = lasting_counter();
    a.write({source.get(), 0, remote.get(), 0, 500, 1, false, id}, &first);
    std::vector<uint64_t> pages;
    for (uint64_t page = 0; page < 100; page += 2) pages.push_back(page);
    a.paged_write({.source = source.get(),
                   .source_pages = {.pages = pages},
                   .target = remote.get(),
                   .target_pages = {.pages = pages},
                   .count = pages.size(),
                   .page_bytes = 1000,
                   .imm = 2,
                   .group = 10,
                   .id = id},
                  &paged);
    a.write({source.get(), 0, remote.get(), 99'000, 500, 3, false, other}, &kept);
    EXPECT_GT(a.cancel(id), 0u);
    ASSERT_EQ(wait_done(a, paged, 1), 1u);
    ASSERT_EQ(paged.failed(), 1u);
    EXPECT_EQ(paged.error()->kind(), ErrorKind::kCancelled);
    ASSERT_EQ(wait_done(a, first, 1), 1u);
    EXPECT_EQ(first.failed(), 0u) << "it had begun";
    ASSERT_EQ(wait_done(a, kept, 1), 1u);
    EXPECT_EQ(kept.failed(), 0u);
    b.imm_counter(1).wait(1);
    b.imm_counter(3).wait(1);
    // No part of it is under way any more: the source may be reused.
    EXPECT_EQ(a.details().peers[0].traffic.outstanding, 0u);
    EXPECT_LT(b.imm_counter(2).value(), 5u);
    EXPECT_GT(a.stats().cancelled, 0u);
    EXPECT_EQ(a.cancel(id), 0u);
  }
}

// A real transfer of more than 4 GiB is in tests/test_engine_large.py; this is its arithmetic.
TEST(Large, LengthsAndOffsetsAre64Bits) {
  auto config = local();
  config.sim.max_write = size_t{1} << 30;
  TransferEngine a(config), b(config);
  const size_t size = (size_t{4} << 30) + 4097;
  // Untouched pages of private mappings cost nothing to read.
  std::shared_ptr<Region> source = a.allocate(size), target = b.allocate(size);
  auto remote = a.open(target->descriptor());
  std::memset(source->data() + size - 100, 1, 100);
  const size_t begin = (size_t{4} << 30) - 5;
  a.write_future({source.get(), begin, remote.get(), begin, size - begin, 1}).get();
  b.imm_counter(1).wait(1);
  EXPECT_EQ(std::memcmp(target->data() + begin, source->data() + begin, size - begin), 0);
  EXPECT_EQ(kind_of([&] {
              a.write({source.get(), 1, remote.get(), 0, size, 1});
            }),
            ErrorKind::kInvalidArgument);
}

}  // namespace
}  // namespace pplx::testing
