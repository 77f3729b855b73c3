#include "xla_ffi/cuda/memory.h"

#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <exception>
#include <string>

#include "xla_ffi/cuda/device.h"
#include "xla_ffi/layout.h"

namespace pplx::moe::cuda {
namespace {

CUmemAllocationProp properties(int device, bool rdma) {
  CUmemAllocationProp prop{};
  prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  prop.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  prop.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = device};
  prop.allocFlags.gpuDirectRDMACapable = rdma ? 1 : 0;
  return prop;
}

size_t granularity(const CUmemAllocationProp& prop) {
  size_t bytes = 0;
  check(Driver::get().get_granularity(&bytes, &prop, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
        "asking for the granularity of device memory");
  return bytes;
}

[[noreturn]] void too_little(int device, size_t bytes, const std::string& what, const std::string& why) {
  size_t free = 0, total = 0;
  const OnDevice current(device);
  if (cudaMemGetInfo(&free, &total) != cudaSuccess) static_cast<void>(cudaGetLastError());
  throw Error(ErrorKind::kFabric,
              "allocating " + std::to_string(bytes) + " bytes on CUDA device " + std::to_string(device) +
                  " for " + what + " failed with " + why + ": " + std::to_string(free) + " of " +
                  std::to_string(total) +
                  " bytes are free. XLA takes most of a GPU's memory at its start: leave some with "
                  "XLA_PYTHON_CLIENT_MEM_FRACTION=0.6 (or XLA_PYTHON_CLIENT_PREALLOCATE=false), or give the "
                  "group a lower chunk= or max_tokens=");
}

}  // namespace

OwnedFd::~OwnedFd() {
  if (fd_ >= 0) close(fd_);
}

void Mapping::map(CUmemGenericAllocationHandle handle, size_t bytes) {
  const Driver& driver = Driver::get();
  handle_ = handle;
  held_ = true;
  bytes_ = bytes;
  check(driver.reserve(&address_, bytes, 0, 0, 0), "reserving " + std::to_string(bytes) + " addresses");
  check(driver.map(address_, bytes, 0, handle_, 0), "mapping " + std::to_string(bytes) + " bytes");
  mapped_ = true;
}

void Mapping::allow(int device) {
  CUmemAccessDesc access{};
  access.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = device};
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  check(Driver::get().set_access(address_, bytes_, &access, 1),
        "letting CUDA device " + std::to_string(device) + " use memory of a peer");
}

Mapping::~Mapping() {
  if (!held_) return;
  const Driver& driver = Driver::get();  // cannot throw: it was there before
  if (mapped_) driver.unmap(address_, bytes_);
  if (address_ != 0) driver.unreserve(address_, bytes_);
  driver.release(handle_);
}

DeviceRegions::DeviceRegions(int device, size_t bytes, const char* what) : device_(device) {
  const OnDevice current(device);
  check(cudaFree(nullptr), "starting CUDA on device " + std::to_string(device));  // makes the context
  const Driver& driver = Driver::get();
  int rdma = 0;
  driver.device_get_attribute(&rdma, CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED, device);
  CUmemAllocationProp prop = properties(device, rdma != 0);
  const size_t mapped =
      static_cast<size_t>(round_up(static_cast<int64_t>(bytes), static_cast<int64_t>(granularity(prop))));
  CUmemGenericAllocationHandle handle = 0;
  CUresult status = driver.create(&handle, mapped, &prop, 0);
  if (status != CUDA_SUCCESS && status != CUDA_ERROR_OUT_OF_MEMORY && rdma != 0) {
    // Some drivers say that they can and cannot: virtual machines, missing peer-memory modules.
    prop = properties(device, false);
    status = driver.create(&handle, mapped, &prop, 0);
  }
  if (status != CUDA_SUCCESS) {
    const char* name = nullptr;
    driver.get_error_name(status, &name);
    too_little(device, mapped, what, name != nullptr ? name : "an unknown error");
  }
  mapping_.map(handle, mapped);
  mapping_.allow(device);
  const Stream stream(device);
  check(cudaMemsetAsync(mapping_.data(), 0, mapped, stream.get()), "clearing device memory");
  stream.wait("clearing device memory");
}

OwnedFd DeviceRegions::export_fd() const {
  int fd = -1;
  check(Driver::get().export_handle(&fd, mapping_.handle(), CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
        "exporting device memory to other processes");
  return OwnedFd(fd);
}

OwnedFd DeviceRegions::export_dma_buf() const {
  const OnDevice current(device_);
  int fd = -1;
  // Address and size are multiples of the allocation's granularity, so of a page.
  const auto address = reinterpret_cast<CUdeviceptr>(data());
  check(Driver::get().export_range(&fd, address, bytes(), CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD, 0),
        "exporting " + std::to_string(bytes()) + " bytes of CUDA device " + std::to_string(device_) +
            " as a dma-buf");
  return OwnedFd(fd);
}

ImportedRegions::ImportedRegions(int device, const OwnedFd& fd, size_t bytes) {
  const OnDevice current(device);
  check(cudaFree(nullptr), "starting CUDA on device " + std::to_string(device));
  CUmemGenericAllocationHandle handle = 0;
  // The descriptor goes in the place of a pointer.
  void* shared = reinterpret_cast<void*>(intptr_t{fd.get()});  // NOLINT(performance-no-int-to-ptr)
  check(Driver::get().import_handle(&handle, shared, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
        "importing device memory of another process");
  mapping_.map(handle, bytes);
  mapping_.allow(device);
}

namespace {

// Without a current device the runtime would make a context on the first one, for this call alone.
template <typename Free>
void on_device(int device, Free&& free) noexcept {
  try {
    const OnDevice current(device);
    free();
  } catch (const std::exception&) {  // the process ends, and the driver before it
  }
}

}  // namespace

PinnedMemory::PinnedMemory(int device, size_t bytes) : device_(device), bytes_(bytes) {
  const OnDevice current(device);
  void* data = nullptr;
  check(cudaHostAlloc(&data, bytes, cudaHostAllocMapped | cudaHostAllocPortable),
        "allocating " + std::to_string(bytes) + " bytes of pinned host memory");
  data_ = static_cast<std::byte*>(data);
  std::memset(data_, 0, bytes);
  void* mapped = nullptr;
  const cudaError_t status = cudaHostGetDevicePointer(&mapped, data_, 0);
  if (status != cudaSuccess) {
    cudaFreeHost(data_);
    check(status, "mapping pinned host memory");
  }
  device_data_ = static_cast<std::byte*>(mapped);
}

PinnedMemory::~PinnedMemory() {
  on_device(device_, [&] { cudaFreeHost(data_); });
}

PinnedView::PinnedView(int device, std::byte* data, size_t bytes)
    : device_(device), data_(data), bytes_(bytes) {
  const OnDevice current(device);
  check(cudaHostRegister(data, bytes, cudaHostRegisterMapped | cudaHostRegisterPortable),
        "pinning " + std::to_string(bytes) +
            " bytes of host memory for ranks that NVLink does not reach (a lower chunk= takes less)");
  void* mapped = nullptr;
  const cudaError_t status = cudaHostGetDevicePointer(&mapped, data, 0);
  if (status != cudaSuccess) {
    cudaHostUnregister(data);
    check(status, "mapping pinned host memory");
  }
  device_data_ = static_cast<std::byte*>(mapped);
}

PinnedView::~PinnedView() {
  on_device(device_, [&] { cudaHostUnregister(data_); });
}

}  // namespace pplx::moe::cuda
