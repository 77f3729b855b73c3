#include "proxy/fabric/libfabric_fabric.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <signal.h>
#include <sys/random.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "proxy/fabric/libfabric.h"
#include "proxy/log.h"

namespace pplx {
namespace {

// Newer than the headers that this is built with.
constexpr uint64_t kMrDmabuf = 1ULL << 40;  // FI_MR_DMABUF, 1.20
struct MrDmabuf {                           // fi_mr_dmabuf, 1.20
  int fd;
  uint64_t offset;
  size_t len;
  void* base_addr;
};

constexpr uint64_t kAccess = FI_SEND | FI_RECV | FI_READ | FI_WRITE | FI_REMOTE_READ | FI_REMOTE_WRITE;

std::string shm_segment(const std::vector<std::byte>& name) {
  std::string text(reinterpret_cast<const char*>(name.data()), name.size());
  text.resize(std::strlen(text.c_str()));
  if (auto prefix = text.find("://"); prefix != std::string::npos) text.erase(0, prefix + 3);
  std::string path = "/dev/shm/" + text;
  return access(path.c_str(), F_OK) == 0 ? path : "";
}

}  // namespace

LibfabricFabric::LibfabricFabric(const EngineConfig& config)
    : lib_(load_libfabric()), info_(find_provider(config)) {
  provider_ = traits_.label.empty() ? info_->fabric_attr->prov_name : traits_.label;
  try {
    open_endpoints(config.endpoints);
    post_receives();
  } catch (...) {
    close();
    throw;
  }
}

LibfabricFabric::~LibfabricFabric() { close(); }

std::string LibfabricFabric::name() const {
  std::string text =
      "libfabric:" + provider_ + " " + std::to_string(lib_.major()) + "." + std::to_string(lib_.minor());
  if (provider_ == "net") text += " (native tcp, which 1.18 renamed \"tcp\")";
  if (caps_.rails > 1) text += " x" + std::to_string(caps_.rails);
  return text;
}

FabricMemory LibfabricFabric::register_memory(void* data, size_t size) {
  fid_mr* mr = nullptr;
  int rc = fi_mr_reg(open_.domain, data, size, kAccess, 0, draw_key(), 0, &mr, nullptr);
  return registered(mr, rc, data, size);
}

FabricMemory LibfabricFabric::register_device_memory(const DeviceMemory& memory) {
  if (!hmem_) return Fabric::register_device_memory(memory);
  iovec whole{memory.data, memory.size};
  MrDmabuf dmabuf{memory.dmabuf_fd, memory.dmabuf_offset, memory.size, memory.data};
  fi_mr_attr attr{};
  uint64_t flags = 0;
  attr.mr_iov = &whole;
  if (memory.dmabuf_fd >= 0) {
    flags = kMrDmabuf;
    attr.mr_iov = reinterpret_cast<const iovec*>(&dmabuf);  // a union since 1.20
  }
  attr.iov_count = 1;
  attr.access = kAccess;
  attr.requested_key = draw_key();
  attr.iface = FI_HMEM_CUDA;
  attr.device.cuda = memory.device;
  fid_mr* mr = nullptr;
  int rc = fi_mr_regattr(open_.domain, &attr, flags, &mr);
  return registered(mr, rc, memory.data, memory.size);
}

void LibfabricFabric::unregister_memory(const FabricMemory& memory) {
  auto* mr = static_cast<fid_mr*>(memory.handle);
  auto found = std::find(open_.memory.begin(), open_.memory.end(), mr);
  if (found == open_.memory.end()) return;
  open_.memory.erase(found);
  close_fid(mr);
}

FabricMemory LibfabricFabric::registered(fid_mr* mr, int rc, void* data, size_t size) {
  if (rc != 0) {
    std::string text =
        "registering " + std::to_string(size) + " bytes with " + provider_ + " failed: " + error_text(rc);
    if (rc == -FI_ENOMEM || rc == -FI_EPERM || rc == -FI_EAGAIN) {
      text +=
          "; locked memory is limited (RLIMIT_MEMLOCK): raise it with 'ulimit -l unlimited' or "
          "/etc/security/limits.conf";
    }
    throw Error(ErrorKind::kFabric, text);
  }
  bool virtual_addresses = (info_->domain_attr->mr_mode & (FI_MR_VIRT_ADDR | FI_MR_BASIC)) != 0;
  open_.memory.push_back(mr);
  return {static_cast<std::byte*>(data),
          size,
          virtual_addresses ? reinterpret_cast<uint64_t>(data) : 0,
          fi_mr_key(mr),
          fi_mr_desc(mr),
          mr};
}

// Whoever knows a region's key can write there, so keys are not to be guessed. Providers that choose them
// don't look at it.
uint64_t LibfabricFabric::draw_key() const {
  uint64_t key = 0;
  if (getrandom(&key, sizeof(key), 0) != sizeof(key)) {
    throw Error(ErrorKind::kFabric, "the kernel gave no random bytes for a memory key");
  }
  const size_t bytes = info_->domain_attr->mr_key_size;
  return key >> (bytes >= 1 && bytes < 8 ? 64 - 8 * bytes : 1);  // the largest key stands for none
}

uint32_t LibfabricFabric::connect(const PeerAddress& peer) {
  if (peer.fabric != "libfabric" || peer.provider != provider_) {
    throw Error(ErrorKind::kInvalidArgument, "the peer " + peer.label() + " uses " + peer.fabric + ":" +
                                                 peer.provider + ", this engine libfabric:" + provider_);
  }
  if (peer.host != address_.host && is_loopback(peer.endpoints[0])) {
    throw Error(ErrorKind::kInvalidArgument,
                "the peer " + peer.label() +
                    " listens on its loopback address only, which is not reachable "
                    "from " +
                    address_.host + ": set EngineConfig.bind_address there");
  }
  Peer entry;
  entry.pid = peer.pid;
  entry.same_pids =
      peer.pid_namespace != 0 && peer.pid_namespace == address_.pid_namespace && peer.host == address_.host;
  bool same_process = entry.same_pids && peer.pid == address_.pid && peer.engine != address_.engine;
  if (same_process && provider_ == "shm" && lib_.major() >= 2) {
    throw Error(ErrorKind::kFabric,
                "the shm provider of libfabric 2 crashes between engines of one process; use fabric='local' "
                "there, or libfabric 1");
  }
  entry.engine = peer.engine;
  if (provider_ == "shm") entry.segment = shm_segment(peer.endpoints[0]);
  for (const auto& name : peer.endpoints) {
    fi_addr_t address = FI_ADDR_UNSPEC;
    // Providers read as many bytes as their own names have; a shorter one would be read past its end.
    auto padded = name;
    padded.resize(std::max(padded.size(), address_.endpoints[0].size() + 1));
    if (fi_av_insert(open_.av, padded.data(), 1, &address, 0, nullptr) != 1) {
      throw Error(ErrorKind::kPeer,
                  "the provider " + provider_ + " does not accept the address of " + peer.label());
    }
    entry.addresses.push_back(address);
  }
  peers_.push_back(std::move(entry));
  return static_cast<uint32_t>(peers_.size() - 1);
}

bool LibfabricFabric::is_loopback(const std::vector<std::byte>& name) const {
  sockaddr_in address{};
  if (info_->addr_format != FI_SOCKADDR_IN || name.size() < sizeof address) return false;
  std::memcpy(&address, name.data(), sizeof address);
  return ntohl(address.sin_addr.s_addr) >> 24 == 127;
}

void LibfabricFabric::disconnect(uint32_t peer) {
  for (fi_addr_t& address : peers_[peer].addresses) {
    if (const int rc = fi_av_remove(open_.av, &address, 1, 0); rc != 0) {
      log(LogLevel::kWarn, "libfabric ", provider_, ": removing an address: ", error_text(rc));
    }
  }
  peers_[peer] = {};
}

// shm never reports that a peer is gone, its queue just stays full; tcp tries to connect again and again.
bool LibfabricFabric::alive(uint32_t peer) {
  const Peer& known = peers_[peer];
  if (known.same_pids && kill(static_cast<pid_t>(known.pid), 0) != 0 && errno == ESRCH) return false;
  if (!known.segment.empty() && access(known.segment.c_str(), F_OK) != 0) return false;
  return provider_ != "shm" || !ShmGraveyard::get().holds(known.engine);
}

void LibfabricFabric::close() {
  if (in_graveyard_) {
    in_graveyard_ = false;
    ShmGraveyard::get().bury(address_.engine, std::move(open_));
  } else {
    LibfabricResources closing(std::move(open_));
  }
}

std::string LibfabricFabric::error_text(ssize_t rc) const {
  int code = static_cast<int>(rc < 0 ? -rc : rc);
  return std::string(lib_.strerror(code)) + " (" + std::to_string(code) + ")";
}

std::unique_ptr<Fabric> make_libfabric(const EngineConfig& config) {
  return std::make_unique<LibfabricFabric>(config);
}

}  // namespace pplx
