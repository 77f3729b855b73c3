// One port of one RDMA device, opened: protection domain, completion queue, shared receive queues, the queue
// pair for datagrams, registered memory.
#pragma once

#include <array>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "proxy/fabric/verbs_handshake.h"
#include "proxy/fabric/verbs_loader.h"
#include "proxy/fabric/verbs_queue.h"

namespace pplx {

inline constexpr uint32_t kVerbsMessageBytes = 16384;
inline constexpr uint32_t kDatagramSends = 16;

template <typename Object>
using VerbsHandle = std::unique_ptr<Object, std::function<void(Object*)>>;

struct VerbsMemory {
  VerbsHandle<ibv_mr> mr;
  bool host;  // the CPU can read it, so that short writes may be copied into the work request
};

class VerbsDevice {
 public:
  explicit VerbsDevice(const EngineConfig& config);
  VerbsDevice(const VerbsDevice&) = delete;
  VerbsDevice& operator=(const VerbsDevice&) = delete;

  const Verbs& lib() const { return lib_; }
  const VerbsConfig& config() const { return config_; }
  const std::string& name() const { return name_; }  // "mlx5_0:1"
  const std::string& description() const { return description_; }
  bool ethernet() const { return ethernet_; }
  uint8_t port() const { return port_; }
  const NicAddress& address() const { return address_; }
  void set_id(const EngineId& id) { address_.id = id; }
  uint64_t max_write() const { return max_write_; }
  uint32_t send_budget() const { return send_budget_; }  // work requests over all queue pairs
  uint32_t queue_depth() const { return queue_depth_; }  // of one queue pair
  uint8_t max_reads() const { return max_reads_; }
  ibv_cq* cq() const { return cq_.get(); }

  FabricMemory register_memory(void* data, size_t size);
  FabricMemory register_device_memory(const DeviceMemory& memory);
  void unregister_memory(const FabricMemory& memory);

  // The path to a NIC, for queue pairs and for datagrams.
  ibv_ah_attr path_to(const NicAddress& peer) const;
  VerbsHandle<ibv_ah> make_path(const NicAddress& peer) const;  // throws kPeer
  struct QueuePair {
    VerbsHandle<ibv_qp> qp;
    uint32_t inline_bytes;  // writes as short as this may be copied into the work request
  };
  QueuePair make_queue_pair(bool messages) const;  // in state RESET; throws kFabric
  std::string error_text(const char* what, int code) const;

  // Datagrams are lost when all buffers are under way, as they may be anywhere else.
  void send_datagram(ibv_ah* path, uint32_t queue_pair, const Handshake& handshake);
  std::span<const std::byte> datagram(uint32_t buffer, uint32_t bytes) const;
  std::span<const std::byte> message(uint32_t buffer, uint32_t bytes) const;
  void datagram_sent(uint32_t buffer) { free_datagrams_.push_back(buffer); }
  bool may_send_datagram() const { return !free_datagrams_.empty(); }
  bool datagrams_sent() const { return free_datagrams_.size() == kDatagramSends; }
  void repost_datagram(uint32_t buffer);
  void repost_message(uint32_t buffer);
  void immediate_consumed() { immediates_.consumed(); }
  void replenish();

  // What the device says of itself: a device that is gone, a port that went down. False: it is gone for good.
  bool read_events(const std::function<void(const Error&)>& report);

 private:
  void open(const EngineConfig& config);
  bool try_port(ibv_context* context, uint8_t port, const EngineConfig& config, std::string& why);
  void make_queues();
  void make_datagram_queue();
  FabricMemory registered(ibv_mr* mr, void* data, size_t size, bool host);
  Error registration_error(const char* what, size_t size) const;

  const Verbs& lib_;
  VerbsConfig config_;
  std::string name_, description_;
  bool ethernet_ = true;
  uint8_t port_ = 0;
  int gid_index_ = 0;
  NicAddress address_;
  uint64_t max_write_ = 0;
  uint32_t send_budget_ = 0, queue_depth_ = 0;
  uint8_t max_reads_ = 1;
  int access_ = 0;

  // Destroyed in the reverse order, memory before the protection domain.
  VerbsHandle<ibv_context> context_;
  VerbsHandle<ibv_pd> pd_;
  std::map<void*, std::unique_ptr<VerbsMemory>> memory_;
  VerbsHandle<ibv_cq> cq_;
  VerbsHandle<ibv_srq> immediate_queue_, message_queue_;
  VerbsHandle<ibv_qp> datagram_qp_;

  ReceiveCredit immediates_{1};
  std::vector<std::byte> message_bytes_, datagram_bytes_;
  FabricMemory message_memory_, datagram_memory_;
  std::vector<uint32_t> free_datagrams_;  // buffers to send from
};

}  // namespace pplx
