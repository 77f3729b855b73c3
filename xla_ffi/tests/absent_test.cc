// Ranks that take no part: the others exchange as if those had no experts and no tokens.
#include <algorithm>
#include <cmath>

#include "xla_ffi/tests/support.h"

namespace pplx::moe::testing {
namespace {

// The ranks of a group but for some.
class Survivors {
 public:
  Survivors(const Problem& problem, std::vector<uint32_t> absent, const EngineConfig& engine = local())
      : absent_(std::move(absent)), members_(problem.ranks) {
    std::vector<Bytes> endpoints(problem.ranks);
    for (int rank = 0; rank < problem.ranks; ++rank) {
      if (away(rank)) continue;
      GroupConfig config = group_config(problem, rank, engine);
      config.absent = absent_;
      members_[rank] = std::make_unique<Member>(problem.shape(rank), config);
      endpoints[rank] = members_[rank]->group.endpoint();
    }
    for (auto& member : members_) {
      if (member) member->group.connect(endpoints);
    }
  }
  bool away(int rank) const { return std::count(absent_.begin(), absent_.end(), rank) != 0; }
  Member& operator[](int rank) { return *members_[rank]; }
  void each(const std::function<void(int)>& body) {
    on_ranks(static_cast<int>(members_.size()), [&](int rank) {
      if (!away(rank)) body(rank);
    });
  }

