// A libgdrapi.so for machines with GPUs and without GDRCopy's driver: what is written to a mapping is carried
// to the GPU's memory by a thread, word by word.
#include <cuda_runtime_api.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

struct Info {
  uint64_t va, mapped_size;
  uint32_t page_size;
  uint64_t tm_cycles;
  uint32_t cycles_per_ms;
  unsigned mapped : 1, wc_mapping : 1;
};

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

struct gdr {
  unsigned long address = 0;
  size_t size = 0;
  int device = 0;
  cudaStream_t stream = nullptr;
  uint64_t* mapping = nullptr;  // pinned
  std::atomic<bool> stop{false};
  std::thread carrier;

  void carry() {
    cudaSetDevice(device);
    const size_t words = size / sizeof(uint64_t);
    std::vector<uint64_t> carried(words, 0);
    while (!stop) {
      for (size_t i = 0; i < words; ++i) {
        const uint64_t value = std::atomic_ref(mapping[i]).load(std::memory_order_acquire);
        if (value == carried[i]) continue;
        carried[i] = value;
        cudaMemcpyAsync(reinterpret_cast<void*>(address + i * sizeof(uint64_t)), &mapping[i],
                        sizeof(uint64_t), cudaMemcpyHostToDevice, stream);
        cudaStreamSynchronize(stream);
      }
    }
  }
};
struct gdr_mh_t {
  unsigned long h;
};

gdr* gdr_open() { return new gdr; }
int gdr_close(gdr* g) {
  delete g;
  return 0;
}
int gdr_pin_buffer(gdr* g, unsigned long address, size_t size, uint64_t, uint32_t, gdr_mh_t* handle) {
  cudaPointerAttributes attributes{};
  if (cudaPointerGetAttributes(&attributes, reinterpret_cast<void*>(address)) != cudaSuccess ||
      attributes.type != cudaMemoryTypeDevice) {
    return EINVAL;
  }
  g->address = address;
  g->size = size;
  g->device = attributes.device;
  handle->h = 1;
  return 0;
}
int gdr_unpin_buffer(gdr*, gdr_mh_t) { return 0; }
int gdr_map(gdr* g, gdr_mh_t, void** address, size_t size) {
  int before = 0;
  void* mapping = nullptr;
  cudaGetDevice(&before);
  const bool made = cudaSetDevice(g->device) == cudaSuccess &&
                    cudaHostAlloc(&mapping, size, cudaHostAllocPortable) == cudaSuccess &&
                    cudaStreamCreateWithFlags(&g->stream, cudaStreamNonBlocking) == cudaSuccess;
  cudaSetDevice(before);
  if (!made) return ENOMEM;
  std::memset(mapping, 0, size);
  g->mapping = static_cast<uint64_t*>(mapping);
  g->carrier = std::thread([g] { g->carry(); });
  *address = mapping;
  return 0;
}
int gdr_unmap(gdr* g, gdr_mh_t, void* address, size_t) {
  g->stop = true;
  g->carrier.join();
  cudaStreamDestroy(g->stream);
  cudaFreeHost(address);
  return 0;
}
int gdr_get_info_v2(gdr* g, gdr_mh_t, Info* info) {
  *info = {.va = g->address,
           .mapped_size = g->size,
           .page_size = 1 << 16,
           .tm_cycles = 0,
           .cycles_per_ms = 0,
           .mapped = 1,
           .wc_mapping = 0};
  return 0;
}
void gdr_runtime_get_version(int* major, int* minor) {
  *major = 2;
  *minor = 4;
}
int gdr_driver_get_version(gdr*, int* major, int* minor) {
  *major = 2;
  *minor = 4;
  return 0;
}

}  // extern "C"
#pragma GCC visibility pop
