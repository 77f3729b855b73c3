// What an engine did and when, as a ring of events that never grows.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "proxy/engine/types.h"

namespace pplx {

inline uint64_t nanoseconds_now() {
  return static_cast<uint64_t>(
      std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now().time_since_epoch()).count());
}

// Guarded by the progress lock.
class Timeline {
 public:
  enum class What : uint8_t { kWrite, kRead, kMessage, kImmediate, kArrivedMessage, kBackpressure, kError };
  struct Event {
    uint64_t start = 0, end = 0;  // ns; equal for what has no duration
    uint64_t bytes = 0;
    uint32_t imm = 0;
    uint32_t peer = 0;
    uint32_t outstanding = 0;  // on the NIC, after the event
    uint16_t nic = 0;
    What what = What::kWrite;
    bool has_imm = false;
  };

  explicit Timeline(size_t capacity) { events_.resize(capacity); }
  void add(const Event& event) {
    events_[static_cast<size_t>(added_ % events_.size())] = event;
    ++added_;
  }
  // `peers` and `nics` by number.
  std::string json(const std::vector<std::string>& peers, const std::vector<std::string>& nics) const;

 private:
  std::vector<Event> events_;
  uint64_t added_ = 0;
};

}  // namespace pplx
