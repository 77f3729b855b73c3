#include "proxy/fabric/verbs_device.h"

#include <fcntl.h>
#include <poll.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>

#include "proxy/fabric/verbs.h"
#include "proxy/log.h"

namespace pplx {
namespace {

constexpr uint32_t kMessageReceives = 128;
constexpr uint32_t kDatagramReceives = 64;
constexpr uint32_t kRouteHeader = 40;  // in front of every datagram that arrives
constexpr uint32_t kDatagramBytes = kRouteHeader + kMaxHandshake;
constexpr uint32_t kDatagramKey = 0x504c58;
constexpr uint32_t kInlineBytes = 64;
constexpr uint64_t kMaxWrite = uint64_t{1} << 30;

template <typename Object, typename Close>
VerbsHandle<Object> own(Object* object, Close close, const char* what) {
  return VerbsHandle<Object>(object, [close, what](Object* closing) {
    if (int rc = close(closing); rc != 0) log(LogLevel::kWarn, "verbs: closing a ", what, " returned ", rc);
  });
}

GidEntry to_entry(const ibv_gid& gid, int index, GidType type) {
  GidEntry entry{index, type, {}};
  std::copy(std::begin(gid.raw), std::end(gid.raw), entry.gid.begin());
  return entry;
}

// One by one, for libraries before rdma-core 34. Entries of interfaces in other network namespaces have no
// type.
std::vector<GidEntry> read_gids_slowly(const Verbs& lib, ibv_context* context, const std::string& device,
                                       uint8_t port, const ibv_port_attr& attributes) {
  std::vector<GidEntry> table;
  for (int index = 0; index < attributes.gid_tbl_len; ++index) {
    ibv_gid gid{};
    if (lib.query_gid(context, port, index, &gid) != 0) continue;
    auto type = std::optional(GidType::kInfiniBand);
    if (attributes.link_layer == IBV_LINK_LAYER_ETHERNET) {
      std::ifstream file("/sys/class/infiniband/" + device + "/ports/" + std::to_string(port) +
                         "/gid_attrs/types/" + std::to_string(index));
      std::string text;
      type = std::getline(file, text) ? parse_gid_type(text) : std::nullopt;
    }
    if (type) table.push_back(to_entry(gid, index, *type));
  }
  return table;
}

std::vector<GidEntry> read_gids(const Verbs& lib, ibv_context* context, const std::string& device,
                                uint8_t port, const ibv_port_attr& attributes) {
  if (lib.query_gid_table == nullptr) return read_gids_slowly(lib, context, device, port, attributes);
  std::vector<ibv_gid_entry> entries(4096);  // of all ports of the device
  const ssize_t count =
      lib.query_gid_table(context, entries.data(), entries.size(), 0, sizeof(ibv_gid_entry));
  if (count < 0) return read_gids_slowly(lib, context, device, port, attributes);
  std::vector<GidEntry> table;
  for (ssize_t i = 0; i < count; ++i) {
    const ibv_gid_entry& entry = entries[static_cast<size_t>(i)];
    if (entry.port_num != port) continue;
    const auto type = entry.gid_type == IBV_GID_TYPE_ROCE_V2   ? GidType::kRoceV2
                      : entry.gid_type == IBV_GID_TYPE_ROCE_V1 ? GidType::kRoceV1
                                                               : GidType::kInfiniBand;
    table.push_back(to_entry(entry.gid, static_cast<int>(entry.gid_index), type));
  }
  std::sort(table.begin(), table.end(), [](const auto& a, const auto& b) { return a.index < b.index; });
  return table;
}

// Macros of the header reach the symbol by name; this is what they do with one from dlsym.
int query_port(const Verbs& lib, ibv_context* context, uint8_t port, ibv_port_attr& attributes) {
  std::memset(&attributes, 0, sizeof attributes);
  verbs_context* extended = verbs_get_ctx_op(context, query_port);
  if (extended != nullptr) return extended->query_port(context, port, &attributes, sizeof attributes);
  return lib.query_port(context, port, reinterpret_cast<_compat_ibv_port_attr*>(&attributes));
}

struct DeviceList {
  explicit DeviceList(const Verbs& library) : lib(library), devices(lib.get_device_list(&count)) {}
  ~DeviceList() {
    if (devices != nullptr) lib.free_device_list(devices);
  }
  DeviceList(const DeviceList&) = delete;
  DeviceList& operator=(const DeviceList&) = delete;

