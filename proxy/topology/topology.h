// What a machine is made of, as far as it matters to who talks to whom: cores, GPUs, RDMA devices and the
// PCIe bridges between them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace pplx {

// How far two PCIe devices are from each other, in nvidia-smi's terms; nearer ones are smaller.
enum class Distance : uint8_t {
  kSwitch,      // PIX: the ports of one PCIe switch
  kSwitches,    // PXB: several switches or bridges, but not the processor's host bridge
  kHostBridge,  // PHB: one host bridge
  kNode,        // NODE: one NUMA node
  kSystem,      // SYS: across NUMA nodes
};
const char* distance_name(Distance distance) noexcept;

struct Core {
  int numa_node = -1;
  std::vector<int> cpus;  // hardware threads, ascending, as the system numbers them
};

struct PciDevice {
  std::string bus_id;     // "0000:3b:00.0"
  std::string name;       // what the system calls it: of an RDMA device "mlx5_0"; "" where it has no name
  std::string interface;  // of an RDMA device, the network interface on it, if any
  uint16_t vendor = 0, device = 0;
  int numa_node = -1;     // -1: unknown, or several
  std::vector<int> cpus;  // the hardware threads nearest to it, ascending
  // From the root to the device: identities of what it hangs on.
  std::vector<uint64_t> bridges;  // host bridge first
};

struct Topology {
  std::string source;  // "hwloc 2.9", or the file
  std::vector<Core> cores;
  std::vector<PciDevice> gpus, nics;  // ascending by bus id; NICs: devices that RDMA libraries can open
};

Distance distance(const PciDevice& a, const PciDevice& b) noexcept;

// Of this machine, or as hwloc's XML file `xml` tells. Throws kFabric without hwloc, or where the file cannot
// be read.
Topology discover_topology(const std::string& xml = "");
// As hwloc's synthetic descriptions tell ("pack:2 numa:2 core:8 pu:2"); no devices.
Topology synthetic_topology(const std::string& description);

}  // namespace pplx
