// Send and recv apart: any interleaving within the window, tickets used once, what is left behind.
#include <gtest/gtest.h>

#include <deque>

#include "xla_ffi/tests/support.h"

namespace pplx::moe {
namespace {

using namespace pplx::moe::testing;

// One rank's run of a program that all ranks share: dispatch and combine `parts` steps. The order of sends is
// the program's; when to receive is up to each rank, within the window.
class Runner {
 public:
  Runner(const Problem& problem, Member& member, const std::vector<std::vector<Inputs>>& inputs,
         uint64_t seed)
      : problem_(problem), member_(member), inputs_(inputs), outputs_(inputs.size()), rng_(seed) {}

  // `sends`: part of each send in turn, a part's first is its dispatch, its second its combine.
  const std::vector<Outputs>& run(const std::vector<int>& sends) {
    for (const int part : sends) {
      // A combine needs its dispatch; otherwise receive only what must be, or a little more.
      const auto must = [&] {
        return under_way_.size() == static_cast<size_t>(problem_.depth) ||
               (sent_[part] == 1 && std::any_of(under_way_.begin(), under_way_.end(),
                                                [&](const Pending& p) { return p.part == part; }));
      };
      while (must() || (!under_way_.empty() && rng_() % 2 == 0)) receive();
      send(part);
    }
    while (!under_way_.empty()) receive();
    return outputs_;
  }

 private:
  struct Pending {
    int part;
    bool dispatch;
    Ticket ticket;
  };

  const Inputs& in(int part) const { return inputs_[part][member_.shape.rank]; }
  Call call(int part, bool is_dispatch) {
    return make_call(member_, is_dispatch ? Kind::kDispatch : Kind::kCombine, in(part).tokens, kSite);
  }

  void send(int part) {
    Arguments args(problem_, member_, in(part), outputs_[part]);
    const bool is_dispatch = sent_[part]++ == 0;
    Ticket ticket = 0;
    const auto error = is_dispatch ? dispatch_send(call(part, true), args.dispatch_send(), ticket)
                                   : combine_send(call(part, false), args.combine_send(), ticket);
    if (error) throw *error;
    under_way_.push_back({part, is_dispatch, ticket});
  }

  void receive() {
    const auto [part, is_dispatch, ticket] = under_way_.front();
    under_way_.pop_front();
    Outputs& out = outputs_[part];
    Arguments args(problem_, member_, in(part), out);
    const auto error = is_dispatch ? dispatch_recv(call(part, true), args.dispatch_recv(), ticket)
                                   : combine_recv(call(part, false), args.combine_recv(), ticket);
    if (error) throw *error;
    if (is_dispatch) apply_experts(problem_, member_.shape.rank, out.group_sizes, out.tokens, out.y);
  }

