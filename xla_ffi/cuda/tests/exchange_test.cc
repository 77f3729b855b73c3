// All four exchanges on the GPU against the dense oracle: bit for bit, but for the order of a dot product.
#include <gtest/gtest.h>

#include <numeric>

#include "xla_ffi/cuda/tests/gpu_cases.h"
#include "xla_ffi/cuda/tests/step.h"

namespace pplx::moe::cuda::testing {
namespace {

const auto name_of = [](const auto& info) { return info.param.name; };

class GpuExchangeTest : public ::testing::TestWithParam<Case> {};

TEST_P(GpuExchangeTest, EqualsTheOracle) {
  Cluster cluster(GetParam().problem);
  check_steps(cluster, std::min(GetParam().steps, 12), 1000);
}

INSTANTIATE_TEST_SUITE_P(Grid, GpuExchangeTest, ::testing::ValuesIn(gpu_cases()), name_of);

// Send and recv apart, one after the other.
class GpuHalvesTest : public ::testing::TestWithParam<Case> {};

TEST_P(GpuHalvesTest, EqualTheOracle) {
  Cluster cluster(GetParam().problem);
  check_steps(cluster, std::min(GetParam().steps / 3 + 1, 4), 2000, true);
}

INSTANTIATE_TEST_SUITE_P(Grid, GpuHalvesTest, ::testing::ValuesIn(gpu_cases_of_one_round()), name_of);

TEST(GpuExchange, HundredsOfStepsWithNewRoutingEach) {
  Cluster cluster({.ranks = 4, .experts = 10, .top_k = 3, .hidden = 12, .max_tokens = 9, .chunk = 4});
  check_steps(cluster, 300, 5000);
}

// The number of blocks is no part of the result.
TEST(GpuExchange, AnyNumberOfBlocks) {
  for (const int num_sms : {1, 2, 3, 16}) {
    for (const Quant quant : {Quant::kNone, Quant::kFp8}) {
      Cluster cluster({.ranks = 3, .hidden = 272, .max_tokens = 40, .chunk = 17, .quant = quant},
                      {.num_sms = num_sms});
      check_steps(cluster, 6, 6000 + num_sms);
    }
  }
}

// Everybody's tokens go to one rank, which then returns them all.
TEST(GpuExchange, AllToOneRank) {
  Cluster cluster({.ranks = 6, .experts = 6, .top_k = 1, .hidden = 64, .max_tokens = 40});
  std::vector<Inputs> inputs;
  for (int rank = 0; rank < 6; ++rank) {
    inputs.push_back(random_inputs(cluster.problem(), 40, 40, Routing::kAllToOne, rank));
  }
  for (int i = 0; i < 5; ++i) {
    Steps steps(cluster, inputs);
    steps.run();
    steps.expect_oracle("step " + std::to_string(i));
  }
}

// Without zero_tail rows past the last are left alone and read by nobody.
TEST(GpuExchange, TheTailIsNeitherWrittenNorReadWhenItNeedNotBeZero) {
  const Problem problem{.ranks = 2, .experts = 4, .top_k = 2, .max_tokens = 8};
  Cluster cluster(problem, {.adjust_shape = [](MoeShape& shape) { shape.zero_tail = false; }});
  Steps steps(cluster, random_step(problem, 3, 8));
  steps.exchange(Kind::kDispatch, false);
  steps.finish();
  steps.apply(&DeviceStep::tokens, &DeviceStep::y);
  cluster.each([&](int rank) {
    const DeviceStep& step = steps[rank];
    int64_t used = 0;
    for (const int32_t size : step.memory.host<int32_t>(step.group_sizes)) used += size;
    ASSERT_LT(used, step.rows());
    const auto rows = step.memory.host<float>(step.tokens);
    const Tensor untouched = garbage(problem.dtype, 1);
    for (size_t i = used * problem.hidden; i < rows.size(); ++i) {
      ASSERT_EQ(std::memcmp(&rows[i], untouched.data(), 4), 0);
    }
    const auto y = step.memory.host<float>(step.y);
    std::fill(y.begin() + used * problem.hidden, y.end(), NAN);
    step.memory.upload(step.y, cluster[rank].stream());
  });
  cluster.sync();
  steps.exchange(Kind::kCombine, false);
  steps.finish();
  for (int rank = 0; rank < 2; ++rank) EXPECT_TRUE(steps.outputs(rank).out == steps.wanted()[rank].out);
}

// A route may be used any number of times, and never.
TEST(GpuExchange, ProgramsThatBreakAlternation) {
  const Problem problem{.ranks = 3, .hidden = 64, .max_tokens = 10, .dtype = DType::kBFloat16};
  Cluster cluster(problem);
  Steps first(cluster, random_step(problem, 1, 10)), second(cluster, random_step(problem, 2, 10));
  for (int i = 0; i < 20; ++i) {
    first.exchange(Kind::kDispatch, false);
    second.exchange(Kind::kDispatch, false);
    first.finish();
    second.finish();
    first.apply(&DeviceStep::tokens, &DeviceStep::y);
    second.apply(&DeviceStep::tokens, &DeviceStep::y);
    for (int j = 0; j < i % 4; ++j) first.exchange(Kind::kCombine, false);
    second.exchange(Kind::kCombine, false);
    first.exchange(Kind::kCombine, false);
    first.finish();
    second.finish();
    for (int rank = 0; rank < 3; ++rank) {
      ASSERT_TRUE(first.outputs(rank).out == first.wanted()[rank].out) << i;
      ASSERT_TRUE(second.outputs(rank).out == second.wanted()[rank].out) << i;
    }
  }
}

// Up to depth exchanges between send and recv, received in the order of their sends or not.
class GpuWindowTest : public ::testing::TestWithParam<int> {};

TEST_P(GpuWindowTest, SeveralSendsBeforeTheirRecvs) {
  const int depth = GetParam();
  const Problem problem{
      .ranks = 3, .hidden = 64, .max_tokens = 10, .depth = depth, .dtype = DType::kBFloat16};
  Cluster cluster(problem);
  std::mt19937_64 rng(depth);
  for (int round = 0; round < 12; ++round) {
    std::vector<std::unique_ptr<Steps>> batches;
    for (int i = 0; i < depth; ++i) {
      batches.push_back(std::make_unique<Steps>(cluster, random_step(problem, 100 * round + i)));
    }
    std::vector<int> order(depth);
    for (const Kind kind : {Kind::kDispatch, Kind::kCombine}) {
      for (int i = 0; i < depth; ++i) batches[i]->launch_all(kind, Half::kSend, i);
      std::iota(order.begin(), order.end(), 0);
      std::shuffle(order.begin(), order.end(), rng);
      for (const int i : order) batches[i]->launch_all(kind, Half::kRecv, i);
      for (auto& batch : batches) batch->finish();
      for (auto& batch : batches) {
        if (kind == Kind::kDispatch) batch->apply(&DeviceStep::tokens, &DeviceStep::y);
      }
    }
    for (int i = 0; i < depth; ++i) {
      for (int rank = 0; rank < 3; ++rank) {
        const Outputs got = batches[i]->outputs(rank);
        const Outputs& want = batches[i]->wanted()[rank];
        ASSERT_TRUE(got.tokens == want.tokens) << "round " << round << " batch " << i << " rank " << rank;
        ASSERT_TRUE(got.out == want.out) << "round " << round << " batch " << i << " rank " << rank;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Depths, GpuWindowTest, ::testing::Range(1, 7));

// The derivative of a recv that nobody differentiates: its ticket is zero, and nothing is exchanged.
TEST(GpuExchange, ATransposedRecvOfNothingIsZero) {
  const Problem problem{.ranks = 2, .experts = 4, .top_k = 2, .hidden = 8, .max_tokens = 6};
  Cluster cluster(problem);
  Steps steps(cluster, random_step(problem, 5, 6));
  steps.exchange(Kind::kDispatch, false);
  cluster.sync();
  const uint64_t next = cluster[0].control().next;
  for (const Kind kind : {Kind::kCombineTranspose, Kind::kDispatchTranspose}) {
    PPLX_MUST(cudaMemset(steps[0].ticket(kind), 0, 16));
    PPLX_MUST(cudaDeviceSynchronize());
    steps.launch(0, kind, Half::kRecv);
  }
  steps.finish();
  const Outputs got = steps.outputs(0);
  EXPECT_TRUE(got.d_x == Tensor(problem.dtype, 6 * problem.hidden));
  EXPECT_EQ(got.d_weights, std::vector<float>(6 * 2, 0.0F));
  EXPECT_TRUE(got.d_y == Tensor(problem.dtype, problem.row_count(6) * problem.hidden));
  EXPECT_EQ(got.d_row_weights, std::vector<float>(problem.row_count(6), 0.0F));
  EXPECT_EQ(cluster[0].control().next, next);
  EXPECT_EQ(cluster[0].host().failure.complete, 0U);
}

}  // namespace
}  // namespace pplx::moe::cuda::testing
