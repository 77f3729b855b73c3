// What the bindings of TransferEngine stand on: errors, waits that give way to Ctrl-C, memory whose owner is
// a Python object, and futures completed off the engine's threads.
//
// Lock order. A thread that makes progress holds the engine's lock, so no thread may wait for the engine
// while it holds the GIL, and nothing that runs under the engine's lock may wait for the GIL. Hence every
// call into the engine releases the GIL, completions go through a queue (Completer), and the buffer of a
// registered array is given back through Py_AddPendingCall where the GIL is not held.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
#include <future>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <tuple>
#include <unordered_set>
#include <utility>
#include <vector>

#include "proxy/engine/engine.h"
#include "proxy/error.h"
#include "proxy/fabric/library_path.h"
#include "proxy/process.h"

namespace nb = nanobind;

namespace pplx {

// How long a blocking call stays away from Python before it looks for Ctrl-C.
inline constexpr Duration kSlice = std::chrono::milliseconds(50);

// ---- errors ------------------------------------------------------------------------------------------

// The class of pplx_jax.errors under which Python knows `kind`. Needs the GIL.
inline nb::object error_class(ErrorKind kind) {
  const std::string name(error_name(kind));
  const char* const module = kind == ErrorKind::kInvalidArgument ? "builtins" : "pplx_jax.errors";
  return nb::module_::import_(module).attr(name.c_str());
}

inline void translate_error(const std::exception_ptr& error, void* /*payload*/) {
  try {
    std::rethrow_exception(error);
  } catch (const Error& e) {
    PyErr_SetString(error_class(e.kind()).ptr(), e.what());
  }
}

// ---- time --------------------------------------------------------------------------------------------

// Seconds to Duration; engine.py has checked that the number is finite and positive. Bounded, so that
// adding it to a time point cannot overflow.
inline Duration to_duration(double seconds) {
  return std::chrono::duration_cast<Duration>(std::chrono::duration<double>(std::clamp(seconds, 0.0, 1e9)));
}

inline std::optional<Duration> to_duration(std::optional<double> seconds) {
  return seconds ? std::optional(to_duration(*seconds)) : std::nullopt;
}

inline std::string seconds_text(Duration duration) {
  std::string text = std::to_string(std::chrono::duration<double>(duration).count());
  text.erase(text.find_last_not_of('0') + 1);
  if (text.ends_with('.')) text.pop_back();
  return text + " s";
}

// Runs signal handlers; throws what they raised. Needs the GIL.
inline void check_signals() {
  if (PyErr_CheckSignals() != 0) throw nb::python_error();
}

// Calls `attempt(slice)` without the GIL until it returns true; false when `timeout` passed.
template <typename Attempt>
bool wait_in_slices(Duration timeout, Attempt&& attempt) {
  const Deadline deadline = Clock::now() + timeout;
  for (;;) {
    const Duration left =
        std::max(Duration::zero(), std::chrono::duration_cast<Duration>(deadline - Clock::now()));
    {
      const nb::gil_scoped_release release;
      if (attempt(std::min(left, kSlice))) return true;
    }
    check_signals();
    if (left <= kSlice) return false;
  }
}

// ---- memory ------------------------------------------------------------------------------------------

// Buffers whose last user was a thread without the GIL: given back by the interpreter's main thread, or at
// the next registration.
class Graveyard {
 public:
  // Never destroyed: threads may bury until the very end of the process.
  static Graveyard& instance() {
    static Graveyard* const graveyard = new Graveyard;
    return *graveyard;
  }

  void bury(std::unique_ptr<Py_buffer> buffer) {
    {
      const std::lock_guard lock(mutex_);
      buffers_.push_back(std::move(buffer));
    }
    Py_AddPendingCall([](void*) { return instance().release_all(), 0; }, nullptr);
  }

  // A reference that we own.
  void bury(PyObject* object) {
    {
      const std::lock_guard lock(mutex_);
      objects_.push_back(object);
    }
    Py_AddPendingCall([](void*) { return instance().release_all(), 0; }, nullptr);
  }

