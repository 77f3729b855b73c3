// The same bits whatever the transport does and in whatever order a program calls.
#include <gtest/gtest.h>

#include <array>

#include "xla_ffi/tests/support.h"

namespace pplx::moe {
namespace {

using namespace pplx::moe::testing;

// Every output of a few steps on every rank, route arrays included.
std::vector<std::byte> outcome(const Problem& problem, const EngineConfig& engine, int steps, uint64_t seed) {
  Cluster cluster(problem, engine);
  std::vector<std::vector<Outputs>> outputs(problem.ranks, std::vector<Outputs>(steps));
  std::vector<std::vector<Inputs>> inputs;
  for (int step = 0; step < steps; ++step) inputs.push_back(random_step(problem, seed + step));
  cluster.each([&](int rank) {
    for (int step = 0; step < steps; ++step) {
      const auto error = run_step(problem, cluster[rank], inputs[step][rank], outputs[rank][step]);
      ASSERT_FALSE(error) << error->what();
    }
  });
  std::vector<std::byte> all;
  for (const auto& of_rank : outputs) {
    for (const Outputs& out : of_rank) {
      const std::vector<std::byte> bytes = out.bytes();
      all.insert(all.end(), bytes.begin(), bytes.end());
    }
  }
  return all;
}

constexpr uint64_t kBlocks = 8, kSeedsOfABlock = 40;

class SimSeeds : public ::testing::TestWithParam<uint64_t> {};

TEST_P(SimSeeds, GiveTheSameBytesAsLocal) {
  for (uint64_t seed = GetParam() * kSeedsOfABlock; seed < (GetParam() + 1) * kSeedsOfABlock; ++seed) {
    const Problem problem{.ranks = 2 + static_cast<int>(seed % 3),
                          .experts = 5,
                          .top_k = 2,
                          .hidden = 6,
                          .max_tokens = 5,
                          .chunk = seed % 2 == 0 ? 2 : 0,
                          .depth = 1 + static_cast<int>(seed / 2 % 2),
                          .dtype = seed % 2 == 0 ? DType::kBFloat16 : DType::kFloat32};
    const uint64_t inputs = seed % 12;
    ASSERT_EQ(outcome(problem, sim(seed), 3, inputs), outcome(problem, local(), 3, inputs))
        << "seed " << seed;
  }
}

INSTANTIATE_TEST_SUITE_P(Block, SimSeeds, ::testing::Range<uint64_t>(0, kBlocks));

TEST(Determinism, ChunkSizeDoesNotShow) {
  Problem problem{.ranks = 3, .experts = 5, .top_k = 3, .max_tokens = 11};
  std::vector<Inputs> inputs = random_step(problem, 77, 11);
  std::vector<std::vector<Outputs>> outcomes;
  for (const int chunk : {1, 2, 3, 7, 11}) {
    problem.chunk = chunk;
    Cluster cluster(problem);
    outcomes.emplace_back(problem.ranks);
    cluster.each([&](int rank) { run_step(problem, cluster[rank], inputs[rank], outcomes.back()[rank]); });
    for (int rank = 0; rank < problem.ranks; ++rank) {
      expect_equal(outcomes.back()[rank], outcomes.front()[rank], "chunk " + std::to_string(chunk));
    }
  }
}

class Providers : public ::testing::TestWithParam<std::pair<std::string, int>> {};

TEST_P(Providers, GiveTheSameBytesAsLocal) {
  const auto [name, endpoints] = GetParam();
  for (const int depth : {1, 2}) {
    const Problem problem{
        .ranks = 4, .experts = 10, .top_k = 3, .max_tokens = 16, .chunk = 6, .depth = depth};
    ASSERT_EQ(outcome(problem, provider(name, endpoints), 12, 9), outcome(problem, local(), 12, 9));
  }
}

INSTANTIATE_TEST_SUITE_P(Fabric, Providers,
                         ::testing::Values(std::pair("tcp", 1), std::pair("shm", 1), std::pair("tcp", 4)),
                         [](const auto& info) {
                           return info.param.first + (info.param.second > 1 ? "_x4" : "");
                         });

struct NetworkCase {
  const char* name;
  EngineConfig (*config)(uint64_t seed);
};

class Networks : public ::testing::TestWithParam<NetworkCase> {};

TEST_P(Networks, GiveTheSameBytesAsLocal) {
  const Problem problem{.ranks = 4, .experts = 10, .top_k = 3, .max_tokens = 16, .chunk = 6, .depth = 2};
  const auto expected = outcome(problem, local(), 12, 9);
  for (uint64_t seed = 0; seed < 12; ++seed) {
    ASSERT_EQ(outcome(problem, GetParam().config(seed), 12, 9), expected) << "seed " << seed;
  }
}

EngineConfig two_addresses(uint64_t /*seed*/) {
  EngineConfig config = provider("tcp");
  config.nics = {{"", "127.0.0.2"}, {"", "127.0.0.3"}};
  return config;
}

INSTANTIATE_TEST_SUITE_P(Fabric, Networks,
                         ::testing::Values(NetworkCase{"efa_like", efa_like},
                                           NetworkCase{"uneven_nics",
                                                       [](uint64_t seed) { return uneven(sim(seed)); }},
                                           NetworkCase{"efa_like_uneven_nics",
                                                       [](uint64_t seed) { return uneven(efa_like(seed)); }},
                                           NetworkCase{"tcp_two_addresses", two_addresses}),
                         [](const auto& info) { return std::string(info.param.name); });

// Regions belong to exchange numbers, not to kinds: any order that all ranks share is right.
class AnyOrder : public ::testing::TestWithParam<EngineConfig> {};

TEST_P(AnyOrder, ProgramsThatBreakAlternation) {
  for (const int depth : {1, 2}) {
    const Problem problem{
        .ranks = 3, .experts = 7, .top_k = 3, .hidden = 9, .max_tokens = 8, .chunk = 5, .depth = depth};
    Cluster cluster(problem, GetParam());
    constexpr int kParts = 4;
    std::vector<std::vector<Inputs>> inputs;
    for (int part = 0; part < kParts; ++part) inputs.push_back(random_step(problem, 40 + part, 8 - part));
    std::vector<std::array<Outputs, kParts>> outputs(problem.ranks), again(problem.ranks);
    cluster.each([&](int rank) {
      Member& member = cluster[rank];
      auto& out = outputs[rank];
      const auto in = [&](int part) -> const Inputs& { return inputs[part][rank]; };
      const auto apply = [&](int part) {
        apply_experts(problem, rank, out[part].group_sizes, out[part].tokens, out[part].y);
      };
      for (int part = 0; part < kParts; ++part) {  // dispatch after dispatch
        run_dispatch(problem, member, in(part), out[part]);
        apply(part);
      }
      run_combine(problem, member, in(2), out[2]);
      run_combine(problem, member, in(0), out[0]);
      again[rank][0] = out[0];
      run_combine(problem, member, in(0), again[rank][0]);   // twice on one route
      run_dispatch(problem, member, in(1), again[rank][1]);  // and never combined
      run_combine_transpose(problem, member, in(2), out[2]);
      run_combine(problem, member, in(3), out[3]);
      run_combine_transpose(problem, member, in(0), out[0]);
      run_combine_transpose(problem, member, in(3), out[3]);
      for (const int part : {3, 0, 2}) {  // transposes in a row
        apply_experts(problem, rank, out[part].group_sizes, out[part].d_y, out[part].d_tokens);
        run_dispatch_transpose(problem, member, in(part), out[part]);
      }
      run_combine(problem, member, in(1), out[1]);
      run_combine_transpose(problem, member, in(1), out[1]);
      apply_experts(problem, rank, out[1].group_sizes, out[1].d_y, out[1].d_tokens);
      run_dispatch_transpose(problem, member, in(1), out[1]);
    });
    for (int part = 0; part < kParts; ++part) {
      const std::vector<Outputs> wanted = oracle(problem, inputs[part]);
      for (int rank = 0; rank < problem.ranks; ++rank) {
        expect_equal(outputs[rank][part], wanted[rank], "part " + std::to_string(part));
      }
    }
    for (int rank = 0; rank < problem.ranks; ++rank) {
      EXPECT_TRUE(again[rank][0].out == outputs[rank][0].out);
      EXPECT_TRUE(again[rank][1].tokens == outputs[rank][1].tokens);
      EXPECT_FALSE(cluster[rank].group.failure());
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Fabric, AnyOrder, ::testing::Values(local(), sim(1), sim(2), sim(15), sim(20)),
                         [](const auto& info) {
                           return info.param.fabric + std::to_string(info.param.sim.seed);
                         });

TEST(TwoGroups, InterleavedOnOneThread) {
  const Problem small{.ranks = 3, .experts = 4, .top_k = 2, .hidden = 8, .max_tokens = 6};
  const Problem large{.ranks = 3, .experts = 11, .top_k = 4, .hidden = 33, .max_tokens = 10, .chunk = 4};
  Cluster a(small, sim(3)), b(large, sim(4));
  std::vector<std::vector<Inputs>> for_a, for_b;
  constexpr int kSteps = 20;
  for (int step = 0; step < kSteps; ++step) {
    for_a.push_back(random_step(small, 100 + step));
    for_b.push_back(random_step(large, 200 + step));
  }
  std::vector<std::vector<Outputs>> of_a(kSteps, std::vector<Outputs>(3)), of_b = of_a;
  on_ranks(3, [&](int rank) {
    for (int step = 0; step < kSteps; ++step) {
      Outputs &in_a = of_a[step][rank], &in_b = of_b[step][rank];
      run_dispatch(small, a[rank], for_a[step][rank], in_a);
      run_dispatch(large, b[rank], for_b[step][rank], in_b);
      apply_experts(small, rank, in_a.group_sizes, in_a.tokens, in_a.y);
      apply_experts(large, rank, in_b.group_sizes, in_b.tokens, in_b.y);
      run_combine(large, b[rank], for_b[step][rank], in_b);
      run_combine(small, a[rank], for_a[step][rank], in_a);
    }
  });
  for (int step = 0; step < kSteps; ++step) {
    const auto want_a = oracle(small, for_a[step]), want_b = oracle(large, for_b[step]);
    for (int rank = 0; rank < 3; ++rank) {
      ASSERT_TRUE(of_a[step][rank].out == want_a[rank].out) << step;
      ASSERT_TRUE(of_b[step][rank].out == want_b[rank].out) << step;
    }
  }
}

TEST(TwoGroups, AtOnceOnThreadsOfTheirOwn) {
  const Problem problem{.ranks = 2, .experts = 5, .top_k = 2, .max_tokens = 7};
  Cluster a(problem), b(problem);
  std::thread other([&] { check_steps(b, 40, 900); });
  check_steps(a, 40, 800);
  other.join();
}

}  // namespace
}  // namespace pplx::moe
