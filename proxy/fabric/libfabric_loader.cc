#include "proxy/fabric/libfabric_loader.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <mutex>
#include <optional>

#include "proxy/error.h"
#include "proxy/fabric/signal_guard.h"
#include "proxy/log.h"
#include "proxy/process.h"

namespace pplx {
namespace {

std::mutex g_mutex;
std::vector<std::string> g_folders;
std::optional<Libfabric> g_library;
std::optional<ProcessMark> g_loaded_in;  // written before g_loaded
std::atomic<bool> g_loaded{false};

std::vector<std::string> candidates() {
  // An explicit path is the user's decision: nothing else is tried beside it.
  if (const char* path = std::getenv("PPLX_LIBFABRIC"); path != nullptr && *path != '\0') return {path};
  std::vector<std::string> paths = {"/opt/amazon/efa/lib/libfabric.so.1",
                                    "/opt/amazon/efa/lib64/libfabric.so.1", "libfabric.so.1"};
  for (const auto& folder : g_folders) {
    std::vector<std::string> found;
    std::error_code ignored;
    for (const auto& entry : std::filesystem::directory_iterator(folder, ignored)) {
      auto file = entry.path().filename().string();
      if (file.starts_with("libfabric") && file.find(".so") != std::string::npos) {
        found.push_back(entry.path().string());
      }
    }
    std::sort(found.begin(), found.end());
    paths.insert(paths.end(), found.begin(), found.end());
  }
  return paths;
}

template <typename Function>
bool resolve(void* handle, const char* symbol, Function& function) {
  function = reinterpret_cast<Function>(dlsym(handle, symbol));
  return function != nullptr;
}

std::optional<Libfabric> try_open(const std::string& path, std::string& tried) {
  const SignalGuard guard{SIGINT, SIGTERM, SIGSEGV, SIGBUS, SIGILL, SIGABRT, SIGFPE};
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    tried += "\n  " + std::string(dlerror());
    return std::nullopt;
  }
  Libfabric library;
  library.path = path;
  bool complete =
      resolve(handle, "fi_getinfo", library.getinfo) && resolve(handle, "fi_freeinfo", library.freeinfo) &&
      resolve(handle, "fi_dupinfo", library.dupinfo) && resolve(handle, "fi_fabric", library.fabric) &&
      resolve(handle, "fi_strerror", library.strerror) && resolve(handle, "fi_version", library.version);
  if (!complete) {
    tried += "\n  " + path + ": not a libfabric (" + dlerror() + ")";
    dlclose(handle);
    return std::nullopt;
  }
  if (library.version() < FI_VERSION(1, 17)) {
    tried += "\n  " + path + ": version " + std::to_string(library.major()) + "." +
             std::to_string(library.minor()) + " is older than 1.17";
    dlclose(handle);
    return std::nullopt;
  }
  return library;
}

}  // namespace

void set_library_search_path(std::vector<std::string> folders) {
  std::lock_guard lock(g_mutex);
  g_folders = std::move(folders);
}

const Libfabric& load_libfabric() {
  if (g_loaded.load(std::memory_order_acquire)) {
    g_loaded_in->require("libfabric, which is loaded already,");
  }
  std::lock_guard lock(g_mutex);
  if (g_library) return *g_library;
  std::string tried;
  for (const auto& path : candidates()) {
    if ((g_library = try_open(path, tried))) {
      g_loaded_in.emplace();
      g_loaded.store(true, std::memory_order_release);
      exit_early_in_forks();
      log(LogLevel::kInfo, "libfabric ", g_library->major(), ".", g_library->minor(), " from ", path);
      return *g_library;
    }
  }
  throw Error(ErrorKind::kFabric,
              "libfabric was not found. Install it (apt-get install libfabric1, or pip install mpich, whose "
              "wheel carries one) or set PPLX_LIBFABRIC to the path of libfabric.so.1. Tried:" +
                  tried);
}

LibraryInfo libfabric_info() {
  const Libfabric& library = load_libfabric();
  Dl_info where{};
  const bool known =
      dladdr(reinterpret_cast<void*>(library.getinfo), &where) != 0 && where.dli_fname != nullptr;
  return {.path = known ? where.dli_fname : library.path,
          .version = std::to_string(library.major()) + "." + std::to_string(library.minor())};
}

}  // namespace pplx
