// Counters of immediates by value: a flat table, since every arrived write is a look-up.
#pragma once

#include <atomic>
#include <memory>
#include <unordered_map>
#include <vector>

#include "proxy/engine/engine.h"

namespace pplx {

struct ImmState {
  explicit ImmState(uint32_t value, std::weak_ptr<EngineCore> owner) : imm(value), core(std::move(owner)) {}
  struct Waiter {
    uint64_t n;
    CompletionSink* sink;
    uint64_t id;
  };
  // Only the holder of the progress lock writes, so that no locked instruction is needed.
  uint64_t add() {
    uint64_t now = count.load(std::memory_order_relaxed) + 1;
    count.store(now, std::memory_order_release);
    return now;
  }

  std::atomic<uint64_t> count{0};
  std::atomic<bool> released{false};  // handles to it are left, but it counts no more
  uint64_t wake_at = UINT64_MAX;      // the smallest n of `waiters`, which the progress lock guards as well
  std::vector<Waiter> waiters;
  const uint32_t imm;
  const std::weak_ptr<EngineCore> core;
};

// Guarded by the progress lock.
class ImmTable {
 public:
  ImmTable() : slots_(kInitial) {}

  ImmState* find(uint32_t imm) const {
    for (size_t i = hash(imm);; i = (i + 1) & (slots_.size() - 1)) {
      const Slot& slot = slots_[i];
      if (slot.state == nullptr) return nullptr;
      if (slot.imm == imm) return slot.state;
    }
  }
  std::shared_ptr<ImmState> shared(uint32_t imm) const {
    auto found = owned_.find(imm);
    return found == owned_.end() ? nullptr : found->second;
  }
  void insert(std::shared_ptr<ImmState> state) {
    uint32_t imm = state->imm;
    if ((owned_.size() + 1) * 2 > slots_.size()) rebuild(slots_.size() * 2);
    place(imm, state.get());
    owned_.emplace(imm, std::move(state));
  }
  // Values come and go by the thousand, so nothing is built anew: whoever was placed further along its chain
  // than the gap moves up into it, and leaves the next gap.
  void erase(uint32_t imm) {
    if (owned_.erase(imm) == 0) return;
    const size_t mask = slots_.size() - 1;
    size_t gap = hash(imm);
    while (slots_[gap].imm != imm || slots_[gap].state == nullptr) gap = (gap + 1) & mask;
    for (size_t i = (gap + 1) & mask; slots_[i].state != nullptr; i = (i + 1) & mask) {
      if (((i - hash(slots_[i].imm)) & mask) < ((i - gap) & mask)) continue;  // it belongs behind the gap
      slots_[gap] = slots_[i];
      gap = i;
    }
    slots_[gap] = {};
  }

 private:
  static constexpr size_t kInitial = 256;
  struct Slot {
    uint32_t imm = 0;
    ImmState* state = nullptr;
  };

  size_t hash(uint32_t imm) const { return (imm * 0x9E3779B1U >> 8) & (slots_.size() - 1); }
  void place(uint32_t imm, ImmState* state) {
    size_t i = hash(imm);
    while (slots_[i].state != nullptr) i = (i + 1) & (slots_.size() - 1);
    slots_[i] = {imm, state};
  }
  void rebuild(size_t size) {
    slots_.assign(size, {});
    for (const auto& [imm, state] : owned_) place(imm, state.get());
  }

  std::vector<Slot> slots_;
  std::unordered_map<uint32_t, std::shared_ptr<ImmState>> owned_;
};

}  // namespace pplx
