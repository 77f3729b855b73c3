#include "proxy/engine/sinks.h"

#include <atomic>

#include "proxy/log.h"

namespace pplx {

struct CompletionCounter::State {
  std::atomic<uint64_t> done{0}, failed{0};
  mutable std::mutex mutex;
  std::optional<Error> error;
};

CompletionCounter::CompletionCounter() : state_(std::make_unique<State>()) {}
CompletionCounter::~CompletionCounter() = default;

void CompletionCounter::complete(const Error* error) noexcept {
  if (error != nullptr) [[unlikely]] {
    std::lock_guard lock(state_->mutex);
    if (!state_->error) state_->error = *error;
    state_->failed.fetch_add(1, std::memory_order_relaxed);
  }
  // Last: whoever sees it may destroy the counter.
  state_->done.fetch_add(1, std::memory_order_release);
}

uint64_t CompletionCounter::done() const noexcept { return state_->done.load(std::memory_order_acquire); }
uint64_t CompletionCounter::failed() const noexcept { return state_->failed.load(std::memory_order_acquire); }
std::optional<Error> CompletionCounter::error() const {
  std::lock_guard lock(state_->mutex);
  return state_->error;
}

thread_local const CallbackThread::State* CallbackThread::current_ = nullptr;

bool CallbackThread::is_current() const noexcept { return current_ == state_.get(); }

void CallbackThread::start() {
  std::lock_guard lock(mutex_);
  if (!thread_.joinable()) thread_ = std::thread(run, state_);
}

void CallbackThread::post(Callback callback, const Error* error) {
  std::lock_guard lock(state_->mutex);
  state_->queue.emplace_back(std::move(callback), error != nullptr ? std::optional(*error) : std::nullopt);
  state_->ready.notify_one();
}

void CallbackThread::stop() {
  std::lock_guard lock(mutex_);
  {
    std::lock_guard state_lock(state_->mutex);
    state_->stopping = true;
    state_->ready.notify_one();
  }
  if (!thread_.joinable()) return;
  // A callback that closes the engine cannot wait for itself; the thread owns its state and ends by itself.
  if (is_current()) {
    thread_.detach();
  } else {
    thread_.join();
  }
}

void CallbackThread::run(std::shared_ptr<State> state) {
  current_ = state.get();
  std::unique_lock lock(state->mutex);
  for (;;) {
    state->ready.wait(lock, [&] { return state->stopping || !state->queue.empty(); });
    if (state->queue.empty()) return;
    auto [callback, error] = std::move(state->queue.front());
    state->queue.pop_front();
    lock.unlock();
    try {
      callback(error ? &*error : nullptr);
    } catch (const std::exception& e) {
      log(LogLevel::kError, "a completion callback threw: ", e.what());
    } catch (...) {
      log(LogLevel::kError, "a completion callback threw something that is no std::exception");
    }
    callback = nullptr;  // what it captured may be anything; not under the lock
    lock.lock();
  }
}

}  // namespace pplx