  const Verbs& lib;
  int count = 0;
  ibv_device** devices;
};

}  // namespace

VerbsDevice::VerbsDevice(const EngineConfig& config) : lib_(load_verbs()), config_(config.verbs) {
  open(config);
  make_queues();
  make_datagram_queue();
}

void VerbsDevice::open(const EngineConfig& config) {
  const NicName wanted = parse_nic(config.nic);
  const DeviceList list(lib_);
  if (list.devices == nullptr || list.count == 0) {
    throw Error(ErrorKind::kFabric,
                "fabric 'verbs' finds no RDMA device: load the NIC's kernel driver (mlx5_ib; rdma_rxe for "
                "Soft-RoCE), "
                "install its library (apt-get install ibverbs-providers), and in a container pass "
                "/dev/infiniband on");
  }
  std::string why;
  for (int i = 0; i < list.count; ++i) {
    const std::string device = lib_.get_device_name(list.devices[i]);
    if (!wanted.device.empty() && device != wanted.device) {
      why += "; " + device + ": not asked for";
      continue;
    }
    context_ = own(lib_.open_device(list.devices[i]), lib_.close_device, "device");
    if (!context_) {
      why += "; " + device + ": cannot be opened: " + std::strerror(errno);
      continue;
    }
    ibv_device_attr attributes{};
    if (lib_.query_device(context_.get(), &attributes) != 0) {
      why += "; " + device + ": cannot be queried";
      continue;
    }
    for (uint8_t port = 1; port <= attributes.phys_port_cnt; ++port) {
      if (wanted.port != 0 && port != wanted.port) continue;
      name_ = device + ":" + std::to_string(port);
      if (try_port(context_.get(), port, config, why)) {
        send_budget_ = std::clamp<uint32_t>(config_.outstanding, 16, attributes.max_cqe / 2);
        queue_depth_ = std::clamp<uint32_t>(config_.send_depth, 2, attributes.max_qp_wr);
        max_reads_ = static_cast<uint8_t>(
            std::clamp(std::min(attributes.max_qp_rd_atom, attributes.max_qp_init_rd_atom), 1, 16));
        const auto most = static_cast<uint32_t>(std::min(attributes.max_srq_wr, attributes.max_cqe / 4));
        immediates_ = ReceiveCredit(std::clamp<uint32_t>(config_.receives, 8, most));
        return;
      }
    }
  }
  std::string asked;
  if (!config.nic.empty()) asked = " '" + config.nic + "'";
  throw Error(ErrorKind::kFabric, "fabric 'verbs' finds no usable RDMA port" + asked + why);
}

bool VerbsDevice::try_port(ibv_context* context, uint8_t port, const EngineConfig& config, std::string& why) {
  ibv_port_attr attributes;
  if (query_port(lib_, context, port, attributes) != 0) {
    why += "; " + name_ + ": the port cannot be queried";
    return false;
  }
  if (attributes.state != IBV_PORT_ACTIVE) {
    why += "; " + name_ + ": the port is not active (is the link up?)";
    return false;
  }
  ethernet_ = attributes.link_layer == IBV_LINK_LAYER_ETHERNET;
  const auto device = name_.substr(0, name_.find(':'));
  GidEntry gid;
  try {
    const GidWish wish{config_.gid_index, config.bind_address, ethernet_};
    gid = choose_gid(read_gids(lib_, context, device, port, attributes), wish, name_);
  } catch (const Error& error) {
    if (error.kind() != ErrorKind::kFabric) throw;
    why += std::string("; ") + error.what();
    return false;
  }
  port_ = port;
  gid_index_ = gid.index;
  address_.gid = gid.gid;
  address_.lid = attributes.lid;
  address_.mtu = static_cast<uint8_t>(attributes.active_mtu);
  max_write_ = std::clamp<uint64_t>(attributes.max_msg_sz, 4096, kMaxWrite);
  description_ = name_ + " " + to_text(gid.gid) + " (" + to_text(gid.type) + ")";
  return true;
}

void VerbsDevice::make_queues() {
  auto made = [&](void* object, const char* what) {
    if (object == nullptr) throw Error(ErrorKind::kFabric, error_text(what, errno));
  };
  pd_ = own(lib_.alloc_pd(context_.get()), lib_.dealloc_pd, "protection domain");
  made(pd_.get(), "allocating a protection domain");
  access_ = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ;
  if (config_.relaxed_ordering && lib_.reg_mr_iova2 != nullptr) access_ |= IBV_ACCESS_RELAXED_ORDERING;

  // Room for everything that can be outstanding, so that it never overflows: after an error each work request
  // completes, signalled or not.
  const uint32_t size =
      send_budget_ + immediates_.depth() + kMessageReceives + kDatagramReceives + kDatagramSends;
  cq_ = own(lib_.create_cq(context_.get(), static_cast<int>(size), nullptr, nullptr, 0), lib_.destroy_cq,
            "completion queue");
  made(cq_.get(), "creating the completion queue");

  ibv_srq_init_attr shared{};
  shared.attr.max_wr = immediates_.depth();
  shared.attr.max_sge = 1;
  immediate_queue_ = own(lib_.create_srq(pd_.get(), &shared), lib_.destroy_srq, "receive queue");
  made(immediate_queue_.get(), "creating a shared receive queue");
  shared.attr.max_wr = kMessageReceives;
  shared.attr.max_sge = 1;
  message_queue_ = own(lib_.create_srq(pd_.get(), &shared), lib_.destroy_srq, "receive queue");
  made(message_queue_.get(), "creating a shared receive queue");

  message_bytes_.resize(size_t{kMessageReceives} * kVerbsMessageBytes);
  message_memory_ = register_memory(message_bytes_.data(), message_bytes_.size());
  for (uint32_t buffer = 0; buffer < kMessageReceives; ++buffer) repost_message(buffer);
  for (uint32_t i = 0; i < immediates_.depth(); ++i) immediates_.consumed();
  replenish();
}

void VerbsDevice::make_datagram_queue() {
  ibv_qp_init_attr init{};
  init.send_cq = init.recv_cq = cq_.get();
  init.cap.max_send_wr = kDatagramSends;
  init.cap.max_recv_wr = kDatagramReceives;
  init.cap.max_send_sge = init.cap.max_recv_sge = 1;
  init.qp_type = IBV_QPT_UD;
  datagram_qp_ = own(lib_.create_qp(pd_.get(), &init), lib_.destroy_qp, "queue pair");
  if (!datagram_qp_)
    throw Error(ErrorKind::kFabric, error_text("creating the queue pair for datagrams", errno));
  datagram_bytes_.resize(size_t{kDatagramReceives + kDatagramSends} * kDatagramBytes);
  datagram_memory_ = register_memory(datagram_bytes_.data(), datagram_bytes_.size());
  for (uint32_t i = 0; i < kDatagramSends; ++i) free_datagrams_.push_back(kDatagramReceives + i);

  ibv_qp_attr attributes{};
  attributes.qp_state = IBV_QPS_INIT;
  attributes.port_num = port_;
  attributes.qkey = kDatagramKey;
  int rc = lib_.modify_qp(datagram_qp_.get(), &attributes,
                          IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_QKEY);
  attributes.qp_state = IBV_QPS_RTR;
  if (rc == 0) rc = lib_.modify_qp(datagram_qp_.get(), &attributes, IBV_QP_STATE);
  attributes.qp_state = IBV_QPS_RTS;
  if (rc == 0) rc = lib_.modify_qp(datagram_qp_.get(), &attributes, IBV_QP_STATE | IBV_QP_SQ_PSN);
  if (rc != 0) throw Error(ErrorKind::kFabric, error_text("readying the queue pair for datagrams", rc));
  for (uint32_t buffer = 0; buffer < kDatagramReceives; ++buffer) repost_datagram(buffer);
  address_.datagram_qp = datagram_qp_->qp_num;
}

std::string VerbsDevice::error_text(const char* what, int code) const {
  return "verbs " + name_ + ": " + what + ": " + std::strerror(code) + " (" + std::to_string(code) + ")";
}

Error VerbsDevice::registration_error(const char* what, size_t size) const {
  const int code = errno;
  std::string text = error_text(("registering " + std::to_string(size) + " bytes of " + what).c_str(), code);
  if (code == ENOMEM || code == EPERM || code == EAGAIN) {
    text +=
        "; locked memory is limited (RLIMIT_MEMLOCK): raise it with 'ulimit -l unlimited' or "
        "/etc/security/limits.conf";
  }
  return Error(ErrorKind::kFabric, text);
}

FabricMemory VerbsDevice::registered(ibv_mr* mr, void* data, size_t size, bool host) {
  auto memory = std::make_unique<VerbsMemory>(VerbsMemory{own(mr, lib_.dereg_mr, "memory region"), host});
  void* const handle = memory.get();
  memory_.emplace(handle, std::move(memory));
  return {static_cast<std::byte*>(data), size, reinterpret_cast<uint64_t>(data), mr->rkey, handle, handle};
}

FabricMemory VerbsDevice::register_memory(void* data, size_t size) {
  const auto address = reinterpret_cast<uint64_t>(data);
  // Of the two only the newer passes optional access flags over in silence where a device lacks them.
  ibv_mr* mr = lib_.reg_mr_iova2 != nullptr
                   ? lib_.reg_mr_iova2(pd_.get(), data, size, address, static_cast<unsigned>(access_))
                   : lib_.reg_mr(pd_.get(), data, size, access_);
  if (mr == nullptr) throw registration_error("host memory", size);
  return registered(mr, data, size, true);
}

FabricMemory VerbsDevice::register_device_memory(const DeviceMemory& memory) {
  const auto address = reinterpret_cast<uint64_t>(memory.data);
  ibv_mr* mr = nullptr;
  std::string help;
  if (memory.dmabuf_fd < 0) {
    // Drivers that know the GPU's addresses by themselves (nvidia_peermem).
    mr = lib_.reg_mr(pd_.get(), memory.data, memory.size, access_ & ~IBV_ACCESS_OPTIONAL_RANGE);
    help = "; without a dma-buf it takes the kernel module nvidia_peermem";
  } else if (lib_.reg_dmabuf_mr == nullptr) {
    throw Error(ErrorKind::kFabric,
                "verbs " + name_ + ": this libibverbs registers no dma-bufs: install rdma-core 34 or newer");
  } else {
    mr = lib_.reg_dmabuf_mr(pd_.get(), memory.dmabuf_offset, memory.size, address, memory.dmabuf_fd, access_);
    help = "; dma-bufs take Linux 5.12 and a driver that knows them (mlx5)";
  }
  if (mr == nullptr) {
    const std::string what = "memory of GPU " + std::to_string(memory.device);
    throw Error(ErrorKind::kFabric, registration_error(what.c_str(), memory.size).what() + help);
  }
  return registered(mr, memory.data, memory.size, false);
}

void VerbsDevice::unregister_memory(const FabricMemory& memory) { memory_.erase(memory.handle); }

ibv_ah_attr VerbsDevice::path_to(const NicAddress& peer) const {
  ibv_ah_attr path{};
  path.port_num = port_;
  path.sl = static_cast<uint8_t>(config_.service_level);
  path.dlid = peer.lid;
  // The first half of a GID is its subnet.
  const bool same_subnet = std::equal(peer.gid.begin(), peer.gid.begin() + 8, address_.gid.begin());
  path.is_global = ethernet_ || !same_subnet ? 1 : 0;
  if (path.is_global != 0) {
    std::copy(peer.gid.begin(), peer.gid.end(), std::begin(path.grh.dgid.raw));
    path.grh.sgid_index = static_cast<uint8_t>(gid_index_);
    path.grh.hop_limit = 64;
    path.grh.traffic_class = static_cast<uint8_t>(config_.traffic_class);
  }
  return path;
}

VerbsHandle<ibv_ah> VerbsDevice::make_path(const NicAddress& peer) const {
  ibv_ah_attr path = path_to(peer);
  auto handle = own(lib_.create_ah(pd_.get(), &path), lib_.destroy_ah, "path");
  if (!handle) throw Error(ErrorKind::kPeer, error_text(("no path to " + to_text(peer.gid)).c_str(), errno));
  return handle;
}

VerbsDevice::QueuePair VerbsDevice::make_queue_pair(bool messages) const {
  ibv_qp_init_attr init{};
  init.send_cq = init.recv_cq = cq_.get();
  init.srq = messages ? message_queue_.get() : immediate_queue_.get();
  init.cap.max_send_wr = queue_depth_;
  init.cap.max_send_sge = 1;
  init.cap.max_inline_data = messages ? 0 : kInlineBytes;
  init.qp_type = IBV_QPT_RC;
  ibv_qp* qp = lib_.create_qp(pd_.get(), &init);
  if (qp == nullptr && init.cap.max_inline_data != 0) {
    init.cap.max_inline_data = 0;
    qp = lib_.create_qp(pd_.get(), &init);
  }
  if (qp == nullptr) throw Error(ErrorKind::kFabric, error_text("creating a queue pair", errno));
  return {own(qp, lib_.destroy_qp, "queue pair"), messages ? 0 : init.cap.max_inline_data};
}

void VerbsDevice::send_datagram(ibv_ah* path, uint32_t queue_pair, const Handshake& handshake) {
  if (free_datagrams_.empty() || path == nullptr) return;
  const auto bytes = encode(handshake);
  const uint32_t buffer = free_datagrams_.back();
  std::byte* place = datagram_bytes_.data() + size_t{buffer} * kDatagramBytes;
  std::memcpy(place, bytes.data(), bytes.size());
  ibv_sge piece{reinterpret_cast<uint64_t>(place), static_cast<uint32_t>(bytes.size()),
                static_cast<VerbsMemory*>(datagram_memory_.local)->mr->lkey};
  ibv_send_wr request{};
  request.wr_id = WorkId{WorkId::Kind::kDatagramSend, 0, buffer}.pack();
  request.sg_list = &piece;
  request.num_sge = 1;
  request.opcode = IBV_WR_SEND;
  request.send_flags = IBV_SEND_SIGNALED;
  request.wr.ud.ah = path;
  request.wr.ud.remote_qpn = queue_pair;
  request.wr.ud.remote_qkey = kDatagramKey;
  ibv_send_wr* bad = nullptr;
  if (int rc = ibv_post_send(datagram_qp_.get(), &request, &bad); rc != 0) {
    log(LogLevel::kWarn, error_text("sending a datagram", rc));
    return;
  }
  free_datagrams_.pop_back();
}

std::span<const std::byte> VerbsDevice::datagram(uint32_t buffer, uint32_t bytes) const {
  if (buffer >= kDatagramReceives || bytes < kRouteHeader || bytes > kDatagramBytes) return {};
  return std::span(datagram_bytes_)
      .subspan(size_t{buffer} * kDatagramBytes + kRouteHeader, bytes - kRouteHeader);
}

std::span<const std::byte> VerbsDevice::message(uint32_t buffer, uint32_t bytes) const {
  if (buffer >= kMessageReceives || bytes > kVerbsMessageBytes) return {};
  return std::span(message_bytes_).subspan(size_t{buffer} * kVerbsMessageBytes, bytes);
}

void VerbsDevice::repost_datagram(uint32_t buffer) {
  ibv_sge piece{reinterpret_cast<uint64_t>(datagram_bytes_.data() + size_t{buffer} * kDatagramBytes),
                kDatagramBytes, static_cast<VerbsMemory*>(datagram_memory_.local)->mr->lkey};
  ibv_recv_wr request{WorkId{WorkId::Kind::kDatagram, 0, buffer}.pack(), nullptr, &piece, 1};
  ibv_recv_wr* bad = nullptr;
  if (int rc = ibv_post_recv(datagram_qp_.get(), &request, &bad); rc != 0) {
    log(LogLevel::kError, error_text("posting a receive for datagrams", rc));
  }
}

void VerbsDevice::repost_message(uint32_t buffer) {
  ibv_sge piece{reinterpret_cast<uint64_t>(message_bytes_.data() + size_t{buffer} * kVerbsMessageBytes),
                kVerbsMessageBytes, static_cast<VerbsMemory*>(message_memory_.local)->mr->lkey};
  ibv_recv_wr request{WorkId{WorkId::Kind::kMessage, 0, buffer}.pack(), nullptr, &piece, 1};
  ibv_recv_wr* bad = nullptr;
  if (int rc = ibv_post_srq_recv(message_queue_.get(), &request, &bad); rc != 0) {
    log(LogLevel::kError, error_text("posting a receive for messages", rc));
  }
}

// Immediates need no buffer: the bytes of their writes go elsewhere.
void VerbsDevice::replenish() {
  for (uint32_t due = immediates_.due(); due > 0;) {
    constexpr uint32_t kChain = 64;
    std::array<ibv_recv_wr, kChain> chain;
    const uint32_t count = std::min(due, kChain);
    for (uint32_t i = 0; i < count; ++i) {
      chain[i] = {WorkId{WorkId::Kind::kImmediate, 0, 0}.pack(), i + 1 < count ? &chain[i + 1] : nullptr,
                  nullptr, 0};
    }
    ibv_recv_wr* bad = nullptr;
    if (int rc = ibv_post_srq_recv(immediate_queue_.get(), chain.data(), &bad); rc != 0) {
      const auto taken = static_cast<uint32_t>(bad != nullptr ? bad - chain.data() : 0);
      immediates_.posted(taken);
      log(LogLevel::kError, error_text("posting receives for immediates", rc));
      return;  // what is missing stays due
    }
    immediates_.posted(count);
    due -= count;
  }
}

bool VerbsDevice::read_events(const std::function<void(const Error&)>& report) {
  bool usable = true;
  pollfd ready{context_->async_fd, POLLIN, 0};
  while (::poll(&ready, 1, 0) > 0 && (ready.revents & POLLIN) != 0) {
    ibv_async_event event{};
    if (lib_.get_async_event(context_.get(), &event) != 0) break;
    const std::string text = "verbs " + name_ + ": " + lib_.event_type_str(event.event_type);
    switch (event.event_type) {
      case IBV_EVENT_DEVICE_FATAL:
      case IBV_EVENT_CQ_ERR:
      case IBV_EVENT_SRQ_ERR:
        usable = false;
        [[fallthrough]];
      case IBV_EVENT_PORT_ERR:
      case IBV_EVENT_QP_FATAL:
      case IBV_EVENT_QP_REQ_ERR:
      case IBV_EVENT_QP_ACCESS_ERR:
        report(Error(ErrorKind::kFabric, text));
        break;
      default:
        log(LogLevel::kInfo, text);
    }
    lib_.ack_async_event(&event);
  }
  return usable;
}

std::vector<std::string> verbs_ports() {
  const Verbs& lib = load_verbs();
  const DeviceList list(lib);
  std::vector<std::string> ports;
  for (int i = 0; i < list.count; ++i) {
    const std::string device = lib.get_device_name(list.devices[i]);
    auto context = own(lib.open_device(list.devices[i]), lib.close_device, "device");
    ibv_device_attr attributes{};
    if (!context || lib.query_device(context.get(), &attributes) != 0) continue;
    for (uint8_t port = 1; port <= attributes.phys_port_cnt; ++port) {
      ibv_port_attr state;
      if (query_port(lib, context.get(), port, state) == 0 && state.state == IBV_PORT_ACTIVE) {
        ports.push_back(device + ":" + std::to_string(port));
      }
    }
  }
  if (ports.empty()) {
    throw Error(ErrorKind::kFabric, "this machine has no RDMA device with an active port (" +
                                        std::to_string(list.count) + " devices)");
  }
  return ports;
}

}  // namespace pplx
