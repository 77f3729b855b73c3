// Executions of programs: one after the other, or two at once.
#include "proxy/moe/launches.h"
#include "xla_ffi/tests/support.h"

namespace pplx::moe::testing {
namespace {

Problem two_ranks() {
  return {.ranks = 2, .experts = 4, .top_k = 2, .hidden = 16, .max_tokens = 8, .chunk = 8};
}

// A step of one rank in execution `run`; whether it went well.
bool step(Cluster& cluster, int rank, int64_t run, Outputs& out) {
  const std::vector<Inputs> inputs = random_step(cluster.problem(), 3, 4);
  return !run_step(cluster.problem(), cluster[rank], inputs[rank], out, {.run = run}) &&
         !cluster[rank].group.failure();
}

TEST(Executions, OneAfterTheOtherMayBeAnyNumber) {
  Cluster cluster(two_ranks());
  std::vector<Outputs> outputs(2);
  for (const int64_t run : {5, -3, 1 << 20, 0, -1}) {
    cluster.each([&](int rank) { EXPECT_TRUE(step(cluster, rank, run, outputs[rank])); });
  }
}

TEST(Executions, ComingBackAfterAnotherSaysThatTheyOverlap) {
  Cluster cluster(two_ranks());
  std::vector<Outputs> outputs(2);
  for (const int64_t run : {1, 2}) {
    cluster.each([&](int rank) { EXPECT_TRUE(step(cluster, rank, run, outputs[rank])); });
  }
  EXPECT_FALSE(step(cluster, 0, 1, outputs[0]));
  expect_error(cluster[0].group.failure(), ErrorKind::kMismatch,
               "two executions of programs overlap on rank 0");
  // The other rank is told, as of any failure.
  EXPECT_TRUE(eventually([&] { return cluster[1].group.failure().has_value(); }));
  expect_error(cluster[1].group.failure(), ErrorKind::kMismatch, "two threads launched at the same time");
}

TEST(Executions, MeetingInsideAnExchangeSaysThatTheyOverlap) {
  Cluster cluster(two_ranks());
  Outputs first, second;
  std::thread waiting([&] { step(cluster, 0, 1, first); });  // for rank 1
  EXPECT_TRUE(eventually([&] { return cluster[0].group.stats().exchanges == 1; }));
  std::thread meeting([&] { step(cluster, 0, 2, second); });
  std::this_thread::sleep_for(100ms);  // it blocks on the group; nothing of that can be seen
  Outputs out;
  step(cluster, 1, 1, out);
  waiting.join();
  meeting.join();
  expect_error(cluster[0].group.failure(), ErrorKind::kMismatch, "overlap on rank 0");
}

TEST(Executions, OfOneExchangeAreTheSameOnAllRanksOfAProcess) {
  const auto launches = std::make_shared<Launches>();
  Cluster cluster(two_ranks(), local(), [&](GroupConfig& config) { config.launches = launches; });
  std::vector<Outputs> outputs(2);
  cluster.each([&](int rank) { EXPECT_TRUE(step(cluster, rank, 1, outputs[rank])); });
  // Neither rank sees anything wrong alone: each runs one execution to its end.
  cluster.each([&](int rank) { EXPECT_FALSE(step(cluster, rank, 2 + rank, outputs[rank])); });
  for (int rank = 0; rank < 2; ++rank) {
    EXPECT_TRUE(eventually([&] { return cluster[rank].group.failure().has_value(); }));
    expect_error(cluster[rank].group.failure(), ErrorKind::kMismatch, "overlap");
  }
}

TEST(Launches, ForgetNothingThatALaggingRankCanAskFor) {
  Launches launches;
  for (uint64_t exchange = 0; exchange < 1000; ++exchange) {
    EXPECT_TRUE(launches.agree(exchange, static_cast<int64_t>(exchange / 4)));
    if (exchange < kMaxLanes) continue;
    EXPECT_TRUE(launches.agree(exchange - kMaxLanes, static_cast<int64_t>((exchange - kMaxLanes) / 4)));
    EXPECT_FALSE(launches.agree(exchange - kMaxLanes, 7777));
  }
}

}  // namespace
}  // namespace pplx::moe::testing
