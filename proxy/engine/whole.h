// A request that goes in parts.
#pragma once

#include <optional>

#include "proxy/engine/core.h"

namespace pplx {

// Told by its parts, tells the caller once; deletes itself then. A part that is held back, which carries the
// immediate, is posted when all others are visible at the target. Guarded by the progress lock.
class Whole final : public CompletionSink {
 public:
  // Whoever makes it calls complete(nullptr) when all parts are submitted: some may be done at once.
  Whole(EngineCore& core, CompletionSink* sink, uint64_t id);
  void add() { ++left_; }
  void hold(Op* op) { held_ = op; }
  // What is held back shall not go. False if nothing is.
  bool refuse(const Error& error);
  void complete(const Error* error) noexcept override;

 private:
  ~Whole();

  EngineCore& core_;
  CompletionSink* sink_;
  uint64_t id_;
  size_t left_ = 1;
  Op* held_ = nullptr;
  std::optional<Error> error_;
};

}  // namespace pplx
