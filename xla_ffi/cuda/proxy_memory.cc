#include "xla_ffi/cuda/proxy_memory.h"

#include <utility>

#include "xla_ffi/cuda/device.h"

namespace pplx::moe::cuda {
namespace {

constexpr const char* kOverride = "PPLX_GPU_REGIONS=device";

bool exports_dma_bufs(int device) {
  int value = 0;
  check(Driver::get().device_get_attribute(&value, CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED, device),
        "asking CUDA device " + std::to_string(device) + " whether it exports dma-bufs");
  return value != 0;
}

}  // namespace

RegionPlan plan_regions(RegionMemory wanted, const std::string& fabric, bool taken) {
  if (wanted == RegionMemory::kPinned) return {.device = false, .why = "PPLX_GPU_REGIONS=pinned"};
  if (taken) return {.device = true, .why = "fabric " + fabric};
  const std::string against = "fabric " + fabric + " cannot register GPU memory";
  if (wanted == RegionMemory::kDevice) {
    throw Error(ErrorKind::kFabric,
                std::string(kOverride) + ": " + against + "; without it they are pinned host memory");
  }
  return {.device = false, .why = against};
}

RegisteredRegion register_device_memory(TransferEngine& engine, DeviceMemory memory,
                                        const std::function<OwnedFd()>& export_dma_buf) {
  std::string tried;
  if (export_dma_buf) {
    try {
      const OwnedFd fd = export_dma_buf();  // the registration keeps what it needs of it
      memory.dmabuf_fd = fd.get();
      memory.dmabuf_offset = 0;
      return {.region = engine.register_memory(memory), .how = "by dma-buf"};
    } catch (const Error& error) {
      tried = std::string("as a dma-buf: ") + error.what() + "; ";
    }
  }
  try {
    memory.dmabuf_fd = -1;
    return {.region = engine.register_memory(memory), .how = "by its address"};
  } catch (const Error& error) {
    throw Error(ErrorKind::kFabric, tried + "by its address: " + error.what());
  }
}

GroupBuffers place_buffers(ProxyMemory& memory, int device, RegionMemory wanted, TransferEngine& engine,
                           size_t region_bytes, size_t staging_bytes) {
  const RegionPlan plan = plan_regions(wanted, engine.fabric_name(), engine.takes_device_memory());
  memory.why = plan.why;
  if (plan.device) {
    constexpr const char* kWhat = "what NICs reach (PPLX_GPU_REGIONS=pinned keeps it in host memory)";
    auto regions = std::make_unique<DeviceRegions>(device, region_bytes, kWhat);
    auto staging = std::make_unique<DeviceRegions>(device, staging_bytes, kWhat);
    const auto registered = [&](const DeviceRegions& own, size_t bytes) {
      const DeviceMemory part{.data = own.data(), .size = bytes, .device = device};
      const auto dma_buf = [&own] { return own.export_dma_buf(); };
      return register_device_memory(engine, part,
                                    exports_dma_bufs(device) ? dma_buf : std::function<OwnedFd()>());
    };
    try {
      RegisteredRegion received = registered(*regions, region_bytes);
      RegisteredRegion sent = registered(*staging, staging_bytes);
      memory.regions = std::move(regions);
      memory.staging = std::move(staging);
      memory.why += ", registered " + received.how;
      return {.regions = std::move(received.region), .staging = std::move(sent.region), .readable = false};
    } catch (const Error& error) {
      memory.why = "fabric " + engine.fabric_name() + " did not register GPU memory: " + error.what();
      if (wanted == RegionMemory::kDevice) {
        throw Error(error.kind(), std::string(kOverride) + ": " + memory.why);
      }
    }
  }
  return {.regions = engine.allocate(region_bytes), .staging = engine.allocate(staging_bytes)};
}

}  // namespace pplx::moe::cuda
