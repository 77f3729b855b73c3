// Ranks that do not agree: on the configuration at connect, on the exchange while running.
#include <gtest/gtest.h>

#include "xla_ffi/tests/rogue.h"

namespace pplx::moe {
namespace {

using namespace pplx::moe::testing;

template <typename Function>
std::optional<Error> thrown(Function&& function) {
  try {
    function();
  } catch (const Error& error) {
    return error;
  }
  return std::nullopt;
}

bool names(const std::optional<Error>& error, const std::string& text) {
  return error && std::string(error->what()).find(text) != std::string::npos;
}

struct Different {
  std::string name;
  std::function<void(const Problem&, Member&, const Inputs&, Outputs&)> odd;  // what the last rank does
  std::vector<std::string> named;
};

class MismatchTest : public ::testing::TestWithParam<int> {};

// Whichever rank looks first, every rank ends with an error that names both sides.
TEST_P(MismatchTest, EveryRankNamesBothSides) {
  const std::vector<Different> all = {
      {"other layer",
       [](const Problem& p, Member& m, const Inputs& in, Outputs& out) {
         run_dispatch(p, m, in, out, {.name = "other"});
       },
       {"'layer'", "'other'"}},
      {"other kind",
       [](const Problem& p, Member& m, const Inputs& in, Outputs& out) {
         Outputs unused;
         run_dispatch(p, m, in, unused, {.name = "first"});
         out = unused;
         out.y = out.tokens;
         run_combine(p, m, in, out);
       },
       {"dispatch 'layer'", "combine 'layer'"}},
      {"other T",
       [](const Problem& p, Member& m, const Inputs&, Outputs& out) {
         run_dispatch(p, m, random_inputs(p, 3, 3, Routing::kUniform, 5), out);
       },
       {"T=8", "T=3"}},
  };
  const int ranks = GetParam();
  const Problem problem{.ranks = ranks, .experts = 8, .top_k = 2, .max_tokens = 8};
  for (const Different& different : all) {
    Cluster cluster(problem, sim(static_cast<uint64_t>(ranks)));
    const std::vector<Inputs> inputs = random_step(problem, 4, 8);
    std::vector<Outputs> outputs(ranks);
    cluster.each([&](int rank) {
      if (rank == ranks - 1) {
        different.odd(problem, cluster[rank], inputs[rank], outputs[rank]);
        return;
      }
      if (different.name == "other kind") {
        Outputs first;
        run_dispatch(problem, cluster[rank], inputs[rank], first, {.name = "first"});
      }
      const auto error = run_dispatch(problem, cluster[rank], inputs[rank], outputs[rank]);
      EXPECT_FALSE(error);
      EXPECT_EQ(outputs[rank].ok, 0);
      EXPECT_TRUE(all_nan(outputs[rank].tokens));
    });
    for (int rank = 0; rank < ranks; ++rank) {
      const auto failure = cluster[rank].group.failure();
      ASSERT_TRUE(failure) << different.name;
      EXPECT_EQ(failure->kind(), ErrorKind::kMismatch) << different.name << failure->what();
      for (const std::string& part : different.named) {
        EXPECT_TRUE(names(failure, part)) << different.name << ": " << failure->what();
      }
      EXPECT_TRUE(names(failure, "rank " + std::to_string(ranks - 1))) << failure->what();
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Ranks, MismatchTest, ::testing::Values(2, 3));

TEST(Connect, DifferentConfigurations) {
  const Problem problem{.ranks = 2};
  std::vector<std::unique_ptr<ExchangeGroup>> groups;
  std::vector<Bytes> endpoints;
  for (int rank = 0; rank < 2; ++rank) {
    GroupConfig config = group_config(problem, rank, local());
    config.fingerprint = rank;
    config.fingerprint_text = "top_k=" + std::to_string(rank + 1);
    groups.push_back(std::make_unique<ExchangeGroup>(config));
    endpoints.push_back(groups.back()->endpoint());
  }
  for (const auto& group : groups) {
    const auto error = thrown([&] { group->connect(endpoints); });
    ASSERT_TRUE(error);
    EXPECT_EQ(error->kind(), ErrorKind::kMismatch);
    EXPECT_TRUE(names(error, "top_k=1") && names(error, "top_k=2")) << error->what();
  }
}

TEST(Connect, RegionsOfAnotherSize) {
  std::vector<std::unique_ptr<ExchangeGroup>> groups;
  std::vector<Bytes> endpoints;
  for (int rank = 0; rank < 2; ++rank) {
    groups.push_back(
        std::make_unique<ExchangeGroup>(group_config({.ranks = 2, .hidden = 32 << rank}, rank, local())));
    endpoints.push_back(groups.back()->endpoint());
  }
  for (const auto& group : groups) {
    EXPECT_EQ(thrown([&] { group->connect(endpoints); })->kind(), ErrorKind::kMismatch);
  }
}

TEST(Connect, DamagedEndpoints) {
  const Problem problem{.ranks = 2};
  const auto connect = [&](const std::function<void(std::vector<Bytes>&)>& damage) {
    ExchangeGroup a(group_config(problem, 0, local())), b(group_config(problem, 1, local()));
    std::vector<Bytes> endpoints = {a.endpoint(), b.endpoint()};
    damage(endpoints);
    return thrown([&] { a.connect(endpoints); });
  };
  EXPECT_FALSE(connect([](auto&) {}));
  const size_t size = ExchangeGroup(group_config(problem, 1, local())).endpoint().size();
  for (size_t length = 0; length < size; length += length < 40 ? 1 : 17) {
    const auto error = connect([&](auto& endpoints) { endpoints[1].resize(length); });
    ASSERT_TRUE(error) << length;
    EXPECT_EQ(error->kind(), ErrorKind::kInvalidArgument) << length;
  }
  for (size_t at = 0; at < size; at += 13) {
    const auto error = connect([&](auto& endpoints) { endpoints[1][at] ^= std::byte{0x10}; });
    ASSERT_TRUE(error) << at;
    EXPECT_EQ(error->kind(), ErrorKind::kInvalidArgument) << at;
  }
  EXPECT_EQ(connect([](auto& endpoints) { endpoints.pop_back(); })->kind(), ErrorKind::kInvalidArgument);
  EXPECT_EQ(connect([](auto& endpoints) { endpoints.push_back(endpoints[0]); })->kind(),
            ErrorKind::kInvalidArgument);
  EXPECT_EQ(connect([](auto& endpoints) { std::swap(endpoints[0], endpoints[1]); })->kind(),
            ErrorKind::kPeer);
}

// Well-formed, and still not to be believed.
TEST(Connect, AbsurdEndpoints) {
  const Problem problem{.ranks = 2};
  const auto connect = [&](const std::function<void(Endpoint&)>& change) {
    ExchangeGroup a(group_config(problem, 0, local())), b(group_config(problem, 1, local()));
    Endpoint endpoint = Endpoint::parse(b.endpoint());
    change(endpoint);
    return thrown([&] { a.connect({a.endpoint(), endpoint.bytes()}); });
  };
  EXPECT_FALSE(connect([](Endpoint&) {}));
  const auto kind = [&](const std::function<void(Endpoint&)>& change) {
    const auto error = connect(change);
    return error ? error->kind() : ErrorKind::kRouting;
  };
  EXPECT_EQ(kind([](Endpoint& e) { ++e.magic; }), ErrorKind::kInvalidArgument);
  EXPECT_EQ(kind([](Endpoint& e) { e.nonce = 0; }), ErrorKind::kPeer);
  EXPECT_EQ(kind([](Endpoint& e) { e.nonce = kMaxNonce + 1; }), ErrorKind::kPeer);
  EXPECT_EQ(kind([](Endpoint& e) { e.shards = 0; }), ErrorKind::kPeer);
  EXPECT_EQ(kind([](Endpoint& e) { e.shards = 1 << 20; }), ErrorKind::kPeer);
  EXPECT_EQ(kind([](Endpoint& e) { e.regions.clear(); }), ErrorKind::kInvalidArgument);
  EXPECT_EQ(kind([](Endpoint& e) { std::swap(e.regions, e.notices); }), ErrorKind::kMismatch);
  EXPECT_EQ(kind([](Endpoint& e) { e.headers = e.notices; }), ErrorKind::kMismatch);
  EXPECT_EQ(kind([](Endpoint& e) { e.headers.resize(3); }), ErrorKind::kInvalidArgument);
}

TEST(Connect, Once) {
  const Problem problem{.ranks = 2};
  ExchangeGroup a(group_config(problem, 0, local())), b(group_config(problem, 1, local()));
  const std::vector<Bytes> endpoints = {a.endpoint(), b.endpoint()};
  a.connect(endpoints);
  EXPECT_EQ(thrown([&] { a.connect(endpoints); })->kind(), ErrorKind::kInvalidArgument);
  b.close();
  EXPECT_EQ(thrown([&] { b.connect(endpoints); })->kind(), ErrorKind::kClosed);
}

TEST(GroupConfigTest, IsChecked) {
  const Problem problem{.ranks = 2};
  const auto kind = [&](const std::function<void(GroupConfig&)>& change) {
    GroupConfig config = group_config(problem, 0, local());
    change(config);
    const auto error = thrown([&] { ExchangeGroup group(config); });
    return error ? error->kind() : ErrorKind::kRouting;
  };
  for (const auto& change : std::vector<std::function<void(GroupConfig&)>>{
           [](GroupConfig& c) { c.num_ranks = 0; }, [](GroupConfig& c) { c.rank = 2; },
           [](GroupConfig& c) { c.num_ranks = kMaxRanks + 1; }, [](GroupConfig& c) { c.depth = 0; },
           [](GroupConfig& c) { c.depth = kMaxLanes / 2 + 1; }, [](GroupConfig& c) { c.region_bytes = 100; },
           [](GroupConfig& c) { c.staging_bytes = c.region_bytes - 1; },
           [](GroupConfig& c) { c.region_bytes = c.staging_bytes = size_t{1} << 33; }}) {
    EXPECT_EQ(kind(change), ErrorKind::kInvalidArgument);
  }
}

}  // namespace
}  // namespace pplx::moe
