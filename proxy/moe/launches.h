// Which execution of a program each exchange belongs to, over all ranks of a group that share a process.
#pragma once

#include <array>
#include <cstdint>
#include <mutex>

#include "proxy/moe/wire.h"

namespace pplx::moe {

// All devices of a process get the same number for one launch. Two threads that launch on one group at the
// same time reach the devices in different orders: exchange q is then one launch's on one rank and another's
// on the next, which no header can tell, as both may be the same program.
class Launches {
 public:
  // A rank is in `exchange` for execution `run`: whether every rank that was there before was so for the
  // same.
  bool agree(uint64_t exchange, int64_t run);

 private:
  struct Entry {
    uint64_t exchange = ~uint64_t{0};
    int64_t run = 0;
  };
  std::mutex mutex_;
  // Ranks are never further apart than there are lanes.
  std::array<Entry, size_t{2} * kMaxLanes> entries_;
};

}  // namespace pplx::moe
