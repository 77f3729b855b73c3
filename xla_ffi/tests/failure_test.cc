// Ranks that die, stall, leave or give up: every other rank learns which one, in time.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include "proxy/fabric/sim.h"
#include "proxy/tests/stops.h"
#include "xla_ffi/tests/rogue.h"

namespace pplx::moe {
namespace {

using namespace pplx::moe::testing;
using pplx::testing::through_stops;

Problem small(int ranks = 2) {
  return {.ranks = ranks, .experts = 4, .top_k = 2, .hidden = 8, .max_tokens = 4};
}

double seconds_of(const std::function<void()>& body) {
  const auto begin = Clock::now();
  body();
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

// One exchange of `rank` with random tokens; true when its outputs are good.
bool exchange(Cluster& cluster, int rank, Outputs& out, const Site& site = {}) {
  const std::vector<Inputs> inputs = random_step(cluster.problem(), 2, 4);
  const auto error = run_dispatch(cluster.problem(), cluster[rank], inputs[rank], out, site);
  return !error && out.ok == 1;
}

TEST(Timeout, NamesTheRankThatNeverComes) {
  Cluster cluster(small(3), sim(1), [](GroupConfig& config) {
    config.timeout = 2s;
    config.stall_timeout = config.first_stall_timeout = 400ms;
  });
  std::vector<Outputs> outputs(3);
  const double took = seconds_of([&] {
    cluster.each([&](int rank) {
      if (rank == 1) return;
      EXPECT_FALSE(exchange(cluster, rank, outputs[rank]));
    });
  });
  EXPECT_GE(took, 0.35);
  EXPECT_LT(took, 10);
  for (const int rank : {0, 2}) {
    EXPECT_TRUE(all_nan(outputs[rank].tokens));
    EXPECT_TRUE(all_nan(outputs[rank].row_weights));
    EXPECT_EQ(outputs[rank].ok, 0);
    expect_error(cluster[rank].group.failure(), ErrorKind::kTimeout, "rank 1");
    expect_error(cluster[rank].group.failure(), ErrorKind::kTimeout, "dispatch 'layer'");
    expect_error(cluster[rank].group.failure(), ErrorKind::kTimeout, "exchange 0");
  }
  // The late rank is told although it isn't in an exchange.
  EXPECT_TRUE(eventually([&] { return cluster[1].group.failure().has_value(); }));
  expect_error(cluster[1].group.failure(), ErrorKind::kTimeout, "rank 1");
}

TEST(Timeout, IsLongerAtACallsFirstExecution) {
  Cluster cluster(small(), local(), [](GroupConfig& config) {
    config.stall_timeout = 300ms;
    config.first_stall_timeout = 60s;
  });
  std::vector<Outputs> outputs(2);
  for (const bool first : {true, false}) {
    cluster.each([&](int rank) {
      if (rank == 1) std::this_thread::sleep_for(900ms);
      const bool good = exchange(cluster, rank, outputs[rank]);
      // The late rank has everybody's message; it hears of the failure later.
      if (rank == 0) {
        EXPECT_EQ(good, first);
      }
    });
  }
  expect_error(cluster[0].group.failure(), ErrorKind::kTimeout, "rank 1");
}

TEST(Timeout, APeerThatIsSlowButAliveIsWaitedFor) {
  Cluster cluster(small(), sim(2), [](GroupConfig& config) { config.timeout = 1s; });
  std::vector<Outputs> outputs(2);
  cluster.each([&](int rank) {
    if (rank == 1) std::this_thread::sleep_for(2500ms);
    EXPECT_TRUE(exchange(cluster, rank, outputs[rank]));
  });
}

TEST(Failure, IsFinalPoisonsAtOnceAndIsRaisedInTheNextRun) {
  Cluster cluster(small(), local(), [](GroupConfig& config) { config.first_stall_timeout = 200ms; });
  Outputs out;
  EXPECT_FALSE(exchange(cluster, 0, out, {.run = 7}));
  const double took = seconds_of([&] {
    for (int layer = 0; layer < 100; ++layer) {
      const std::vector<Inputs> inputs = random_step(small(), 2, 4);
      EXPECT_FALSE(run_step(small(), cluster[0], inputs[0], out, {.run = 7}));
      for (const Tensor* tensor : {&out.tokens, &out.out, &out.d_y, &out.d_x}) ASSERT_TRUE(all_nan(*tensor));
      ASSERT_TRUE(all_nan(out.row_weights) && all_nan(out.d_row_weights) && all_nan(out.d_weights));
      ASSERT_EQ(out.num_rows + out.num_dropped + out.ok, 0);
    }
  });
  EXPECT_LT(took, 5);
  for (int64_t run = 8; run < 10; ++run) {
    const std::vector<Inputs> inputs = random_step(small(), 2, 4);
    expect_error(run_dispatch(small(), cluster[0], inputs[0], out, {.run = run}), ErrorKind::kTimeout,
                 "rank 1");
  }
}

TEST(Failure, TheFirstOneWinsAndIsToldToAll) {
  Cluster cluster(small(3), sim(3));
  cluster[2].group.fail(Error(ErrorKind::kFabric, "the first"), 2);
  cluster[2].group.fail(Error(ErrorKind::kPeer, "the second"), 0);
  for (const int rank : {0, 1}) {
    EXPECT_TRUE(eventually([&] { return cluster[rank].group.failure().has_value(); }));
    expect_error(cluster[rank].group.failure(), ErrorKind::kFabric, "the first");
    expect_error(cluster[rank].group.failure(), ErrorKind::kFabric, "rank 2");
  }
}

TEST(Failure, OfARankInTheMiddleEndsTheOthersWaitAtOnce) {
  Cluster cluster(small(3), sim(6));
  std::vector<Outputs> outputs(3);
  const double took = seconds_of([&] {
    cluster.each([&](int rank) {
      if (rank == 1) {
        std::this_thread::sleep_for(100ms);
        cluster[1].group.fail(Error(ErrorKind::kRouting, "out of memory"), 1);
      } else {
        EXPECT_FALSE(exchange(cluster, rank, outputs[rank]));
      }
    });
  });
  EXPECT_LT(took, 15);
  for (const int rank : {0, 2})
    expect_error(cluster[rank].group.failure(), ErrorKind::kRouting, "out of memory");
}

TEST(Death, ASilentPeerIsNamedWithinTheTimeout) {
  EngineConfig engine = sim(4);
  engine.sim.network = "death";
  Cluster cluster(small(3), engine, [](GroupConfig& config) { config.timeout = 1500ms; });
  std::vector<Outputs> outputs(3);
  cluster.each([&](int rank) { EXPECT_TRUE(exchange(cluster, rank, outputs[rank])); });
  sim_drop_peer("death", Endpoint::parse(cluster[1].group.endpoint()).address());
  const double took = seconds_of([&] {
    cluster.each([&](int rank) {
      if (rank == 1) return;
      EXPECT_FALSE(exchange(cluster, rank, outputs[rank]));
    });
  });
  EXPECT_LT(took, 15);
  for (const int rank : {0, 2}) expect_error(cluster[rank].group.failure(), ErrorKind::kPeer, "rank 1");
}

// Nobody waits for it: the monitor alone must notice.
TEST(Death, IsNoticedBetweenExchanges) {
  EngineConfig engine = local();
  engine.sim.network = "idle death";
  Cluster cluster(small(), engine, [](GroupConfig& config) { config.timeout = 1s; });
  sim_drop_peer("idle death", Endpoint::parse(cluster[0].group.endpoint()).address());
  EXPECT_TRUE(eventually([&] { return cluster[1].group.failure().has_value(); }));
  expect_error(cluster[1].group.failure(), ErrorKind::kPeer, "rank 0");
}

// Long before it has been silent for the timeout, where the network tells.
TEST(Death, ABrokenConnectionIsNoticedBetweenExchanges) {
  EngineConfig engine = local();
  engine.sim.network = "broken connection";
  Cluster cluster(small(3), engine, [](GroupConfig& config) { config.timeout = 600s; });
  sim_drop_peer("broken connection", Endpoint::parse(cluster[1].group.endpoint()).address());
  for (const int rank : {0, 2}) {
    EXPECT_TRUE(eventually([&] { return cluster[rank].group.failure().has_value(); }));
    expect_error(cluster[rank].group.failure(), ErrorKind::kPeer, "rank 1");
  }
}

// Nothing that it leaves behind tells so.
TEST(Death, OfAProcessOfThisHostIsSeen) {
  const pid_t child = fork();
  if (child == 0) {
    for (;;) pause();
  }
  Rogue peer(
      small(), [](GroupConfig& config) { config.timeout = 600s; }, child);
  std::this_thread::sleep_for(5s);  // more than two rounds
  const auto before = peer.real().group.failure();
  kill(child, SIGKILL);  // and nobody waits for it yet
  EXPECT_TRUE(eventually([&] { return peer.real().group.failure().has_value(); }));
  waitpid(child, nullptr, 0);
  EXPECT_FALSE(before) << before->what();
  expect_error(peer.real().group.failure(), ErrorKind::kPeer, "its process has ended");
  EXPECT_EQ(peer.real().group.failure_culprit(), 1u);
}

// Those who cannot reach it blame it; it cannot reach anybody, and blames itself.
TEST(Death, WhoLosesItsOnlyNicIsToBlame) {
  EngineConfig engine = local();
  engine.sim.network = "cut off";
  Cluster cluster(small(3), engine, [](GroupConfig& config) { config.timeout = 600s; });
  sim_break_nic("cut off", Endpoint::parse(cluster[2].group.endpoint()).address(), 0, true);
  for (const int rank : {0, 1, 2}) {
    EXPECT_TRUE(eventually([&] { return cluster[rank].group.failure().has_value(); }));
    EXPECT_EQ(cluster[rank].group.failure_culprit(), 2u) << rank;
  }
}

// The heartbeats that it held fail together, and others go on.
TEST(Death, OneOfTwoNicsIsNotAll) {
  EngineConfig engine = local();
  engine.sim.network = "one of two";
  engine.nics.resize(2);
  Cluster cluster(small(), engine, [](GroupConfig& config) { config.timeout = 8s; });
  const auto address = [&](int rank) { return Endpoint::parse(cluster[rank].group.endpoint()).address(); };
  sim_unplug_nic("one of two", address(1), 1);
  std::this_thread::sleep_for(7s);  // a heartbeat a second, by turns
  ASSERT_FALSE(cluster[0].group.failure());
  sim_break_nic("one of two", address(0), 1, true);
  std::this_thread::sleep_for(2s);
  EXPECT_FALSE(cluster[0].group.failure()) << cluster[0].group.failure()->what();
}

// A process that was stopped must not take its own absence for its peers' silence, whether or not their signs
// of life are the first thing that it sees when it goes on.
TEST(Death, AStopOfThisProcessBlamesNobody) {
  EXPECT_TRUE(through_stops(3s, [] {
    Rogue peer(small(), [](GroupConfig& config) { config.timeout = 2s; });
    for (int i = 0; i < 2; ++i) {
      peer.stray(immediate(peer.nonce(), 1, kHeartbeatLane));
      std::this_thread::sleep_for(300ms);  // the monitor has seen that
      raise(SIGSTOP);
      std::this_thread::sleep_for(300ms);
    }
    return !peer.real().group.failure();
  }));
}

// Nor does that time count as a peer's that is awaited.
TEST(Timeout, AStopOfThisProcessDoesNotCount) {
  EXPECT_TRUE(through_stops(6s, [] {
    Cluster cluster(small(), sim(3), [](GroupConfig& config) {
      config.timeout = 20s;
      config.stall_timeout = config.first_stall_timeout = 5s;
    });
    std::vector<Outputs> outputs(2);
    std::atomic<bool> good{true};
    std::thread stop([] {
      std::this_thread::sleep_for(300ms);
      raise(SIGSTOP);
    });
    cluster.each([&](int rank) {
      // In short naps, or this one's absence were of use to it.
      for (int i = 0; rank == 1 && i < 100; ++i) std::this_thread::sleep_for(10ms);
      if (!exchange(cluster, rank, outputs[rank])) good = false;
    });
    stop.join();
    return good.load();
  }));
}

TEST(Close, APeerThatClosedWillNotCome) {
  Cluster cluster(small(3), sim(8));
  cluster[2].group.close();
  std::vector<Outputs> outputs(3);
  const double took = seconds_of([&] {
    cluster.each([&](int rank) {
      if (rank == 2) return;
      EXPECT_FALSE(exchange(cluster, rank, outputs[rank]));
    });
  });
  EXPECT_LT(took, 15);
  for (const int rank : {0, 1}) expect_error(cluster[rank].group.failure(), ErrorKind::kPeer, "rank 2");
}

// The notice of a close may arrive before the closer's last messages do.
TEST(Close, RightAfterTheLastExchangeHarmsNobody) {
  for (uint64_t seed = 0; seed < 60; ++seed) {
    EngineConfig engine = sim(seed);
    engine.sim.max_delay = 40;
    Cluster cluster(small(3), engine);
    std::vector<Outputs> outputs(3);
    cluster.each([&](int rank) {
      EXPECT_TRUE(exchange(cluster, rank, outputs[rank])) << seed;
      cluster[rank].group.close();
      EXPECT_FALSE(cluster[rank].group.failure()) << seed << ' ' << cluster[rank].group.failure()->what();
    });
  }
}

TEST(Close, EndsAWaitAtOnce) {
  for (const bool disorder : {false, true}) {
    Cluster cluster(small(3), disorder ? sim(9) : local());
    std::optional<Error> returned;
    Outputs out;
    std::thread waiting([&] {
      const std::vector<Inputs> inputs = random_step(small(3), 2, 4);
      returned = run_dispatch(small(3), cluster[0], inputs[0], out);
    });
    std::this_thread::sleep_for(100ms);
    EXPECT_LT(seconds_of([&] { cluster[0].group.close(); }), 10);
    waiting.join();
    expect_error(returned, ErrorKind::kClosed, "closed");
    EXPECT_TRUE(all_nan(out.tokens));
    EXPECT_FALSE(cluster[0].group.failure());
  }
}

TEST(Close, EveryLaterCallSaysSo) {
  Cluster cluster(small());
  std::vector<Outputs> outputs(2);
  cluster.each([&](int rank) { EXPECT_TRUE(exchange(cluster, rank, outputs[rank])); });
  cluster[0].group.close();
  cluster[0].group.close();
  const std::vector<Inputs> inputs = random_step(small(), 2, 4);
  outputs[0].y = outputs[0].d_tokens = outputs[0].tokens;
  outputs[0].d_row_weights = outputs[0].row_weights;
  for (const auto& run : {run_dispatch, run_combine, run_combine_transpose, run_dispatch_transpose}) {
    expect_error(run(small(), cluster[0], inputs[0], outputs[0], {}), ErrorKind::kClosed,
                 "'test' was closed");
  }
}

TEST(Close, WhileThePeersAreInEveryStage) {
  for (int trial = 0; trial < 40; ++trial) {
    Cluster cluster(small(3), sim(trial));
    std::thread closer([&] {
      std::this_thread::sleep_for(std::chrono::microseconds(trial * 150));
      cluster[trial % 3].group.close();
    });
    cluster.each([&](int rank) {
      Outputs out;
      for (int step = 0; step < 1000; ++step) {
        const std::vector<Inputs> inputs = random_step(small(3), step % 5);
        const auto error = run_step(small(3), cluster[rank], inputs[rank], out, {.run = step});
        if (!error) continue;
        EXPECT_EQ(error->kind(), rank == trial % 3 ? ErrorKind::kClosed : ErrorKind::kPeer) << error->what();
        return;
      }
      ADD_FAILURE() << "the close was never noticed";
    });
    closer.join();
  }
}

TEST(Close, OfAGroupThatNeverConnected) {
  ExchangeGroup group(group_config(small(), 0, local()));
  EXPECT_LT(seconds_of([&] { group.close(); }), 5);
}

TEST(Stats, MayBeReadWhileExchangesRun) {
  Cluster cluster(small(), sim(12));
  std::atomic<bool> stop{false};
  std::thread reader([&] {
    while (!stop) {
      EXPECT_LE(cluster[0].group.stats().exchanges, 200U);
      std::this_thread::sleep_for(100us);
    }
  });
  cluster.each([&](int rank) {
    Outputs out;
    for (int step = 0; step < 50; ++step) exchange(cluster, rank, out);
  });
  stop = true;
  reader.join();
  EXPECT_EQ(cluster[0].group.stats().exchanges, 50U);
}

}  // namespace
}  // namespace pplx::moe
