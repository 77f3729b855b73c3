// Registered memory, here and at peers.
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "proxy/engine/core.h"
#include "proxy/log.h"

namespace pplx {

std::shared_ptr<Region> EngineCore::register_memory(void* data, size_t size,
                                                    std::shared_ptr<void> keepalive) {
  if (data == nullptr || size == 0) {
    throw Error(ErrorKind::kInvalidArgument, "registered memory must not be empty");
  }
  require_open();
  Locked locked(*this);
  if (fabric_closed_) require_open();
  FabricMemory memory = fabric_->register_memory(data, size);
  DescriptorFields fields{address_.bytes(), memory.base, memory.size, {memory.key}};
  auto region = std::make_shared<RegionImpl>(shared_from_this(), memory, RegionDescriptor(encode(fields)),
                                             std::move(keepalive));
  regions_.insert(region.get());
  return region;
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
  return register_memory(data, size, std::move(keepalive));
}

void EngineCore::unregister(RegionImpl& region) noexcept {
  if (forked()) return;
  Locked locked(*this);
  regions_.erase(&region);
  if (!fabric_closed_) fabric_->unregister_memory(region.memory());
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
  return remote;
}

}  // namespace pplx
