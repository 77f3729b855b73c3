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

}  // namespace
}  // namespace pplx::moe::testing