  // Needs the GIL.
  void release_all() {
    std::vector<std::unique_ptr<Py_buffer>> buffers;
    std::vector<PyObject*> objects;
    {
      const std::lock_guard lock(mutex_);
      buffers.swap(buffers_);
      objects.swap(objects_);
    }
    for (const auto& buffer : buffers) PyBuffer_Release(buffer.get());
    for (PyObject* const object : objects) Py_DECREF(object);
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Py_buffer>> buffers_;
  std::vector<PyObject*> objects_;
};

// A Python object that any thread may let go.
inline std::shared_ptr<PyObject> keep_object(const nb::object& object) {
  return {object.inc_ref().ptr(), [](PyObject* held) {
            if (Py_IsInitialized() != 0) Graveyard::instance().bury(held);
          }};
}

// A Python object's memory, held until the last engine handle to it is gone.
struct BufferHold {
  std::unique_ptr<Py_buffer> buffer;

  explicit BufferHold(std::unique_ptr<Py_buffer> held) : buffer(std::move(held)) {}
  BufferHold(const BufferHold&) = delete;
  BufferHold& operator=(const BufferHold&) = delete;
  ~BufferHold() {
    if (!buffer) return;
    if (Py_IsInitialized() == 0) {
      static_cast<void>(buffer.release());  // the interpreter and the object are gone
    } else if (PyGILState_Check() != 0) {
      PyBuffer_Release(buffer.get());
    } else {
      Graveyard::instance().bury(std::move(buffer));
    }
  }
};

// A handle of the engine owned by Python: its destructor may wait for the engine, so it lets the GIL go.
template <typename T>
struct Handle {
  std::shared_ptr<T> value;

  explicit Handle(std::shared_ptr<T> handle) : value(std::move(handle)) {}
  Handle(Handle&&) noexcept = default;
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  Handle& operator=(Handle&&) = delete;
  ~Handle() {
    if (!value) return;
    const nb::gil_scoped_release release;
    value.reset();
  }
};

using PyRegion = Handle<Region>;
using PyRemoteRegion = Handle<RemoteRegion>;
using PyPeerGroup = Handle<PeerGroup>;
using PyGroupRegions = Handle<GroupRegions>;
using PyRemotePool = Handle<RemotePool>;

inline nb::bytes to_python(const Bytes& bytes) { return nb::bytes(bytes.data(), bytes.size()); }

inline Bytes to_bytes(const nb::bytes& bytes) {
  const auto* const data = static_cast<const std::byte*>(bytes.data());
  return {data, data + bytes.size()};
}

// ---- completions -------------------------------------------------------------------------------------

// Completes concurrent.futures.Future objects from a thread of its own. The engine's side only puts a
// finished operation into a queue, because a sink may neither block nor call the engine (nor take the GIL).
class Completer : public std::enable_shared_from_this<Completer> {
 public:
  // One Python future over one or more completions. Owned by `live_` until it is in the queue.
  class Operation final : public CompletionSink {
   public:
    Operation(Completer& owner, nb::object future, size_t completions)
        : owner_(owner), future_(std::move(future)), left_(completions) {}
    ~Operation() = default;
    Operation(const Operation&) = delete;
    Operation& operator=(const Operation&) = delete;

    void complete(const Error* error) noexcept override { owner_.completed(this, error); }

    // Kept for as long as the NIC may use them; dropped, without the GIL, before the future is completed.
    std::shared_ptr<Region> source;
    std::vector<std::shared_ptr<const RemoteRegion>> targets;

   private:
    friend class Completer;
    Completer& owner_;
    nb::object future_;
    size_t left_;
    std::optional<Error> error_;
  };

  // Needs the GIL. `future` is running and is completed after `completions` (at least one) calls of the sink.
  Operation* begin(nb::object future, size_t completions, std::shared_ptr<Region> source,
                   std::vector<std::shared_ptr<const RemoteRegion>> targets) {
    auto operation = std::make_unique<Operation>(*this, std::move(future), completions);
    operation->source = std::move(source);
    operation->targets = std::move(targets);
    const std::lock_guard lock(mutex_);
    if (stopping_) throw Error(ErrorKind::kClosed, "the TransferEngine is closed");
    if (!thread_.joinable()) {
      thread_ = std::thread([self = shared_from_this()] { self->run(); });
    }
    return *live_.insert(operation.release()).first;
  }

