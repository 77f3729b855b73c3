// GDRCopy, opened at run time: one build works with its library and without.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace pplx::moe::cuda {

// As gdrapi.h 2.x declares them, whose header no distribution has.
struct Gdr;  // the library's, of an open driver
struct GdrHandle {
  unsigned long h;
};
struct GdrInfo {
  uint64_t va;           // of the mapping's first byte on the device
  uint64_t mapped_size;  // in bytes
  uint32_t page_size;
  // Deprecated members, bits, and what later versions append.
  alignas(8) std::byte more[104];
};

struct GdrCopy {
  Gdr* (*open)() = nullptr;
  int (*close)(Gdr*) = nullptr;
  int (*pin_buffer)(Gdr*, unsigned long address, size_t size, uint64_t p2p_token, uint32_t va_space,
                    GdrHandle*) = nullptr;
  int (*unpin_buffer)(Gdr*, GdrHandle) = nullptr;
  int (*map)(Gdr*, GdrHandle, void** address, size_t size) = nullptr;
  int (*unmap)(Gdr*, GdrHandle, void* address, size_t size) = nullptr;
  int (*get_info)(Gdr*, GdrHandle, GdrInfo*) = nullptr;
  void (*runtime_version)(int* major, int* minor) = nullptr;
  int (*driver_version)(Gdr*, int* major, int* minor) = nullptr;
  std::string path;
  int major = 0, minor = 0;
};

// Opens it when it is first needed, and keeps it. Throws kFabric, naming what was tried, and also where
// PPLX_GDRCOPY=off.
const GdrCopy& load_gdrcopy();

}  // namespace pplx::moe::cuda
