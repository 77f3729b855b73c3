// Python's view of proxy/topology: plain dicts, for pplx_jax/topology.py.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "proxy/engine/cores.h"
#include "proxy/topology/placement.h"
#include "proxy/topology/topology.h"

namespace nb = nanobind;

namespace pplx {
namespace {

nb::dict device_dict(const PciDevice& device) {
  nb::dict out;
  out["pci"] = device.bus_id;
  out["name"] = device.name;
  out["interface"] = device.interface;
  out["vendor"] = device.vendor;
  out["device"] = device.device;
  out["numa_node"] = device.numa_node;
  out["cpus"] = device.cpus;
  return out;
}

nb::dict topology_dict(const std::string& xml) {
  Topology topology;
  {
    const nb::gil_scoped_release released;
    topology = discover_topology(xml);
  }
  nb::list cores, gpus, nics, distances, placements;
  for (const Core& core : topology.cores) {
    nb::dict one;
    one["numa_node"] = core.numa_node;
    one["cpus"] = core.cpus;
    cores.append(one);
  }
  for (const PciDevice& nic : topology.nics) nics.append(device_dict(nic));
  for (const PciDevice& gpu : topology.gpus) {
    gpus.append(device_dict(gpu));
    nb::list row;
    for (const PciDevice& nic : topology.nics) row.append(distance_name(distance(gpu, nic)));
    distances.append(row);
  }
  for (const Placement& placement : place_gpus(topology)) {
    nb::dict one;
    one["nics"] = placement.nics;
    one["distance"] = placement.nics.empty() ? "" : distance_name(placement.distance);
    one["shared"] = placement.shared;
    one["cores"] = placement.cores;
    placements.append(one);
  }
  nb::dict out;
  out["source"] = topology.source;
  out["cores"] = cores;
  out["gpus"] = gpus;
  out["nics"] = nics;
  out["distances"] = distances;
  out["placements"] = placements;
  return out;
}

}  // namespace

void bind_topology(nb::module_& m);

void bind_topology(nb::module_& m) {
  m.def("topology", &topology_dict, nb::arg("xml"));
  m.def("cores_for", &cores_for, nb::arg("device"));
}

}  // namespace pplx
