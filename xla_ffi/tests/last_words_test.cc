// A rank that closes after a failure says so: who caused it may have been unable to tell everybody.
#include <cstring>

#include "xla_ffi/tests/rogue.h"

namespace pplx::moe::testing {
namespace {

Problem two_ranks() { return {.ranks = 2, .experts = 4, .top_k = 2, .max_tokens = 4}; }

TEST(LastWords, OfAFailedRankAreItsFailure) {
  Rogue rogue(two_ranks());
  AbortNotice notice = rogue.good_notice();
  notice.error_kind = static_cast<uint8_t>(ErrorKind::kMismatch);
  notice.culprit = 1;
  std::strcpy(notice.text, "rank 1 is elsewhere");
  rogue.notify(notice, false);
  ASSERT_TRUE(eventually([&] { return rogue.real().group.failure().has_value(); }));
  rogue.real().group.close();
  const AbortNotice words = rogue.last_words();
  EXPECT_EQ(words.closed, 1);
  EXPECT_EQ(words.error_kind, static_cast<uint8_t>(ErrorKind::kMismatch));
  EXPECT_EQ(words.culprit, 1U);
  EXPECT_NE(std::string(words.text).find("rank 1 is elsewhere"), std::string::npos) << words.text;
}

TEST(LastWords, AreBelieved) {
  Rogue rogue(two_ranks());
  AbortNotice notice = rogue.good_notice();
  notice.closed = 1;
  notice.error_kind = static_cast<uint8_t>(ErrorKind::kTimeout);
  notice.culprit = 0;
  std::strcpy(notice.text, "rank 0 did not come");
  rogue.notify(notice, true);
  ASSERT_TRUE(eventually([&] { return rogue.real().group.failure().has_value(); }));
  expect_error(rogue.real().group.failure(), ErrorKind::kTimeout, "rank 0 did not come");
  EXPECT_EQ(rogue.real().group.failure_culprit(), 0U);
}

TEST(LastWords, OfAnOrderlyCloseAreNoFailure) {
  const Problem problem{.ranks = 2};
  Cluster cluster(problem);
  cluster[1].group.close();
  std::this_thread::sleep_for(100ms);
  cluster[0].group.read_notices();
  EXPECT_FALSE(cluster[0].group.failure());
}

// A peer that dies may leave a queue of this rank's in a state in which nobody is heard any more.
TEST(LastWords, OfManyWhoFallSilentItIsWhoHasEnded) {
  const Problem problem{.ranks = 3};
  std::vector<std::unique_ptr<Member>> members;
  std::vector<Bytes> endpoints;
  for (int rank = 0; rank < problem.ranks; ++rank) {
    GroupConfig config = group_config(problem, rank, local());
    config.timeout = 4s;
    members.push_back(std::make_unique<Member>(problem.shape(rank), config));
    endpoints.push_back(members.back()->group.endpoint());
  }
  Endpoint gone = Endpoint::parse(endpoints[2]);
  gone.pid = 99999999;  // more than Linux has
  endpoints[2] = gone.bytes();
  members[0]->group.connect(endpoints);  // and the others never do, nor do they beat
  ASSERT_TRUE(eventually([&] { return members[0]->group.failure().has_value(); }));
  const std::string text = members[0]->group.failure()->what();
  EXPECT_NE(text.find("rank 2 ("), std::string::npos) << text;
  EXPECT_EQ(text.find("rank 1 ("), std::string::npos) << text;
  EXPECT_EQ(members[0]->group.failure_culprit(), 2U);
}

}  // namespace
}  // namespace pplx::moe::testing
