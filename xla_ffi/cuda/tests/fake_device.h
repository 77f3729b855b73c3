// Memory that the CPU reaches only by asking, as a GPU's: whoever touches it by its own address dies.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <vector>

namespace pplx::moe::cuda::testing {

class FakeDevice {
 public:
  explicit FakeDevice(size_t bytes) : bytes_(bytes), file_(memfd_create("fake-device", MFD_CLOEXEC)) {
    if (file_ < 0 || ftruncate(file_, static_cast<off_t>(bytes)) != 0) throw std::runtime_error("memfd");
    data_ = map(PROT_NONE);
    inside_ = map(PROT_READ | PROT_WRITE);
    const std::lock_guard guard(mutex());
    all().push_back(this);
  }
  ~FakeDevice() {
    {
      const std::lock_guard guard(mutex());
      std::erase(all(), this);
    }
    munmap(data_, bytes_);
    munmap(inside_, bytes_);
    close(file_);
  }
  FakeDevice(const FakeDevice&) = delete;
  FakeDevice& operator=(const FakeDevice&) = delete;

  std::byte* data() const { return data_; }
  size_t bytes() const { return bytes_; }

  // What lies at an address, for whoever plays the device; of no device: the address itself.
  static std::byte* inside(const void* address) {
    auto* at = static_cast<std::byte*>(const_cast<void*>(address));
    const std::lock_guard guard(mutex());
    for (const FakeDevice* device : all()) {
      if (at >= device->data_ && at < device->data_ + device->bytes_) {
        return device->inside_ + (at - device->data_);
      }
    }
    return at;
  }
  // As SimConfig::copy.
  static void copy(void* to, const void* from, size_t bytes) { std::memcpy(inside(to), inside(from), bytes); }

 private:
  static std::mutex& mutex() {
    static std::mutex mutex;
    return mutex;
  }
  static std::vector<const FakeDevice*>& all() {
    static std::vector<const FakeDevice*> devices;
    return devices;
  }
  std::byte* map(int access) const {
    void* memory = mmap(nullptr, bytes_, access, MAP_SHARED, file_, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("mmap");
    return static_cast<std::byte*>(memory);
  }

  size_t bytes_;
  int file_;
  std::byte* data_ = nullptr;
  std::byte* inside_ = nullptr;
};

}  // namespace pplx::moe::cuda::testing