 private:
  std::vector<uint32_t> absent_;
  std::vector<std::unique_ptr<Member>> members_;
};

Call losing(Member& member, Kind kind, int tokens, int64_t run) {
  static const Site site;
  Call call = make_call(member, kind, tokens, site);
  call.run = run;
  call.losses = &member.losses;
  return call;
}

std::optional<Error> forward(const Problem& problem, Member& member, int rank, const Inputs& in, Outputs& out,
                             int64_t run) {
  Arguments args(problem, member, in, out);
  if (auto error = dispatch(losing(member, Kind::kDispatch, in.tokens, run), args.dispatch_send(),
                            args.dispatch_recv())) {
    return error;
  }
  apply_experts(problem, rank, out.group_sizes, out.tokens, out.y);
  return combine(losing(member, Kind::kCombine, in.tokens, run), args.combine_send(), args.combine_recv());
}

// What is lost, and the inputs without it: for the oracle, which knows of no absent ranks.
LossCounts take_away(Problem& problem, std::vector<Inputs>& inputs, const Survivors& group, int counted) {
  LossCounts lost;
  problem.expert_map = problem.map();
  const int slots = problem.experts_per_rank();
  problem.slots_per_rank = slots;
  for (int p = 0; p < problem.ranks * slots; ++p) {
    if (group.away(p / slots)) problem.expert_map[p] = -1;
  }
  const auto hosted = [&](int expert) {
    return std::count(problem.expert_map.begin(), problem.expert_map.end(), expert) != 0;
  };
  for (int rank = 0; rank < problem.ranks; ++rank) {
    Inputs& in = inputs[rank];
    if (group.away(rank)) in.num_tokens = 0;
    for (int t = 0; t < in.num_tokens; ++t) {
      int32_t* ids = in.indices.data() + static_cast<ptrdiff_t>(t) * problem.top_k;
      float* weights = in.weights.data() + static_cast<ptrdiff_t>(t) * problem.top_k;
      float all = 0, left = 0;
      int routed = 0, kept = 0;
      for (int k = 0; k < problem.top_k; ++k) {
        if (ids[k] < 0) continue;
        ++routed;
        all += weights[k];
        if (!hosted(ids[k])) {
          ids[k] = -1;
          continue;
        }
        ++kept;
        left += weights[k];
      }
      for (int k = 0; k < problem.top_k && kept != 0 && kept != routed; ++k) weights[k] *= all / left;
      if (rank != counted || routed == 0) continue;
      ++lost.routed;
      if (kept == routed) continue;
      ++lost.tokens;
      lost.whole += kept == 0 ? 1 : 0;
      lost.weight += all - left;
      if (kept != 0) ++lost.by_share[std::min(3, static_cast<int>((all - left) / all * 4))];
    }
  }
  return lost;
}

struct Away {
  const char* name;
  std::vector<uint32_t> ranks;
};

class Absent : public ::testing::TestWithParam<Away> {};

TEST_P(Absent, OthersExchangeAsIfTheyHadNoExpertsAndNoTokens) {
  for (const bool replicas : {false, true}) {
    for (int variant = 0; variant < 6; ++variant) {
      Problem problem{.ranks = 4,
                      .experts = 8,
                      .top_k = 3,
                      .hidden = 20,
                      .max_tokens = 9,
                      .chunk = variant % 2 == 0 ? 0 : 4,
                      .dtype = variant % 3 == 0 ? DType::kBFloat16 : DType::kFloat32};
      if (replicas) {
        problem.expert_map = {0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 0};
        problem.slots_per_rank = 3;
      }
      Survivors group(problem, GetParam().ranks, variant < 3 ? local() : sim(variant));
      for (int number = 0; number < 8; ++number) {
        std::vector<Inputs> inputs = random_step(problem, 100 * variant + number);
        for (Inputs& in : inputs) {
          in.weighted = true;
          for (float& weight : in.weights) weight = std::abs(weight) + 0.01F;
        }
        std::vector<Inputs> remaining = inputs;
        Problem without = problem;
        const LossCounts before = group[0].losses.counts();
        const LossCounts lost = take_away(without, remaining, group, 0);
        const std::vector<Outputs> want = oracle(without, remaining);
        group.each([&](int rank) {
          Outputs out;
          const auto error = forward(problem, group[rank], rank, inputs[rank], out, number + 1);
          ASSERT_FALSE(error) << error->what();
          const std::string where =
              std::to_string(variant) + "/" + std::to_string(number) + " rank " + std::to_string(rank);
          EXPECT_EQ(out.ok, 1) << where;
          EXPECT_EQ(out.group_sizes, want[rank].group_sizes) << where;
          EXPECT_TRUE(out.tokens == want[rank].tokens) << where;
          EXPECT_EQ(out.row_weights, want[rank].row_weights) << where;
          EXPECT_TRUE(out.out == want[rank].out) << where;
        });
        const LossCounts after = group[0].losses.counts();
        EXPECT_EQ(after.routed - before.routed, lost.routed);
        EXPECT_EQ(after.tokens - before.tokens, lost.tokens);
        EXPECT_EQ(after.whole - before.whole, lost.whole);
        EXPECT_NEAR(after.weight - before.weight, lost.weight, 1e-3);
        for (int i = 0; i < 4; ++i) EXPECT_EQ(after.by_share[i] - before.by_share[i], lost.by_share[i]) << i;
      }
      group.each([&](int rank) { EXPECT_FALSE(group[rank].group.failure()); });
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Ranks, Absent,
                         ::testing::Values(Away{"one", {2}}, Away{"two", {1, 3}},
                                           Away{"all_others", {1, 2, 3}}),
                         [](const auto& info) { return info.param.name; });

TEST(AbsentRanks, HaveNoDerivatives) {
  const Problem problem{.ranks = 3, .experts = 6, .top_k = 2, .max_tokens = 4};
  Survivors group(problem, {1});
  const std::vector<Inputs> inputs = random_step(problem, 3, 4);
  group.each([&](int rank) {
    Outputs out;
    ASSERT_FALSE(forward(problem, group[rank], rank, inputs[rank], out, 1));
    expect_error(run_combine_transpose(problem, group[rank], inputs[rank], out), ErrorKind::kInvalidArgument,
                 "masked ranks");
    ASSERT_FALSE(forward(problem, group[rank], rank, inputs[rank], out, 2));  // nothing has failed
  });
}

// A route of a dispatch in which the rank took part: what it held of a token is gone.
TEST(AbsentRanks, RowsForThemAreADataErrorOrAFailureButNeverANumber) {
  const Problem problem{.ranks = 3, .experts = 6, .top_k = 2, .max_tokens = 6};
  const std::vector<Inputs> inputs = random_step(problem, 1, 6);
  std::vector<Outputs> outputs(problem.ranks);
  {
    Cluster whole(problem);
    whole.each([&](int rank) {
      ASSERT_FALSE(run_dispatch(problem, whole[rank], inputs[rank], outputs[rank]));
      apply_experts(problem, rank, outputs[rank].group_sizes, outputs[rank].tokens, outputs[rank].y);
    });
  }
  Survivors group(problem, {1});
  group.each([&](int rank) {
    Outputs& out = outputs[rank];
    const bool needed = std::any_of(out.home.begin(), out.home.end(), [&](int32_t expert) {
      return expert >= 0 && expert / problem.experts_per_rank() == 1;
    });
    ASSERT_TRUE(needed);
    EXPECT_FALSE(run_combine(problem, group[rank], inputs[rank], out));
    EXPECT_TRUE(group[rank].group.failure() || group[rank].group.data_error());
    for (int t = 0; t < inputs[rank].num_tokens; ++t) {
      const int32_t* home = out.home.data() + static_cast<ptrdiff_t>(t) * problem.top_k;
      const bool lost = std::any_of(home, home + problem.top_k, [&](int32_t expert) {
        return expert >= 0 && expert / problem.experts_per_rank() == 1;
      });
      const bool nan = std::isnan(out.out.get(int64_t{t} * problem.hidden));
      EXPECT_TRUE(nan || !lost) << rank << " " << t;
    }
  });
}

TEST(AbsentRanks, AreRefusedWhereTheyMakeNoSense) {
  const Problem problem{.ranks = 2};
  for (const uint32_t rank : {0U, 2U}) {
    GroupConfig config = group_config(problem, 0, local());
    config.absent = {rank};
    EXPECT_THROW(ExchangeGroup group(config), Error);
  }
}

TEST(AbsentRanks, AreNotMissedByTheMonitor) {
  const Problem problem{.ranks = 3, .experts = 6, .top_k = 2, .max_tokens = 4};
  std::vector<std::unique_ptr<Member>> members(3);
  std::vector<Bytes> endpoints(3);
  for (const int rank : {0, 2}) {
    GroupConfig config = group_config(problem, rank, local());
    config.absent = {1};
    config.timeout = 500ms;
    members[rank] = std::make_unique<Member>(problem.shape(rank), config);
    endpoints[rank] = members[rank]->group.endpoint();
  }
  for (const int rank : {0, 2}) members[rank]->group.connect(endpoints);
  std::this_thread::sleep_for(1500ms);
  for (const int rank : {0, 2}) EXPECT_FALSE(members[rank]->group.failure());
}

TEST(Failure, NamesItsCulprit) {
  const Problem problem{.ranks = 3};
  Cluster cluster(problem);
  EXPECT_EQ(cluster[0].group.failure_culprit(), ExchangeGroup::kNobody);
  cluster[2].group.fail(Error(ErrorKind::kPeer, "rank 1 is gone"), 1);
  for (const int rank : {0, 1}) {
    EXPECT_TRUE(eventually([&] { return cluster[rank].group.failure().has_value(); }));
    EXPECT_EQ(cluster[rank].group.failure_culprit(), 1U);
  }
}

}  // namespace
}  // namespace pplx::moe::testing
