// All four exchanges against the dense oracle, bit for bit.
#include <gtest/gtest.h>

#include "xla_ffi/tests/cases.h"
#include "xla_ffi/tests/support.h"

namespace pplx::moe {
namespace {

using namespace pplx::moe::testing;

class ExchangeTest : public ::testing::TestWithParam<Case> {};

TEST_P(ExchangeTest, EqualsTheOracle) {
  Cluster cluster(GetParam().problem);
  check_steps(cluster, GetParam().steps, 1000);
}

INSTANTIATE_TEST_SUITE_P(Grid, ExchangeTest, ::testing::ValuesIn(cases()),
                         [](const auto& info) { return info.param.name; });

// Send and recv apart, one after the other. Halves go in one round.
class HalvesTest : public ::testing::TestWithParam<Case> {};

TEST_P(HalvesTest, EqualTheOracle) {
  Cluster cluster(GetParam().problem);
  check_steps(cluster, GetParam().steps / 3 + 1, 2000, {.split = true});
}

std::vector<Case> cases_of_one_round() {
  std::vector<Case> all = cases();
  std::erase_if(all, [](const Case& c) { return c.problem.chunk != 0; });
  return all;
}

INSTANTIATE_TEST_SUITE_P(Grid, HalvesTest, ::testing::ValuesIn(cases_of_one_round()),
                         [](const auto& info) { return info.param.name; });

TEST(Exchange, HundredsOfStepsWithNewRoutingEach) {
  Cluster cluster({.ranks = 4, .experts = 10, .top_k = 3, .hidden = 12, .max_tokens = 9, .chunk = 4});
  check_steps(cluster, 400, 5000);
}

TEST(Exchange, TokensLeaveARankOnceForEachDestination) {
  const Problem problem{.ranks = 2, .experts = 8, .top_k = 4, .hidden = 64, .max_tokens = 10};
  Cluster cluster(problem);
  std::vector<Inputs> inputs;
  for (int rank = 0; rank < 2; ++rank) {
    inputs.push_back(random_inputs(problem, 10, 10, Routing::kUniform, rank));
    for (int t = 0; t < 10; ++t) {
      for (int k = 0; k < 4; ++k)
        inputs[rank].indices[t * 4 + k] = (1 - rank) * 4 + k;  // all four over there
    }
  }
  std::vector<Outputs> outputs(2);
  cluster.each([&](int rank) { run_dispatch(problem, cluster[rank], inputs[rank], outputs[rank]); });
  const MoeShape shape = problem.shape(0);
  const uint64_t expected = sizeof(RegionHeader) + shape.counts_bytes() + 10 * shape.dispatch_stride();
  for (int rank = 0; rank < 2; ++rank) {
    EXPECT_EQ(outputs[rank].num_rows, 40);
    const GroupStats stats = cluster[rank].group.stats();
    EXPECT_EQ(stats.peers[1 - rank].sent_bytes, expected);
    EXPECT_EQ(stats.peers[1 - rank].received_bytes, expected);
    EXPECT_EQ(stats.exchanges, 1U);
  }
}

// A combine may return more rows than a send buffer holds: every source's chunk of tokens to one rank.
TEST(Exchange, ACombineLongerThanTheSendBufferDrainsItOnTheWay) {
  const Problem problem{.ranks = 6, .experts = 6, .top_k = 1, .hidden = 64, .max_tokens = 40};
  ASSERT_LT(buffer_sizes(problem.shape(0)).staging_bytes,
            static_cast<size_t>(5 * 40 * problem.shape(0).row_stride()));
  for (const EngineConfig& engine : {local(), sim(7), sim(20)}) {
    Cluster cluster(problem, engine);
    std::vector<Inputs> inputs;
    for (int rank = 0; rank < 6; ++rank) {
      inputs.push_back(random_inputs(problem, 40, 40, Routing::kAllToOne, rank));
    }
    const std::vector<Outputs> wanted = oracle(problem, inputs);
    for (int step = 0; step < 4; ++step) {
      std::vector<Outputs> outputs(6);
      cluster.each([&](int rank) { run_step(problem, cluster[rank], inputs[rank], outputs[rank]); });
      for (int rank = 0; rank < 6; ++rank) expect_equal(outputs[rank], wanted[rank], "rank");
    }
  }
}

// Without zero_tail rows past the last are left alone and read by nobody.
TEST(Exchange, TheTailIsNeitherWrittenNorReadWhenItNeedNotBeZero) {
  const Problem problem{.ranks = 2, .experts = 4, .top_k = 2, .max_tokens = 8};
  Cluster cluster(problem);
  for (int rank = 0; rank < 2; ++rank) cluster[rank].shape.zero_tail = false;
  const std::vector<Inputs> inputs = random_step(problem, 3, 8);
  const std::vector<Outputs> wanted = oracle(problem, inputs);
  std::vector<Outputs> outputs(2);
  cluster.each([&](int rank) {
    Outputs& out = outputs[rank];
    run_dispatch(problem, cluster[rank], inputs[rank], out);
    int64_t used = 0;
    for (const int32_t size : out.group_sizes) used += size;
    const Tensor untouched = garbage(problem.dtype, problem.hidden);
    for (int64_t row = used; row < problem.row_count(8); ++row) {
      EXPECT_EQ(std::memcmp(static_cast<const std::byte*>(out.tokens.data()) + row * problem.hidden * 4,
                            untouched.data(), problem.hidden * 4),
                0);
    }
    apply_experts(problem, rank, out.group_sizes, out.tokens, out.y);
    for (int64_t i = used * problem.hidden; i < out.y.count(); ++i) out.y.set(i, NAN);
    run_combine(problem, cluster[rank], inputs[rank], out);
  });
  for (int rank = 0; rank < 2; ++rank) EXPECT_TRUE(outputs[rank].out == wanted[rank].out);
}

}  // namespace
}  // namespace pplx::moe