  // The operation was refused when it was posted: the caller raises. Needs the GIL.
  void abandon(Operation* operation) {
    {
      const std::lock_guard lock(mutex_);
      if (live_.erase(operation) == 0) return;  // close() was faster and has failed it
    }
    const std::unique_ptr<Operation> owned(operation);
    const nb::gil_scoped_release release;
    owned->source.reset();
    owned->targets.clear();
  }

  // `sent` completes `operation`. engine.h's send has no sink, so that the thread looks at these in turn.
  void follow(Operation* operation, std::future<void> sent) {
    const std::lock_guard lock(mutex_);
    if (!live_.contains(operation)) return;
    sends_.emplace_back(operation, std::move(sent));
    wake_.notify_one();
  }

  // The engine is closed: whatever is left fails with kClosed. Without the GIL.
  void stop() {
    std::thread thread;
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
      wake_.notify_one();
      thread.swap(thread_);
    }
    if (!thread.joinable()) return;
    if (thread.get_id() == std::this_thread::get_id()) {
      thread.detach();  // close() in a future's callback; the thread ends after it
    } else {
      thread.join();
    }
  }

 private:
  void completed(Operation* operation, const Error* error) noexcept {
    const std::lock_guard lock(mutex_);
    if (!live_.contains(operation) || operation->left_ == 0) return;
    if (error != nullptr && !operation->error_) operation->error_ = *error;
    if (--operation->left_ == 0) finish(operation);
  }

  void finish(Operation* operation) {
    live_.erase(operation);
    done_.emplace_back(operation);
    wake_.notify_one();
  }

  void run() {
    std::unique_lock lock(mutex_);
    for (;;) {
      poll_sends();
      if (done_.empty()) {
        if (stopping_) {
          fail_rest();
          if (done_.empty()) return;
        } else if (sends_.empty()) {
          wake_.wait(lock);
          continue;
        } else {
          wake_.wait_for(lock, std::chrono::microseconds(100));
          continue;
        }
      }
      std::deque<std::unique_ptr<Operation>> batch;
      batch.swap(done_);
      lock.unlock();
      for (const auto& operation : batch) {
        operation->source.reset();
        operation->targets.clear();
      }
      deliver(std::move(batch));
      lock.lock();
    }
  }

  void poll_sends() {
    std::erase_if(sends_, [this](auto& send) {
      auto& [operation, sent] = send;
      if (sent.wait_for(std::chrono::seconds(0)) != std::future_status::ready) return false;
      try {
        sent.get();
      } catch (const Error& error) {
        operation->error_ = error;
      } catch (const std::exception& error) {
        operation->error_ = Error(ErrorKind::kFabric, error.what());
      }
      finish(operation);
      return true;
    });
  }

  void fail_rest() {
    sends_.clear();
    while (!live_.empty()) {
      Operation* const operation = *live_.begin();
      if (!operation->error_) {
        operation->error_ = Error(ErrorKind::kClosed, "the engine was closed before the operation completed");
      }
      finish(operation);
    }
  }

  static void deliver(std::deque<std::unique_ptr<Operation>> batch) {
    if (Py_IsInitialized() == 0) {
      for (auto& operation : batch) static_cast<void>(operation->future_.release());
      return;
    }
    const nb::gil_scoped_acquire acquire;
    for (auto& operation : batch) {
      try {
        if (operation->error_) {
          operation->future_.attr("set_exception")(
              error_class(operation->error_->kind())(operation->error_->what()));
        } else {
          operation->future_.attr("set_result")(nb::none());
        }
      } catch (nb::python_error& error) {
        error.discard_as_unraisable("completing a TransferEngine future");
      }
      operation.reset();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::thread thread_;
  bool stopping_ = false;
  std::unordered_set<Operation*> live_;
  std::deque<std::unique_ptr<Operation>> done_;
  std::vector<std::pair<Operation*, std::future<void>>> sends_;
};

}  // namespace pplx
