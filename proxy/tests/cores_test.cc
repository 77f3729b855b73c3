#include "proxy/engine/cores.h"

#include <gtest/gtest.h>
#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <array>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "proxy/tests/support.h"

namespace pplx::testing {
namespace {

// Numbers that no machine has and no other run of this test uses at the same time.
std::array<int, 2> unused_cores() { return {1'000'000 + 2 * ::getpid(), 1'000'001 + 2 * ::getpid()}; }

TEST(CoreClaim, ACoreHasOneOwnerUntilItIsGivenBack) {
  const auto cores = unused_cores();
  auto first = CoreClaim::take_one_of(cores);
  auto second = CoreClaim::take_one_of(cores);
  ASSERT_TRUE(first && second);
  EXPECT_EQ(first->core(), cores[0]);
  EXPECT_EQ(second->core(), cores[1]);
  EXPECT_FALSE(CoreClaim::take_one_of(cores));
  first.reset();
  EXPECT_EQ(CoreClaim::take_one_of(cores)->core(), cores[0]);
}

TEST(CoreClaim, IsTakenOnlyWhereThereAreCoresForIt) {
  cpu_set_t set;
  ASSERT_EQ(::sched_getaffinity(::getpid(), sizeof set, &set), 0);
  const auto count = static_cast<size_t>(CPU_COUNT(&set));
  std::vector<std::optional<CoreClaim>> claims;
  while (claims.size() <= count) {
    claims.push_back(CoreClaim::take());
    if (!claims.back()) break;
    EXPECT_TRUE(CPU_ISSET(claims.back()->core(), &set));
  }
  EXPECT_LE(claims.size() - 1, count < 8 ? 0 : count / 4);
}

TEST(CoresFor, AreThoseNearTheDevice) {
  ::setenv("PPLX_TOPOLOGY", (std::string(PPLX_TEST_TOPOLOGIES) + "/dgx-h100.xml").c_str(), 1);
  const auto near = cores_for("mlx5_9");
  ::unsetenv("PPLX_TOPOLOGY");
  EXPECT_EQ(near.size(), 56U);
  EXPECT_TRUE(cores_for("no such device").empty());
  EXPECT_TRUE(cores_for("").empty());
}

TEST(CoresFor, CanBeOverridden) {
  ::setenv("PPLX_CORES", "2-4,7", 1);
  EXPECT_EQ(cores_for(""), (std::vector<int>{2, 3, 4, 7}));
  for (const char* wrong : {"a", "3-", "5-3", "-1", "1-2-3", "1 2", "99999"}) {
    ::setenv("PPLX_CORES", wrong, 1);
    EXPECT_THROW(cores_for(""), Error) << wrong;
  }
  ::unsetenv("PPLX_CORES");
}

TEST(CoreClaim, NearCoresComeFirst) {
  cpu_set_t set;
  ASSERT_EQ(::sched_getaffinity(::getpid(), sizeof set, &set), 0);
  if (CPU_COUNT(&set) < 8) GTEST_SKIP() << "fewer than eight cores: none is claimed";
  int lowest = 0;
  while (!CPU_ISSET(lowest, &set)) ++lowest;
  const auto claim = CoreClaim::take(std::vector<int>{lowest});
  ASSERT_TRUE(claim);
  EXPECT_EQ(claim->core(), lowest);
}

TEST(Pinning, MovesTheThreadToThatCore) {
  cpu_set_t allowed;
  ASSERT_EQ(::sched_getaffinity(::getpid(), sizeof allowed, &allowed), 0);
  int core = 0;
  while (!CPU_ISSET(core, &allowed)) ++core;
  std::thread([core] {
    ASSERT_TRUE(pin_to_core(core));
    cpu_set_t set;
    ASSERT_EQ(::pthread_getaffinity_np(::pthread_self(), sizeof set, &set), 0);
    EXPECT_EQ(CPU_COUNT(&set), 1);
    EXPECT_TRUE(CPU_ISSET(core, &set));
  }).join();
  EngineConfig config;
  config.cpu = core;
  EXPECT_EQ(TransferEngine(config).stats().worker_core, core);
  config.cpu = EngineConfig::kAnyCore;
  EXPECT_EQ(TransferEngine(config).stats().worker_core, -1);
}

}  // namespace
}  // namespace pplx::testing
