// A libgdrapi.so for tests on machines without GPUs: "device memory" is the caller's own. What goes wrong is
// said by FAKE_GDR.
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

constexpr size_t kPage = 1 << 16;

struct Info {
  uint64_t va, mapped_size;
  uint32_t page_size;
  uint64_t tm_cycles;
  uint32_t cycles_per_ms;
  unsigned mapped : 1, wc_mapping : 1;
};

bool told(const char* what) {
  const char* given = std::getenv("FAKE_GDR");
  return given != nullptr && std::strcmp(given, what) == 0;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

struct gdr {
  unsigned long address = 0;
  size_t size = 0;
  bool pinned = false, mapped = false;
};
struct gdr_mh_t {
  unsigned long h;
};

// Of all drivers: how many are open, pinned and mapped.
int fake_gdr_in_use = 0;

gdr* gdr_open() {
  if (told("no driver")) return nullptr;
  ++fake_gdr_in_use;
  return new gdr;
}
int gdr_close(gdr* g) {
  if (g->pinned || g->mapped) return EBUSY;
  --fake_gdr_in_use;
  delete g;
  return 0;
}
int gdr_pin_buffer(gdr* g, unsigned long address, size_t size, uint64_t, uint32_t, gdr_mh_t* handle) {
  if (told("no pages")) return ENOMEM;
  if (address % kPage != 0 || size % kPage != 0) return EINVAL;
  g->address = address;
  g->size = size;
  g->pinned = true;
  ++fake_gdr_in_use;
  handle->h = reinterpret_cast<unsigned long>(g);
  return 0;
}
int gdr_unpin_buffer(gdr* g, gdr_mh_t handle) {
  if (handle.h != reinterpret_cast<unsigned long>(g) || !g->pinned || g->mapped) return EINVAL;
  g->pinned = false;
  --fake_gdr_in_use;
  return 0;
}
int gdr_map(gdr* g, gdr_mh_t, void** address, size_t size) {
  if (told("no mapping")) return EAGAIN;
  if (!g->pinned || size != g->size) return EINVAL;
  // "early": the mapping begins before what was asked for, as where the driver takes larger pages.
  *address = reinterpret_cast<void*>(g->address - (told("early") ? kPage : 0));
  g->mapped = true;
  ++fake_gdr_in_use;
  return 0;
}
int gdr_unmap(gdr* g, gdr_mh_t, void*, size_t) {
  if (!g->mapped) return EINVAL;
  g->mapped = false;
  --fake_gdr_in_use;
  return 0;
}
int gdr_get_info_v2(gdr* g, gdr_mh_t, Info* info) {
  const size_t before = told("early") ? kPage : 0;
  *info = {.va = g->address - before,
           .mapped_size = told("short") ? kPage / 2 : g->size + before,
           .page_size = kPage,
           .tm_cycles = 0,
           .cycles_per_ms = 0,
           .mapped = 1,
           .wc_mapping = 1};
  return 0;
}
void gdr_runtime_get_version(int* major, int* minor) {
  *major = told("version 3") ? 3 : 2;
  *minor = 5;
}
int gdr_driver_get_version(gdr*, int* major, int* minor) {
  *major = 2;
  *minor = 4;
  return 0;
}

}  // extern "C"
#pragma GCC visibility pop
