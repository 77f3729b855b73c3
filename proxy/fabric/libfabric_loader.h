// libfabric, opened at run time: one build works with any version and without it.
#pragma once

#include <rdma/fabric.h>

#include <string>

#include "proxy/fabric/library_path.h"

namespace pplx {

// The functions that are symbols; everything else libfabric offers is reached through its objects.
struct Libfabric {
  decltype(&fi_getinfo) getinfo = nullptr;
  decltype(&fi_freeinfo) freeinfo = nullptr;
  decltype(&fi_dupinfo) dupinfo = nullptr;
  decltype(&fi_fabric) fabric = nullptr;
  decltype(&fi_strerror) strerror = nullptr;
  decltype(&fi_version) version = nullptr;
  std::string path;

  uint32_t major() const { return FI_MAJOR(version()); }
  uint32_t minor() const { return FI_MINOR(version()); }
};

// Opens it once a process; throws kFabric naming what was tried and what to install.
const Libfabric& load_libfabric();

}  // namespace pplx
