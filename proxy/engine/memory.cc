// Registered memory, here and at peers.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "proxy/engine/group.h"
#include "proxy/engine/regions.h"
#include "proxy/log.h"

namespace pplx {

std::shared_ptr<Region> EngineCore::register_memory(void* data, size_t size, const Register& with_nic,
                                                    std::shared_ptr<void> keepalive) {
  if (data == nullptr || size == 0) {
    throw Error(ErrorKind::kInvalidArgument, "registered memory must not be empty");
  }
  require_open();
  Locked locked(*this);
  if (fabric_closed_) require_open();
  RegionImpl::Memories memories{};
  DescriptorFields fields{address_.bytes(), 0, size, {}};
  try {
    for (size_t i = 0; i < nics_.size(); ++i) {
      FabricMemory& memory = memories[i];
      if (nics_[i].down) {
        memory.data = static_cast<std::byte*>(data);
        memory.size = size;
      } else {
        memory = with_nic(*nics_[i].fabric);
        fields.base = memory.base;
      }
      fields.keys.push_back(memory.key);
    }
  } catch (...) {
    release(memories);
    throw;
  }
  auto region = std::make_shared<RegionImpl>(shared_from_this(), memories, RegionDescriptor(encode(fields)),
                                             std::move(keepalive));
  regions_.insert(region.get());
  return region;
}

namespace {

// Lives as long as the region: kernels see what NICs write there.
struct VisibleDevice {
  std::shared_ptr<void> keepalive;
  GpuWrites::Use use;
};

}  // namespace

std::shared_ptr<Region> EngineCore::register_memory(const DeviceMemory& memory,
                                                    std::shared_ptr<void> keepalive) {
  GpuWrites::Use use;
  {
    Locked locked(*this);
    use = gpu_writes_.use(memory.device);
  }
  auto both = std::make_shared<VisibleDevice>(VisibleDevice{std::move(keepalive), std::move(use)});
  return register_memory(
      memory.data, memory.size, [&](Fabric& fabric) { return fabric.register_device_memory(memory); },
      std::move(both));
}

std::shared_ptr<Region> EngineCore::allocate(size_t size) {
  if (size == 0) throw Error(ErrorKind::kInvalidArgument, "registered memory must not be empty");
  size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  if (size > SIZE_MAX - page) throw Error(ErrorKind::kInvalidArgument, "the size is absurd");
  size_t mapped = (size + page - 1) / page * page;
  void* data = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) {
    throw Error(ErrorKind::kFabric, "allocating " + std::to_string(size) + " bytes: " + std::strerror(errno));
  }
  std::shared_ptr<void> keepalive(data, [mapped](void* memory) { munmap(memory, mapped); });
  return register_memory(
      data, size, [&](Fabric& fabric) { return fabric.register_memory(data, size); }, std::move(keepalive));
}

void EngineCore::unregister(RegionImpl& region) noexcept {
  if (forked()) return;
  Locked locked(*this);
  regions_.erase(&region);
  if (!fabric_closed_) release(region.memories());
}

void EngineCore::release(const std::array<FabricMemory, kMaxNics>& memories) noexcept {
  for (size_t i = 0; i < nics_.size(); ++i) {
    // Where the NIC was down already nothing was registered, where it has failed since, nothing is any more.
    if (memories[i].size != 0 && !nics_[i].down) nics_[i].fabric->unregister_memory(memories[i]);
  }
}

std::shared_ptr<RemoteRegion> EngineCore::open(const RegionDescriptor& descriptor) {
  DescriptorFields fields = decode_descriptor(descriptor.bytes());
  decode_address(fields.address);
  require_open();
  Locked locked(*this);
  if (fabric_closed_) require_open();
  auto remote = std::make_shared<RemoteRegionImpl>();
  remote->core = this;
  remote->peer = connect(fields.address);
  remote->base = fields.base;
  remote->key = fields.keys[0];
  remote->length = fields.length;
  const size_t theirs = decode_address(fields.address).nics();
  if (fields.keys.size() != theirs) {
    throw Error(ErrorKind::kInvalidArgument,
                "malformed region descriptor: " + std::to_string(fields.keys.size()) + " keys for " +
                    std::to_string(theirs) + " NICs");
  }
  if (peers_[remote->peer].paths.size() > 1) {
    auto keys = std::make_shared<RemoteKeys>();
    std::copy(fields.keys.begin(), fields.keys.end(), keys->keys.begin());
    remote->keys = std::move(keys);
  }
  return remote;
}

std::shared_ptr<GroupRegions> EngineCore::open(PeerGroup& base,
                                               std::span<const RegionDescriptor> descriptors) {
  auto& group = static_cast<GroupImpl&>(base);
  if (group.core().get() != this)
    throw Error(ErrorKind::kInvalidArgument, "the group belongs to another engine");
  if (descriptors.size() != group.size()) {
    throw Error(
        ErrorKind::kInvalidArgument,
        std::to_string(descriptors.size()) + " descriptors for a group of " + std::to_string(group.size()));
  }
  std::vector<std::shared_ptr<RemoteRegion>> regions;
  for (size_t rank = 0; rank < descriptors.size(); ++rank) {
    if (group.rank_of(decode_descriptor(descriptors[rank].bytes()).address) != rank) {
      throw Error(ErrorKind::kInvalidArgument,
                  "descriptor " + std::to_string(rank) + " is not of that member of the group");
    }
    regions.push_back(open(descriptors[rank]));
  }
  return std::make_shared<GroupRegionsImpl>(std::move(regions));
}

}  // namespace pplx
