// What compiled programs hold by number or address, and so what outlives groups: the control block of a group
// on a device, and the call sites that run on it.
#pragma once

#include <cstdint>
#include <deque>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>

#include "proxy/moe/wire.h"
#include "xla_ffi/cuda/control.h"
#include "xla_ffi/cuda/gdr_window.h"
#include "xla_ffi/cuda/site_book.h"

namespace pplx::moe::cuda {

// The call sites of a group, by the index that kernels know them by.
class Sites {
 public:
  // Of a site that is new, the next index. Throws kInvalidArgument beyond kMaxSites.
  uint32_t index(Kind kind, uint64_t tag, std::string_view name);
  // Never moves. Null for an index that was never given out.
  const Site* at(uint32_t index) const;
  std::optional<Site> find(Kind kind, uint64_t tag) const;
  // For another process of this host: the sites there are and those to come, see SiteBookView.
  OwnedFd share();

 private:
  mutable std::mutex mutex_;
  std::deque<Site> sites_;
  std::optional<SiteBook> book_;
};

// Never freed.
struct ControlBlock {
  int device = 0;
  Control* control = nullptr;  // device memory, with GPU pages of its own
  Sites sites;
  bool used = false;  // by a group before, whose kernels may still be queued

  // Makes the kernels see `values`; only while no kernel of the group runs.
  void write(const Control& values) const;
  // Of those pages.
  static constexpr size_t kBytes = (sizeof(Control) + kGpuPage - 1) / kGpuPage * kGpuPage;
  void shut() const;
  // The number of the next exchange.
  uint64_t next() const;
};

// The one of this group number and device. Throws kFabric.
ControlBlock& control_block(int64_t group, int device);

}  // namespace pplx::moe::cuda
