#include "xla_ffi/cuda/gdr_window.h"

#include <atomic>
#include <cerrno>
#include <cstring>
#include <string>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "proxy/error.h"

namespace pplx::moe::cuda {

GdrWindow::GdrWindow(void* memory, size_t bytes) : library_(load_gdrcopy()) {
  const auto fail = [&](const std::string& what, int code) {
    undo();
    throw Error(ErrorKind::kFabric, "GDRCopy " + std::to_string(library_.major) + "." +
                                        std::to_string(library_.minor) + " (" + library_.path + "): " + what +
                                        (code != 0 ? std::string(": ") + std::strerror(code) : ""));
  };
  const auto address = reinterpret_cast<uintptr_t>(memory);
  if (address % kGpuPage != 0 || bytes == 0 || bytes % kGpuPage != 0) {
    throw Error(ErrorKind::kInvalidArgument, "GDRCopy maps whole pages of " + std::to_string(kGpuPage) +
                                                 " bytes of GPU memory, not " + std::to_string(bytes) +
                                                 " bytes from " + std::to_string(address));
  }
  driver_ = library_.open();
  if (driver_ == nullptr) {
    fail("its driver cannot be used: load the module gdrdrv, and let this user open /dev/gdrdrv", 0);
  }
  if (const int rc = library_.pin_buffer(driver_, address, bytes, 0, 0, &handle_); rc != 0) {
    fail("pinning " + std::to_string(bytes) + " bytes of GPU memory", rc);
  }
  pinned_ = true;
  void* mapping = nullptr;
  if (const int rc = library_.map(driver_, handle_, &mapping, bytes); rc != 0) {
    fail("mapping " + std::to_string(bytes) + " bytes of GPU memory", rc);
  }
  mapping_ = mapping;
  mapped_ = bytes;
  // Begins at a page's start, which the driver may take another size for.
  GdrInfo info{};
  if (const int rc = library_.get_info(driver_, handle_, &info); rc != 0) fail("asking what it mapped", rc);
  if (info.va > address || address - info.va >= info.mapped_size ||
      info.mapped_size - (address - info.va) < bytes) {
    fail("it mapped " + std::to_string(info.mapped_size) + " bytes from " + std::to_string(info.va) +
             ", asked for were " + std::to_string(bytes) + " from " + std::to_string(address),
         0);
  }
  data_ = static_cast<std::byte*>(mapping_) + (address - info.va);
}

GdrWindow::~GdrWindow() { undo(); }

void GdrWindow::undo() noexcept {
  if (mapping_ != nullptr) library_.unmap(driver_, handle_, mapping_, mapped_);
  if (pinned_) library_.unpin_buffer(driver_, handle_);
  if (driver_ != nullptr) library_.close(driver_);
  mapping_ = nullptr;
  pinned_ = false;
  driver_ = nullptr;
}

void push_stores() noexcept {
#if defined(__x86_64__)
  _mm_sfence();
#elif defined(__aarch64__)
  asm volatile("dsb st" : : : "memory");
#else
  std::atomic_thread_fence(std::memory_order_seq_cst);
#endif
}

}  // namespace pplx::moe::cuda
