// Who was waited for, and for how long.
#include "xla_ffi/tests/support.h"

namespace pplx::moe::testing {
namespace {

TEST(Stats, NameTheRankThatWasWaitedFor) {
  const Problem problem{.ranks = 3, .experts = 6, .top_k = 2, .hidden = 16, .max_tokens = 8, .chunk = 8};
  constexpr int kSlow = 1;
  constexpr auto kLate = 40ms;
  constexpr int kSteps = 5;
  Cluster cluster(problem);
  std::vector<Outputs> outputs(problem.ranks);
  for (int number = 0; number < kSteps; ++number) {
    const std::vector<Inputs> inputs = random_step(problem, number, 8);
    cluster.each([&](int rank) {
      if (rank == kSlow) std::this_thread::sleep_for(kLate);
      EXPECT_FALSE(run_step(problem, cluster[rank], inputs[rank], outputs[rank], {.run = number}));
    });
  }
  for (const int rank : {0, 2}) {
    const std::vector<PeerStats> peers = cluster[rank].group.stats().peers;
    const PeerStats& slow = peers[kSlow];
    EXPECT_GT(slow.waited, kSteps * kLate / 2);
    EXPECT_GT(slow.longest_wait, kLate / 2);
    EXPECT_LE(slow.longest_wait, slow.waited);
    EXPECT_NE(slow.process.find("pid"), std::string::npos);
    EXPECT_LT(peers[2 - rank].waited, slow.waited);
    EXPECT_EQ(peers[rank].waited.count(), 0);
  }
  for (const PeerStats& peer : cluster[kSlow].group.stats().peers) EXPECT_LT(peer.waited, kSteps * kLate / 2);
}

// Who was slow once, at the start, is not who is slow now.
TEST(Stats, TheStragglerIsWhoIsSlowOfLate) {
  const Problem problem{.ranks = 3, .experts = 6, .top_k = 2, .hidden = 16, .max_tokens = 8, .chunk = 8};
  Cluster cluster(problem);
  std::vector<Outputs> outputs(problem.ranks);
  int64_t run = 0;
  const auto step = [&](int slow, Duration late) {
    const std::vector<Inputs> inputs = random_step(problem, ++run, 8);
    cluster.each([&](int rank) {
      if (rank == slow) std::this_thread::sleep_for(late);
      EXPECT_FALSE(run_step(problem, cluster[rank], inputs[rank], outputs[rank], {.run = run}));
    });
  };
  step(1, 6s);
  for (int number = 0; number < 80; ++number) step(2, 10ms);
  const std::vector<PeerStats> peers = cluster[0].group.stats().peers;
  EXPECT_GT(peers[1].waited, peers[2].waited);
  EXPECT_GT(peers[2].recent_wait, peers[1].recent_wait);
  EXPECT_GT(peers[2].recent_wait, 500us);  // one in four exchanges of a step
}

}  // namespace
}  // namespace pplx::moe::testing
