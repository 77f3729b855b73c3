// Words that somebody else increments.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>

#include "proxy/engine/core.h"

namespace pplx {

// Lives until its handle is gone and its last write has completed.
class WatchImpl final : public CompletionSink, public std::enable_shared_from_this<WatchImpl> {
 public:
  WatchImpl(std::shared_ptr<EngineCore> core, WatchConfig config);

  // Locked. Acts on what has changed since the last look; returns the number of increments.
  size_t look(EngineCore& core);
  void complete(const Error* error) noexcept override;

  const std::shared_ptr<EngineCore> core;
  WatchConfig config;
  std::atomic<uint64_t> seen{0}, posted{0}, completed{0};
  mutable std::mutex mutex;    // guards error
  std::optional<Error> error;  // the first

 private:
  void fail(const Error& failure);

  std::atomic<bool> telling_{false};  // a callback is queued that has not yet read `seen`
  bool broken_ = false;               // locked
  std::shared_ptr<WatchImpl> self_;   // while writes are under way; locked
};

}  // namespace pplx
