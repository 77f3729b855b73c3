#include "proxy/fabric/libfabric.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_eq.h>
#include <rdma/fi_rma.h>
#include <signal.h>
#include <sys/random.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <set>
#include <utility>
#include <vector>

#include "proxy/fabric/libfabric_loader.h"
#include "proxy/fabric/libfabric_queues.h"
#include "proxy/fabric/libfabric_traits.h"
#include "proxy/log.h"

namespace pplx {
namespace {

// Newer than the headers that this is built with.
constexpr uint64_t kMrDmabuf = 1ULL << 40;       // FI_MR_DMABUF, 1.20
constexpr int kOptCudaApiPermitted = 10;         // FI_OPT_CUDA_API_PERMITTED, 1.18
constexpr int kOptMaxMsgSize = 12;               // FI_OPT_MAX_MSG_SIZE, 2.0
constexpr int kOptEfaRnrRetry = -(0xefa << 16);  // FI_OPT_EFA_RNR_RETRY
constexpr size_t kRnrForEver = 7;                // of its values
struct MrDmabuf {                                // fi_mr_dmabuf, 1.20
  int fd;
  uint64_t offset;
  size_t len;
  void* base_addr;
};

constexpr size_t kMessageBytes = 16384;
constexpr size_t kReceives = 64;  // posted receive buffers, replenished as they are consumed
constexpr size_t kPollBatch = 32;
constexpr size_t kLongestQueue = 65536, kShortestQueue = 1024;  // completions, where they come unsolicited
constexpr uint64_t kAccess = FI_SEND | FI_RECV | FI_READ | FI_WRITE | FI_REMOTE_READ | FI_REMOTE_WRITE;

struct InfoDeleter {
  const Libfabric* lib;
  void operator()(fi_info* info) const { lib->freeinfo(info); }
};
using Info = std::unique_ptr<fi_info, InfoDeleter>;

template <typename Fid>
void close_fid(Fid*& fid) {
  if (fid == nullptr) return;
  if (int rc = fi_close(&fid->fid); rc != 0) log(LogLevel::kWarn, "libfabric: fi_close returned ", rc);
  fid = nullptr;
}

// What a domain consists of, closed in the order that libfabric wants.
struct Resources {
  Resources() = default;
  Resources(Resources&& other) noexcept { *this = std::move(other); }
  Resources& operator=(Resources&& other) noexcept {
    fabric = std::exchange(other.fabric, nullptr);
    domain = std::exchange(other.domain, nullptr);
    cq = std::exchange(other.cq, nullptr);
    av = std::exchange(other.av, nullptr);
    endpoints = std::exchange(other.endpoints, {});
    memory = std::exchange(other.memory, {});
    return *this;
  }
  ~Resources() {
    for (auto*& endpoint : endpoints) close_fid(endpoint);
    for (auto*& mr : memory) close_fid(mr);
    close_fid(cq);
    close_fid(av);
    close_fid(domain);
    close_fid(fabric);
  }

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
  static ShmGraveyard& get() {
    static auto* graveyard = new ShmGraveyard;  // leaked: engines may close during exit
    return *graveyard;
  }
  void opened() {
    std::lock_guard lock(mutex_);
    ++open_;
  }
  void bury(const EngineId& engine, Resources resources) {
    for (auto*& mr : resources.memory) close_fid(mr);
    resources.memory.clear();
    std::vector<Resources> last;
    std::lock_guard lock(mutex_);
    buried_.push_back(std::move(resources));
    engines_.insert(engine);
    if (--open_ > 0) return;
    last.swap(buried_);
    engines_.clear();
  }
  bool holds(const EngineId& engine) {
    std::lock_guard lock(mutex_);
    return engines_.contains(engine);
  }

 private:
  std::mutex mutex_;
  size_t open_ = 0;
  std::vector<Resources> buried_;
  std::set<EngineId> engines_;
};

// Errors that say "the peer or the path to it is gone", as opposed to a refused operation.
bool is_peer_error(int code) {
  switch (code) {
    case ECONNRESET:
    case ECONNREFUSED:
    case ECONNABORTED:
    case ENOTCONN:
    case EPIPE:
    case ESHUTDOWN:
    case EHOSTUNREACH:
    case ENETUNREACH:
    case ETIMEDOUT:
    case ECANCELED:
    case EIO:
    case ENOENT:  // shm: the peer's segment is gone
      return true;
    default:
      return false;
  }
}

class LibfabricFabric final : public Fabric {
 public:
  explicit LibfabricFabric(const EngineConfig& config)
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
  ~LibfabricFabric() override { close(); }

