#include "proxy/fabric/libfabric.h"

#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_eq.h>
#include <rdma/fi_rma.h>
#include <signal.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <vector>

#include "proxy/fabric/libfabric_loader.h"
#include "proxy/log.h"

namespace pplx {
namespace {

constexpr uint32_t kApiVersion = FI_VERSION(1, 17);
constexpr size_t kMessageBytes = 16384;
constexpr size_t kReceives = 64;  // posted receive buffers, replenished as they are consumed
constexpr size_t kPollBatch = 32;
constexpr uint64_t kAccess = FI_SEND | FI_RECV | FI_WRITE | FI_REMOTE_WRITE;

struct InfoDeleter {
  const Libfabric* lib;
  void operator()(fi_info* info) const { lib->freeinfo(info); }
};
using Info = std::unique_ptr<fi_info, InfoDeleter>;

template <typename Fid>
void close_fid(Fid*& fid) {
  if (fid == nullptr) return;
  if (int rc = fi_close(&fid->fid); rc != 0) log().warn("libfabric: fi_close returned {}", rc);
  fid = nullptr;
}

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
      : lib_(load_libfabric()), info_(find_provider(config)), provider_(info_->fabric_attr->prov_name) {
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
    int rc = fi_mr_reg(domain_, data, size, kAccess, 0, next_key_++, 0, &mr, nullptr);
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
    memory_.push_back(mr);
    return {static_cast<std::byte*>(data),
            size,
            virtual_addresses ? reinterpret_cast<uint64_t>(data) : 0,
            fi_mr_key(mr),
            fi_mr_desc(mr),
            mr};
  }

  void unregister_memory(const FabricMemory& memory) override {
    auto* mr = static_cast<fid_mr*>(memory.handle);
    auto found = std::find(memory_.begin(), memory_.end(), mr);
    if (found == memory_.end()) return;
    memory_.erase(found);
    close_fid(mr);
  }

  uint32_t connect(const PeerAddress& peer) override {
    if (peer.fabric != "libfabric" || peer.provider != provider_) {
      throw Error(ErrorKind::kInvalidArgument, "the peer " + peer.label() + " uses " + peer.fabric + ":" +
                                                   peer.provider + ", this engine libfabric:" + provider_);
    }
    Peer entry;
    entry.pid = peer.pid;
    entry.same_pids =
        peer.pid_namespace != 0 && peer.pid_namespace == address_.pid_namespace && peer.host == address_.host;
    for (const auto& name : peer.endpoints) {
      fi_addr_t address = FI_ADDR_UNSPEC;
      // Providers read as many bytes as their own names have; a shorter one would be read past its end.
      auto padded = name;
      padded.resize(std::max(padded.size(), address_.endpoints[0].size() + 1));
      if (fi_av_insert(av_, padded.data(), 1, &address, 0, nullptr) != 1) {
        throw Error(ErrorKind::kPeer,
                    "the provider " + provider_ + " does not accept the address of " + peer.label());
      }
      entry.addresses.push_back(address);
    }
    peers_.push_back(std::move(entry));
    return static_cast<uint32_t>(peers_.size() - 1);
  }

  Post try_write(FabricOp& op) override {
    const auto& addresses = peers_[op.peer].addresses;
    fi_addr_t to = addresses[op.rail % addresses.size()];
    auto* source = const_cast<std::byte*>(op.source);
    ssize_t rc;
    if (op.length == 0 && op.has_imm) {
      rc = write_nothing(op, to);
    } else if (op.has_imm || imm_always_) {
      uint64_t data = op.has_imm ? op.imm : kNoImmediate;
      rc = fi_writedata(endpoints_[op.rail], source, op.length, op.local, data, to, op.target, op.key, &op);
    } else {
      rc = fi_write(endpoints_[op.rail], source, op.length, op.local, to, op.target, op.key, &op);
    }
    return posted(rc, "write");
  }

  Post try_send(FabricOp& op) override {
    fi_addr_t to = peers_[op.peer].addresses[0];
    return posted(fi_send(endpoints_[0], op.source, op.length, op.local, to, &op), "send");
  }

