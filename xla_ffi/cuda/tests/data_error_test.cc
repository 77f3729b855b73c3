// Wrong data: its rank's results are NaN, others get NaN for just the tokens that needed that rank, and the
// group goes on.
#include <gtest/gtest.h>

#include "xla_ffi/cuda/tests/step.h"

namespace pplx::moe::cuda::testing {
namespace {

constexpr int kRanks = 3, kTokens = 8, kCulprit = 1;

Problem problem() { return {.ranks = kRanks, .experts = 9, .top_k = 3, .hidden = 64, .max_tokens = kTokens}; }

// The first tokens need one rank each.
std::vector<Inputs> good_inputs(const Problem& problem, uint64_t seed, Routing routing = Routing::kUniform) {
  std::vector<Inputs> inputs;
  for (int rank = 0; rank < problem.ranks; ++rank) {
    inputs.push_back(random_inputs(problem, kTokens, kTokens, routing, seed * 10 + rank));
    const std::vector<int32_t> first = {3, -1, -1, 0, -1, -1, 6, -1, -1};
    std::ranges::copy(first, inputs.back().indices.begin());
  }
  return inputs;
}

void expect_error(const Cluster& cluster, int rank, Fault fault, int culprit, Kind kind,
                  const std::vector<int64_t>& detail = {}) {
  FaultRecord& record = cluster[rank].host().data_error;
  ASSERT_EQ(load(record.complete), 1U) << "rank " << rank;
  EXPECT_EQ(record.fault, fault) << "rank " << rank;
  EXPECT_EQ(record.culprit, static_cast<uint32_t>(culprit)) << "rank " << rank;
  EXPECT_EQ(record.kind, static_cast<uint32_t>(kind)) << "rank " << rank;
  EXPECT_EQ(record.tokens, static_cast<uint32_t>(kTokens)) << "rank " << rank;
  for (size_t i = 0; i < detail.size(); ++i) EXPECT_EQ(record.detail[i], detail[i]) << "detail " << i;
}

// As check() does.
void take_errors(const Cluster& cluster) {
  for (int rank = 0; rank < cluster.size(); ++rank) {
    HostControl& host = cluster[rank].host();
    if (load(host.data_error.complete) == 0) continue;
    store(host.data_error.complete, 0U);
    store(host.data_errors_taken, host.data_errors_taken + 1);
  }
}

void expect_usable(Cluster& cluster) {
  take_errors(cluster);
  for (int i = 0; i < 3; ++i) {
    Steps steps(cluster, good_inputs(cluster.problem(), 900 + i, Routing::kSparse));
    steps.run();
    steps.expect_oracle("after the error, step " + std::to_string(i));
  }
}

// Of another rank than the culprit: NaN where a token's experts are on the culprit, the oracle's bytes
// elsewhere.
void expect_nan_where_needed(const Problem& problem, const Inputs& in, const Tensor& got,
                             const Tensor& want) {
  int hit = 0;
  for (int t = 0; t < in.tokens; ++t) {
    bool needs = false;
    for (int k = 0; k < problem.top_k; ++k) {
      const int expert = in.indices[t * problem.top_k + k];
      needs = needs || (expert >= 0 && expert / problem.experts_per_rank() == kCulprit);
    }
    hit += needs;
    for (int h = 0; h < problem.hidden; ++h) {
      const float value = got.get(int64_t{t} * problem.hidden + h);
      if (needs) {
        ASSERT_TRUE(std::isnan(value)) << "token " << t;
      } else {
        ASSERT_EQ(value, want.get(int64_t{t} * problem.hidden + h)) << "token " << t;
      }
    }
  }
  ASSERT_GT(hit, 0) << "the test proves nothing";
  ASSERT_LT(hit, in.tokens) << "the test proves nothing";
}

struct Bad {
  std::string name;
  std::function<void(DeviceStep&)> spoil;
  Fault fault;
  std::vector<int64_t> detail;
};
void PrintTo(const Bad& bad, std::ostream* out) { *out << bad.name; }

Bad bad_index(const std::string& name, int token, int choice, int id, Fault fault) {
  return {name,
          [=](DeviceStep& step) {
            const auto ids = step.memory.host<int32_t>(step.indices).subspan(token * 3, 3);
            // 7 and 8 are other experts than any that a Bad names.
            ids[(choice + 1) % 3] = fault == Fault::kDuplicate ? id : 7;
            ids[(choice + 2) % 3] = 8;
            ids[choice] = id;
          },
          fault,
          {token, choice, id}};
}

Bad bad_count(const std::string& name, int num_tokens) {
  return {name,
          [=](DeviceStep& step) { step.memory.host<int32_t>(step.num_tokens)[0] = num_tokens; },
          Fault::kNumTokens,
          {num_tokens}};
}

std::vector<Bad> bad_inputs() {
  Bad homeless = bad_index("homeless", 2, 1, 4, Fault::kHomeless);
  homeless.spoil = [spoil = homeless.spoil](DeviceStep& step) {
    // Only the one that is named.
    for (int32_t& id : step.memory.host<int32_t>(step.indices)) id = id == 4 ? -1 : id;
    spoil(step);
    for (int32_t& expert : step.memory.host<int32_t>(step.map)) expert = expert == 4 ? -1 : expert;
  };
  return {bad_index("too_large", 3, 1, 9, Fault::kBadExpert),
          bad_index("huge", 7, 2, 0x7fffffff, Fault::kBadExpert),
          bad_index("negative", 0, 0, -2, Fault::kBadExpert),
          bad_index("twice", 5, 2, 3, Fault::kDuplicate),
          bad_count("fewer_than_none", -1),
          bad_count("more_than_there_are", kTokens + 1),
          homeless};
}

class GpuBadInput : public ::testing::TestWithParam<Bad> {};

TEST_P(GpuBadInput, PoisonsItsRankAndWhatNeededIt) {
  const Problem p = problem();
  Cluster cluster(p);
  for (int i = 0; i < 3; ++i) {
    std::vector<Inputs> inputs = good_inputs(p, i, Routing::kSparse);
    Steps steps(cluster, inputs);
    GetParam().spoil(steps[kCulprit]);
    steps.upload();
    // What the others' results are: those of a rank that sends nothing.
    std::fill(inputs[kCulprit].indices.begin(), inputs[kCulprit].indices.end(), -1);
    const std::vector<Outputs> wanted = oracle(p, inputs);
    steps.exchange(Kind::kDispatch, i == 2);
    steps.finish();
    for (int rank = 0; rank < kRanks; ++rank) {
      if (rank == kCulprit) {
        EXPECT_TRUE(steps[rank].poisoned(Kind::kDispatch));
        expect_error(cluster, rank, GetParam().fault, kCulprit, Kind::kDispatch, GetParam().detail);
      } else {
        EXPECT_TRUE(steps.outputs(rank).tokens == wanted[rank].tokens);
        EXPECT_EQ(steps.outputs(rank).ok, 1);
        expect_error(cluster, rank, Fault::kPoisoned, kCulprit, Kind::kDispatch);
      }
    }
    steps.apply(&DeviceStep::tokens, &DeviceStep::y);
    steps.exchange(Kind::kCombine, i == 2);
    steps.finish();
    EXPECT_TRUE(steps[kCulprit].poisoned(Kind::kCombine));
    for (const int rank : {0, 2}) {
      expect_nan_where_needed(p, inputs[rank], steps.outputs(rank).out, wanted[rank].out);
      EXPECT_EQ(cluster[rank].host().failure.complete, 0U);
    }
    expect_usable(cluster);
  }
}

INSTANTIATE_TEST_SUITE_P(Faults, GpuBadInput, ::testing::ValuesIn(bad_inputs()),
                         [](const auto& info) { return info.param.name; });

TEST(GpuOverflow, PoisonsTheRankThatReceivesTooMuch) {
  Problem p = problem();
  p.rows = 10;
  Cluster cluster(p);
  std::vector<Inputs> inputs = good_inputs(p, 1, Routing::kNobody);
  int needed = 0;
  for (Inputs& in : inputs) {
    for (int t = 0; t < kTokens; ++t) {
      // Even tokens go to the culprit's experts, the odd ones nowhere or, one of them, to rank 2.
      in.indices[t * 3] = t % 2 == 0 ? kCulprit * 3 + t % 3 : t == 1 ? 7 : -1;
      needed += t % 2 == 0;
    }
  }
  ASSERT_GT(needed, p.rows);
  Steps steps(cluster, inputs);
  steps.exchange(Kind::kDispatch, false);
  steps.finish();
  EXPECT_TRUE(steps[kCulprit].poisoned(Kind::kDispatch));
  expect_error(cluster, kCulprit, Fault::kOverflow, kCulprit, Kind::kDispatch, {needed, p.rows});
  for (const int rank : {0, 2}) {
    EXPECT_EQ(steps.outputs(rank).ok, 1);
    EXPECT_EQ(cluster[rank].host().data_error.complete, 0U);
  }
  steps.apply(&DeviceStep::tokens, &DeviceStep::y);
  steps.exchange(Kind::kCombine, false);
  steps.finish();
  EXPECT_TRUE(steps[kCulprit].poisoned(Kind::kCombine));
  for (const int rank : {0, 2}) {
    const Outputs got = steps.outputs(rank);
    for (int t = 0; t < kTokens; ++t) {
      const float value = got.out.get(int64_t{t} * p.hidden);
      EXPECT_EQ(std::isnan(value), t % 2 == 0) << "token " << t;
    }
    expect_error(cluster, rank, Fault::kPoisoned, kCulprit, Kind::kCombine);
  }
  take_errors(cluster);
  Steps after(cluster, good_inputs(p, 5, Routing::kNobody));
  after.run();
  after.expect_oracle("after the overflow");
}

// One value of the route changed between dispatch and what uses it. slot_start is not read.
enum class Judge {
  kSender,    // what is sent is poisoned
  kReceiver,  // nobody else hears of it, and nobody else's values change
  kRow,       // likewise, but for the slot whose row is out of range
};
struct Tampering {
  std::string name;
  Fault fault;
  Part DeviceStep::*part;
  int at;  // below 0: from the end
  int32_t value;

