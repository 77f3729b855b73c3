// One NIC's queue pairs, peers and handshakes. verbs_fabric.cc has what the engine calls, verbs_progress.cc
// completions, verbs_connect.cc datagrams.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "proxy/fabric/verbs.h"
#include "proxy/fabric/verbs_link.h"
#include "proxy/presence.h"

namespace pplx {

class VerbsFabric final : public Fabric {
 public:
  explicit VerbsFabric(const EngineConfig& config);
  ~VerbsFabric() override;

  const FabricCaps& caps() const override { return caps_; }
  const PeerAddress& address() const override { return address_; }
  std::string name() const override;

  FabricMemory register_memory(void* data, size_t size) override;
  FabricMemory register_device_memory(const DeviceMemory& memory) override;
  void unregister_memory(const FabricMemory& memory) override;
  uint32_t connect(const PeerAddress& peer) override;
  void disconnect(uint32_t peer) override;
  Post try_write(FabricOp& op) override { return post(op, static_cast<uint8_t>(op.rail)); }
  Post try_read(FabricOp& op) override { return post(op, static_cast<uint8_t>(op.rail)); }
  Post try_send(FabricOp& op) override { return post(op, kMessageLink); }
  size_t poll(FabricEvents& events) override;
  Fence fence(const PeerAddress& peer) override;
  void drain(FabricEvents& events) override;
  bool alive(uint32_t peer) override;
  void close() override;

  size_t peers() const { return peers_by_id_.size(); }  // NICs that this one remembers

 private:
  // A NIC of a peer: one that the engine has connected to, or one that has connected to us, or both.
  struct Peer {
    uint32_t index = 0;  // in peers_
    NicAddress nic;
    std::string label;
    bool self = false;
    bool numbered = false;  // the engine has a number for it
    uint32_t pid = 0;       // 0: of another host, or unknown
    VerbsHandle<ibv_ah> path;
    std::map<uint8_t, std::unique_ptr<VerbsLink>> links;
    std::map<uint32_t, uint64_t> arrived;  // immediates, by the number of its queue pair
    Liveness liveness{Duration::zero()};
    bool heard = false;           // something came since the last look
    std::optional<Error> failed;  // for good
    std::string trouble;          // the last error on the way to it
  };
  struct Failure {
    FabricOp* op;
    Error error;
    bool undelivered;
  };

  // verbs_fabric.cc
  Post post(FabricOp& op, uint8_t link);
  void post_on(VerbsLink& link, FabricOp& op);
  void flush(VerbsLink& link);
  VerbsLink& link_of(Peer& peer, uint8_t number);
  Peer& known(const NicAddress& nic, const std::string& label);
  void forget(const Peer& peer);
  VerbsLink* by_queue(uint32_t queue) const { return queue < queues_.size() ? queues_[queue] : nullptr; }
  Peer& peer_of(const VerbsLink& link) { return *peers_[link.peer]; }

  // verbs_progress.cc
  void on_work(const ibv_wc& work, FabricEvents& events);
  void on_sent(const WorkId& id, ibv_wc_status status, FabricEvents& events);
  void settle(VerbsLink& link, const VerbsLink::Returned& returned, FabricEvents& events);
  void fail(FabricOp* op, const Error& error, bool undelivered) {
    failures_.push_back({op, error, undelivered});
  }
  size_t report_failures(FabricEvents& events);
  void break_off(VerbsLink& link);
  void finish_broken(VerbsLink& link);
  void look_after(Peer& peer, Clock::time_point now);
  void resume(VerbsLink& link);
  void fail_peer(Peer& peer, const Error& error);
  void forget_failed();
  void keep_house(FabricEvents& events);
  Error broken_error(const VerbsLink& link, ibv_wc_status status) const;

  // verbs_connect.cc
  void start(VerbsLink& link);
  void renew(VerbsLink& link);
  void send_hello(VerbsLink& link, bool ask = false);
  void on_datagram(std::span<const std::byte> bytes);
  void on_hello(const Handshake& hello);
  void on_refusal(const Handshake& refusal);
  void on_bye(const Handshake& bye);
  void refuse(const Handshake& hello, const std::string& why);
  void say_bye(const Peer& peer, bool nic_only);
  void say_bye();
  bool ensure_path(Peer& peer);
  void confirmed(VerbsLink& link);
  void repeat_hellos(Clock::time_point now);
  Handshake handshake(Handshake::Type type, const EngineId& to) const;

  FabricCaps caps_;
  PeerAddress address_;
  HandshakeSelf self_;
  Duration connect_timeout_;
  std::unique_ptr<VerbsDevice> device_;       // null once closed
  std::vector<std::unique_ptr<Peer>> peers_;  // null: forgotten
  std::map<EngineId, Peer*> peers_by_id_;
  std::vector<uint32_t> numbers_;                         // the engine's number -> index in peers_
  std::vector<VerbsLink*> queues_{nullptr};               // by number of the queue pair, which starts at 1
  std::unordered_map<uint32_t, VerbsLink*> links_by_qp_;  // by the device's number
  uint32_t outstanding_ = 0;
  Clock::time_point emptied_{};  // when a poll began that found the completion queue empty; while links break
  bool forgot_ = false;          // some NICs altogether
  // The latest NICs that were forgotten, and what came from them.
  std::deque<std::pair<NicAddress, std::map<uint32_t, uint64_t>>> forgotten_;

  std::vector<VerbsLink*> chained_;  // with work requests not posted yet
  std::vector<VerbsLink*> handshaking_;
  std::vector<VerbsLink*> broken_;    // until they have given everything back
  std::vector<VerbsLink*> resuming_;  // with operations to be posted again
  std::vector<Failure> failures_;     // to be reported by the next poll()
  std::vector<FabricOp*> arrived_;    // as the peer has said; the same
  std::vector<VerbsLink::Returned> returned_;
  uint32_t polls_ = 0;
  // Paths of the latest refusals, whose datagrams may still be on their way.
  std::array<VerbsHandle<ibv_ah>, 2 * kDatagramSends> strangers_;
  uint32_t next_stranger_ = 0;
  Clock::time_point next_events_{}, next_refusal_{};
  Presence presence_;
  bool down_ = false;
};

}  // namespace pplx
