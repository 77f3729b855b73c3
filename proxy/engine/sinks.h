// Completions as futures and callbacks.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>

#include "proxy/engine/engine.h"

namespace pplx {

// Of messages whose loss is noticed otherwise; deletes itself once told.
class IgnoringSink final : public CompletionSink {
 public:
  void complete(const Error* /*error*/) noexcept override { delete this; }
};

// Fulfils a promise; deletes itself once told.
class FutureSink final : public CompletionSink {
 public:
  std::future<void> future() { return promise_.get_future(); }
  void complete(const Error* error) noexcept override {
    if (error == nullptr) {
      promise_.set_value();
    } else {
      promise_.set_exception(std::make_exception_ptr(*error));
    }
    delete this;
  }

 private:
  std::promise<void> promise_;
};

// Runs callbacks one after another on a thread of its own, started by the first one.
class CallbackThread {
 public:
  using Callback = std::function<void(const Error*)>;

  ~CallbackThread() { stop(); }
  void start();                      // idempotent
  bool is_current() const noexcept;  // called from one of its callbacks
  void post(Callback callback, const Error* error);
  // Runs what was posted, then ends the thread. May be called from a callback.
  void stop();

 private:
  struct State {
    std::mutex mutex;
    std::condition_variable ready;
    std::deque<std::pair<Callback, std::optional<Error>>> queue;
    bool stopping = false;
  };
  static void run(std::shared_ptr<State> state);
  static thread_local const State* current_;

  std::mutex mutex_;  // guards thread_
  std::thread thread_;
  std::shared_ptr<State> state_ = std::make_shared<State>();
};

// Hands the completion to the callback thread; deletes itself once told.
class CallbackSink final : public CompletionSink {
 public:
  CallbackSink(CallbackThread& thread, CallbackThread::Callback callback)
      : thread_(thread), callback_(std::move(callback)) {}
  void complete(const Error* error) noexcept override {
    thread_.post(std::move(callback_), error);
    delete this;
  }

 private:
  CallbackThread& thread_;
  CallbackThread::Callback callback_;
};

}  // namespace pplx
