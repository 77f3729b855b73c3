// A piece of a GPU's memory that the CPU writes like its own.
#pragma once

#include <cstddef>
#include <cstdint>

#include "xla_ffi/cuda/gdrcopy_loader.h"

namespace pplx::moe::cuda {

// What GDRCopy pins and maps are whole pages of this size.
inline constexpr size_t kGpuPage = size_t{1} << 16;

// Of whole GPU pages, mapped by GDRCopy. Goes before the device memory does.
class GdrWindow {
 public:
  // `memory` is a device address. Throws kFabric where library or driver are missing or refuse it.
  GdrWindow(void* memory, size_t bytes);
  ~GdrWindow();
  GdrWindow(const GdrWindow&) = delete;
  GdrWindow& operator=(const GdrWindow&) = delete;

  // Where the CPU writes `offset` bytes after `memory`.
  template <typename T>
  T* at(size_t offset) const noexcept {
    return reinterpret_cast<T*>(data_ + offset);
  }

 private:
  void undo() noexcept;

  const GdrCopy& library_;
  Gdr* driver_ = nullptr;
  GdrHandle handle_{};
  bool pinned_ = false;
  void* mapping_ = nullptr;
  size_t mapped_ = 0;
  std::byte* data_ = nullptr;
};

// A store through such a mapping, which may wait in the CPU's write-combining buffers, is on its way after
// this.
void push_stores() noexcept;

}  // namespace pplx::moe::cuda
