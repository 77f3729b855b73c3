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

namespace pplx::moe::cuda {

struct Site {
  Kind kind;
  uint64_t tag;
  std::string name;
};

// The call sites of a group, by the index that kernels know them by.
class Sites {
 public:
  // Of a site that is new, the next index. Throws kInvalidArgument beyond kMaxSites.
  uint32_t index(Kind kind, uint64_t tag, std::string_view name);
  // Never moves. Null for an index that was never given out.
  const Site* at(uint32_t index) const;
  const Site* find(Kind kind, uint64_t tag) const;

 private:
  mutable std::mutex mutex_;
  std::deque<Site> sites_;
};

// Never freed.
struct ControlBlock {
  int device = 0;
  Control* control = nullptr;  // device memory
  Sites sites;
  bool used = false;  // by a group before, whose kernels may still be queued

  // Makes the kernels see `values`; only while no kernel of the group runs.
  void write(const Control& values) const;
  void shut() const;
  // The number of the next exchange.
  uint64_t next() const;
};

// The one of this group number and device. Throws kFabric.
ControlBlock& control_block(int64_t group, int device);

}  // namespace pplx::moe::cuda