  Judge judge(Kind kind) const {
    if (part == &DeviceStep::home && kind != Kind::kCombineTranspose) return Judge::kReceiver;
    if (part != &DeviceStep::slot_rows) return Judge::kSender;
    return kind == Kind::kCombineTranspose ? Judge::kReceiver : Judge::kRow;
  }
  void spoil(const DeviceStep& step) const {
    const auto values = step.memory.host<int32_t>(step.*part);
    values[at < 0 ? values.size() + at : at] = value;
  }
};
void PrintTo(const Tampering& tampering, std::ostream* out) { *out << tampering.name; }

std::vector<Tampering> tamperings() {
  const auto put = [](const std::string& name, Part DeviceStep::*part, int at, int32_t value,
                      Fault fault = Fault::kForeignRoute) {
    return Tampering{name, fault, part, at, value};
  };
  return {put("home_too_large", &DeviceStep::home, 0, 9), put("home_too_small", &DeviceStep::home, -1, -3),
          put("home_huge", &DeviceStep::home, 5, 0x7fffffff),
          put("slots_negative", &DeviceStep::source_slots, 1, -1),
          put("slots_beyond_a_chunk", &DeviceStep::source_slots, 2, kTokens + 1),
          put("slots_huge", &DeviceStep::source_slots, 0, 0x7fffffff),
          // Of the first token of rank 0, which has no other row.
          put("row_too_large", &DeviceStep::slot_rows, 0, 3 * kTokens * 3),
          put("row_too_small", &DeviceStep::slot_rows, 0, -2),
          put("not_ok", &DeviceStep::ok, 0, 0, Fault::kFailedRoute)};
}

// What an exchange returned to a rank: of each array the first row, then all others. Garbage takes its place,
// so that what the next exchange leaves unwritten shows.
std::vector<std::vector<float>> take_results(const DeviceStep& step, Kind kind) {
  int64_t rows = step.tokens_of_rank();
  std::vector<Part> parts;
  if (kind == Kind::kCombine) parts = {step.out};
  if (kind == Kind::kDispatchTranspose) parts = {step.d_x, step.d_weights};
  if (kind == Kind::kCombineTranspose) {
    rows = step.rows();
    parts = {step.d_y, step.d_row_weights};
  }
  std::vector<std::vector<float>> results;
  for (const Part& part : parts) {
    const auto values = step.memory.host<float>(part);
    const auto second = values.begin() + static_cast<int64_t>(values.size()) / rows;
    results.push_back({values.begin(), second});
    results.push_back({second, values.end()});
    std::ranges::fill(step.memory.host<std::byte>(part), Mirror::kGarbage);
  }
  return results;
}

class GpuTamperedRoute : public ::testing::TestWithParam<std::tuple<Tampering, Kind>> {};

TEST_P(GpuTamperedRoute, IsADataErrorInEveryExchangeThatReadsIt) {
  const auto& [tampering, kind] = GetParam();
  const Judge judge = tampering.judge(kind);
  const Problem p = problem();
  Cluster cluster(p);
  for (const bool split : {false, true}) {
    const std::vector<Inputs> inputs = good_inputs(p, 3);
    Steps steps(cluster, inputs);
    steps.exchange(Kind::kDispatch, false);
    steps.finish();
    ASSERT_GT(steps.outputs(kCulprit).num_rows, 0);
    steps.apply(&DeviceStep::tokens, &DeviceStep::y);
    steps.apply(&DeviceStep::tokens, &DeviceStep::d_tokens);
    steps.give_row_gradients();
    steps.exchange(kind, split);
    steps.finish();
    std::vector<std::vector<std::vector<float>>> sound;
    for (int rank = 0; rank < kRanks; ++rank) sound.push_back(take_results(steps[rank], kind));
    tampering.spoil(steps[kCulprit]);
    steps.upload();

    steps.exchange(kind, split);
    steps.finish();
    EXPECT_TRUE(steps[kCulprit].poisoned(kind));
    expect_error(cluster, kCulprit, tampering.fault, kCulprit, kind);
    for (const int rank : {0, 2}) {
      EXPECT_FALSE(steps[rank].poisoned(kind));
      EXPECT_FALSE(steps[rank].wrote_past_an_end());
      EXPECT_EQ(cluster[rank].host().failure.complete, 0U);
      if (judge == Judge::kSender) {
        expect_error(cluster, rank, Fault::kPoisoned, kCulprit, kind);
        continue;
      }
      EXPECT_EQ(cluster[rank].host().data_error.complete, 0U) << "rank " << rank;
      std::vector<std::vector<float>> wanted = sound[rank];
      if (judge == Judge::kRow && rank == 0) {
        // Nothing but that row would have come home to the first token.
        ASSERT_TRUE(std::ranges::any_of(wanted[0], [](float value) { return value != 0; }));
        std::ranges::fill(wanted[0], 0.0F);
        if (kind == Kind::kDispatchTranspose) std::ranges::fill(wanted[2], 0.0F);
      }
      EXPECT_EQ(take_results(steps[rank], kind), wanted) << "rank " << rank;
    }
    expect_usable(cluster);
  }
}

INSTANTIATE_TEST_SUITE_P(Faults, GpuTamperedRoute,
                         ::testing::Combine(::testing::ValuesIn(tamperings()),
                                            ::testing::Values(Kind::kCombine, Kind::kCombineTranspose,
                                                              Kind::kDispatchTranspose)),
                         [](const auto& info) {
                           std::string kind = kind_name(std::get<1>(info.param));
                           std::ranges::replace(kind, ' ', '_');
                           return std::get<0>(info.param).name + "_" + kind;
                         });

// Values that dispatch did not return but might have: any end but a crash or a hang.
TEST(GpuTamperedRouteAnyhow, NeverCrashesNorHangs) {
  const Problem p = problem();
  for (uint64_t seed = 0; seed < 40; ++seed) {
    std::mt19937_64 rng(seed);
    Cluster cluster(p, {.stall_ns = 500 * kMillisecond});
    Steps steps(cluster, good_inputs(p, seed));
    steps.exchange(Kind::kDispatch, false);
    steps.finish();
    for (int i = 0; i < 3; ++i) {
      constexpr Part DeviceStep::*kParts[] = {&DeviceStep::home, &DeviceStep::source_slots,
                                              &DeviceStep::slot_rows};
      DeviceStep& step = steps[static_cast<int>(rng() % kRanks)];
      const auto values = step.memory.host<int32_t>(step.*kParts[rng() % 3]);
      values[rng() % values.size()] = values[rng() % values.size()] + static_cast<int32_t>(rng() % 3) - 1;
    }
    steps.upload();
    for (const Kind kind : {Kind::kCombine, Kind::kCombineTranspose, Kind::kDispatchTranspose}) {
      steps.exchange(kind, false);
    }
    steps.finish();
    for (int rank = 0; rank < kRanks; ++rank) EXPECT_FALSE(steps[rank].wrote_past_an_end()) << seed;
  }
}

// A second error before the first is taken leaves the first; one after that is seen.
TEST(GpuDataError, TheFirstIsKeptUntilItIsTaken) {
  const Problem p = problem();
  Cluster cluster(p);
  const auto run = [&](int id) {
    Steps steps(cluster, good_inputs(p, 1));
    steps[kCulprit].memory.host<int32_t>(steps[kCulprit].indices)[0] = id;
    steps.upload();
    steps.exchange(Kind::kDispatch, false);
    steps.finish();
  };
  run(100);
  run(200);
  expect_error(cluster, kCulprit, Fault::kBadExpert, kCulprit, Kind::kDispatch, {0, 0, 100});
  EXPECT_EQ(cluster[kCulprit].host().data_error.exchange, 0U);
  take_errors(cluster);
  run(300);
  expect_error(cluster, kCulprit, Fault::kBadExpert, kCulprit, Kind::kDispatch, {0, 0, 300});
  EXPECT_EQ(cluster[kCulprit].host().data_error.exchange, 2U);
}

}  // namespace
}  // namespace pplx::moe::cuda::testing
