// One GPU's membership in a group: its memory, its way to every rank, its control plane.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "proxy/moe/exchange_group.h"
#include "xla_ffi/cuda/control_block.h"
#include "xla_ffi/cuda/courier.h"
#include "xla_ffi/cuda/fd_exchange.h"
#include "xla_ffi/cuda/gdr_window.h"
#include "xla_ffi/cuda/kernels.h"
#include "xla_ffi/cuda/local_regions.h"
#include "xla_ffi/cuda/memory.h"
#include "xla_ffi/cuda/proxy_memory.h"
#include "xla_ffi/layout.h"
#include "xla_ffi/registry.h"

namespace pplx::moe::cuda {

struct MemberOptions {
  std::vector<bool> nvlink;  // by rank: kernels write into its memory themselves; true for this rank
  bool proxies = false;      // some pair of the group's ranks is not like that; the same on all ranks
  bool shares = false;       // some rank that is belongs to another process
  int num_sms = 1;           // blocks of a kernel; the same on all ranks
  RegionMemory regions = RegionMemory::kAuto;  // of proxied ranks' messages
};

// What lies where, and why there.
struct Placed {
  const char* memory;  // "device", "pinned"
  std::string why;
};

struct MemberStats {
  GroupStats group;
  std::vector<bool> nvlink;
  CourierStats courier;
  size_t device_bytes = 0, pinned_bytes = 0;
  int num_sms = 0;
  // Where some pair of ranks is proxied: messages, and the words by which the host tells kernels of them.
  std::optional<Placed> regions, flags;
};

class Member {
 public:
  // Allocates. Throws kInvalidArgument for shapes that the kernels do not take, kFabric.
  Member(int64_t group, int device, const MoeShape& shape, GroupConfig config, const MemberOptions& options);
  ~Member();
  Member(const Member&) = delete;
  Member& operator=(const Member&) = delete;

  // As in ExchangeGroup.
  Bytes endpoint() const;
  void connect(const std::vector<Bytes>& endpoints);
  // Lets kernels run; after every rank has connected.
  void publish();
  // Idempotent and bounded. Ends waits of kernels under way.
  void close();
  bool closed() const noexcept { return closed_.load(); }
  void fail(const std::string& why);
  std::optional<Error> failure() const;
  // The data error and whether it is this rank's own; the group works again.
  std::optional<std::pair<Error, bool>> take_data_error();
  MemberStats stats() const;

  const MoeShape& shape() const noexcept { return shape_; }
  const std::string& name() const noexcept { return group_->config().name; }
  // What every call of this group begins with. Throws when a kernel must not be launched: the group is
  // closed, or has failed.
  KernelCall call(Kind kind, uint64_t tag, std::string_view site, int64_t tokens);

 private:
  struct Peer;

  void allocate();
  void map_control();
  void reach(uint32_t rank, const Peer& peer, Clock::time_point deadline);
  FindSite site_of_peer() const;
  Control control_values();
  HostControl& host() const { return *reinterpret_cast<HostControl*>(pinned_->data()); }
  void release(bool idle);

  const ProcessMark mark_;
  const int device_;
  const MoeShape shape_;
  const MemberOptions options_;
  RegionLayout layout_;
  ControlBlock* block_ = nullptr;
  const Token token_;

  // What kernels use, and what therefore outlives them.
  ProxyMemory proxy_memory_;  // registered with the group, so that it goes after it
  std::unique_ptr<ExchangeGroup> group_;
  std::shared_ptr<DeviceRegions> regions_;
  std::unique_ptr<DeviceRegions> scratch_;
  std::unique_ptr<PinnedMemory> pinned_;  // HostControl, then the slots of submitted messages
  std::unique_ptr<PinnedView> host_regions_, host_staging_;  // where proxy_memory_ has none
  std::unique_ptr<GdrWindow> window_;                        // onto the control block; null: no GDRCopy
  std::optional<Placed> regions_placed_, flags_placed_;
  std::vector<LocalRank> shared_;                           // ranks in this process
  std::vector<std::unique_ptr<ImportedRegions>> imported_;  // of ranks in others
  std::vector<std::unique_ptr<SiteBookView>> books_;
  std::vector<std::byte*> peers_;  // by rank, as this device sees them

  std::unique_ptr<FdServer> server_;
  std::unique_ptr<Courier> courier_;
  mutable std::mutex lifetime_;  // whose end close() is
  bool published_ = false;
  uint64_t exchanges_ = 0;  // at the close
  bool stuck_ = false;      // kernels may still use the memory: it is never freed
  std::atomic<bool> closed_{false};
};

using GpuRegistry = RegistryOf<Member>;

}  // namespace pplx::moe::cuda
