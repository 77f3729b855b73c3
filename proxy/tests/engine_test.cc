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
      CompletionCounter done;
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
  constexpr uint64_t kWrites = 10000;
  auto source = a.allocate(4096);
  auto target = b.allocate(4096);
  auto remote = a.open(target->descriptor());
  CompletionCounter done;
  for (uint64_t i = 0; i < kWrites; ++i) {
    a.write({source.get(), 0, remote.get(), i % 64 * 8, 8, static_cast<uint32_t>(i % 3)}, &done);
  }
  for (uint32_t imm = 0; imm < 3; ++imm) b.imm_counter(imm).wait((kWrites + 2 - imm) / 3);
  EXPECT_EQ(wait_done(a, done, kWrites), kWrites);
  EXPECT_EQ(done.failed(), 0u);
  std::this_thread::sleep_for(20ms);
  for (int i = 0; i < 1000; ++i) b.progress();
  uint64_t total = 0;
  for (uint32_t imm = 0; imm < 3; ++imm) total += b.imm_counter(imm).value();
  EXPECT_EQ(total, kWrites);
  EXPECT_EQ(b.stats().immediates, kWrites);
  EXPECT_EQ(a.stats().writes, kWrites);
  EXPECT_EQ(a.stats().write_bytes, kWrites * 8);
}

}  // namespace

INSTANTIATE_TEST_SUITE_P(Fabrics, EngineTest, ::testing::ValuesIn(all_fabrics()), case_name);

}  // namespace pplx::testing
