// hwloc, opened at run time: one build works with any 2.x and without it.
#pragma once

#include <hwloc.h>

#include <string>

namespace pplx {

// The functions that are symbols. Not hwloc's inline ones: they would call symbols that nothing links.
struct Hwloc {
  decltype(&hwloc_get_api_version) get_api_version = nullptr;
  decltype(&hwloc_topology_init) topology_init = nullptr;
  decltype(&hwloc_topology_destroy) topology_destroy = nullptr;
  decltype(&hwloc_topology_load) topology_load = nullptr;
  decltype(&hwloc_topology_set_xml) topology_set_xml = nullptr;
  decltype(&hwloc_topology_set_synthetic) topology_set_synthetic = nullptr;
  decltype(&hwloc_topology_set_flags) topology_set_flags = nullptr;
  decltype(&hwloc_topology_set_io_types_filter) topology_set_io_types_filter = nullptr;
  decltype(&hwloc_get_obj_by_depth) get_obj_by_depth = nullptr;
  decltype(&hwloc_bitmap_next) bitmap_next = nullptr;
  std::string path;
};

// Opens it once a process; throws kFabric naming what was tried and what to install.
const Hwloc& load_hwloc();

}  // namespace pplx
