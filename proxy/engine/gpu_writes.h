// A completion seen by the CPU does not by itself mean that a running kernel sees what a NIC wrote into its
// GPU's memory. Where the GPU does not order such writes itself, they are flushed before anybody is told of
// them.
#pragma once

#include <array>
#include <atomic>
#include <functional>
#include <map>
#include <memory>

namespace pplx {

// What of <cuda.h> this takes; results are CUresult.
struct CudaDriver {
  // The attribute of a device, CUDA's number; false where it cannot be told.
  std::function<bool(int attribute, int device, int& value)> attribute;
  // cuFlushGPUDirectRDMAWrites in the device's primary context.
  std::function<int(int device)> flush;
};

class GpuWrites {
 public:
  // Null: libcuda, when it is first needed. Without one there is no GPU memory either.
  explicit GpuWrites(std::shared_ptr<const CudaDriver> driver) : driver_(std::move(driver)) {}

  // Held while memory of a device is registered.
  using Use = std::shared_ptr<void>;
  // Throws kFabric where the GPU neither orders a NIC's writes nor can flush them.
  Use use(int device);
  bool needed() const noexcept { return users_->total.load(std::memory_order_relaxed) != 0; }
  // Everything that has arrived is visible to kernels. Throws kFabric.
  void flush() const;

 private:
  static constexpr size_t kDevices = 64;
  // Users that need flushes, by device. Regions may outlive the engine.
  struct Users {
    std::array<std::atomic<uint32_t>, kDevices> of{};
    std::atomic<uint32_t> total{0};
  };

  std::shared_ptr<const CudaDriver> driver_;
  std::shared_ptr<Users> users_ = std::make_shared<Users>();
};

}  // namespace pplx
