// Messages that go by the host: the same results, and what happens when none come.
#include <gtest/gtest.h>

#include "xla_ffi/cuda/tests/gpu_cases.h"
#include "xla_ffi/cuda/tests/proxy.h"
#include "xla_ffi/cuda/tests/step.h"

namespace pplx::moe::cuda::testing {
namespace {

bool nobody(int, int) { return false; }
bool same_node(int a, int b) { return a / 2 == b / 2; }

std::vector<Case> proxied_cases() {
  std::vector<Case> all = gpu_cases();
  // Nothing in the host's part depends on the dtype: two of them are enough.
  std::erase_if(all, [](const Case& c) { return c.problem.dtype == DType::kFloat16; });
  return all;
}

// Some peers of every rank on its node, some beyond.
std::vector<Case> cases_of_pairs() {
  std::vector<Case> all = proxied_cases();
  std::erase_if(all, [](const Case& c) { return c.problem.ranks < 3; });
  return all;
}

class GpuProxiedTest : public ::testing::TestWithParam<Case> {};

TEST_P(GpuProxiedTest, EqualsTheOracle) {
  Cluster cluster(GetParam().problem, {.direct = nobody});
  const Proxy proxy(cluster);
  check_steps(cluster, std::min(GetParam().steps, 4), 3000);
  if (GetParam().problem.chunk == 0) check_steps(cluster, 2, 3500, true);
}

class GpuPairsTest : public ::testing::TestWithParam<Case> {};

TEST_P(GpuPairsTest, EqualsTheOracle) {
  Cluster cluster(GetParam().problem, {.direct = same_node});
  const Proxy proxy(cluster);
  check_steps(cluster, std::min(GetParam().steps, 4), 4000);
  if (GetParam().problem.chunk == 0) check_steps(cluster, 2, 4500, true);
}

const auto name_of = [](const auto& info) { return info.param.name; };
INSTANTIATE_TEST_SUITE_P(Grid, GpuProxiedTest, ::testing::ValuesIn(proxied_cases()), name_of);
INSTANTIATE_TEST_SUITE_P(Grid, GpuPairsTest, ::testing::ValuesIn(cases_of_pairs()), name_of);

TEST(GpuProxied, ManySteps) {
  Cluster cluster({.ranks = 4, .experts = 10, .top_k = 3, .hidden = 12, .max_tokens = 9, .chunk = 4},
                  {.direct = same_node});
  const Proxy proxy(cluster);
  check_steps(cluster, 150, 5000);
}

// Lane after lane is reused while messages of other exchanges are under way.
TEST(GpuProxied, SeveralInFlight) {
  for (const int depth : {2, 3, 6}) {
    const Problem problem{.ranks = 3, .hidden = 64, .max_tokens = 10, .depth = depth};
    Cluster cluster(problem, {.direct = nobody});
    const Proxy proxy(cluster);
    for (int round = 0; round < 10; ++round) {
      std::vector<std::unique_ptr<Steps>> batches;
      for (int i = 0; i < depth; ++i) {
        batches.push_back(std::make_unique<Steps>(cluster, random_step(problem, 50 * round + i)));
      }
      for (int i = 0; i < depth; ++i) batches[i]->launch_all(Kind::kDispatch, Half::kSend, i);
      for (int i = depth - 1; i >= 0; --i) batches[i]->launch_all(Kind::kDispatch, Half::kRecv, i);
      for (int i = 0; i < depth; ++i) {
        batches[i]->finish();
        for (int rank = 0; rank < 3; ++rank) {
          ASSERT_TRUE(batches[i]->outputs(rank).tokens == batches[i]->wanted()[rank].tokens) << round;
        }
      }
    }
  }
}

TEST(GpuProxied, ADataErrorTravelsWithTheMessage) {
  const Problem problem{.ranks = 3, .experts = 9, .top_k = 3, .hidden = 64, .max_tokens = 8};
  Cluster cluster(problem, {.direct = same_node});
  const Proxy proxy(cluster);
  std::vector<Inputs> inputs = random_step(problem, 5, 8);
  inputs[2].num_tokens = 8;
  inputs[2].indices[0] = 77;
  Steps steps(cluster, inputs);
  steps.exchange(Kind::kDispatch, false);
  steps.finish();
  EXPECT_TRUE(steps[2].poisoned(Kind::kDispatch));
  EXPECT_EQ(cluster[2].host().data_error.fault, Fault::kBadExpert);
  for (const int rank : {0, 1}) {
    EXPECT_EQ(steps.outputs(rank).ok, 1);
    ASSERT_EQ(cluster[rank].host().data_error.complete, 1U);
    EXPECT_EQ(cluster[rank].host().data_error.fault, Fault::kPoisoned);
    EXPECT_EQ(cluster[rank].host().data_error.culprit, 2U);
    EXPECT_EQ(cluster[rank].host().failure.complete, 0U);
  }
}

TEST(GpuProxied, OtherProgramsAreAMismatch) {
  const Problem problem{.ranks = 2, .hidden = 64, .max_tokens = 8};
  Cluster cluster(problem, {.direct = nobody});
  const Proxy proxy(cluster);
  Steps steps(cluster, random_step(problem, 5, 8));
  steps.launch(0, Kind::kDispatch, Half::kBoth, 0);
  steps.launch(1, Kind::kDispatch, Half::kBoth, 1);
  steps.finish();
  for (int rank = 0; rank < 2; ++rank) {
    const FaultRecord& failure = cluster[rank].host().failure;
    ASSERT_EQ(failure.complete, 1U);
    // A rank that fails tells the others by the host, which here does not.
    EXPECT_EQ(failure.fault, Fault::kMismatch);
    EXPECT_EQ(failure.theirs.tag, steps.call(1 - rank, Kind::kDispatch, 1 - rank).tag);
    EXPECT_TRUE(steps[rank].poisoned(Kind::kDispatch));
  }
}

TEST(GpuProxied, WhenNothingComesTheWaitEnds) {
  const Problem problem{.ranks = 3, .hidden = 64, .max_tokens = 8};
  for (const bool by_host : {false, true}) {
    Cluster cluster(problem, {.stall_ns = (by_host ? 3'600'000 : 50) * kMillisecond, .direct = same_node});
    Proxy proxy(cluster);
    proxy.stop();
    Steps steps(cluster, random_step(problem, 5, 8));
    steps.exchange(Kind::kDispatch, false);
    if (by_host) {
      // A proxy that sees its peer die ends the wait.
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      for (int rank = 0; rank < 3; ++rank) store<uint64_t>(cluster[rank].host().abort, 1);
    }
    steps.finish();
    for (int rank = 0; rank < 3; ++rank) {
      EXPECT_TRUE(steps[rank].poisoned(Kind::kDispatch));
      const FaultRecord& failure = cluster[rank].host().failure;
      ASSERT_EQ(failure.complete, 1U);
      if (failure.fault == Fault::kNotice) continue;
      EXPECT_EQ(failure.fault, by_host ? Fault::kAborted : Fault::kTimeout) << rank;
    }
  }
}

}  // namespace
}  // namespace pplx::moe::cuda::testing