  const Problem& problem_;
  Member& member_;
  const std::vector<std::vector<Inputs>>& inputs_;
  std::vector<Outputs> outputs_;
  std::mt19937_64 rng_;
  std::map<int, int> sent_;
  std::deque<Pending> under_way_;
};

TEST(Halves, AnyInterleavingOfEveryRankGivesTheOraclesBytes) {
  for (uint64_t seed = 0; seed < 60; ++seed) {
    std::mt19937_64 rng(seed);
    const Problem problem{.ranks = 2 + static_cast<int>(seed % 3),
                          .experts = 5,
                          .top_k = 2,
                          .hidden = 6,
                          .max_tokens = 5,
                          .depth = 1 + static_cast<int>(seed % 6)};
    Cluster cluster(problem, seed % 4 == 3 ? local() : sim(seed));
    constexpr int kParts = 12;
    std::vector<std::vector<Inputs>> inputs;
    std::vector<int> sends;
    for (int part = 0; part < kParts; ++part) {
      inputs.push_back(random_step(problem, seed * 100 + part));
      sends.insert(sends.end(), {part, part});
    }
    std::shuffle(sends.begin(), sends.end(), rng);
    std::vector<std::vector<Outputs>> outputs(problem.ranks);
    cluster.each([&](int rank) {
      outputs[rank] = Runner(problem, cluster[rank], inputs, seed * 31 + rank).run(sends);
    });
    for (int part = 0; part < kParts; ++part) {
      const std::vector<Outputs> wanted = oracle(problem, inputs[part]);
      for (int rank = 0; rank < problem.ranks; ++rank) {
        const std::string where = "seed " + std::to_string(seed) + " part " + std::to_string(part);
        ASSERT_TRUE(outputs[rank][part].tokens == wanted[rank].tokens) << where;
        ASSERT_EQ(outputs[rank][part].group_sizes, wanted[rank].group_sizes) << where;
        ASSERT_TRUE(outputs[rank][part].out == wanted[rank].out) << where;
      }
    }
  }
}

class TwoRanks : public ::testing::Test {
 protected:
  static Problem problem(int depth) {
    return {.ranks = 2, .experts = 4, .top_k = 2, .hidden = 8, .max_tokens = 6, .depth = depth};
  }
  std::vector<Inputs> inputs = random_step(problem(2), 5, 6);
};

// Sends a dispatch; returns its ticket.
Ticket send(const Problem& problem, Member& member, const Inputs& in, Outputs& out, const Site& site = {}) {
  Arguments args(problem, member, in, out);
  Ticket ticket = 0;
  const auto error =
      dispatch_send(make_call(member, Kind::kDispatch, in.tokens, site), args.dispatch_send(), ticket);
  EXPECT_FALSE(error);
  return ticket;
}
std::optional<Error> receive(const Problem& problem, Member& member, const Inputs& in, Outputs& out,
                             Ticket ticket, const Site& site = {}) {
  Arguments args(problem, member, in, out);
  return dispatch_recv(make_call(member, Kind::kDispatch, in.tokens, site), args.dispatch_recv(), ticket);
}

TEST_F(TwoRanks, ATicketIsGoodForOneRecvOfItsCallInItsExecution) {
  const Problem p = problem(2);
  Cluster cluster(p);
  cluster.each([&](int rank) {
    Outputs out;
    Member& member = cluster[rank];
    const auto refused = [&](Ticket ticket, const Site& site) {
      try {
        receive(p, member, inputs[rank], out, ticket, site);
      } catch (const Error& error) {
        return error.kind() == ErrorKind::kInvalidArgument &&
               std::string(error.what()).find("exactly once") != std::string::npos;
      }
      return false;
    };
    const Ticket ticket = send(p, member, inputs[rank], out);
    EXPECT_TRUE(refused(0, {}));
    EXPECT_TRUE(refused(ticket + 1, {}));
    EXPECT_TRUE(refused(ticket, {.name = "another"}));
    EXPECT_TRUE(refused(ticket, {.run = 2}));
    EXPECT_FALSE(receive(p, member, inputs[rank], out, ticket));
    EXPECT_EQ(out.ok, 1);
    EXPECT_TRUE(refused(ticket, {}));
    EXPECT_FALSE(member.group.failure());
  });
}

TEST_F(TwoRanks, ATransposedRecvOfNothingIsZero) {
  const Problem p = problem(1);
  Cluster cluster(p);
  Outputs out;
  Arguments args(p, cluster[0], inputs[0], out);
  out.home.assign(6 * 2, -1);
  const auto call = [&](Kind kind) { return make_call(cluster[0], kind, 6, kSite); };
  EXPECT_FALSE(dispatch_transpose_recv(call(Kind::kDispatchTranspose), args.dispatch_transpose_recv(), 0));
  EXPECT_TRUE(out.d_x == Tensor(p.dtype, 6 * p.hidden));
  EXPECT_EQ(out.d_weights, std::vector<float>(6 * 2, 0.0F));
  EXPECT_FALSE(combine_transpose_recv(call(Kind::kCombineTranspose), args.combine_transpose_recv(), 0));
  EXPECT_TRUE(out.d_y == Tensor(p.dtype, p.row_count(6) * p.hidden));
  EXPECT_EQ(out.d_row_weights, std::vector<float>(p.row_count(6), 0.0F));
  EXPECT_EQ(cluster[0].group.stats().exchanges, 0U);
}

TEST_F(TwoRanks, SendingBeyondTheWindowFailsTheGroup) {
  for (const int depth : {1, 2, 4}) {
    const Problem p = problem(depth);
    Cluster cluster(p);
    cluster.each([&](int rank) {
      std::vector<Outputs> out(depth + 1);
      for (int i = 0; i <= depth; ++i) send(p, cluster[rank], inputs[rank], out[i]);
      const auto failure = cluster[rank].group.failure();
      ASSERT_TRUE(failure);
      EXPECT_EQ(failure->kind(), ErrorKind::kMismatch);
      EXPECT_NE(std::string(failure->what()).find("exchange 0 has not been received"), std::string::npos)
          << failure->what();
    });
  }
}

// Received out of order, the oldest holds its lane though fewer than depth are under way.
TEST_F(TwoRanks, TheWindowIsCountedFromTheOldest) {
  const Problem p = problem(2);
  Cluster cluster(p);
  cluster.each([&](int rank) {
    std::vector<Outputs> out(3);
    send(p, cluster[rank], inputs[rank], out[0]);
    const Ticket second = send(p, cluster[rank], inputs[rank], out[1]);
    EXPECT_FALSE(receive(p, cluster[rank], inputs[rank], out[1], second));
    EXPECT_EQ(out[1].ok, 1);
    send(p, cluster[rank], inputs[rank], out[2]);
    EXPECT_TRUE(cluster[rank].group.failure());
  });
}

TEST_F(TwoRanks, WhatAnExecutionLeavesBehindIsClearedByTheNext) {
  for (const EngineConfig& engine : {local(), sim(2), sim(5), sim(9)}) {
    const Problem p = problem(2);
    Cluster cluster(p, engine);
    const std::vector<Outputs> wanted = oracle(p, inputs);
    std::vector<Outputs> outputs(2);
    cluster.each([&](int rank) {
      for (int run = 1; run <= 20; ++run) {
        Outputs lost[2];
        for (int i = 0; i < run % 3; ++i) {
          send(p, cluster[rank], inputs[rank], lost[i], {.name = "lost", .run = 2 * run});
        }
        const auto error = run_step(p, cluster[rank], inputs[rank], outputs[rank],
                                    {.run = 2 * run + 1, .split = run % 2 == 0});
        ASSERT_FALSE(error) << error->what();
        expect_equal(outputs[rank], wanted[rank], "run " + std::to_string(run));
      }
    });
  }
}

TEST_F(TwoRanks, ADataErrorAtTheSendPoisonsTheRecv) {
  const Problem p = problem(2);
  Cluster cluster(p);
  inputs[1].indices[0] = 77;
  cluster.each([&](int rank) {
    Outputs out;
    const Ticket ticket = send(p, cluster[rank], inputs[rank], out);
    EXPECT_FALSE(receive(p, cluster[rank], inputs[rank], out, ticket));
    EXPECT_EQ(out.ok, rank == 0 ? 1 : 0);
    EXPECT_EQ(all_nan(out.tokens), rank == 1);
    EXPECT_TRUE(cluster[rank].group.take_data_error());
  });
}

// Ranks may have sent more or less when the flag comes; their numbers must agree afterwards.
TEST_F(TwoRanks, ARaiseInAHalfWaitsForTheNextExecution) {
  const Problem p = problem(2);
  Cluster cluster(p);
  const std::vector<Outputs> wanted = oracle(p, inputs);
  std::vector<Inputs> bad = inputs;
  bad[1].indices[0] = 77;
  cluster.each([&](int rank) {
    Member& member = cluster[rank];
    for (int64_t run = 1; run < 40; run += 4) {
      Outputs out, first, second;
      EXPECT_FALSE(run_dispatch(p, member, bad[rank], out, {.run = run}));
      const Site halves{.run = run + 1};
      const Ticket one = send(p, member, inputs[rank], first, halves);
      if (rank == 1) {
        EXPECT_FALSE(receive(p, member, inputs[rank], first, one, halves));
      }
      const Ticket two = send(p, member, inputs[rank], second, halves);
      if (rank == 0) {
        EXPECT_FALSE(receive(p, member, inputs[rank], first, one, halves));
      }
      EXPECT_FALSE(receive(p, member, inputs[rank], second, two, halves));
      EXPECT_EQ(second.ok, 1);
      for (int i = 0; i < 2; ++i) {
        const auto error = run_dispatch(p, member, inputs[rank], out, {.run = run + 2});
        ASSERT_TRUE(error);
        EXPECT_EQ(error->kind(), ErrorKind::kRouting);
      }
      EXPECT_TRUE(member.group.take_data_error());
      const auto error = run_step(p, member, inputs[rank], out, {.run = run + 3, .split = run % 8 == 1});
      ASSERT_FALSE(error) << error->what();
      expect_equal(out, wanted[rank], "run " + std::to_string(run));
    }
  });
}

TEST_F(TwoRanks, AnExceptionBetweenTheHalvesOfACallIsTheGroupsEnd) {
  const Problem p = problem(1);
  Cluster cluster(p);
  cluster.each([&](int rank) {
    Outputs out;
    if (rank == 1) {
      const Call call = make_call(cluster[1], Kind::kDispatch, 6, kSite);
      const Exchange given_up(call.group, call.site, 0, call.run);
      return;
    }
    EXPECT_FALSE(run_dispatch(p, cluster[0], inputs[0], out));
    EXPECT_EQ(out.ok, 0);
    EXPECT_NE(std::string(cluster[0].group.failure()->what()).find("given up"), std::string::npos);
  });
}

TEST_F(TwoRanks, ARouteOfAFailedDispatchIsADataError) {
  const Problem p = problem(1);
  Cluster cluster(p);
  cluster.each([&](int rank) {
    Outputs out;
    EXPECT_FALSE(run_dispatch(p, cluster[rank], inputs[rank], out, {.run = 1}));
    out.y = out.tokens;
    if (rank == 1) out.ok = 0;
    EXPECT_FALSE(run_combine(p, cluster[rank], inputs[rank], out, {.run = 2}));
    const auto error = cluster[rank].group.take_data_error();
    ASSERT_TRUE(error);
    const std::string expected = rank == 1 ? "is of a dispatch that failed" : "rank 1";
    EXPECT_NE(std::string(error->what()).find(expected), std::string::npos) << error->what();
  });
}

TEST_F(TwoRanks, APeerThatDiesBetweenTheHalvesIsNamed) {
  const Problem p = problem(2);
  Cluster cluster(p);
  cluster.each([&](int rank) {
    Outputs out;
    if (rank == 1) {
      cluster[rank].group.fail(Error(ErrorKind::kPeer, "died on purpose"), 1);
      return;
    }
    const Ticket ticket = send(p, cluster[rank], inputs[rank], out);
    EXPECT_FALSE(receive(p, cluster[rank], inputs[rank], out, ticket));
    EXPECT_EQ(out.ok, 0);
    EXPECT_TRUE(all_nan(out.tokens));
    EXPECT_NE(std::string(cluster[rank].group.failure()->what()).find("died on purpose"), std::string::npos);
  });
}

// Two threads launch: the second one's execution comes between a send and its recv.
TEST_F(TwoRanks, AnotherExecutionBetweenSendAndRecvIsAnOverlap) {
  const Problem p = problem(2);
  Cluster cluster(p);
  std::vector<Outputs> out(2);
  std::vector<Ticket> tickets(2);
  cluster.each([&](int rank) {
    Outputs other;
    tickets[rank] = send(p, cluster[rank], inputs[rank], out[rank], {.run = 1});
    EXPECT_FALSE(run_dispatch(p, cluster[rank], inputs[rank], other, {.run = 2}));
    EXPECT_EQ(other.ok, 1);
  });
  cluster.each([&](int rank) {
    try {
      receive(p, cluster[rank], inputs[rank], out[rank], tickets[rank], {.run = 1});
      ADD_FAILURE() << "received what was thrown away";
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::kMismatch);
      EXPECT_NE(std::string(error.what()).find("overlap"), std::string::npos) << error.what();
    }
  });
}

}  // namespace
}  // namespace pplx::moe
