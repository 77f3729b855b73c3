#include "proxy/fabric/verbs_loader.h"

#include <dlfcn.h>

#include <mutex>
#include <optional>

#include "proxy/error.h"
#include "proxy/log.h"
#include "proxy/process.h"

namespace pplx {
namespace {

constexpr const char* kName = "libibverbs.so.1";

std::mutex g_mutex;
std::optional<Verbs> g_library;
std::optional<ProcessMark> g_loaded_in;

class Symbols {
 public:
  explicit Symbols(void* handle) : handle_(handle) {}
  template <typename Function>
  void may(const char* symbol, Function& function) {
    function = reinterpret_cast<Function>(dlsym(handle_, symbol));
  }
  template <typename Function>
  void must(const char* symbol, Function& function) {
    may(symbol, function);
    if (function == nullptr) missing_ += std::string(missing_.empty() ? "" : ", ") + symbol;
  }
  const std::string& missing() const { return missing_; }

 private:
  void* handle_;
  std::string missing_;
};

Verbs open_library() {
  void* handle = dlopen(kName, RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    throw Error(ErrorKind::kFabric, std::string("fabric 'verbs' needs libibverbs, which cannot be opened: ") +
                                        dlerror() +
                                        "; install it (apt-get install libibverbs1 ibverbs-providers)");
  }
  Verbs lib;
  Symbols symbols(handle);
  symbols.must("ibv_get_device_list", lib.get_device_list);
  symbols.must("ibv_free_device_list", lib.free_device_list);
  symbols.must("ibv_get_device_name", lib.get_device_name);
  symbols.must("ibv_open_device", lib.open_device);
  symbols.must("ibv_close_device", lib.close_device);
  symbols.must("ibv_query_device", lib.query_device);
  symbols.must("ibv_query_port", lib.query_port);
  symbols.must("ibv_query_gid", lib.query_gid);
  symbols.may("_ibv_query_gid_table", lib.query_gid_table);
  symbols.must("ibv_alloc_pd", lib.alloc_pd);
  symbols.must("ibv_dealloc_pd", lib.dealloc_pd);
  symbols.must("ibv_reg_mr", lib.reg_mr);
  symbols.may("ibv_reg_mr_iova2", lib.reg_mr_iova2);
  symbols.may("ibv_reg_dmabuf_mr", lib.reg_dmabuf_mr);
  symbols.must("ibv_dereg_mr", lib.dereg_mr);
  symbols.must("ibv_create_cq", lib.create_cq);
  symbols.must("ibv_destroy_cq", lib.destroy_cq);
  symbols.must("ibv_create_srq", lib.create_srq);
  symbols.must("ibv_destroy_srq", lib.destroy_srq);
  symbols.must("ibv_create_qp", lib.create_qp);
  symbols.must("ibv_modify_qp", lib.modify_qp);
  symbols.must("ibv_destroy_qp", lib.destroy_qp);
  symbols.must("ibv_create_ah", lib.create_ah);
  symbols.must("ibv_destroy_ah", lib.destroy_ah);
  symbols.must("ibv_wc_status_str", lib.wc_status_str);
  symbols.must("ibv_event_type_str", lib.event_type_str);
  symbols.must("ibv_get_async_event", lib.get_async_event);
  symbols.must("ibv_ack_async_event", lib.ack_async_event);
  symbols.must("ibv_fork_init", lib.fork_init);
  if (!symbols.missing().empty()) {
    const std::string& missing = symbols.missing();
    dlclose(handle);
    throw Error(ErrorKind::kFabric,
                std::string(kName) + " lacks " + missing + ": it is too old; install rdma-core 15 or newer");
  }
  return lib;
}

}  // namespace

const Verbs& load_verbs() {
  std::lock_guard lock(g_mutex);
  if (g_library) {
    g_loaded_in->require("libibverbs, which is loaded already,");
    return *g_library;
  }
  g_library = open_library();
  g_loaded_in.emplace();
  // Where the kernel does not copy pinned pages at a fork, a parent that writes would lose its registrations'
  // pages to the child. On kernels that do, this is nothing.
  if (int rc = g_library->fork_init(); rc != 0) {
    log(LogLevel::kWarn, "libibverbs: ibv_fork_init returned ", rc, "; do not fork while engines are open");
  }
  return *g_library;
}

}  // namespace pplx
