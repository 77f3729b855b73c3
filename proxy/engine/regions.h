// Registered memory, here and at peers.
#pragma once

#include <array>
#include <memory>
#include <vector>

#include "proxy/engine/core.h"

namespace pplx {

class RegionImpl final : public Region, public std::enable_shared_from_this<RegionImpl> {
 public:
  using Memories = std::array<FabricMemory, kMaxNics>;  // by NIC

  RegionImpl(std::shared_ptr<EngineCore> core, const Memories& memories, RegionDescriptor descriptor,
             std::shared_ptr<void> keepalive)
      : core_(std::move(core)),
        memories_(memories),
        descriptor_(std::move(descriptor)),
        keepalive_(std::move(keepalive)) {}
  ~RegionImpl() override { core_->unregister(*this); }
  std::byte* data() const noexcept override { return memories_[0].data; }
  size_t size() const noexcept override { return memories_[0].size; }
  const RegionDescriptor& descriptor() const noexcept override { return descriptor_; }
  const FabricMemory& memory(size_t nic) const noexcept { return memories_[nic]; }
  const Memories& memories() const noexcept { return memories_; }
  const EngineCore* core() const noexcept { return core_.get(); }

 private:
  std::shared_ptr<EngineCore> core_;
  Memories memories_;
  RegionDescriptor descriptor_;
  std::shared_ptr<void> keepalive_;
};

// By the owner's NIC.
struct RemoteKeys {
  std::array<uint64_t, kMaxNics> keys{};
};

struct RemoteRegionImpl final : RemoteRegion {
  size_t size() const noexcept override { return length; }
  const EngineCore* core = nullptr;
  uint32_t peer = 0;
  uint64_t base = 0;
  uint64_t key = 0;  // of the first NIC
  size_t length = 0;
  std::shared_ptr<const RemoteKeys> keys;  // null where there is one path only
};

class GroupRegionsImpl final : public GroupRegions {
 public:
  explicit GroupRegionsImpl(std::vector<std::shared_ptr<RemoteRegion>> regions)
      : regions_(std::move(regions)) {}
  size_t size() const noexcept override { return regions_.size(); }
  const std::shared_ptr<RemoteRegion>& operator[](size_t rank) const { return regions_[rank]; }

 private:
  std::vector<std::shared_ptr<RemoteRegion>> regions_;
};

}  // namespace pplx
