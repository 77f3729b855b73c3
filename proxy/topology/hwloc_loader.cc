#include "proxy/topology/hwloc_loader.h"

#include <dlfcn.h>

#include <cstdlib>
#include <mutex>
#include <optional>
#include <vector>

#include "proxy/error.h"
#include "proxy/log.h"

namespace pplx {
namespace {

std::mutex g_mutex;
std::optional<Hwloc> g_library;

template <typename Function>
bool resolve(void* handle, const char* symbol, Function& function) {
  function = reinterpret_cast<Function>(dlsym(handle, symbol));
  return function != nullptr;
}

std::optional<Hwloc> try_open(const std::string& path, std::string& tried) {
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    tried += "\n  " + std::string(dlerror());
    return std::nullopt;
  }
  Hwloc library;
  library.path = path;
  const bool complete =
      resolve(handle, "hwloc_get_api_version", library.get_api_version) &&
      resolve(handle, "hwloc_topology_init", library.topology_init) &&
      resolve(handle, "hwloc_topology_destroy", library.topology_destroy) &&
      resolve(handle, "hwloc_topology_load", library.topology_load) &&
      resolve(handle, "hwloc_topology_set_xml", library.topology_set_xml) &&
      resolve(handle, "hwloc_topology_set_synthetic", library.topology_set_synthetic) &&
      resolve(handle, "hwloc_topology_set_flags", library.topology_set_flags) &&
      resolve(handle, "hwloc_topology_set_io_types_filter", library.topology_set_io_types_filter) &&
      resolve(handle, "hwloc_get_obj_by_depth", library.get_obj_by_depth) &&
      resolve(handle, "hwloc_bitmap_next", library.bitmap_next);
  if (!complete) {
    tried += "\n  " + path + ": not hwloc 2 (" + dlerror() + ")";
    dlclose(handle);
    return std::nullopt;
  }
  // Objects are read as the headers of the build lay them out, which holds within a major version.
  if (const unsigned major = library.get_api_version() >> 16; major != (HWLOC_API_VERSION >> 16)) {
    tried += "\n  " + path + ": it is of version " + std::to_string(major) + ", " +
             std::to_string(HWLOC_API_VERSION >> 16) + " is needed";
    dlclose(handle);
    return std::nullopt;
  }
  return library;
}

}  // namespace

const Hwloc& load_hwloc() {
  const std::lock_guard lock(g_mutex);
  if (g_library) return *g_library;
  std::vector<std::string> paths = {"libhwloc.so.15"};
  // An explicit path is the user's decision: nothing else is tried beside it.
  if (const char* path = std::getenv("PPLX_HWLOC"); path != nullptr && *path != '\0') paths = {path};
  std::string tried;
  for (const auto& path : paths) {
    if ((g_library = try_open(path, tried))) {
      log(LogLevel::kInfo, "hwloc from ", path);
      return *g_library;
    }
  }
  throw Error(ErrorKind::kFabric,
              "hwloc was not found: which NICs and cores are near a GPU is unknown. Install it (apt-get "
              "install libhwloc15) or set PPLX_HWLOC to the path of libhwloc.so.15. Tried:" +
                  tried);
}

}  // namespace pplx
