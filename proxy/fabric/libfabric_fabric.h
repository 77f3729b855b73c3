// One libfabric domain, its endpoints and peers. libfabric_fabric.cc has what the engine calls,
// libfabric_open.cc set-up, libfabric_progress.cc posting and completions.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "proxy/fabric/fabric.h"
#include "proxy/fabric/libfabric_loader.h"
#include "proxy/fabric/libfabric_queues.h"
#include "proxy/fabric/libfabric_resources.h"
#include "proxy/fabric/libfabric_traits.h"

namespace pplx {

class LibfabricFabric final : public Fabric {
 public:
  explicit LibfabricFabric(const EngineConfig& config);
  ~LibfabricFabric() override;

  const FabricCaps& caps() const override { return caps_; }
  const PeerAddress& address() const override { return address_; }
  std::string name() const override;

  FabricMemory register_memory(void* data, size_t size) override;
  FabricMemory register_device_memory(const DeviceMemory& memory) override;
  void unregister_memory(const FabricMemory& memory) override;
  uint32_t connect(const PeerAddress& peer) override;
  void disconnect(uint32_t peer) override;
  Post try_write(FabricOp& op) override;
  Post try_read(FabricOp& op) override;
  Post try_send(FabricOp& op) override;
  size_t poll(FabricEvents& events) override;
  bool alive(uint32_t peer) override;
  void close() override;

 private:
  struct Peer {
    std::vector<fi_addr_t> addresses;
    uint32_t pid = 0;
    bool same_pids = false;  // our kernel can tell whether `pid` lives
    std::string segment;     // shm: the file that goes with the peer's endpoint; empty: not known
    EngineId engine{};
  };
  static constexpr size_t kMessageBytes = 16384;

  // libfabric_fabric.cc
  bool is_loopback(const std::vector<std::byte>& name) const;
  FabricMemory registered(fid_mr* mr, int rc, void* data, size_t size);
  uint64_t draw_key() const;
  std::string error_text(ssize_t rc) const;

  // libfabric_open.cc
  LibfabricInfo make_hints(const ProviderTraits& traits, uint64_t completion, bool hmem) const;
  LibfabricInfo find_provider(const EngineConfig& config);
  LibfabricInfo choose_nic(LibfabricInfo all, const std::string& nic, const std::string& node) const;
  void open_completion_queue(size_t outstanding);
  void open_endpoints(int count);
  void forbid_cuda(fid_ep* endpoint) const;
  std::vector<std::byte> endpoint_name(fid_ep* endpoint) const;
  void check(int rc, const char* what) const;

  // libfabric_progress.cc
  Post posted(ssize_t rc, const char* what) const;
  void post_receives();
  void post_receive(FabricOp& op);
  ssize_t try_receive(FabricOp& op);
  void report(ssize_t rc) const;
  size_t report_error(FabricEvents& events);

  const Libfabric& lib_;
  ProviderTraits traits_;
  bool hmem_ = false;   // registers GPU memory
  LibfabricInfo info_;  // after these two, which finding it sets
  std::string provider_;
  FabricCaps caps_;
  PeerAddress address_;
  uint64_t completion_ = 0;  // FI_DELIVERY_COMPLETE where offered
  LibfabricResources open_;
  bool in_graveyard_ = false;  // ours is one of the process's shm endpoints
  std::vector<Peer> peers_;
  std::vector<std::byte> receive_bytes_;
  FabricMemory receive_memory_;
  std::vector<FabricOp> receives_;
  UnpostedReceives unposted_;
};

}  // namespace pplx
