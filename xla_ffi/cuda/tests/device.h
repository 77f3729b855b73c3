// CUDA objects that free themselves, for tests.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace pplx::moe::cuda::testing {

inline void must(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + ", " +
                           cudaGetErrorString(error));
}
#define PPLX_MUST(call) ::pplx::moe::cuda::testing::must((call), #call)

struct FreeDevice {
  void operator()(std::byte* memory) const { cudaFree(memory); }
};
struct FreePinned {
  void operator()(std::byte* memory) const { cudaFreeHost(memory); }
};

// Zeroed memory of the current device.
class DeviceMemory {
 public:
  explicit DeviceMemory(size_t bytes) {
    void* memory = nullptr;
    PPLX_MUST(cudaMalloc(&memory, std::max<size_t>(bytes, 16)));
    memory_.reset(static_cast<std::byte*>(memory));
    PPLX_MUST(cudaMemset(memory, 0, std::max<size_t>(bytes, 16)));
    // The null stream orders nothing for the non-blocking ones.
    PPLX_MUST(cudaDeviceSynchronize());
  }
  template <typename T = std::byte>
  T* as() const {
    return reinterpret_cast<T*>(memory_.get());
  }

 private:
  std::unique_ptr<std::byte, FreeDevice> memory_;
};

// Zeroed host memory that kernels reach at the same address.
class PinnedMemory {
 public:
  explicit PinnedMemory(size_t bytes) {
    void* memory = nullptr;
    PPLX_MUST(
        cudaHostAlloc(&memory, std::max<size_t>(bytes, 16), cudaHostAllocPortable | cudaHostAllocMapped));
    memory_.reset(static_cast<std::byte*>(memory));
    std::memset(memory, 0, std::max<size_t>(bytes, 16));
  }
  template <typename T = std::byte>
  T* as() const {
    return reinterpret_cast<T*>(memory_.get());
  }

 private:
  std::unique_ptr<std::byte, FreePinned> memory_;
};

class Stream {
 public:
  Stream() {
    cudaStream_t stream = nullptr;
    PPLX_MUST(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    stream_.reset(stream);
  }
  cudaStream_t get() const { return stream_.get(); }

 private:
  struct Destroy {
    void operator()(cudaStream_t stream) const { cudaStreamDestroy(stream); }
  };
  std::unique_ptr<std::remove_pointer_t<cudaStream_t>, Destroy> stream_;
};

class Event {
 public:
  Event() {
    cudaEvent_t event = nullptr;
    PPLX_MUST(cudaEventCreate(&event));
    event_.reset(event);
  }
  cudaEvent_t get() const { return event_.get(); }

 private:
  struct Destroy {
    void operator()(cudaEvent_t event) const { cudaEventDestroy(event); }
  };
  std::unique_ptr<std::remove_pointer_t<cudaEvent_t>, Destroy> event_;
};

// What `record()` enqueues on a stream, to be launched again and again.
class Graph {
 public:
  template <typename Record>
  Graph(cudaStream_t stream, Record&& record) {
    PPLX_MUST(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    record();
    cudaGraph_t graph = nullptr;
    PPLX_MUST(cudaStreamEndCapture(stream, &graph));
    const std::unique_ptr<std::remove_pointer_t<cudaGraph_t>, DestroyGraph> captured(graph);
    cudaGraphExec_t runnable = nullptr;
    PPLX_MUST(cudaGraphInstantiate(&runnable, graph, 0));
    runnable_.reset(runnable);
    PPLX_MUST(cudaGraphUpload(runnable, stream));
  }
  void launch(cudaStream_t stream) const { PPLX_MUST(cudaGraphLaunch(runnable_.get(), stream)); }

 private:
  struct DestroyGraph {
    void operator()(cudaGraph_t graph) const { cudaGraphDestroy(graph); }
  };
  struct DestroyRunnable {
    void operator()(cudaGraphExec_t graph) const { cudaGraphExecDestroy(graph); }
  };
  std::unique_ptr<std::remove_pointer_t<cudaGraphExec_t>, DestroyRunnable> runnable_;
};

// Part of a Mirror.
struct Part {
  size_t offset = 0, bytes = 0;
};

// Arrays in device memory with their copies on the host, moved all at once or one by one. All starts as
// garbage, the gaps between arrays included: whatever is left unwritten shows, and so does a write past an
// end.
class Mirror {
 public:
  static constexpr std::byte kGarbage{0x5a};

  // Before allocate().
  Part add(size_t bytes) {
    const Part part{size_, bytes};
    size_ = (size_ + bytes + kGap + kGap - 1) / kGap * kGap;
    return part;
  }
  void allocate() {
    host_ = std::make_unique<PinnedMemory>(size_);
    device_ = std::make_unique<DeviceMemory>(size_);
    fill_garbage();
  }
  void fill_garbage() const { std::fill_n(host_->as(), size_, kGarbage); }

  template <typename T>
  std::span<T> host(const Part& part) const {
    return {reinterpret_cast<T*>(host_->as() + part.offset), part.bytes / sizeof(T)};
  }
  template <typename T>
  T* device(const Part& part) const {
    return reinterpret_cast<T*>(device_->as() + part.offset);
  }
  void set(const Part& part, const void* from) const {
    if (part.bytes != 0) std::memcpy(host_->as() + part.offset, from, part.bytes);
  }

  // In stream order.
  void upload(cudaStream_t stream) const { upload({0, size_}, stream); }
  void upload(const Part& part, cudaStream_t stream) const {
    PPLX_MUST(cudaMemcpyAsync(device_->as() + part.offset, host_->as() + part.offset, part.bytes,
                              cudaMemcpyHostToDevice, stream));
  }
  void download(cudaStream_t stream) const { download({0, size_}, stream); }
  void download(const Part& part, cudaStream_t stream) const {
    PPLX_MUST(cudaMemcpyAsync(host_->as() + part.offset, device_->as() + part.offset, part.bytes,
                              cudaMemcpyDeviceToHost, stream));
  }
  // After download().
  bool intact_after(const Part& part) const {
    const std::byte* gap = host_->as() + part.offset + part.bytes;
    return std::all_of(gap, gap + kGap, [](std::byte byte) { return byte == kGarbage; });
  }

 private:
  static constexpr size_t kGap = 256;
  size_t size_ = 0;
  std::unique_ptr<PinnedMemory> host_;
  std::unique_ptr<DeviceMemory> device_;
};

}  // namespace pplx::moe::cuda::testing
