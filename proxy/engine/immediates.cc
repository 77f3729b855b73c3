// Counting what arrives.
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
  core->wait([&] { return value() >= n || core->closed(); }, core->deadline(timeout));
  if (value() >= n) return;
  std::string what = "waiting for " + std::to_string(n) + " immediates " + hex(state_->imm) + ", " +
                     std::to_string(value()) + " arrived";
  if (core->closed()) throw Error(ErrorKind::kClosed, what + " before the TransferEngine was closed");
  throw Error(ErrorKind::kTimeout, what + " before the deadline");
}

void EngineCore::on_immediate(uint32_t imm) {
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
  state->add();
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
      throw Error(ErrorKind::kInvalidArgument, "more than 65536 different immediate values are in use");
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
  immediates_.erase(imm);
}

}  // namespace pplx
