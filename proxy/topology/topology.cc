#include "proxy/topology/topology.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>

#include "proxy/error.h"
#ifdef PPLX_WITH_HWLOC
#include "proxy/topology/hwloc_loader.h"
#endif

namespace pplx {

const char* distance_name(Distance distance) noexcept {
  switch (distance) {
    case Distance::kSwitch:
      return "PIX";
    case Distance::kSwitches:
      return "PXB";
    case Distance::kHostBridge:
      return "PHB";
    case Distance::kNode:
      return "NODE";
    case Distance::kSystem:
      return "SYS";
  }
  return "?";
}

Distance distance(const PciDevice& a, const PciDevice& b) noexcept {
  const auto [left, right] =
      std::mismatch(a.bridges.begin(), a.bridges.end(), b.bridges.begin(), b.bridges.end());
  const auto shared = left - a.bridges.begin();
  if (shared == 0) return a.cpus == b.cpus ? Distance::kNode : Distance::kSystem;
  if (shared == 1) return Distance::kHostBridge;
  // A switch is an upstream port with its downstream ports, each a bridge.
  const auto below = std::max(a.bridges.end() - left, b.bridges.end() - right);
  return below <= 1 ? Distance::kSwitch : Distance::kSwitches;
}

#ifdef PPLX_WITH_HWLOC

namespace {

constexpr uint16_t kNvidia = 0x10de, kAmd = 0x1002;

class Walk {
 public:
  Walk(const Hwloc& library, Topology& out) : library_(library), out_(out) {}

  void visit(hwloc_obj_t object) {
    if (object->type == HWLOC_OBJ_CORE) add_core(object);
    if (object->type == HWLOC_OBJ_PCI_DEVICE) add_device(object);
    for (auto* child : {object->first_child, object->io_first_child}) {
      for (; child != nullptr; child = child->next_sibling) visit(child);
    }
  }

 private:
  std::vector<int> numbers(hwloc_const_bitmap_t bitmap) const {
    std::vector<int> found;
    if (bitmap == nullptr) return found;
    for (int at = library_.bitmap_next(bitmap, -1); at >= 0; at = library_.bitmap_next(bitmap, at)) {
      found.push_back(at);
    }
    return found;
  }

  int node(hwloc_const_bitmap_t nodeset) const {
    const auto nodes = numbers(nodeset);
    return nodes.size() == 1 ? nodes.front() : -1;
  }

  void add_core(hwloc_obj_t object) {
    out_.cores.push_back({.numa_node = node(object->nodeset), .cpus = numbers(object->cpuset)});
  }

  void add_device(hwloc_obj_t object) {
    const auto& pci = object->attr->pcidev;
    PciDevice device;
    char bus_id[32];
    std::snprintf(bus_id, sizeof bus_id, "%04x:%02x:%02x.%x", static_cast<unsigned>(pci.domain), pci.bus,
                  pci.dev, pci.func);
    device.bus_id = bus_id;
    device.vendor = pci.vendor_id;
    device.device = pci.device_id;
    bool rdma = false;
    for (auto* child = object->io_first_child; child != nullptr; child = child->next_sibling) {
      if (child->type != HWLOC_OBJ_OS_DEVICE || child->name == nullptr) continue;
      if (child->attr->osdev.type == HWLOC_OBJ_OSDEV_OPENFABRICS) {
        rdma = true;
        device.name = child->name;
      } else if (child->attr->osdev.type == HWLOC_OBJ_OSDEV_NETWORK) {
        device.interface = child->name;
      }
    }
    hwloc_obj_t parent = object->parent;
    for (; parent != nullptr && parent->cpuset == nullptr; parent = parent->parent) {
      if (parent->type == HWLOC_OBJ_BRIDGE) device.bridges.push_back(parent->gp_index);
    }
    std::reverse(device.bridges.begin(), device.bridges.end());
    if (parent != nullptr) {
      device.numa_node = node(parent->nodeset);
      device.cpus = numbers(parent->cpuset);
    }
    const unsigned kind = pci.class_id >> 8;
    const bool display = kind == 0x03 && (pci.vendor_id == kNvidia || pci.vendor_id == kAmd);
    const bool accelerator = kind == 0x12 && pci.vendor_id == kAmd;
    if (display || accelerator) out_.gpus.push_back(device);
    if (rdma) out_.nics.push_back(device);
  }

  const Hwloc& library_;
  Topology& out_;
};

template <typename Choose>
Topology load(std::string source, const Choose& choose) {
  const Hwloc& library = load_hwloc();
  hwloc_topology_t raw = nullptr;
  auto check = [&](int result, const char* what) {
    if (result == 0) return;
    throw Error(ErrorKind::kFabric,
                "hwloc: " + std::string(what) + " failed for " + source + ": " + std::strerror(errno));
  };
  errno = 0;
  check(library.topology_init(&raw), "hwloc_topology_init");
  const std::unique_ptr<hwloc_topology, decltype(library.topology_destroy)> topology(
      raw, library.topology_destroy);
  check(choose(library, raw), "the description");
  check(library.topology_set_io_types_filter(raw, HWLOC_TYPE_FILTER_KEEP_IMPORTANT), "the choice of devices");
  check(library.topology_load(raw), "hwloc_topology_load");
  Topology out;
  out.source = std::move(source);
  Walk(library, out).visit(library.get_obj_by_depth(raw, 0, 0));
  for (auto* devices : {&out.gpus, &out.nics}) {
    std::sort(devices->begin(), devices->end(),
              [](const PciDevice& a, const PciDevice& b) { return a.bus_id < b.bus_id; });
  }
  return out;
}

}  // namespace

Topology discover_topology(const std::string& xml) {
  if (!xml.empty()) {
    return load(xml, [&](const Hwloc& library, hwloc_topology_t topology) {
      return library.topology_set_xml(topology, xml.c_str());
    });
  }
  const unsigned version = load_hwloc().get_api_version();
  return load("hwloc " + std::to_string(version >> 16) + "." + std::to_string((version >> 8) & 0xff),
              [](const Hwloc&, hwloc_topology_t) { return 0; });
}

Topology synthetic_topology(const std::string& description) {
  return load(description, [&](const Hwloc& library, hwloc_topology_t topology) {
    return library.topology_set_synthetic(topology, description.c_str());
  });
}

#else

Topology discover_topology(const std::string&) {
  throw Error(ErrorKind::kFabric,
              "this build has no hwloc: which NICs and cores are near a GPU is unknown. Build it with "
              "hwloc's headers (apt-get install libhwloc-dev)");
}
Topology synthetic_topology(const std::string&) { return discover_topology(""); }

#endif

}  // namespace pplx
