#include "proxy/engine/gpu_writes.h"

#include <dlfcn.h>

#include <cstdint>
#include <string>
#include <utility>

#include "proxy/error.h"

namespace pplx {
namespace {

// <cuda.h>
constexpr int kFlushOptions = 117;     // CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS
constexpr int kOrdering = 118;         // CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING
constexpr int kFlushByHost = 1;        // CU_FLUSH_GPU_DIRECT_RDMA_WRITES_OPTION_HOST
constexpr int kOrderedForOwner = 100;  // CU_GPU_DIRECT_RDMA_WRITES_ORDERING_OWNER
constexpr int kCurrentContext = 0;     // CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TARGET_CURRENT_CTX
constexpr int kToOwner = 100;          // CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TO_OWNER

template <typename Function>
bool look_up(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  return function != nullptr;
}

std::shared_ptr<const CudaDriver> load_cuda() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);  // never closed: it has threads of its own
  int (*init)(unsigned) = nullptr;
  int (*get)(int*, int) = nullptr;
  int (*attribute)(int*, int, int) = nullptr;
  if (library == nullptr || !look_up(library, "cuInit", init) || !look_up(library, "cuDeviceGet", get) ||
      !look_up(library, "cuDeviceGetAttribute", attribute) || init(0) != 0) {
    return nullptr;
  }
  auto driver = std::make_shared<CudaDriver>();
  driver->attribute = [get, attribute](int name, int ordinal, int& value) {
    int device = 0;
    return get(&device, ordinal) == 0 && attribute(&value, name, device) == 0;
  };
  int (*retain)(void**, int) = nullptr;
  int (*push)(void*) = nullptr;
  int (*pop)(void**) = nullptr;
  int (*flush)(int, int) = nullptr;  // CUDA 11.3
  if (look_up(library, "cuDevicePrimaryCtxRetain", retain) && look_up(library, "cuCtxPushCurrent_v2", push) &&
      look_up(library, "cuCtxPopCurrent_v2", pop) && look_up(library, "cuFlushGPUDirectRDMAWrites", flush)) {
    // The context that the CUDA runtime and JAX use. It is kept for the life of the process.
    driver->flush = [=, contexts = std::make_shared<std::map<int, void*>>()](int ordinal) {
      void*& context = (*contexts)[ordinal];
      int device = 0;
      if (context == nullptr) {
        int rc = get(&device, ordinal);
        if (rc == 0) rc = retain(&context, device);
        if (rc != 0) return rc;
      }
      int rc = push(context);
      if (rc != 0) return rc;
      rc = flush(kCurrentContext, kToOwner);
      void* popped = nullptr;
      pop(&popped);
      return rc;
    };
  }
  return driver;
}

}  // namespace

GpuWrites::Use GpuWrites::use(int device) {
  if (driver_ == nullptr) driver_ = load_cuda();
  int ordering = 0, options = 0;
  if (driver_ == nullptr ||
      (driver_->attribute(kOrdering, device, ordering) && ordering >= kOrderedForOwner)) {
    return nullptr;
  }
  const bool can = driver_->attribute(kFlushOptions, device, options) && (options & kFlushByHost) != 0 &&
                   driver_->flush != nullptr && device >= 0 && static_cast<size_t>(device) < kDevices;
  if (!can) {
    throw Error(ErrorKind::kFabric,
                "GPU " + std::to_string(device) +
                    " neither orders the writes of NICs nor can flush them (GPUDirect RDMA writes ordering " +
                    std::to_string(ordering) + ", flush options " + std::to_string(options) +
                    "), so that kernels could read old bytes: go through pinned host memory");
  }
  ++users_->of[static_cast<size_t>(device)];
  ++users_->total;
  return {users_.get(), [users = users_, device](void*) {
            --users->of[static_cast<size_t>(device)];
            --users->total;
          }};
}

void GpuWrites::flush() const {
  for (size_t device = 0; device < kDevices; ++device) {
    if (users_->of[device].load(std::memory_order_relaxed) == 0) continue;
    if (const int rc = driver_->flush(static_cast<int>(device)); rc != 0) {
      throw Error(ErrorKind::kFabric, "cuFlushGPUDirectRDMAWrites on GPU " + std::to_string(device) +
                                          " failed: CUresult " + std::to_string(rc));
    }
  }
}

}  // namespace pplx
