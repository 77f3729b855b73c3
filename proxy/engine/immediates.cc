// Counting what arrives.
#include <algorithm>
#include <cstdio>

#include "proxy/engine/core.h"
#include "proxy/log.h"

namespace pplx {
namespace {

constexpr size_t kMaxUserValues = 65536;

std::string hex(uint32_t imm) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", imm);
  return text;
}

}  // namespace

uint64_t ImmCounter::value() const noexcept {
  return state_ == nullptr ? 0 : state_->count.load(std::memory_order_acquire);
}

void ImmCounter::wait(uint64_t n, std::optional<Duration> timeout) const {
  if (value() >= n) return;
  auto core = state_ != nullptr ? state_->core.lock() : nullptr;
  if (core == nullptr) throw Error(ErrorKind::kClosed, "the TransferEngine is closed");
  const auto over = [&] { return core->closed() || state_->released.load(std::memory_order_acquire); };
  core->wait([&] { return value() >= n || over(); }, core->deadline(timeout));
  if (value() >= n) return;
  std::string what = "waiting for " + std::to_string(n) + " immediates " + hex(state_->imm) + ", " +
                     std::to_string(value()) + " arrived";
  if (core->closed()) throw Error(ErrorKind::kClosed, what + " before the TransferEngine was closed");
  if (over()) throw Error(ErrorKind::kClosed, what + " before the value was released");
  throw Error(ErrorKind::kTimeout, what + " before the deadline");
}

void EngineCore::on_immediate(uint32_t imm) {
  if (gpu_writes_.needed()) [[unlikely]] {
    try {
      gpu_writes_.flush();
    } catch (const Error& error) {
      on_down(error);  // what this NIC brings cannot be vouched for
      return;
    }
  }
  ImmState* state = immediates_.find(imm);
  if (state == nullptr) [[unlikely]] {
    if ((imm & kReservedImmediate) != 0 || user_values_ >= kMaxUserValues) {
      bump(counters_.unknown_immediates);
      return;
    }
    auto made = std::make_shared<ImmState>(imm, weak_from_this());
    state = made.get();
    immediates_.insert(std::move(made));
    ++user_values_;
  }
  bump(counters_.immediates);
  if (state->add() >= state->wake_at) [[unlikely]]
    wake(*state, nullptr, [&](const auto& waiter) { return waiter.n <= state->count.load(); });
  if (timeline_) [[unlikely]] {
    uint64_t now = nanoseconds_now();
    timeline_->add({.start = now,
                    .end = now,
                    .imm = imm,
                    .peer = UINT32_MAX,
                    .nic = static_cast<uint16_t>(polling_),
                    .what = Timeline::What::kImmediate,
                    .has_imm = true});
  }
}

// Tells those of the waiters whom `wanted` picks; returns how many.
template <typename Wanted>
size_t EngineCore::wake(ImmState& state, const Error* error, Wanted&& wanted) {
  std::vector<ImmState::Waiter> told, kept;
  for (auto& waiter : state.waiters) (wanted(waiter) ? told : kept).push_back(waiter);
  state.waiters = std::move(kept);
  state.wake_at = UINT64_MAX;
  for (const auto& waiter : state.waiters) state.wake_at = std::min(state.wake_at, waiter.n);
  watching_.fetch_sub(told.size(), std::memory_order_relaxed);
  if (state.waiters.empty()) std::erase_if(waited_for_, [&](const auto& one) { return one.get() == &state; });
  for (auto& waiter : told) waiter.sink->complete(error);
  return told.size();
}

