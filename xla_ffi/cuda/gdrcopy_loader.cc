#include "xla_ffi/cuda/gdrcopy_loader.h"

#include <dlfcn.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <optional>
#include <string_view>
#include <vector>

#include "proxy/error.h"
#include "proxy/log.h"

namespace pplx::moe::cuda {
namespace {

constexpr int kMajor = 2;

std::mutex g_mutex;
std::map<std::string, GdrCopy> g_libraries;  // by path; never closed

template <typename Function>
bool resolve(void* handle, const char* symbol, Function& function) {
  function = reinterpret_cast<Function>(dlsym(handle, symbol));
  return function != nullptr;
}

std::optional<GdrCopy> try_open(const std::string& path, std::string& tried) {
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    tried += "\n  " + std::string(dlerror());
    return std::nullopt;
  }
  GdrCopy library;
  library.path = path;
  const bool complete =
      resolve(handle, "gdr_open", library.open) && resolve(handle, "gdr_close", library.close) &&
      resolve(handle, "gdr_pin_buffer", library.pin_buffer) &&
      resolve(handle, "gdr_unpin_buffer", library.unpin_buffer) && resolve(handle, "gdr_map", library.map) &&
      resolve(handle, "gdr_unmap", library.unmap) && resolve(handle, "gdr_get_info_v2", library.get_info) &&
      resolve(handle, "gdr_runtime_get_version", library.runtime_version) &&
      resolve(handle, "gdr_driver_get_version", library.driver_version);
  if (!complete) {
    tried += "\n  " + path + ": not GDRCopy 2 (" + dlerror() + ")";
    dlclose(handle);
    return std::nullopt;
  }
  library.runtime_version(&library.major, &library.minor);
  if (library.major != kMajor) {
    tried += "\n  " + path + ": it is of version " + std::to_string(library.major) + "." +
             std::to_string(library.minor) + ", " + std::to_string(kMajor) + ".x is needed";
    dlclose(handle);
    return std::nullopt;
  }
  return library;
}

}  // namespace

const GdrCopy& load_gdrcopy() {
  std::vector<std::string> paths = {"libgdrapi.so.2", "libgdrapi.so"};
  // An explicit path is the user's decision: nothing else is tried beside it.
  if (const char* path = std::getenv("PPLX_GDRCOPY"); path != nullptr && *path != '\0') {
    if (std::string_view(path) == "off") throw Error(ErrorKind::kFabric, "PPLX_GDRCOPY=off");
    paths = {path};
  }
  const std::lock_guard lock(g_mutex);
  std::string tried;
  for (const auto& path : paths) {
    if (const auto known = g_libraries.find(path); known != g_libraries.end()) return known->second;
    if (const auto library = try_open(path, tried)) {
      log(LogLevel::kInfo, "GDRCopy ", library->major, ".", library->minor, " from ", path);
      return g_libraries.emplace(path, *library).first->second;
    }
  }
  throw Error(ErrorKind::kFabric,
              "GDRCopy's library was not found: install it (libgdrapi.so.2) or set PPLX_GDRCOPY to its path. "
              "Tried:" +
                  tried);
}

}  // namespace pplx::moe::cuda
