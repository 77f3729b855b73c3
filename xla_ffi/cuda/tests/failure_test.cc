// Failures are final: they end every wait, name who is to blame, and later exchanges poison at once.
#include <gtest/gtest.h>

#include "xla_ffi/cuda/tests/step.h"

namespace pplx::moe::cuda::testing {
namespace {

constexpr uint64_t kHour = 3'600'000 * kMillisecond;
constexpr int kTokens = 6;

Problem problem(int ranks = 3, int depth = 1) {
  return {.ranks = ranks, .experts = 6, .top_k = 2, .hidden = 32, .max_tokens = kTokens, .depth = depth};
}

std::vector<Inputs> inputs_of(const Problem& problem) { return random_step(problem, 5, kTokens); }

Fault failure_of(const Cluster& cluster, int rank) {
  FaultRecord& record = cluster[rank].host().failure;
  return load(record.complete) == 0 ? Fault::kNone : record.fault;
}

void set_stall(const Cluster& cluster, uint64_t first, uint64_t later) {
  for (int rank = 0; rank < cluster.size(); ++rank) {
    store(cluster[rank].host().first_stall_ns, first);
    store(cluster[rank].host().stall_ns, later);
  }
}

// Alone, each kind of exchange ends without anybody else, however long a wait may last.
void expect_poison_at_once(Cluster& cluster, int rank) {
  set_stall(cluster, kHour, kHour);
  for (const Kind kind :
       {Kind::kDispatch, Kind::kCombine, Kind::kCombineTranspose, Kind::kDispatchTranspose}) {
    Steps steps(cluster, inputs_of(cluster.problem()));
    steps.launch(rank, kind);
    steps.finish();
    EXPECT_TRUE(steps[rank].poisoned(kind)) << kind_name(kind);
    Steps halves(cluster, inputs_of(cluster.problem()));
    halves.launch(rank, kind, Half::kSend);
    halves.launch(rank, kind, Half::kRecv);
    halves.finish();
    EXPECT_TRUE(halves[rank].poisoned(kind)) << kind_name(kind) << " in halves";
  }
}

TEST(GpuTimeout, NamesTheRankThatNeverComes) {
  for (const bool split : {false, true}) {
    for (int missing = 0; missing < 3; ++missing) {
      Cluster cluster(problem(), {.stall_ns = 50 * kMillisecond});
      Steps steps(cluster, inputs_of(cluster.problem()));
      int timeouts = 0;
      cluster.each([&](int rank) {
        if (rank == missing) return;
        if (split) {
          steps.launch(rank, Kind::kDispatch, Half::kSend, 3);
          steps.launch(rank, Kind::kDispatch, Half::kRecv, 3);
        } else {
          steps.launch(rank, Kind::kDispatch, Half::kBoth, 3);
        }
      });
      steps.finish();
      for (int rank = 0; rank < 3; ++rank) {
        if (rank == missing) continue;
        EXPECT_TRUE(steps[rank].poisoned(Kind::kDispatch));
        const FaultRecord& record = cluster[rank].host().failure;
        // Who is told by the other before its own deadline fails of that.
        ASSERT_TRUE(failure_of(cluster, rank) == Fault::kTimeout || record.fault == Fault::kNotice);
        EXPECT_EQ(record.exchange, 0U);
        EXPECT_EQ(record.kind, static_cast<uint32_t>(Kind::kDispatch));
        EXPECT_EQ(record.site, steps.call(rank, Kind::kDispatch, 3).site);
        if (record.fault != Fault::kTimeout) continue;
        ++timeouts;
        EXPECT_EQ(record.culprit, static_cast<uint32_t>(missing));
      }
      EXPECT_GE(timeouts, 1);
      expect_poison_at_once(cluster, (missing + 1) % 3);
      // The one that comes late is told, at the latest when it needs more than they had sent.
      steps.launch(missing, Kind::kDispatch, Half::kBoth, 3);
      steps.launch(missing, Kind::kCombine);
      steps.finish();
      EXPECT_TRUE(steps[missing].poisoned(Kind::kCombine));
      EXPECT_EQ(failure_of(cluster, missing), Fault::kNotice);
    }
  }
}

TEST(GpuTimeout, IsLongerAtACallsFirstExecution) {
  Cluster cluster(problem(2));
  Steps steps(cluster, inputs_of(cluster.problem()));
  set_stall(cluster, kHour, 50 * kMillisecond);
  steps.exchange(Kind::kDispatch, false);
  cluster.sync();
  // Another call, for the first time: waits for the latecomer.
  steps.launch(0, Kind::kDispatch, Half::kBoth, 1);
  std::this_thread::sleep_for(std::chrono::milliseconds(400));
  EXPECT_EQ(cudaStreamQuery(cluster[0].stream()), cudaErrorNotReady);
  steps.launch(1, Kind::kDispatch, Half::kBoth, 1);
  steps.finish();
  for (int rank = 0; rank < 2; ++rank) EXPECT_TRUE(steps.outputs(rank).tokens == steps.wanted()[rank].tokens);
  // The second time it does not.
  steps.launch(0, Kind::kDispatch, Half::kBoth, 1);
  steps.finish();
  EXPECT_EQ(failure_of(cluster, 0), Fault::kTimeout);
  EXPECT_EQ(cluster[0].host().failure.culprit, 1U);
}

TEST(GpuAbort, AWordOfTheHostEndsAWait) {
  Cluster cluster(problem(2), {.stall_ns = kHour});
  Steps steps(cluster, inputs_of(cluster.problem()));
  HostControl& host = cluster[0].host();
  steps.launch(0, Kind::kDispatch);
  ASSERT_TRUE(Cluster::wait([&] { return load(host.entered) == 1; }, std::chrono::seconds(20)));
  std::thread([&] { store<uint64_t>(host.abort, 1); }).join();
  steps.finish();
  EXPECT_TRUE(steps[0].poisoned(Kind::kDispatch));
  EXPECT_EQ(failure_of(cluster, 0), Fault::kAborted);
  expect_poison_at_once(cluster, 0);
}

TEST(GpuClosed, PoisonsWithoutWaiting) {
  Cluster cluster(problem(2), {.stall_ns = kHour});
  cluster[0].close();
  expect_poison_at_once(cluster, 0);
  EXPECT_EQ(failure_of(cluster, 0), Fault::kNone);
}

void expect_mismatch(Cluster& cluster, const Steps& steps, const std::vector<Kind>& kinds,
                     const std::vector<uint32_t>& places) {
  int mismatches = 0;
  for (int rank = 0; rank < cluster.size(); ++rank) {
    const FaultRecord& record = cluster[rank].host().failure;
    const Fault fault = failure_of(cluster, rank);
    ASSERT_TRUE(fault == Fault::kMismatch || fault == Fault::kNotice) << static_cast<int>(fault);
    if (fault != Fault::kMismatch) continue;
    ++mismatches;
    const auto culprit = static_cast<int>(record.culprit);
    ASSERT_LT(culprit, cluster.size());
    const KernelCall theirs = steps.call(culprit, kinds[culprit], places[culprit]);
    EXPECT_NE(theirs.tag, steps.call(rank, kinds[rank], places[rank]).tag);
    EXPECT_EQ(record.theirs.kind, static_cast<uint8_t>(theirs.kind));
    EXPECT_EQ(record.theirs.tag, theirs.tag);
    EXPECT_EQ(record.theirs.tokens, static_cast<uint32_t>(kTokens));
    EXPECT_EQ(record.theirs.source, record.culprit);
  }
  EXPECT_GE(mismatches, 1);
}

TEST(GpuMismatch, OfKindOrCallNamesTheOther) {
  const std::vector<std::pair<std::vector<Kind>, std::vector<uint32_t>>> programs = {
      {{Kind::kDispatch, Kind::kCombine, Kind::kDispatch}, {0, 0, 0}},
      {{Kind::kCombine, Kind::kCombine, Kind::kCombineTranspose}, {0, 0, 0}},
      {{Kind::kDispatchTranspose, Kind::kDispatch, Kind::kCombine}, {0, 0, 0}},
      {{Kind::kDispatch, Kind::kDispatch, Kind::kDispatch}, {0, 0, 1}},
      {{Kind::kCombine, Kind::kCombine, Kind::kCombine}, {4, 0, 0}}};
  for (const auto& [kinds, places] : programs) {
    Cluster cluster(problem());
    Steps steps(cluster, inputs_of(cluster.problem()));
    steps.exchange(Kind::kDispatch, false);
    cluster.sync();
    cluster.each([&](int rank) { steps.launch(rank, kinds[rank], Half::kBoth, places[rank]); });
    steps.finish();
    expect_mismatch(cluster, steps, kinds, places);
    for (int rank = 0; rank < 3; ++rank) EXPECT_TRUE(steps[rank].poisoned(kinds[rank])) << rank;
    expect_poison_at_once(cluster, 1);
  }
}

TEST(GpuMismatch, OfTheNumberOfTokens) {
  Cluster cluster(problem(2));
  std::vector<Inputs> inputs = inputs_of(cluster.problem());
  Steps steps(cluster, inputs);
  KernelCall call = steps.call(1, Kind::kDispatch);
  call.tokens = kTokens - 2;
  steps.launch(0, Kind::kDispatch);
  launch(call, steps[1]);
  steps.finish();
  for (int rank = 0; rank < 2; ++rank) {
    const Fault fault = failure_of(cluster, rank);
    EXPECT_TRUE(fault == Fault::kMismatch || fault == Fault::kNotice) << static_cast<int>(fault);
  }
  EXPECT_TRUE(steps[0].poisoned(Kind::kDispatch));
}

TEST(GpuWindow, SendingBeyondItFailsTheGroup) {
  for (const int depth : {1, 2, 6}) {
    Cluster cluster(problem(2, depth));
    std::vector<std::unique_ptr<Steps>> batches;
    for (int i = 0; i <= depth; ++i) {
      batches.push_back(std::make_unique<Steps>(cluster, inputs_of(cluster.problem())));
    }
    for (auto& batch : batches) batch->launch_all(Kind::kDispatch, Half::kSend);
    cluster.sync();
    for (int rank = 0; rank < 2; ++rank) {
      const Fault fault = failure_of(cluster, rank);
      ASSERT_TRUE(fault == Fault::kWindow || fault == Fault::kNotice) << static_cast<int>(fault);
      if (fault != Fault::kWindow) continue;
      EXPECT_EQ(cluster[rank].host().failure.detail[0], 0);
    }
    EXPECT_TRUE(failure_of(cluster, 0) == Fault::kWindow || failure_of(cluster, 1) == Fault::kWindow);
    expect_poison_at_once(cluster, 0);
  }
}

// Received out of order, the oldest holds its lane though fewer than depth are under way.
TEST(GpuWindow, IsCountedFromTheOldest) {
  Cluster cluster(problem(2, 2));
  std::vector<std::unique_ptr<Steps>> batches;
  for (int i = 0; i < 3; ++i) {
    batches.push_back(std::make_unique<Steps>(cluster, inputs_of(cluster.problem())));
  }
  batches[0]->launch_all(Kind::kDispatch, Half::kSend);
  batches[1]->launch_all(Kind::kDispatch, Half::kSend);
  batches[1]->launch_all(Kind::kDispatch, Half::kRecv);
  batches[1]->finish();
  EXPECT_EQ(batches[1]->outputs(0).ok, 1);
  batches[2]->launch(0, Kind::kDispatch, Half::kSend);
  cluster.sync();
  ASSERT_EQ(failure_of(cluster, 0), Fault::kWindow);
  EXPECT_EQ(cluster[0].host().failure.detail[0], 0);
}

TEST(GpuTicket, IsGoodForOneRecv) {
  enum class How { kTwice, kNothing, kNonsense, kFuture };
  for (const How how : {How::kTwice, How::kNothing, How::kNonsense, How::kFuture}) {
    Cluster cluster(problem(2, 2));
    Steps steps(cluster, inputs_of(cluster.problem())), other(cluster, inputs_of(cluster.problem()));
    steps.launch_all(Kind::kDispatch, Half::kSend);
    steps.launch_all(Kind::kDispatch, Half::kRecv);
    steps.finish();
    EXPECT_EQ(failure_of(cluster, 0), Fault::kNone);
    EXPECT_EQ(steps.outputs(0).ok, 1);
    DeviceStep& late = how == How::kTwice ? steps[0] : other[0];
    if (how != How::kTwice) {
      const Part& ticket = late.tickets[static_cast<size_t>(Kind::kDispatch)];
      const auto values = late.memory.host<float>(ticket);
      const auto used = steps[0].memory.host<float>(steps[0].tickets[static_cast<size_t>(Kind::kDispatch)]);
      for (size_t i = 0; i < 4; ++i) {
        values[i] = how == How::kNothing ? 0 : how == How::kNonsense ? -1e9F * (i + 0.5F) : used[i] + 1;
      }
      late.memory.upload(ticket, cluster[0].stream());
    }
    launch(cluster[0].call(Kind::kDispatch, kTokens), late, Half::kRecv);
    cluster.sync();
    late.memory.download(cluster[0].stream());
    cluster.sync();
    EXPECT_EQ(failure_of(cluster, 0), Fault::kTicket) << static_cast<int>(how);
    EXPECT_TRUE(late.poisoned(Kind::kDispatch)) << static_cast<int>(how);
    expect_poison_at_once(cluster, 0);
  }
}

// A rank that waits when another fails ends then, not at its own deadline.
TEST(GpuNotice, EndsTheOthersWait) {
  Cluster cluster(problem(3, 1), {.stall_ns = kHour});
  Steps steps(cluster, inputs_of(cluster.problem())), more(cluster, inputs_of(cluster.problem()));
  steps.launch(0, Kind::kDispatch);
  steps.launch(2, Kind::kDispatch);
  steps.launch(1, Kind::kDispatch, Half::kSend);
  cluster.sync();  // ranks 0 and 2 have all they need
  steps.launch(0, Kind::kCombine);
  steps.launch(2, Kind::kCombine);
  more.launch(1, Kind::kDispatch, Half::kSend);  // beyond the window
  steps.finish();
  EXPECT_EQ(failure_of(cluster, 1), Fault::kWindow);
  for (const int rank : {0, 2}) {
    EXPECT_EQ(failure_of(cluster, rank), Fault::kNotice);
    EXPECT_TRUE(steps[rank].poisoned(Kind::kCombine));
  }
}

}  // namespace
}  // namespace pplx::moe::cuda::testing
