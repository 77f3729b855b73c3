// Which NICs and cores a GPU uses.
#pragma once

#include <cstddef>
#include <optional>
#include <string_view>
#include <vector>

#include "proxy/topology/topology.h"

namespace pplx {

struct Placement {
  std::vector<size_t> nics;               // indices into Topology::nics, nearest first
  Distance distance = Distance::kSystem;  // of the farthest of them; means nothing where there are none
  bool shared = false;                    // other GPUs use these NICs too, as there are fewer than GPUs
  std::vector<int> cores;                 // its share of the nearest cores, ascending: a hardware thread each
};

// One for each GPU. A GPU uses the NICs nearest to it: behind its PCIe switch, else below its host bridge,
// else of its NUMA node, else any. GPUs with the same NICs nearest share them out: equally many each, and
// none is used by two unless there are fewer NICs than GPUs. The same holds for cores.
std::vector<Placement> place_gpus(const Topology& topology);

// The cores for a worker that serves a device: a GPU (by bus id) its share, a NIC (by name, or bus id) the
// cores nearest to it. Empty: nothing is known of such a device.
std::vector<int> cores_near(const Topology& topology, std::string_view device);

}  // namespace pplx
