// What libfabric's queues do when they are full or refused, which no provider here can be made to do.
#include "proxy/fabric/libfabric_queues.h"

#include <gtest/gtest.h>

#include <map>
#include <vector>

#include "proxy/fabric/libfabric_traits.h"

namespace pplx::testing {
namespace {

// A provider that takes so many receives, and refuses the next with `error`.
struct Provider {
  ssize_t operator()(FabricOp& op) {
    ++calls;
    if (room == 0) return error;
    --room;
    ++posted[&op];
    return 0;
  }
  int room = 0;
  ssize_t error = -FI_EAGAIN;
  int calls = 0;
  std::map<FabricOp*, int> posted;
};

TEST(UnpostedReceives, AreTriedUntilTheProviderTakesThem) {
  std::vector<FabricOp> ops(64);
  Provider provider;
  auto post = [&](FabricOp& op) { return provider(op); };
  UnpostedReceives receives;
  provider.room = 10;
  for (FabricOp& op : ops) EXPECT_EQ(receives.post(op, post), 0) << "to be full is no error";
  EXPECT_FALSE(receives.empty());
  for (int turn = 0; turn < 60 && !receives.empty(); ++turn) {
    provider.room = turn % 3;
    EXPECT_EQ(receives.retry(post), 0);
  }
  EXPECT_TRUE(receives.empty());
  ASSERT_EQ(provider.posted.size(), ops.size()) << "none is lost";
  for (const auto& [op, times] : provider.posted) EXPECT_EQ(times, 1) << "none is posted twice";
}

TEST(UnpostedReceives, AnErrorIsToldOnceAndTriedAgain) {
  std::vector<FabricOp> ops(2);
  Provider provider;
  provider.error = -FI_ENOMEM;
  auto post = [&](FabricOp& op) { return provider(op); };
  UnpostedReceives receives;
  EXPECT_EQ(receives.post(ops[0], post), -FI_ENOMEM);
  EXPECT_EQ(receives.post(ops[1], post), 0);
  EXPECT_EQ(receives.retry(post), 0);
  provider.error = -FI_EIO;
  EXPECT_EQ(receives.retry(post), -FI_EIO);
  EXPECT_EQ(provider.calls, 4) << "one try a poll";
  provider.room = 2;
  EXPECT_EQ(receives.retry(post), 0);
  EXPECT_TRUE(receives.empty());
  EXPECT_EQ(receives.post(ops[0], post), -FI_EIO) << "a new one";
}

TEST(OpenLongest, HalvesUntilItIsTaken) {
  std::vector<size_t> tried;
  auto device = [&](size_t longest) {
    return [&tried, longest](size_t size) {
      tried.push_back(size);
      return size <= longest ? 0 : -FI_EINVAL;
    };
  };
  EXPECT_EQ(open_longest(65536, 1000, device(65536)), 0);
  EXPECT_EQ(tried, (std::vector<size_t>{65536}));
  tried.clear();
  EXPECT_EQ(open_longest(65536, 1000, device(20000)), 0);
  EXPECT_EQ(tried, (std::vector<size_t>{65536, 32768, 16384}));
  tried.clear();
  EXPECT_EQ(open_longest(3000, 1000, device(10)), -FI_EINVAL);
  EXPECT_EQ(tried, (std::vector<size_t>{3000, 1500, 1000}));
  tried.clear();
  EXPECT_EQ(open_longest(2048, 2048, device(10)), -FI_EINVAL) << "and only once";
  EXPECT_EQ(tried, (std::vector<size_t>{2048}));
}

TEST(OpenLongest, EfaAsksForRoomBecauseWritesTakeNone) {
  for (const ProviderTraits& traits : provider_traits("efa", FI_VERSION(2, 1))) {
    EXPECT_TRUE(traits.unsolicited);
    EXPECT_TRUE(traits.rnr_retries);
  }
  EXPECT_FALSE(provider_traits("tcp", FI_VERSION(2, 1)).front().unsolicited);
}

}  // namespace
}  // namespace pplx::testing