  size_t poll(FabricEvents& events) override {
    fi_cq_data_entry entries[kPollBatch];
    ssize_t count = fi_cq_read(cq_, entries, kPollBatch);
    if (count == -FI_EAGAIN) return 0;
    if (count == -FI_EAVAIL) return report_error(events);
    if (count < 0) {
      events.on_error(Error(ErrorKind::kFabric, "polling " + provider_ + ": " + error_text(count)));
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

  // shm never reports a dead peer: its queue just stays full.
  bool alive(uint32_t peer) override {
    if (provider_ != "shm" || !peers_[peer].same_pids) return true;
    return kill(static_cast<pid_t>(peers_[peer].pid), 0) == 0 || errno != ESRCH;
  }

  void close() override {
    for (auto*& endpoint : endpoints_) close_fid(endpoint);
    endpoints_.clear();
    for (auto*& mr : memory_) close_fid(mr);
    memory_.clear();
    close_fid(cq_);
    close_fid(av_);
    close_fid(domain_);
    close_fid(fabric_);
  }

 private:
  struct Peer {
    std::vector<fi_addr_t> addresses;
    uint32_t pid = 0;
    bool same_pids = false;  // our kernel can tell whether `pid` lives
  };

  std::string error_text(ssize_t rc) const {
    int code = static_cast<int>(rc < 0 ? -rc : rc);
    return std::string(lib_.strerror(code)) + " (" + std::to_string(code) + ")";
  }

  // Of no bytes none can be late, and shm (1.17) never completes an empty write with FI_DELIVERY_COMPLETE.
  // The empty source is a valid one: ofi_rxd reads the first without looking at their number.
  ssize_t write_nothing(FabricOp& op, fi_addr_t to) {
    iovec source{receive_bytes_.data(), 0};
    void* local = receive_memory_.local;
    fi_rma_iov target{op.target, 0, op.key};
    fi_msg_rma message{};
    message.msg_iov = &source;
    message.desc = &local;
    message.iov_count = 1;
    message.addr = to;
    message.rma_iov = &target;
    message.rma_iov_count = 1;
    message.context = &op;
    message.data = op.imm;
    return fi_writemsg(endpoints_[op.rail], &message, FI_REMOTE_CQ_DATA | FI_COMPLETION);
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

  std::string provider_name(const std::string& fabric) const {
    // 1.17 calls the native provider "net" and means tcp;ofi_rxm by "tcp".
    if (fabric == "tcp" && lib_.version() < FI_VERSION(1, 18)) return "net";
    return fabric;
  }

  Info find_provider(const EngineConfig& config) const {
    std::string provider = provider_name(config.fabric);
    bool sockets = provider.find("tcp") != std::string::npos || provider.find("udp") != std::string::npos ||
                   provider == "net" || provider == "sockets";
    const char* node = !sockets                      ? nullptr
                       : config.bind_address.empty() ? "127.0.0.1"
                                                     : config.bind_address.c_str();
    int rc = 0;
    for (uint64_t completion : {uint64_t{FI_DELIVERY_COMPLETE}, uint64_t{0}}) {
      Info hints(lib_.dupinfo(nullptr), InfoDeleter{&lib_});
      if (!hints) throw Error(ErrorKind::kFabric, "libfabric: out of memory");
      hints->caps = FI_MSG | FI_RMA;
      hints->mode = FI_CONTEXT | FI_CONTEXT2;
      hints->ep_attr->type = FI_EP_RDM;
      hints->domain_attr->mr_mode = FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY | FI_MR_LOCAL;
      hints->domain_attr->threading = FI_THREAD_DOMAIN;
      hints->domain_attr->control_progress = FI_PROGRESS_MANUAL;
      hints->domain_attr->data_progress = FI_PROGRESS_MANUAL;
      hints->domain_attr->resource_mgmt = FI_RM_ENABLED;
      hints->domain_attr->cq_data_size = 4;
      hints->tx_attr->op_flags = completion;
      hints->tx_attr->msg_order = FI_ORDER_NONE;
      hints->rx_attr->msg_order = FI_ORDER_NONE;
      hints->fabric_attr->prov_name = strdup(provider.c_str());  // freeinfo frees it
      fi_info* found = nullptr;
      rc = lib_.getinfo(kApiVersion, node, nullptr, node != nullptr ? FI_SOURCE : 0, hints.get(), &found);
      if (rc == 0 && found != nullptr) return Info(found, InfoDeleter{&lib_});
    }
    throw Error(ErrorKind::kFabric,
                "libfabric " + std::to_string(lib_.major()) + "." + std::to_string(lib_.minor()) + " (" +
                    lib_.path + ") offers no provider '" + provider +
                    "' with reliable datagrams, RMA and 4-byte immediates" +
                    (node != nullptr ? std::string(" on address ") + node : "") + ": " + error_text(rc));
  }

  void open_endpoints(int count) {
    check(lib_.fabric(info_->fabric_attr, &fabric_, nullptr), "opening the fabric");
    check(fi_domain(fabric_, info_.get(), &domain_, nullptr), "opening the domain");
    fi_cq_attr cq{};
    cq.format = FI_CQ_FORMAT_DATA;
    cq.wait_obj = FI_WAIT_NONE;
    cq.size = static_cast<size_t>(count) * (info_->tx_attr->size + info_->rx_attr->size);
    check(fi_cq_open(domain_, &cq, &cq_, nullptr), "opening the completion queue");
    fi_av_attr av{};
    av.type = info_->domain_attr->av_type;
    check(fi_av_open(domain_, &av, &av_, nullptr), "opening the address vector");
    address_ = make_address("libfabric", provider_);
    for (int i = 0; i < count; ++i) {
      fid_ep* endpoint = nullptr;
      check(fi_endpoint(domain_, info_.get(), &endpoint, nullptr), "opening an endpoint");
      endpoints_.push_back(endpoint);
      check(fi_ep_bind(endpoint, &cq_->fid, FI_TRANSMIT | FI_RECV), "binding the completion queue");
      check(fi_ep_bind(endpoint, &av_->fid, 0), "binding the address vector");
      check(fi_enable(endpoint), "enabling an endpoint");
      address_.endpoints.push_back(endpoint_name(endpoint));
    }
    caps_.max_write = info_->ep_attr->max_msg_size;
    caps_.max_message = std::min(kMessageBytes, info_->ep_attr->max_msg_size);
    caps_.queue_depth = static_cast<size_t>(count) * info_->tx_attr->size;
    caps_.rails = static_cast<uint32_t>(count);
    caps_.delivery_complete = (info_->tx_attr->op_flags & FI_DELIVERY_COMPLETE) != 0;
    // Without remote data shm copies straight into the peer and checks no key.
    imm_always_ = provider_ == "shm";
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

  void post_receive(FabricOp& op) {
    auto* buffer = const_cast<std::byte*>(op.source);
    ssize_t rc = fi_recv(endpoints_[0], buffer, kMessageBytes, op.local, FI_ADDR_UNSPEC, &op);
    if (rc != 0) log().error("libfabric {}: posting a receive: {}", provider_, error_text(rc));
  }

  size_t report_error(FabricEvents& events) {
    fi_cq_err_entry entry{};
    ssize_t rc = fi_cq_readerr(cq_, &entry, 0);
    if (rc == -FI_EAGAIN) return 0;
    if (rc < 0) {
      events.on_error(Error(ErrorKind::kFabric, "reading an error of " + provider_ + ": " + error_text(rc)));
      return 0;
    }
    char buffer[256] = {};
    const char* detail = fi_cq_strerror(cq_, entry.prov_errno, entry.err_data, buffer, sizeof buffer);
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
  Info info_;
  std::string provider_;
  FabricCaps caps_;
  PeerAddress address_;
  bool imm_always_ = false;
  uint64_t next_key_ = 1;  // read only by providers that let the user choose keys
  fid_fabric* fabric_ = nullptr;
  fid_domain* domain_ = nullptr;
  fid_cq* cq_ = nullptr;
  fid_av* av_ = nullptr;
  std::vector<fid_ep*> endpoints_;
  std::vector<fid_mr*> memory_;
  std::vector<Peer> peers_;
  std::vector<std::byte> receive_bytes_;
  FabricMemory receive_memory_;
  std::vector<FabricOp> receives_;
};

}  // namespace

std::unique_ptr<Fabric> make_libfabric(const EngineConfig& config) {
  return std::make_unique<LibfabricFabric>(config);
}

}  // namespace pplx