void EngineCore::when(const ImmCounter& counter, uint64_t n, CompletionSink* sink, uint64_t id) {
  require_open();
  Locked locked(*this);
  if (fabric_closed_) require_open();
  const auto& state = counter.state_;
  if (state == nullptr || state->core.lock().get() != this) {
    throw Error(ErrorKind::kInvalidArgument, "the counter belongs to another engine");
  }
  if (state->count.load() >= n) {
    sink->complete(nullptr);
    return;
  }
  if (state->released) {
    throw Error(ErrorKind::kClosed, "immediate " + hex(state->imm) + " was released; ask for a new counter");
  }
  if (state->waiters.empty()) waited_for_.push_back(state);
  state->waiters.push_back({n, sink, id});
  state->wake_at = std::min(state->wake_at, n);
  watching_.fetch_add(1, std::memory_order_relaxed);
}

size_t EngineCore::cancel_waiters(uint64_t id, const Error& error) {
  size_t taken = 0;
  for (const auto& state : std::vector(waited_for_)) {
    taken += wake(*state, &error, [&](const auto& waiter) { return waiter.id == id; });
  }
  std::vector<MessageWaiter> told, kept;
  for (auto& waiter : message_waiters_) (waiter.id == id ? told : kept).push_back(waiter);
  message_waiters_ = std::move(kept);
  watching_.fetch_sub(told.size(), std::memory_order_relaxed);
  for (auto& waiter : told) waiter.sink->complete(&error);
  return taken + told.size();
}

void EngineCore::close_waiters(const Error& error) {
  for (const auto& state : std::vector(waited_for_)) {
    wake(*state, &error, [](const auto&) { return true; });
  }
  tell_message_waiters(&error);
}

ImmCounter EngineCore::imm_counter(uint32_t imm) {
  require_own_process();
  if ((imm & kReservedImmediate) != 0) {
    throw Error(ErrorKind::kInvalidArgument, "immediate " + hex(imm) + " is reserved: its top bit is set");
  }
  Locked locked(*this);
  ImmCounter counter;
  counter.state_ = immediates_.shared(imm);
  if (counter.state_ == nullptr) {
    if (user_values_ >= kMaxUserValues) {
      throw Error(ErrorKind::kInvalidArgument, "no counter for immediate " + hex(imm) +
                                                   ": 65536 values are in use already; release_immediate() "
                                                   "those that are done");
    }
    counter.state_ = std::make_shared<ImmState>(imm, weak_from_this());
    immediates_.insert(counter.state_);
    ++user_values_;
  }
  return counter;
}

ImmCounter EngineCore::watch(uint32_t imm) {
  require_own_process();
  if ((imm & kReservedImmediate) == 0 || imm == kNoImmediate) {
    throw Error(ErrorKind::kInvalidArgument, "immediate " + hex(imm) + " cannot be watched");
  }
  Locked locked(*this);
  ImmCounter counter;
  counter.state_ = immediates_.shared(imm);
  if (counter.state_ == nullptr) {
    counter.state_ = std::make_shared<ImmState>(imm, weak_from_this());
    immediates_.insert(counter.state_);
  }
  return counter;
}

void EngineCore::unwatch(uint32_t imm) {
  require_own_process();
  if ((imm & kReservedImmediate) == 0) {
    throw Error(ErrorKind::kInvalidArgument, "immediate " + hex(imm) + " is not reserved");
  }
  Locked locked(*this);
  forget(imm);
}

void EngineCore::release_immediate(uint32_t imm) {
  require_own_process();
  if ((imm & kReservedImmediate) != 0) {
    throw Error(ErrorKind::kInvalidArgument, "immediate " + hex(imm) + " is reserved: its top bit is set");
  }
  Locked locked(*this);
  if (forget(imm)) --user_values_;
}

bool EngineCore::forget(uint32_t imm) {
  const auto state = immediates_.shared(imm);
  if (state == nullptr) return false;
  state->released.store(true, std::memory_order_release);
  if (!state->waiters.empty()) {
    const Error error(ErrorKind::kClosed, "immediate " + hex(imm) + " was released");
    wake(*state, &error, [](const auto&) { return true; });
  }
  immediates_.erase(imm);
  return true;
}

}  // namespace pplx