  const FabricCaps& caps() const override { return caps_; }
  const PeerAddress& address() const override { return address_; }
  std::string name() const override {
    std::string text =
        "libfabric:" + provider_ + " " + std::to_string(lib_.major()) + "." + std::to_string(lib_.minor());
    if (provider_ == "net") text += " (native tcp, which 1.18 renamed \"tcp\")";
    if (caps_.rails > 1) text += " x" + std::to_string(caps_.rails);
    return text;
  }

  FabricMemory register_memory(void* data, size_t size) override {
    fid_mr* mr = nullptr;
    int rc = fi_mr_reg(open_.domain, data, size, kAccess, 0, draw_key(), 0, &mr, nullptr);
    return registered(mr, rc, data, size);
  }

  FabricMemory register_device_memory(const DeviceMemory& memory) override {
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

  void unregister_memory(const FabricMemory& memory) override {
    auto* mr = static_cast<fid_mr*>(memory.handle);
    auto found = std::find(open_.memory.begin(), open_.memory.end(), mr);
    if (found == open_.memory.end()) return;
    open_.memory.erase(found);
    close_fid(mr);
  }

  uint32_t connect(const PeerAddress& peer) override {
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
      throw Error(
          ErrorKind::kFabric,
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

  void disconnect(uint32_t peer) override {
    for (fi_addr_t& address : peers_[peer].addresses) {
      if (const int rc = fi_av_remove(open_.av, &address, 1, 0); rc != 0) {
        log(LogLevel::kWarn, "libfabric ", provider_, ": removing an address: ", error_text(rc));
      }
    }
    peers_[peer] = {};
  }

  // Always fi_writemsg: 1.17's tcp takes FI_DELIVERY_COMPLETE from the flags of the call only, not from the
  // endpoint's.
  Post try_write(FabricOp& op) override {
    const auto& addresses = peers_[op.peer].addresses;
    // The source of an empty write is valid all the same: ofi_rxd reads the first without looking at their
    // number.
    bool empty = op.length == 0;
    iovec source{empty ? receive_bytes_.data() : const_cast<std::byte*>(op.source), op.length};
    void* local = empty ? receive_memory_.local : op.local;
    fi_rma_iov target{op.target, op.length, op.key};
    fi_msg_rma message;
    message.msg_iov = &source;
    message.desc = &local;
    message.iov_count = 1;
    message.addr = addresses.size() == 1 ? addresses[0] : addresses[op.rail % addresses.size()];
    message.rma_iov = &target;
    message.rma_iov_count = 1;
    message.context = &op;
    message.data = op.has_imm ? op.imm : kNoImmediate;
    uint64_t flags = FI_COMPLETION;
    if (op.has_imm || traits_.always_immediate) flags |= FI_REMOTE_CQ_DATA;
    // Of no bytes none can be late, and shm (1.17) never completes an empty write that asks for delivery.
    if (!empty) flags |= completion_;
    return posted(fi_writemsg(open_.endpoints[op.rail], &message, flags), "write");
  }

  Post try_read(FabricOp& op) override {
    const auto& addresses = peers_[op.peer].addresses;
    auto* into = const_cast<std::byte*>(op.source);
    return posted(fi_read(open_.endpoints[op.rail], into, op.length, op.local,
                          addresses[op.rail % addresses.size()], op.target, op.key, &op),
                  "read");
  }

  Post try_send(FabricOp& op) override {
    fi_addr_t to = peers_[op.peer].addresses[0];
    return posted(fi_send(open_.endpoints[0], op.source, op.length, op.local, to, &op), "send");
  }

  size_t poll(FabricEvents& events) override {
    if (!unposted_.empty()) [[unlikely]]
      report(unposted_.retry([this](FabricOp& op) { return try_receive(op); }));
    fi_cq_data_entry entries[kPollBatch];
    ssize_t count = fi_cq_read(open_.cq, entries, kPollBatch);
    if (count == -FI_EAGAIN) return 0;
    if (count == -FI_EAVAIL) return report_error(events);
    if (count < 0) {
      events.on_down(Error(ErrorKind::kFabric, "polling " + provider_ + ": " + error_text(count)));
      return 0;
    }
    for (ssize_t i = 0; i < count; ++i) {
      const auto& entry = entries[i];
      // FI_REMOTE_WRITE first: "sockets" sets FI_REMOTE_CQ_DATA on the initiator's completions as well.
      if ((entry.flags & FI_REMOTE_WRITE) != 0) {
        auto imm = static_cast<uint32_t>(entry.data);
        if (imm != kNoImmediate) events.on_immediate(imm);
      } else if (auto* op = static_cast<FabricOp*>(entry.op_context); op == nullptr) {
        continue;
      } else if (op->kind == FabricOp::Kind::kReceive) {
        events.on_message({op->source, std::min(entry.len, kMessageBytes)});
        post_receive(*op);
      } else {
        events.on_complete(*op, nullptr);
      }
    }
    return static_cast<size_t>(count);
  }

  // shm never reports that a peer is gone, its queue just stays full; tcp tries to connect again and again.
  bool alive(uint32_t peer) override {
    const Peer& known = peers_[peer];
    if (known.same_pids && kill(static_cast<pid_t>(known.pid), 0) != 0 && errno == ESRCH) return false;
    if (!known.segment.empty() && access(known.segment.c_str(), F_OK) != 0) return false;
    return provider_ != "shm" || !ShmGraveyard::get().holds(known.engine);
  }

  void close() override {
    if (in_graveyard_) {
      in_graveyard_ = false;
      ShmGraveyard::get().bury(address_.engine, std::move(open_));
    } else {
      Resources closing(std::move(open_));
    }
  }

 private:
  struct Peer {
    std::vector<fi_addr_t> addresses;
    uint32_t pid = 0;
    bool same_pids = false;  // our kernel can tell whether `pid` lives
    std::string segment;     // shm: the file that goes with the peer's endpoint; empty: not known
    EngineId engine{};
  };

  bool is_loopback(const std::vector<std::byte>& name) const {
    sockaddr_in address{};
    if (info_->addr_format != FI_SOCKADDR_IN || name.size() < sizeof address) return false;
    std::memcpy(&address, name.data(), sizeof address);
    return ntohl(address.sin_addr.s_addr) >> 24 == 127;
  }

  static std::string shm_segment(const std::vector<std::byte>& name) {
    std::string text(reinterpret_cast<const char*>(name.data()), name.size());
    text.resize(std::strlen(text.c_str()));
    if (auto prefix = text.find("://"); prefix != std::string::npos) text.erase(0, prefix + 3);
    std::string path = "/dev/shm/" + text;
    return access(path.c_str(), F_OK) == 0 ? path : "";
  }

  std::string error_text(ssize_t rc) const {
    int code = static_cast<int>(rc < 0 ? -rc : rc);
    return std::string(lib_.strerror(code)) + " (" + std::to_string(code) + ")";
  }

  void check(int rc, const char* what) const {
    if (rc == 0) return;
    throw Error(ErrorKind::kFabric,
                std::string("libfabric provider ") + provider_ + ": " + what + ": " + error_text(rc));
  }

  Post posted(ssize_t rc, const char* what) const {
    if (rc == 0) [[likely]]
      return Post::kPosted;
    if (rc == -FI_EAGAIN) return Post::kFull;
    throw Error(
        is_peer_error(static_cast<int>(-rc)) ? ErrorKind::kPeer : ErrorKind::kFabric,
        std::string("libfabric provider ") + provider_ + " refused a " + what + ": " + error_text(rc));
  }

  // Whoever knows a region's key can write there, so keys are not to be guessed. Providers that choose them
  // don't look at it.
  uint64_t draw_key() const {
    uint64_t key = 0;
    if (getrandom(&key, sizeof(key), 0) != sizeof(key)) {
      throw Error(ErrorKind::kFabric, "the kernel gave no random bytes for a memory key");
    }
    const size_t bytes = info_->domain_attr->mr_key_size;
    return key >> (bytes >= 1 && bytes < 8 ? 64 - 8 * bytes : 1);  // the largest key stands for none
  }

  FabricMemory registered(fid_mr* mr, int rc, void* data, size_t size) {
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

  Info make_hints(const ProviderTraits& traits, uint64_t completion, bool hmem) const {
    Info hints(lib_.dupinfo(nullptr), InfoDeleter{&lib_});
    if (!hints) throw Error(ErrorKind::kFabric, "libfabric: out of memory");
    hints->caps = FI_MSG | FI_RMA;
    hints->mode = FI_CONTEXT | FI_CONTEXT2;
    hints->ep_attr->type = FI_EP_RDM;
    hints->domain_attr->mr_mode = FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY | FI_MR_LOCAL;
    if (hmem) {
      hints->caps |= FI_HMEM;
      hints->domain_attr->mr_mode |= FI_MR_HMEM;
    }
    hints->domain_attr->threading = FI_THREAD_DOMAIN;
    hints->domain_attr->control_progress = FI_PROGRESS_MANUAL;
    hints->domain_attr->data_progress = FI_PROGRESS_MANUAL;
    hints->domain_attr->resource_mgmt = FI_RM_ENABLED;
    hints->domain_attr->cq_data_size = 4;
    hints->tx_attr->op_flags = completion;
    hints->tx_attr->msg_order = FI_ORDER_NONE;
    hints->rx_attr->msg_order = FI_ORDER_NONE;
    hints->fabric_attr->prov_name = strdup(traits.provider.c_str());  // freeinfo frees these
    if (!traits.fabric.empty()) hints->fabric_attr->name = strdup(traits.fabric.c_str());
    return hints;
  }

  // What the configuration asks for, in the first way that is offered.
  Info find_provider(const EngineConfig& config) {
    int rc = 0;
    std::string node, tried;
    for (const ProviderTraits& traits : provider_traits(config.fabric, lib_.version())) {
      if (traits.sockets) node = config.bind_address.empty() ? "127.0.0.1" : config.bind_address;
      tried +=
          (tried.empty() ? "'" : " or '") + (traits.label.empty() ? traits.provider : traits.label) + "'";
      for (bool hmem : {true, false}) {
        if (hmem && !traits.hmem) continue;
        for (uint64_t completion : {uint64_t{FI_DELIVERY_COMPLETE}, uint64_t{0}}) {
          if (completion != 0 && !traits.ask_delivery) continue;
          Info hints = make_hints(traits, completion, hmem);
          fi_info* found = nullptr;
          rc = lib_.getinfo(traits.api, node.empty() ? nullptr : node.c_str(), nullptr,
                            node.empty() ? 0 : FI_SOURCE, hints.get(), &found);
          if (rc != 0 || found == nullptr) continue;
          traits_ = traits;
          hmem_ = hmem;
          return choose_nic(Info(found, InfoDeleter{&lib_}), config.nic, node);
        }
      }
    }
    throw Error(ErrorKind::kFabric, "libfabric " + std::to_string(lib_.major()) + "." +
                                        std::to_string(lib_.minor()) + " (" + lib_.path +
                                        ") offers no provider " + tried +
                                        " with reliable datagrams, RMA and 4-byte immediates" +
                                        (node.empty() ? "" : " on address " + node) + ": " + error_text(rc));
  }

  Info choose_nic(Info all, const std::string& nic, const std::string& node) const {
    if (nic.empty() || traits_.provider == "shm") return all;
    std::string names;
    for (const fi_info* info = all.get(); info != nullptr; info = info->next) {
      // An RDMA device's domains are called after it: "rdmap0s6-rdm" and "rdmap0s6-dgrm" are EFA's.
      const std::string name = info->domain_attr->name;
      if (name == nic || name.starts_with(nic + "-")) return Info(lib_.dupinfo(info), InfoDeleter{&lib_});
      if (!names.empty()) names += ", ";
      names += info->domain_attr->name;
    }
    throw Error(ErrorKind::kFabric, "the libfabric provider " + traits_.provider + " has no NIC '" + nic +
                                        "' (PPLX_NICS)" + (node.empty() ? "" : " with address " + node) +
                                        "; it has " + names);
  }

  void forbid_cuda(fid_ep* endpoint) const {
    bool permitted = false;
    int rc = fi_setopt(&endpoint->fid, FI_OPT_ENDPOINT, kOptCudaApiPermitted, &permitted, sizeof permitted);
    if (rc == 0) return;
    // It would call CUDA then where it has to copy, and a kernel that waits for this NIC would wait for ever.
    throw Error(ErrorKind::kFabric, "libfabric provider " + provider_ +
                                        " cannot do without CUDA calls (FI_OPT_CUDA_API_PERMITTED): " +
                                        error_text(rc) + "; GPUDirect RDMA is needed");
  }

  // Versions up to 1.x give up after three times that a target had no receive ready, which a target that is
  // stopped for a while looks like. Who does not know the option has no such limit.
  static void retry_for_ever(fid_ep* endpoint) {
    size_t retries = kRnrForEver;
    const int rc = fi_setopt(&endpoint->fid, FI_OPT_ENDPOINT, kOptEfaRnrRetry, &retries, sizeof retries);
    if (rc != 0) log(LogLevel::kDebug, "libfabric: FI_OPT_EFA_RNR_RETRY was refused: ", rc);
  }

  // `outstanding`: of our own operations and receives.
  void open_completion_queue(size_t outstanding) {
    fi_cq_attr cq{};
    cq.format = FI_CQ_FORMAT_DATA;
    cq.wait_obj = FI_WAIT_NONE;
    const size_t wanted = traits_.unsolicited ? std::max(outstanding, kLongestQueue) : outstanding;
    const size_t least = traits_.unsolicited ? std::min(outstanding, kShortestQueue) : outstanding;
    const int rc = open_longest(wanted, least, [&](size_t size) {
      cq.size = size;
      return fi_cq_open(open_.domain, &cq, &open_.cq, nullptr);
    });
    check(rc, "opening the completion queue");
    if (cq.size >= outstanding) return;
    log(LogLevel::kWarn, "libfabric ", provider_, ": a completion queue of ", cq.size, " for ", outstanding,
        " operations is the longest that it opens: use fewer endpoints");
  }

  void open_endpoints(int count) {
    check(lib_.fabric(info_->fabric_attr, &open_.fabric, nullptr), "opening the fabric");
    check(fi_domain(open_.fabric, info_.get(), &open_.domain, nullptr), "opening the domain");
    open_completion_queue(static_cast<size_t>(count) * (info_->tx_attr->size + info_->rx_attr->size));
    fi_av_attr av{};
    av.type = info_->domain_attr->av_type;
    check(fi_av_open(open_.domain, &av, &open_.av, nullptr), "opening the address vector");
    address_ = make_address("libfabric", provider_);
    if (provider_ == "shm") {
      ShmGraveyard::get().opened();
      in_graveyard_ = true;
    }
    for (int i = 0; i < count; ++i) {
      fid_ep* endpoint = nullptr;
      check(fi_endpoint(open_.domain, info_.get(), &endpoint, nullptr), "opening an endpoint");
      open_.endpoints.push_back(endpoint);
      if (hmem_) forbid_cuda(endpoint);
      if (traits_.rnr_retries) retry_for_ever(endpoint);
      check(fi_ep_bind(endpoint, &open_.cq->fid, FI_TRANSMIT | FI_RECV), "binding the completion queue");
      check(fi_ep_bind(endpoint, &open_.av->fid, 0), "binding the address vector");
      check(fi_enable(endpoint), "enabling an endpoint");
      address_.endpoints.push_back(endpoint_name(endpoint));
    }
    caps_.max_write = info_->ep_attr->max_msg_size;
    caps_.max_message = std::min(kMessageBytes, info_->ep_attr->max_msg_size);
    if (traits_.own_message_size) {
      size_t longest = 0, size = sizeof longest;
      check(fi_getopt(&open_.endpoints[0]->fid, FI_OPT_ENDPOINT, kOptMaxMsgSize, &longest, &size),
            "asking for the longest message");
      caps_.max_message = std::min(caps_.max_message, longest);
    }
    caps_.queue_depth = static_cast<size_t>(count) * info_->tx_attr->size;
    caps_.rails = static_cast<uint32_t>(count);
    completion_ = traits_.ask_delivery ? info_->tx_attr->op_flags & FI_DELIVERY_COMPLETE : 0;
    caps_.delivery_complete = completion_ != 0 || traits_.delivered;
    caps_.mutual = traits_.mutual;
    caps_.device_memory = hmem_;
  }

  std::vector<std::byte> endpoint_name(fid_ep* endpoint) const {
    std::vector<std::byte> name(512);
    size_t size = name.size();
    check(fi_getname(&endpoint->fid, name.data(), &size), "reading an endpoint's name");
    name.resize(size);
    return name;
  }

  void post_receives() {
    receive_bytes_.resize(kReceives * kMessageBytes);
    receive_memory_ = register_memory(receive_bytes_.data(), receive_bytes_.size());
    receives_.resize(kReceives);
    for (size_t i = 0; i < kReceives; ++i) {
      receives_[i].kind = FabricOp::Kind::kReceive;
      receives_[i].source = receive_bytes_.data() + i * kMessageBytes;
      receives_[i].local = receive_memory_.local;
      post_receive(receives_[i]);
    }
  }

  ssize_t try_receive(FabricOp& op) {
    auto* buffer = const_cast<std::byte*>(op.source);
    return fi_recv(open_.endpoints[0], buffer, kMessageBytes, op.local, FI_ADDR_UNSPEC, &op);
  }

  void post_receive(FabricOp& op) {
    report(unposted_.post(op, [this](FabricOp& one) { return try_receive(one); }));
  }

  void report(ssize_t rc) const {
    if (rc != 0) log(LogLevel::kError, "libfabric ", provider_, ": posting a receive: ", error_text(rc));
  }

  size_t report_error(FabricEvents& events) {
    union {
      fi_cq_err_entry entry;
      char room[256];  // newer APIs have longer entries
    };
    std::memset(room, 0, sizeof room);
    ssize_t rc = fi_cq_readerr(open_.cq, &entry, 0);
    if (rc == -FI_EAGAIN) return 0;
    if (rc < 0) {
      events.on_error(Error(ErrorKind::kFabric, "reading an error of " + provider_ + ": " + error_text(rc)));
      return 0;
    }
    char buffer[256] = {};
    const char* detail = fi_cq_strerror(open_.cq, entry.prov_errno, entry.err_data, buffer, sizeof buffer);
    std::string text = provider_ + ": " + error_text(entry.err);
    if (entry.prov_errno != 0 && entry.prov_errno != entry.err && detail != nullptr) {
      text += std::string(", ") + detail + " (" + std::to_string(entry.prov_errno) + ")";
    }
    Error error(is_peer_error(entry.err) ? ErrorKind::kPeer : ErrorKind::kFabric, text);
    auto* op = static_cast<FabricOp*>(entry.op_context);
    if (op == nullptr || (entry.flags & FI_REMOTE_WRITE) != 0) {
      events.on_error(error);
    } else if (op->kind == FabricOp::Kind::kReceive) {
      events.on_error(error);
      if (entry.err != FI_ECANCELED) post_receive(*op);
    } else {
      events.on_complete(*op, &error);
    }
    return 1;
  }

  const Libfabric& lib_;
  ProviderTraits traits_;
  bool hmem_ = false;  // registers GPU memory
  Info info_;          // after these two, which finding it sets
  std::string provider_;
  FabricCaps caps_;
  PeerAddress address_;
  uint64_t completion_ = 0;  // FI_DELIVERY_COMPLETE where offered
  Resources open_;
  bool in_graveyard_ = false;  // ours is one of the process's shm endpoints
  std::vector<Peer> peers_;
  std::vector<std::byte> receive_bytes_;
  FabricMemory receive_memory_;
  std::vector<FabricOp> receives_;
  UnpostedReceives unposted_;
};

}  // namespace

std::unique_ptr<Fabric> make_libfabric(const EngineConfig& config) {
  return std::make_unique<LibfabricFabric>(config);
}

}  // namespace pplx
