// Memory that GPUs and the host share: regions that peers write, pinned host memory. All of it is zero at
// first, and goes with its owner.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <utility>

namespace pplx::moe::cuda {

// A file descriptor, closed with its owner.
class OwnedFd {
 public:
  OwnedFd() = default;
  explicit OwnedFd(int fd) : fd_(fd) {}
  OwnedFd(OwnedFd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  OwnedFd& operator=(OwnedFd&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~OwnedFd();
  int get() const noexcept { return fd_; }

 private:
  int fd_ = -1;
};

// A physical allocation, mapped at an address of this process.
class Mapping {
 public:
  Mapping() = default;
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping();

  // Takes the handle, whatever happens. `bytes` is a multiple of the granularity.
  void map(CUmemGenericAllocationHandle handle, size_t bytes);
  void allow(int device);
  std::byte* data() const noexcept {
    return reinterpret_cast<std::byte*>(address_);  // NOLINT(performance-no-int-to-ptr): the driver's type
  }
  size_t bytes() const noexcept { return bytes_; }
  CUmemGenericAllocationHandle handle() const noexcept { return handle_; }

 private:
  CUmemGenericAllocationHandle handle_ = 0;
  CUdeviceptr address_ = 0;
  size_t bytes_ = 0;
  bool held_ = false, mapped_ = false;
};

// Memory of one device, mapped for it.
class DeviceRegions {
 public:
  // `what` names it in errors.
  DeviceRegions(int device, size_t bytes, const char* what);
  int device() const noexcept { return device_; }
  std::byte* data() const noexcept { return mapping_.data(); }
  size_t bytes() const noexcept { return mapping_.bytes(); }
  // For another device of this process.
  void allow(int device) { mapping_.allow(device); }
  // For another process of this host.
  OwnedFd export_fd() const;
  // All of it for NICs, as a dma-buf. Throws kFabric.
  OwnedFd export_dma_buf() const;

 private:
  int device_;
  Mapping mapping_;
};

// Another process's DeviceRegions, mapped for one device of ours.
class ImportedRegions {
 public:
  // `bytes` is what the other side's bytes() said.
  ImportedRegions(int device, const OwnedFd& fd, size_t bytes);
  std::byte* data() const noexcept { return mapping_.data(); }

 private:
  Mapping mapping_;
};

// Host memory that every device of this process reaches at the host's own address.
class PinnedMemory {
 public:
  PinnedMemory(int device, size_t bytes);
  ~PinnedMemory();
  PinnedMemory(const PinnedMemory&) = delete;
  PinnedMemory& operator=(const PinnedMemory&) = delete;
  std::byte* data() const noexcept { return data_; }
  size_t bytes() const noexcept { return bytes_; }
  // Its address on the device.
  std::byte* device_data() const noexcept { return device_data_; }

 private:
  int device_;
  std::byte* data_ = nullptr;
  std::byte* device_data_ = nullptr;
  size_t bytes_;
};

// Host memory of somebody else, who keeps it longer than this.
class PinnedView {
 public:
  PinnedView(int device, std::byte* data, size_t bytes);
  ~PinnedView();
  PinnedView(const PinnedView&) = delete;
  PinnedView& operator=(const PinnedView&) = delete;
  std::byte* device_data() const noexcept { return device_data_; }
  size_t bytes() const noexcept { return bytes_; }

 private:
  int device_;
  std::byte* data_;
  std::byte* device_data_ = nullptr;
  size_t bytes_;
};

}  // namespace pplx::moe::cuda
