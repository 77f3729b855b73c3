// Kernels, couriers, groups and the engine together, by proxy: messages in GPU memory that NICs reach, in
// pinned host memory, and some ranks this way and some that.
#include <gtest/gtest.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "xla_ffi/cuda/tests/beside.h"
#include "xla_ffi/cuda/tests/member_cluster.h"
#include "xla_ffi/cuda/tests/step.h"

namespace pplx::moe::cuda::testing {
namespace {

Problem problem(int ranks, int chunk = 0, int depth = 1) {
  return {.ranks = ranks,
          .experts = 10,
          .top_k = 3,
          .hidden = 64,
          .max_tokens = 20,
          .chunk = chunk,
          .depth = depth};
}

class GpuMembers : public ::testing::Test {
 protected:
  void SetUp() override { setenv("PPLX_GDRCOPY", "off", 1); }
  void TearDown() override { unsetenv("PPLX_GDRCOPY"); }

  static void expect_memory(const MemberCluster& cluster, int rank, const std::string& memory,
                            const std::string& why) {
    const auto placed = cluster[rank].member().stats().regions;
    ASSERT_TRUE(placed.has_value());
    EXPECT_EQ(placed->memory, memory) << placed->why;
    EXPECT_NE(placed->why.find(why), std::string::npos) << placed->why;
  }
};

TEST_F(GpuMembers, WhatNicsReachIsInGpuMemory) {
  MemberCluster cluster(problem(2));
  for (int rank = 0; rank < 2; ++rank) {
    expect_memory(cluster, rank, "device", "registered");
    const MemberStats stats = cluster[rank].member().stats();
    EXPECT_GE(stats.device_bytes, stats.group.region_bytes + stats.group.staging_bytes);
    EXPECT_LT(stats.pinned_bytes, stats.group.region_bytes);
  }
  check_steps(cluster, 6, 100);
  check_steps(cluster, 3, 200, true);
}

TEST_F(GpuMembers, RoundsAndSeveralLanesInGpuMemory) {
  for (const int depth : {1, 2}) {
    MemberCluster cluster(problem(3, 7, depth));
    check_steps(cluster, 5, 300 + depth);
  }
}

TEST_F(GpuMembers, WithoutSuchANicTheyArePinned) {
  MemberCluster cluster(problem(2), {.nic_reaches_gpus = false});
  expect_memory(cluster, 0, "pinned", "fabric local cannot register GPU memory");
  EXPECT_GT(cluster[0].member().stats().pinned_bytes, cluster[0].member().stats().group.region_bytes);
  check_steps(cluster, 4, 400);
}

TEST_F(GpuMembers, TheUserDecides) {
  MemberCluster cluster(problem(2), {.regions = [](int) { return RegionMemory::kPinned; }});
  expect_memory(cluster, 1, "pinned", "PPLX_GPU_REGIONS=pinned");
  check_steps(cluster, 3, 500);
  try {
    MemberCluster refused(problem(2),
                          {.regions = [](int) { return RegionMemory::kDevice; }, .nic_reaches_gpus = false});
    FAIL() << "was made";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("PPLX_GPU_REGIONS=device: fabric local cannot"),
              std::string::npos)
        << error.what();
  }
}

// Each rank for itself; every pair of kinds meets, both ways.
TEST_F(GpuMembers, RanksMayDiffer) {
  MemberCluster cluster(problem(4), {.regions = [](int rank) {
                          return rank % 3 == 0 ? RegionMemory::kPinned : RegionMemory::kDevice;
                        }});
  for (int rank = 0; rank < 4; ++rank) expect_memory(cluster, rank, rank % 3 == 0 ? "pinned" : "device", "");
  check_steps(cluster, 6, 600);
  check_steps(cluster, 3, 700, true);
}

TEST_F(GpuMembers, HundredsOfStepsInGpuMemory) {
  MemberCluster cluster(problem(2));
  check_steps(cluster, 150, 1000);
}

// The words that say so are written through a mapping, here a stand-in's.
TEST_F(GpuMembers, ArrivalsToldThroughAMapping) {
  setenv("PPLX_GDRCOPY", beside(PPLX_FAKE_GPU_GDRAPI).c_str(), 1);
  for (const RegionMemory memory : {RegionMemory::kPinned, RegionMemory::kDevice}) {
    MemberCluster cluster(problem(2, 0, 2), {.regions = [memory](int) { return memory; }});
    const auto flags = cluster[0].member().stats().flags;
    ASSERT_TRUE(flags.has_value());
    EXPECT_EQ(std::string(flags->memory), "device") << flags->why;
    check_steps(cluster, 20, 2000);
    check_steps(cluster, 10, 3000, true);
  }
}

TEST_F(GpuMembers, WithoutGdrCopyArrivalsAreToldInPinnedMemory) {
  MemberCluster cluster(problem(2));
  const auto flags = cluster[0].member().stats().flags;
  ASSERT_TRUE(flags.has_value());
  EXPECT_EQ(std::string(flags->memory), "pinned");
  EXPECT_EQ(flags->why, "PPLX_GDRCOPY=off");
}

}  // namespace
}  // namespace pplx::moe::cuda::testing
