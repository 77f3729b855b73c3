// Accounting of what queues hold. Nothing here touches a device.
#pragma once

#include <bit>
#include <chrono>
#include <cstdint>
#include <vector>

#include "proxy/fabric/fabric.h"

namespace pplx {

// What a completion says about itself: of one with an error nothing else may be read.
struct WorkId {
  enum class Kind : uint8_t { kSend = 1, kImmediate = 2, kMessage = 3, kDatagram = 4, kDatagramSend = 5 };

  Kind kind;
  uint32_t queue;  // number of the queue pair, 24 bits
  uint32_t index;  // place in the queue, or number of the buffer

  uint64_t pack() const {
    return static_cast<uint64_t>(kind) << 56 | static_cast<uint64_t>(queue) << 32 | index;
  }
  static WorkId unpack(uint64_t id) {
    return {static_cast<Kind>(id >> 56), static_cast<uint32_t>(id >> 32 & 0xFF'FFFF),
            static_cast<uint32_t>(id)};
  }
};

// The operations that a send queue holds, oldest first. Only some are signalled: a completion of one is that
// of all before it, as reliable connections complete in order. A place is free again only when a completion
// has said so, never when it might.
class SendQueue {
 public:
  explicit SendQueue(uint32_t depth) : ops_(std::bit_ceil(depth)), depth_(depth) {}

  bool full() const { return size() >= depth_; }
  bool empty() const { return head_ == tail_; }
  uint32_t size() const { return tail_ - head_; }
  uint32_t push(FabricOp* op) {
    ops_[tail_ & mask()] = op;
    return tail_++;
  }
  FabricOp* pop() { return ops_[head_++ & mask()]; }
  FabricOp* pop_newest() { return ops_[--tail_ & mask()]; }
  bool holds(uint32_t place) const { return place - head_ < size(); }
  uint32_t oldest() const { return head_; }

 private:
  uint32_t mask() const { return static_cast<uint32_t>(ops_.size()) - 1; }

  std::vector<FabricOp*> ops_;
  uint32_t depth_;
  uint32_t head_ = 0, tail_ = 0;  // wrap around
};

// When a stopped queue pair may be destroyed. What it was sending has to come back. And some devices throw
// away a queue pair's completions with it, among them those of immediates whose senders know already that
// they have arrived: so the completion queue has to be found empty first, by a poll that began a while after
// the stop, as a device may be in the middle of a packet.
class Drain {
 public:
  using Time = std::chrono::steady_clock::time_point;

  // `limit`: for sends to come back.
  void stop(Time now, Time limit) {
    settled_ = now + kSettles;
    limit_ = limit;
  }
  // `emptied`: when the latest poll began that found the completion queue empty.
  bool done(Time emptied, bool sending, Time now) const {
    return emptied >= settled_ && (!sending || now >= limit_);
  }

 private:
  static constexpr auto kSettles = std::chrono::milliseconds(2);
  Time settled_{}, limit_{};
};

// Whether a peer is still there, by what comes from it. One that says nothing is asked, again and again; one
// that does not answer for as long again is gone.
class Liveness {
 public:
  using Time = std::chrono::steady_clock::time_point;
  using Duration = std::chrono::nanoseconds;

  explicit Liveness(Duration patience) : patience_(patience) {}
  void heard(Time now) { heard_ = now; }
  void excuse(Duration absent) { heard_ += absent; }
  bool gone(Time now) const { return now - heard_ > 2 * patience_; }
  // True: ask now.
  bool ask(Time now) {
    if (now - heard_ <= patience_ || now - asked_ <= patience_ / 8) return false;
    asked_ = now;
    return true;
  }
  Duration patience() const { return patience_; }

 private:
  Duration patience_;
  Time heard_{}, asked_{};
};

// Receives that were posted and not yet consumed; says when to post more.
class ReceiveCredit {
 public:
  // Replenished when an eighth is used up, so that seven are left for what arrives until the next look.
  explicit ReceiveCredit(uint32_t depth) : depth_(depth), batch_(depth / 8 > 0 ? depth / 8 : 1) {}
  void consumed() { ++missing_; }
  uint32_t due() const { return missing_ >= batch_ ? missing_ : 0; }
  void posted(uint32_t count) { missing_ -= count; }
  uint32_t depth() const { return depth_; }
  uint32_t missing() const { return missing_; }

 private:
  uint32_t depth_, batch_;
  uint32_t missing_ = 0;
};

}  // namespace pplx
