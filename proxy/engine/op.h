// One operation under way, and where operations come from and wait.
#pragma once

#include <atomic>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "proxy/engine/engine.h"
#include "proxy/fabric/fabric.h"

namespace pplx {

struct RemoteKeys;
class Region;
class RegionImpl;

struct Op : FabricOp {
  Op* next;  // in a queue or free list
  Op* before;
  Op* after;  // in its path's list of posted operations
  CompletionSink* sink;
  uint64_t id;         // for cancel(); 0: none
  uint64_t posted_at;  // ns, where it is timed; 0: it is not
  uint32_t to;         // the engine's number of the peer; FabricOp::peer is the fabric's
  uint32_t stamp;      // the engine's tick when it was submitted
  uint32_t slot;       // messages: index of the send buffer
  uint32_t routed;     // the tick when it took its path, of several
  uint16_t path;       // of its peer
  uint64_t number;     // messages: by which the receiver knows a repetition; 0: it is never repeated
  uint8_t retries;
  bool shared;     // belongs to the shared pool
  bool abandoned;  // its caller has been told that it failed; the provider still holds it
  bool per_shard;  // WriteRequest::imm_per_shard, until it is split
  // What another NIC needs, where there are several: the caller keeps the region, we the keys.
  const RegionImpl* region;
  // Of an abandoned one: the provider may still read or write there, whatever its caller does with it.
  std::shared_ptr<const Region> held;
  std::shared_ptr<const RemoteKeys> keys;
};

// First in, first out.
class OpQueue {
 public:
  bool empty() const { return head_ == nullptr; }
  size_t size() const { return size_; }
  Op* front() const { return head_; }
  void push(Op* op) {
    op->next = nullptr;
    (head_ == nullptr ? head_ : tail_->next) = op;
    tail_ = op;
    ++size_;
  }
  void push_front(Op* op) {
    op->next = head_;
    if (head_ == nullptr) tail_ = op;
    head_ = op;
    ++size_;
  }
  Op* pop() {
    Op* op = head_;
    head_ = op->next;
    --size_;
    return op;
  }
  // Moves all that `wanted` picks to the end of `taken`.
  template <typename Wanted>
  void take(Wanted&& wanted, OpQueue& taken) {
    OpQueue kept;
    while (!empty()) {
      Op* op = pop();
      (wanted(*op) ? taken : kept).push(op);
    }
    *this = kept;
  }

 private:
  Op* head_ = nullptr;
  Op* tail_ = nullptr;
  size_t size_ = 0;
};

// The operations of one path that the fabric holds, oldest first.
class OpList {
 public:
  Op* front() const { return head_; }
  size_t size() const {
    size_t count = 0;
    for (const Op* op = head_; op != nullptr; op = op->after) ++count;
    return count;
  }
  void push(Op* op) {
    op->before = tail_;
    op->after = nullptr;
    (tail_ == nullptr ? head_ : tail_->after) = op;
    tail_ = op;
  }
  void erase(Op* op) {
    (op->before == nullptr ? head_ : op->before->after) = op->after;
    (op->after == nullptr ? tail_ : op->after->before) = op->before;
  }

 private:
  Op* head_ = nullptr;
  Op* tail_ = nullptr;
};

// Any thread pushes; the holder of the progress lock takes everything, in the order of arrival.
class SubmissionQueue {
 public:
  void push(Op* op) {
    op->next = head_.load(std::memory_order_relaxed);
    while (!head_.compare_exchange_weak(op->next, op, std::memory_order_seq_cst, std::memory_order_relaxed)) {
    }
  }
  bool empty() const { return head_.load(std::memory_order_seq_cst) == nullptr; }
  OpQueue take() {
    Op* reversed = nullptr;
    for (Op* op = head_.exchange(nullptr, std::memory_order_acquire); op != nullptr;) {
      Op* next = op->next;
      op->next = reversed;
      reversed = op;
      op = next;
    }
    OpQueue queue;
    while (reversed != nullptr) {
      Op* next = reversed->next;
      queue.push(reversed);
      reversed = next;
    }
    return queue;
  }

 private:
  std::atomic<Op*> head_{nullptr};
};

// Operations are recycled and freed only with the pool: a provider may keep pointing at one that was given
// up. Not thread-safe by itself: the core guards one by the progress lock and a second one, for threads that
// could not get it, by a mutex of its own.
class OpPool {
 public:
  Op* take() {
    if (free_ == nullptr) grow();
    Op* op = free_;
    free_ = op->next;
    return op;
  }
  void put(Op* op) {
    op->next = free_;
    free_ = op;
  }

 private:
  static constexpr size_t kChunk = 256;
  void grow() {
    chunks_.push_back(std::make_unique<Op[]>(kChunk));
    for (size_t i = 0; i < kChunk; ++i) put(&chunks_.back()[i]);
  }
  std::vector<std::unique_ptr<Op[]>> chunks_;
  Op* free_ = nullptr;
};

}  // namespace pplx
