// Wrong data on one rank: its tokens are NaN, everybody learns, the protocol goes on.
#include <gtest/gtest.h>

#include <array>
#include <atomic>

#include "xla_ffi/tests/support.h"

namespace pplx::moe {
namespace {

using namespace pplx::moe::testing;

// A full step on every rank; returns what each handed back.
std::vector<std::optional<Error>> step(Cluster& cluster, const std::vector<Inputs>& inputs,
                                       std::vector<Outputs>& outputs, int64_t run) {
  std::vector<std::optional<Error>> errors(inputs.size());
  outputs.assign(inputs.size(), {});
  cluster.each([&](int rank) {
    errors[rank] = run_step(cluster.problem(), cluster[rank], inputs[rank], outputs[rank], {.run = run});
  });
  return errors;
}

void expect_sound_step(Cluster& cluster, int64_t run) {
  const std::vector<Inputs> inputs = random_step(cluster.problem(), 60 + run, cluster.problem().max_tokens);
  std::vector<Outputs> outputs;
  for (const auto& error : step(cluster, inputs, outputs, run)) EXPECT_FALSE(error) << error->what();
  const std::vector<Outputs> wanted = oracle(cluster.problem(), inputs);
  for (size_t rank = 0; rank < inputs.size(); ++rank) expect_equal(outputs[rank], wanted[rank], "sound step");
}

void expect_poisoned(const Outputs& out) {
  EXPECT_EQ(out.ok, 0);
  EXPECT_EQ(out.num_rows, 0);
  EXPECT_EQ(out.num_dropped, 0);
  for (const int32_t size : out.group_sizes) EXPECT_EQ(size, 0);
  for (const Tensor* tensor : {&out.tokens, &out.out, &out.d_y, &out.d_x}) EXPECT_TRUE(all_nan(*tensor));
  for (const auto* values : {&out.row_weights, &out.d_row_weights, &out.d_weights}) {
    EXPECT_TRUE(all_nan(*values));
  }
}

bool touches(const Problem& problem, const Inputs& in, int token, int rank) {
  for (int k = 0; k < problem.top_k; ++k) {
    const int expert = in.indices[token * problem.top_k + k];
    if (token < in.num_tokens && expert >= 0 && expert / problem.experts_per_rank() == rank) return true;
  }
  return false;
}

// Tokens that needed `bad` are NaN, all others are exactly the oracle's.
void expect_only_its_tokens_nan(const Problem& problem, int bad, const Inputs& in, const Outputs& got,
                                const Outputs& want) {
  for (int t = 0; t < in.tokens; ++t) {
    for (int h = 0; h < problem.hidden; ++h) {
      const int64_t at = int64_t{t} * problem.hidden + h;
      if (touches(problem, in, t, bad)) {
        ASSERT_TRUE(std::isnan(got.out.get(at)) && std::isnan(got.d_x.get(at))) << t;
      } else {
        ASSERT_EQ(got.out.get(at), want.out.get(at)) << t;
        ASSERT_EQ(got.d_x.get(at), want.d_x.get(at)) << t;
      }
    }
  }
}

struct Bad {
  std::string name, text;
  std::function<void(Inputs&)> change;
};

std::vector<Bad> bad_inputs() {
  return {{"too_high", "indices[1, 0] is 9, allowed are -1 and 0..8", [](Inputs& in) { in.indices[2] = 9; }},
          {"far", "indices[0, 1] is 2147483647", [](Inputs& in) { in.indices[1] = INT32_MAX; }},
          {"too_low", "indices[0, 0] is -2", [](Inputs& in) { in.indices[0] = -2; }},
          {"lowest", "indices[3, 1] is -2147483648", [](Inputs& in) { in.indices[7] = INT32_MIN; }},
          {"duplicate", "a second time", [](Inputs& in) { in.indices[4] = in.indices[5] = 3; }},
          {"num_tokens_high", "num_tokens is 9, allowed are 0..8", [](Inputs& in) { in.num_tokens = 9; }},
          {"num_tokens_low", "num_tokens is -1", [](Inputs& in) { in.num_tokens = -1; }}};
}

class BadInput : public ::testing::TestWithParam<Bad> {};

TEST_P(BadInput, PoisonsItsRankAndIsRaisedOnAllUntilTaken) {
  const Problem problem{.ranks = 3, .experts = 9, .top_k = 2, .max_tokens = 8, .chunk = 3};
  constexpr int kBad = 1;
  Cluster cluster(problem, sim(5));
  expect_sound_step(cluster, 1);
  std::vector<Inputs> inputs;
  for (int rank = 0; rank < 3; ++rank) {
    inputs.push_back(random_inputs(problem, 8, 8, Routing::kUniform, 7 + rank));
  }
  std::vector<Inputs> without = inputs;
  std::fill(without[kBad].indices.begin(), without[kBad].indices.end(), -1);
  GetParam().change(inputs[kBad]);

  std::vector<Outputs> outputs;
  for (const auto& error : step(cluster, inputs, outputs, 2)) EXPECT_FALSE(error);
  expect_poisoned(outputs[kBad]);
  const std::vector<Outputs> wanted = oracle(problem, without);
  for (const int rank : {0, 2}) {
    EXPECT_EQ(outputs[rank].ok, 1);
    EXPECT_TRUE(outputs[rank].tokens == wanted[rank].tokens);
    expect_only_its_tokens_nan(problem, kBad, inputs[rank], outputs[rank], wanted[rank]);
  }
  // The next executions raise on every rank, until every rank has taken its error.
  for (int64_t run = 3; run < 5; ++run) {
    std::vector<Outputs> unused;
    for (const auto& error : step(cluster, without, unused, run)) {
      ASSERT_TRUE(error);
      EXPECT_EQ(error->kind(), ErrorKind::kRouting);
      EXPECT_NE(std::string(error->what()).find("rank 1"), std::string::npos) << error->what();
    }
  }
  for (int rank = 0; rank < problem.ranks; ++rank) {
    EXPECT_FALSE(cluster[rank].group.failure());
    const auto error = cluster[rank].group.take_data_error();
    ASSERT_TRUE(error);
    EXPECT_NE(std::string(error->what()).find(rank == kBad ? GetParam().text : "rank 1"), std::string::npos)
        << error->what();
    if (rank + 1 < problem.ranks) {  // one rank's error is enough to stop all
      std::vector<Outputs> unused;
      for (const auto& raised : step(cluster, without, unused, 10 + rank)) EXPECT_TRUE(raised);
    }
  }
  expect_sound_step(cluster, 20);
}

INSTANTIATE_TEST_SUITE_P(Kind, BadInput, ::testing::ValuesIn(bad_inputs()),
                         [](const auto& info) { return info.param.name; });

TEST(BadInput, AnExpertThatLivesNowhere) {
  const Problem problem{
      .ranks = 2, .experts = 3, .top_k = 1, .max_tokens = 4, .expert_map = {0, 2, 2, 0}, .slots_per_rank = 2};
  Cluster cluster(problem);
  std::vector<Inputs> inputs;
  for (int rank = 0; rank < 2; ++rank) {
    inputs.push_back(random_inputs(problem, 4, 4, Routing::kNobody, rank));
  }
  inputs[0].indices[2] = 1;
  std::vector<Outputs> outputs;
  step(cluster, inputs, outputs, 1);
  expect_poisoned(outputs[0]);
  EXPECT_NE(std::string(cluster[0].group.data_error()->what()).find("places nowhere"), std::string::npos);
}

class Overflow : public ::testing::TestWithParam<int> {};  // chunk

TEST_P(Overflow, PoisonsTheRankThatReceivesTooMuch) {
  const Problem problem{
      .ranks = 3, .experts = 6, .top_k = 2, .max_tokens = 8, .chunk = GetParam(), .rows = 30};
  constexpr int kFull = 2;
  Cluster cluster(problem);
  std::vector<Inputs> inputs;
  for (int rank = 0; rank < 3; ++rank) {
    inputs.push_back(random_inputs(problem, 8, 8, Routing::kUniform, rank));
    for (int t = 0; t < 8; ++t) {
      if (t < 6) inputs[rank].indices[t * 2] = 4, inputs[rank].indices[t * 2 + 1] = 5;  // 36 pairs to rank 2
      if (t >= 6) inputs[rank].indices[t * 2] = rank, inputs[rank].indices[t * 2 + 1] = -1;
    }
  }
  std::vector<Outputs> outputs;
  for (const auto& error : step(cluster, inputs, outputs, 1)) EXPECT_FALSE(error);
  Problem roomy = problem;
  roomy.rows = 48;
  const std::vector<Outputs> wanted = oracle(roomy, inputs);
  expect_poisoned(outputs[kFull]);
  for (const int rank : {0, 1}) {
    EXPECT_EQ(outputs[rank].ok, 1);
    expect_only_its_tokens_nan(problem, kFull, inputs[rank], outputs[rank], wanted[rank]);
  }
  const auto error = cluster[kFull].group.data_error();
  ASSERT_TRUE(error);
  EXPECT_NE(std::string(error->what()).find("receives 36 rows, rows=30"), std::string::npos) << error->what();
  for (int rank = 0; rank < 3; ++rank) {
    const auto taken = cluster[rank].group.take_data_error();
    ASSERT_TRUE(taken) << rank;
    EXPECT_NE(std::string(taken->what()).find("rank 2"), std::string::npos) << taken->what();
  }
  inputs = std::vector<Inputs>(3, random_inputs(problem, 8, 8, Routing::kNobody, 0));
  for (const auto& again : step(cluster, inputs, outputs, 2)) EXPECT_FALSE(again);
}

INSTANTIATE_TEST_SUITE_P(Chunk, Overflow, ::testing::Values(8, 3, 1));

// With drop nothing is an error: forward, gradients and counts agree with the oracle (exchange_test.cc has
// the grid); here the clip is the largest common one.
TEST(Drop, ClipsEveryExpertToTheLargestCommonLength) {
  const Problem problem{.ranks = 2, .experts = 4, .top_k = 1, .max_tokens = 10, .rows = 9, .drop = true};
  Cluster cluster(problem);
  std::vector<Inputs> inputs(2, random_inputs(problem, 10, 10, Routing::kNobody, 1));
  for (int t = 0; t < 10; ++t) {
    inputs[0].indices[t] = 0;               // ten for expert 0
    inputs[1].indices[t] = t < 3 ? 1 : -1;  // three for expert 1
  }
  std::vector<Outputs> outputs;
  step(cluster, inputs, outputs, 1);
  EXPECT_EQ(outputs[0].group_sizes, (std::vector<int32_t>{6, 3}));
  EXPECT_EQ(outputs[0].num_rows, 9);
  EXPECT_EQ(outputs[0].num_dropped, 4);
  EXPECT_EQ(outputs[1].num_dropped, 0);
  for (int t = 6; t < 10; ++t) {
    EXPECT_EQ(outputs[0].out.get(t * problem.hidden), 0.0F);
    EXPECT_EQ(outputs[0].d_weights[t], 0.0F);
  }
  for (int rank = 0; rank < 2; ++rank) EXPECT_FALSE(cluster[rank].group.data_error());
}

// check() takes the error while its rank is halfway through sending.
TEST(Raise, IsTheSameInEveryMessageOfAnExchange) {
  const Problem problem{.ranks = 3};
  Cluster cluster(problem);
  cluster[0].group.report_data_error(Error(ErrorKind::kRouting, "old"), 0, 1);
  cluster.each([&](int rank) {
    const Site site{.name = "layer", .run = 2};
    const Call call = make_call(cluster[rank], Kind::kCombine, 0, site);
    Exchange exchange(call.group, call.site, 0, call.run);
    for (const uint32_t peer : {1U, 2U, 0U}) {
      if (peer == static_cast<uint32_t>(rank)) continue;
      ASSERT_NE(exchange.message(peer, sizeof(RegionHeader)), nullptr);
      exchange.post(0);
      if (rank == 0) call.group.take_data_error();
    }
    ASSERT_NE(exchange.message(rank, sizeof(RegionHeader)), nullptr);
    exchange.post(0);
    ASSERT_TRUE(exchange.wait());
    EXPECT_TRUE(exchange.raised()) << rank;
  });
}

// All ranks return the error from one and the same exchange or none does, whenever check() takes it.
TEST(Raise, IsAgreedWhileAnotherThreadTakesTheError) {
  const Problem problem{.ranks = 3, .experts = 6, .top_k = 2, .hidden = 8, .max_tokens = 12, .chunk = 1};
  Cluster cluster(problem);
  const std::vector<Inputs> good = random_step(problem, 3, 12);
  std::vector<Inputs> bad = good;
  bad[1].indices[0] = 77;
  std::atomic<bool> stop{false};
  std::thread taker([&] {
    while (!stop) {
      for (int rank = 0; rank < 3; ++rank) cluster[rank].group.take_data_error();
      std::this_thread::sleep_for(20us);
    }
  });
  for (int64_t run = 1; run < 120; ++run) {
    std::vector<Outputs> outputs;
    const auto errors = step(cluster, run % 2 == 0 ? good : bad, outputs, run);
    for (int rank = 1; rank < 3; ++rank) ASSERT_EQ(errors[rank].has_value(), errors[0].has_value()) << run;
    for (int rank = 0; rank < 3; ++rank) ASSERT_FALSE(cluster[rank].group.failure()) << run;
  }
  stop = true;
  taker.join();
}

struct Tampering {
  std::string name;
  std::function<void(Outputs&)> change;
};

std::vector<Tampering> tamperings() {
  return {{"row_high", [](Outputs& out) { out.slot_rows[0] = 1 << 20; }},
          {"row_low", [](Outputs& out) { out.slot_rows[0] = -2; }},
          {"home_high", [](Outputs& out) { out.home[3] = 6; }},
          {"home_low", [](Outputs& out) { out.home[3] = -3; }},
          {"home_far", [](Outputs& out) { out.home[0] = INT32_MIN; }},
          {"slots_negative", [](Outputs& out) { out.source_slots[1] = -1; }},
          {"slots_beyond_chunk", [](Outputs& out) { out.source_slots[0] = 9; }},
          {"slots_far", [](Outputs& out) { out.source_slots[0] = INT32_MAX; }},
          {"start_not_zero", [](Outputs& out) { out.slot_start[0] = 1; }},
          {"start_falls", [](Outputs& out) { out.slot_start[1] = -5; }},
          {"start_jumps", [](Outputs& out) { out.slot_start[1] = 1 << 30; }}};
}

class TamperedRoute : public ::testing::TestWithParam<Tampering> {};

TEST_P(TamperedRoute, IsADataErrorInEveryExchangeThatReadsIt) {
  const Problem problem{.ranks = 2, .experts = 6, .top_k = 2, .max_tokens = 8};
  for (int exchange = 0; exchange < 3; ++exchange) {
    Cluster cluster(problem);
    std::vector<Inputs> inputs;
    for (int rank = 0; rank < 2; ++rank) {
      inputs.push_back(random_inputs(problem, 8, 8, Routing::kUniform, 10 + rank));
    }
    std::vector<Outputs> outputs(2);
    cluster.each([&](int rank) {
      Outputs& out = outputs[rank];
      run_dispatch(problem, cluster[rank], inputs[rank], out);
      out.y = out.d_tokens = out.tokens;
      out.d_row_weights = out.row_weights;
      if (rank == 0) GetParam().change(out);
      const auto run = exchange == 0   ? run_combine
                       : exchange == 1 ? run_combine_transpose
                                       : run_dispatch_transpose;
      EXPECT_FALSE(run(problem, cluster[rank], inputs[rank], out, {}));
    });
    const Outputs& out = outputs[0];
    EXPECT_TRUE(all_nan(exchange == 0 ? out.out : exchange == 1 ? out.d_y : out.d_x));
    const auto error = cluster[0].group.take_data_error();
    ASSERT_TRUE(error);
    EXPECT_EQ(error->kind(), ErrorKind::kRouting);
    EXPECT_TRUE(cluster[1].group.take_data_error());
    for (int rank = 0; rank < 2; ++rank) EXPECT_FALSE(cluster[rank].group.failure());
    expect_sound_step(cluster, 5);
  }
}

INSTANTIATE_TEST_SUITE_P(Change, TamperedRoute, ::testing::ValuesIn(tamperings()),
                         [](const auto& info) { return info.param.name; });

// In range but not what dispatch returned: whatever comes of it, every call returns.
TEST(TamperedRouteAnyhow, NeverCrashesNorHangs) {
  const Problem problem{.ranks = 2, .experts = 6, .top_k = 5, .hidden = 8, .max_tokens = 6};
  for (uint64_t seed = 0; seed < 120; ++seed) {
    Cluster cluster(problem);
    const std::vector<Inputs> inputs = random_step(problem, seed, 6);
    cluster.each([&](int rank) {
      std::mt19937_64 rng(seed);
      Outputs out;
      run_dispatch(problem, cluster[rank], inputs[rank], out);
      out.y = out.d_tokens = out.tokens;
      out.d_row_weights = out.row_weights;
      if (rank == 0) {
        for (int change = 0; change < 6; ++change) {
          auto* array = std::array{&out.home, &out.source_slots, &out.slot_start, &out.slot_rows}[rng() % 4];
          (*array)[rng() % array->size()] = static_cast<int32_t>(rng() % 10) - 1;
        }
      }
      run_combine(problem, cluster[rank], inputs[rank], out);
      run_combine_transpose(problem, cluster[rank], inputs[rank], out);
      run_dispatch_transpose(problem, cluster[rank], inputs[rank], out);
    });
  }
}

}  // namespace
}  // namespace pplx::moe
