// Where messages that go by the host lie: in the GPU's memory where its NICs reach that, otherwise in pinned
// host memory, which kernels reach over PCIe.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>

#include "proxy/engine/engine.h"
#include "proxy/moe/buffers.h"
#include "xla_ffi/cuda/memory.h"

namespace pplx::moe::cuda {

// What the user wants.
enum class RegionMemory { kAuto, kDevice, kPinned };

struct RegionPlan {
  bool device = false;  // worth trying: only registering shows whether the NIC takes the memory
  std::string why;
};
// `fabric` is the fabric's name, `taken` whether it knows of GPU memory. Throws kFabric where kDevice is
// wanted and cannot be. (Whether kernels see what NICs write is the engine's business: it registers no memory
// of a GPU that can neither order nor flush that.)
RegionPlan plan_regions(RegionMemory wanted, const std::string& fabric, bool taken);

struct RegisteredRegion {
  std::shared_ptr<Region> region;
  std::string how;  // for people
};
// As a dma-buf where `export_dma_buf` is given and works, otherwise by its address alone, for which the
// provider must know the GPU's driver. Throws kFabric, naming both.
RegisteredRegion register_device_memory(TransferEngine& engine, DeviceMemory memory,
                                        const std::function<OwnedFd()>& export_dma_buf);

struct ProxyMemory {
  std::unique_ptr<DeviceRegions> regions, staging;  // null: pinned host memory
  std::string why;
};

// Makes an ExchangeGroup's buffers, and notes in `memory` what they are.
GroupBuffers place_buffers(ProxyMemory& memory, int device, RegionMemory wanted, TransferEngine& engine,
                           size_t region_bytes, size_t staging_bytes);

}  // namespace pplx::moe::cuda
