// send, recv and barriers on every fabric.
#include <thread>

#include "proxy/tests/support.h"

namespace pplx::testing {
namespace {

using MessageTest = PairTest;

Bytes bytes_of(const std::string& text) {
  auto view = std::as_bytes(std::span(text));
  return {view.begin(), view.end()};
}

TEST_P(MessageTest, ArriveWholeAndNameTheirSender) {
  auto first = a.send(b.address(), bytes_of("hello"));
  auto message = b.recv();
  EXPECT_EQ(message.from, a.address());
  EXPECT_EQ(message.payload, bytes_of("hello"));
  // The receiver answers to an address that it had never seen before.
  b.send(message.from, {});
  EXPECT_TRUE(a.recv().payload.empty());

  Bytes longest(a.max_message());
  fill_random(longest.data(), longest.size(), 1);
  auto sent = a.send(b.address(), longest);
  EXPECT_EQ(b.recv().payload, longest);
  sent.get();
  longest.push_back({});
  EXPECT_EQ(kind_of([&] { a.send(b.address(), longest); }), ErrorKind::kInvalidArgument);
}

TEST_P(MessageTest, MoreThanThereAreBuffers) {
  constexpr size_t kMessages = 1000;
  std::vector<std::future<void>> sent;
  for (size_t i = 0; i < kMessages; ++i) sent.push_back(a.send(b.address(), bytes_of(std::to_string(i))));
  // On this thread alone, as wait_arrived() does.
  const auto all_are_here = [&] {
    b.progress();
    return b.stats().receives >= kMessages;
  };
  ASSERT_TRUE(a.wait_until(all_are_here, Clock::now() + scaled(20s)));
  std::vector<bool> seen(kMessages);
  for (size_t i = 0; i < kMessages; ++i) {
    auto message = b.recv();
    size_t number = std::stoul(
        std::string(reinterpret_cast<const char*>(message.payload.data()), message.payload.size()));
    ASSERT_LT(number, kMessages);
    ASSERT_FALSE(seen[number]);
    seen[number] = true;
  }
  for (auto& future : sent) {
    ASSERT_EQ(future.wait_for(10s), std::future_status::ready);
    future.get();
  }
  EXPECT_EQ(a.stats().sends, kMessages);
  EXPECT_EQ(b.stats().receives, kMessages);
}

TEST_P(MessageTest, BarriersHoldEveryoneBack) {
  constexpr int kRanks = 4, kRounds = 20;
  std::vector<std::unique_ptr<TransferEngine>> engines;
  std::vector<Address> members;
  for (int r = 0; r < kRanks; ++r) {
    engines.push_back(std::make_unique<TransferEngine>(GetParam().config));
    members.push_back(engines.back()->address());
  }
  std::atomic<int> entered{0};
  std::vector<std::future<void>> threads;
  for (int r = 0; r < kRanks; ++r) {
    threads.push_back(std::async(std::launch::async, [&, r] {
      for (int generation = 0; generation < 2; ++generation) {
        auto group = engines[static_cast<size_t>(r)]->peer_group(members, 7);
        EXPECT_EQ(group->rank(), static_cast<size_t>(r));
        EXPECT_EQ(group->size(), size_t{kRanks});
        for (int round = 1; round <= kRounds; ++round) {
          if (r == round % kRanks) std::this_thread::sleep_for(1ms);  // skew
          entered.fetch_add(1);
          engines[static_cast<size_t>(r)]->barrier(*group);
          EXPECT_GE(entered.load(), (generation * kRounds + round) * kRanks);
        }
      }
    }));
  }
  for (auto& thread : threads) thread.get();
}

TEST_P(MessageTest, BarrierNamesWhoIsMissing) {
  std::vector<Address> members = {a.address(), b.address()};
  auto group = a.peer_group(members, 1);
  try {
    a.barrier(*group, 50ms);
    FAIL() << "rank 1 never came";
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::kTimeout);
    EXPECT_NE(std::string(error.what()).find("rank 1"), std::string::npos) << error.what();
  }
  // A late rank 1 passes: rank 0 has been there.
  b.barrier(*b.peer_group(members, 1));
}

TEST_P(MessageTest, GroupsAreCheckedWhenMade) {
  EXPECT_EQ(kind_of([&] { a.peer_group({b.address()}, 1); }), ErrorKind::kInvalidArgument);
  EXPECT_EQ(kind_of([&] { a.peer_group({a.address(), a.address()}, 1); }), ErrorKind::kInvalidArgument);
  auto group = b.peer_group({a.address(), b.address()}, 1);
  EXPECT_EQ(kind_of([&] { a.barrier(*group, 50ms); }), ErrorKind::kInvalidArgument);
  auto alone = a.peer_group({a.address()}, 2);
  a.barrier(*alone);
}

}  // namespace

INSTANTIATE_TEST_SUITE_P(Fabrics, MessageTest, ::testing::ValuesIn(all_fabrics()), case_name);

}  // namespace pplx::testing
