// Machines that are not here, as hwloc's XML files (tests/topology), and what is chosen on them.
#include "proxy/topology/topology.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "proxy/error.h"
#include "proxy/topology/placement.h"

namespace pplx::testing {
namespace {

Topology machine(const std::string& name) {
  return discover_topology(std::string(PPLX_TEST_TOPOLOGIES) + "/" + name + ".xml");
}

std::vector<std::string> names(const Topology& topology, const Placement& placement) {
  std::vector<std::string> result;
  for (size_t nic : placement.nics) result.push_back(topology.nics[nic].name);
  return result;
}

// Whatever the machine: fair, no NIC twice unless there are too few, cores not twice.
void expect_fair(const Topology& topology) {
  const auto placements = place_gpus(topology);
  ASSERT_EQ(placements.size(), topology.gpus.size());
  std::map<size_t, int> users;
  std::set<int> cores;
  for (const auto& placement : placements) {
    for (size_t nic : placement.nics) ++users[nic];
    for (int core : placement.cores) EXPECT_TRUE(cores.insert(core).second) << "core " << core << " twice";
    EXPECT_TRUE(std::is_sorted(placement.cores.begin(), placement.cores.end()));
  }
  for (const auto& placement : placements) {
    bool twice = false;
    for (size_t nic : placement.nics) twice = twice || users[nic] > 1;
    EXPECT_EQ(placement.shared, twice);
  }
}

TEST(Topology, P5HasFourEfaDevicesBehindEachGpusSwitch) {
  const Topology topology = machine("p5.48xlarge");
  ASSERT_EQ(topology.gpus.size(), 8U);  // and not the instance's display
  ASSERT_EQ(topology.nics.size(), 32U);
  EXPECT_EQ(topology.cores.size(), 96U);
  EXPECT_EQ(topology.gpus[5].numa_node, 1);
  expect_fair(topology);
  const auto placements = place_gpus(topology);
  std::set<size_t> used;
  for (size_t gpu = 0; gpu < 8; ++gpu) {
    const auto& placement = placements[gpu];
    EXPECT_EQ(placement.nics.size(), 4U);
    EXPECT_EQ(placement.distance, Distance::kSwitch);
    EXPECT_FALSE(placement.shared);
    for (size_t nic : placement.nics) {
      EXPECT_EQ(distance(topology.gpus[gpu], topology.nics[nic]), Distance::kSwitch);
      EXPECT_TRUE(used.insert(nic).second);
    }
    ASSERT_EQ(placement.cores.size(), 12U);
    EXPECT_EQ(placement.cores.front(), 12 * static_cast<int>(gpu));
  }
  EXPECT_EQ(used.size(), 32U);
  EXPECT_EQ(names(topology, placements[0]),
            (std::vector<std::string>{"rdmap18s0", "rdmap20s0", "rdmap22s0", "rdmap24s0"}));
}

TEST(Topology, DgxHasOneConnectXForEachGpuAndLeavesStorageAlone) {
  const Topology topology = machine("dgx-h100");
  ASSERT_EQ(topology.gpus.size(), 8U);
  ASSERT_EQ(topology.nics.size(), 12U);
  expect_fair(topology);
  const auto placements = place_gpus(topology);
  const std::vector<std::string> compute{"mlx5_0", "mlx5_3", "mlx5_4",  "mlx5_5",
                                         "mlx5_6", "mlx5_9", "mlx5_10", "mlx5_11"};
  for (size_t gpu = 0; gpu < 8; ++gpu) {
    EXPECT_EQ(names(topology, placements[gpu]), std::vector<std::string>{compute[gpu]});
    EXPECT_EQ(placements[gpu].cores.size(), 14U);
  }
  const auto& storage = *std::find_if(topology.nics.begin(), topology.nics.end(),
                                      [](const PciDevice& nic) { return nic.name == "mlx5_1"; });
  EXPECT_EQ(storage.interface, "ens0p0");
  EXPECT_EQ(distance(topology.gpus[0], storage), Distance::kNode);
  EXPECT_EQ(distance(topology.gpus[7], storage), Distance::kSystem);
}

TEST(Topology, GpusOfOneSwitchShareItsNicsEqually) {
  const Topology topology = machine("pairs");
  expect_fair(topology);
  const auto placements = place_gpus(topology);
  ASSERT_EQ(placements.size(), 4U);
  // Three NICs for two GPUs: one is left over, and the one at the host bridge is too far.
  EXPECT_EQ(names(topology, placements[0]), std::vector<std::string>{"mlx5_0"});
  EXPECT_EQ(names(topology, placements[1]), std::vector<std::string>{"mlx5_1"});
  EXPECT_EQ(names(topology, placements[2]), std::vector<std::string>{"mlx5_4"});
  EXPECT_EQ(names(topology, placements[3]), std::vector<std::string>{"mlx5_5"});
  EXPECT_EQ(placements[0].cores.size(), 16U);
  EXPECT_EQ(distance(topology.gpus[0], topology.nics[3]), Distance::kHostBridge);
}

TEST(Topology, FewerNicsThanGpusAreShared) {
  const Topology topology = machine("flat");
  expect_fair(topology);
  const auto placements = place_gpus(topology);
  ASSERT_EQ(placements.size(), 4U);
  for (size_t gpu = 0; gpu < 4; ++gpu) {
    EXPECT_EQ(names(topology, placements[gpu]), std::vector<std::string>{"mlx5_" + std::to_string(gpu % 2)});
    EXPECT_TRUE(placements[gpu].shared);
    EXPECT_EQ(placements[gpu].distance, Distance::kHostBridge);
  }
}

TEST(Topology, CoresNearADevice) {
  const Topology topology = machine("dgx-h100");
  EXPECT_EQ(cores_near(topology, "mlx5_9").front(), 56);
  EXPECT_EQ(cores_near(topology, "mlx5_9").size(), 56U);
  EXPECT_EQ(cores_near(topology, "ibp0").front(), 0);
  EXPECT_EQ(cores_near(topology, topology.gpus[1].bus_id), place_gpus(topology)[1].cores);
  EXPECT_TRUE(cores_near(topology, "mlx5_99").empty());
  EXPECT_TRUE(cores_near(topology, "").empty());
}

TEST(Topology, WithoutDevicesThereIsNothingToPlace) {
  const Topology topology = synthetic_topology("pack:2 numa:1 core:4 pu:2");
  EXPECT_EQ(topology.cores.size(), 8U);
  EXPECT_EQ(topology.cores[5].numa_node, 1);
  EXPECT_EQ(topology.cores[5].cpus.size(), 2U);
  EXPECT_TRUE(place_gpus(topology).empty());
}

TEST(Topology, GpusWithoutNicsGetCores) {
  Topology topology = synthetic_topology("pack:2 core:4 pu:1");
  for (int node = 0; node < 2; ++node) {
    PciDevice gpu;
    gpu.bus_id = "0000:0" + std::to_string(node) + ":00.0";
    for (int cpu = 0; cpu < 4; ++cpu) gpu.cpus.push_back(4 * node + cpu);
    topology.gpus.push_back(gpu);
  }
  const auto placements = place_gpus(topology);
  EXPECT_TRUE(placements[0].nics.empty());
  EXPECT_EQ(placements[1].cores, (std::vector<int>{4, 5, 6, 7}));
}

TEST(Topology, NicsAcrossNumaNodesAreTakenWhereNoneIsNearer) {
  Topology topology = machine("dgx-h100");
  // Node 1's NICs only.
  std::erase_if(topology.nics, [](const PciDevice& nic) { return nic.numa_node == 0; });
  expect_fair(topology);
  const auto placements = place_gpus(topology);
  EXPECT_EQ(placements[0].distance, Distance::kSystem);
  EXPECT_EQ(placements[7].distance, Distance::kSwitch);
  for (const auto& placement : placements) EXPECT_EQ(placement.nics.size(), 1U);
}

TEST(Topology, ThisMachine) {
  const Topology topology = discover_topology();
  EXPECT_TRUE(topology.source.starts_with("hwloc 2."));
  EXPECT_FALSE(topology.cores.empty());
  expect_fair(topology);
}

TEST(Topology, AFileThatIsNoTopologyIsRefused) {
  try {
    discover_topology("/proc/self/status");
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::kFabric);
    EXPECT_NE(std::string(error.what()).find("/proc/self/status"), std::string::npos);
  }
}

}  // namespace
}  // namespace pplx::testing
