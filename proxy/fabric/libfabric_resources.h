// libfabric's objects, owned; and where shm's wait when they must not be closed yet.
#pragma once

#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_eq.h>

#include <memory>
#include <mutex>
#include <set>
#include <utility>
#include <vector>

#include "proxy/fabric/address.h"
#include "proxy/fabric/libfabric_loader.h"
#include "proxy/log.h"

namespace pplx {

struct LibfabricInfoDeleter {
  const Libfabric* lib;
  void operator()(fi_info* info) const { lib->freeinfo(info); }
};
using LibfabricInfo = std::unique_ptr<fi_info, LibfabricInfoDeleter>;

template <typename Fid>
void close_fid(Fid*& fid) {
  if (fid == nullptr) return;
  if (int rc = fi_close(&fid->fid); rc != 0) log(LogLevel::kWarn, "libfabric: fi_close returned ", rc);
  fid = nullptr;
}

// What a domain consists of, closed in the order that libfabric wants.
struct LibfabricResources {
  LibfabricResources() = default;
  LibfabricResources(LibfabricResources&& other) noexcept { *this = std::move(other); }
  LibfabricResources& operator=(LibfabricResources&& other) noexcept;
  ~LibfabricResources();

  fid_fabric* fabric = nullptr;
  fid_domain* domain = nullptr;
  fid_cq* cq = nullptr;
  fid_av* av = nullptr;
  std::vector<fid_ep*> endpoints;
  std::vector<fid_mr*> memory;
};

// shm's endpoints of one process look into each other's memory without mapping it anew, and crash when one
// that they still wait for has been closed. So closed ones stay, unpolled, until the last is closed.
class ShmGraveyard {
 public:
  static ShmGraveyard& get();
  void opened();
  void bury(const EngineId& engine, LibfabricResources resources);
  bool holds(const EngineId& engine);

 private:
  std::mutex mutex_;
  size_t open_ = 0;
  std::vector<LibfabricResources> buried_;
  std::set<EngineId> engines_;
};

}  // namespace pplx
