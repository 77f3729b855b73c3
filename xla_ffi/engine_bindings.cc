// Python bindings of TransferEngine: the thin half. pplx_jax/engine.py checks arguments and carries the
// documentation; this file converts, releases the GIL and keeps memory alive.
//
// Lock order. A thread that makes progress holds the engine's lock, so no thread may wait for the engine
// while it holds the GIL, and nothing that runs under the engine's lock may wait for the GIL. Hence every
// call into the engine releases the GIL, completions go through a queue (Completer), and the buffer of a
// registered array is given back through Py_AddPendingCall where the GIL is not held.
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
namespace {

// How long a blocking call stays away from Python before it looks for Ctrl-C.
constexpr Duration kSlice = std::chrono::milliseconds(50);

// ---- errors ------------------------------------------------------------------------------------------

// The class of pplx_jax.errors under which Python knows `kind`. Needs the GIL.
nb::object error_class(ErrorKind kind) {
  const std::string name(error_name(kind));
  const char* const module = kind == ErrorKind::kInvalidArgument ? "builtins" : "pplx_jax.errors";
  return nb::module_::import_(module).attr(name.c_str());
}

void translate_error(const std::exception_ptr& error, void* /*payload*/) {
  try {
    std::rethrow_exception(error);
  } catch (const Error& e) {
    PyErr_SetString(error_class(e.kind()).ptr(), e.what());
  }
}

// ---- time --------------------------------------------------------------------------------------------

// Seconds to Duration; engine.py has checked that the number is finite and positive. Bounded, so that
// adding it to a time point cannot overflow.
Duration to_duration(double seconds) {
  return std::chrono::duration_cast<Duration>(std::chrono::duration<double>(std::clamp(seconds, 0.0, 1e9)));
}

std::optional<Duration> to_duration(std::optional<double> seconds) {
  return seconds ? std::optional(to_duration(*seconds)) : std::nullopt;
}

std::string seconds_text(Duration duration) {
  std::string text = std::to_string(std::chrono::duration<double>(duration).count());
  text.erase(text.find_last_not_of('0') + 1);
  if (text.ends_with('.')) text.pop_back();
  return text + " s";
}

// Runs signal handlers; throws what they raised. Needs the GIL.
void check_signals() {
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

  // Needs the GIL.
  void release_all() {
    std::vector<std::unique_ptr<Py_buffer>> buffers;
    {
      const std::lock_guard lock(mutex_);
      buffers.swap(buffers_);
    }
    for (const auto& buffer : buffers) PyBuffer_Release(buffer.get());
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Py_buffer>> buffers_;
};

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

nb::bytes to_python(const Bytes& bytes) { return nb::bytes(bytes.data(), bytes.size()); }

Bytes to_bytes(const nb::bytes& bytes) {
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

// ---- the engine --------------------------------------------------------------------------------------

class PyImmCounter {
 public:
  PyImmCounter(std::shared_ptr<TransferEngine> engine, ImmCounter counter, uint32_t imm)
      : engine_(std::move(engine)), counter_(std::move(counter)), imm_(imm) {}

  uint64_t value() const noexcept { return counter_.value(); }
  uint32_t imm() const noexcept { return imm_; }

  void wait(uint64_t n, std::optional<double> timeout) const {
    const Duration limit = to_duration(timeout).value_or(engine_->config().timeout);
    const bool reached = wait_in_slices(limit, [&](Duration slice) {
      try {
        counter_.wait(n, slice);
        return true;
      } catch (const Error& error) {
        if (error.kind() != ErrorKind::kTimeout) throw;
        return false;
      }
    });
    if (!reached) {
      throw Error(ErrorKind::kTimeout, "imm_counter(" + std::to_string(imm_) + ").wait(" + std::to_string(n) +
                                           "): " + std::to_string(value()) + " arrived within " +
                                           seconds_text(limit));
    }
  }

 private:
  std::shared_ptr<TransferEngine> engine_;  // a wait drives the engine's progress
  ImmCounter counter_;
  uint32_t imm_;
};

using PyScatterEntry = std::tuple<size_t, const PyRemoteRegion*, size_t, size_t>;

class PyEngine {
 public:
  explicit PyEngine(const EngineConfig& config) : completer_(std::make_shared<Completer>()) {
    const nb::gil_scoped_release release;
    engine_ = std::make_shared<TransferEngine>(config);
    keep_in_forks(this, completer_);  // its thread is not there to be joined
  }
  PyEngine(const PyEngine&) = delete;
  PyEngine& operator=(const PyEngine&) = delete;
  ~PyEngine() {
    const nb::gil_scoped_release release;
    withdraw_from_forks(this);
    shut_down();
    engine_.reset();
  }

  std::string fabric_name() const { return engine_->fabric_name(); }
  nb::bytes address() const { return to_python(engine_->address().bytes()); }
  size_t max_message() const { return engine_->max_message(); }
  bool closed() const { return engine_->closed(); }

  PyRegion register_buffer(const nb::object& object, bool writable) {
    Graveyard::instance().release_all();
    auto buffer = std::make_unique<Py_buffer>();
    const int flags = PyBUF_C_CONTIGUOUS | (writable ? PyBUF_WRITABLE : 0);
    if (PyObject_GetBuffer(object.ptr(), buffer.get(), flags) != 0) throw nb::python_error();
    void* const data = buffer->buf;
    const auto size = static_cast<size_t>(buffer->len);
    auto hold = std::make_shared<BufferHold>(std::move(buffer));
    const nb::gil_scoped_release release;
    return PyRegion(engine_->register_memory(data, size, std::move(hold)));
  }

  PyRegion allocate(size_t size) {
    const nb::gil_scoped_release release;
    return PyRegion(engine_->allocate(size));
  }

  PyRemoteRegion open(const nb::bytes& descriptor) {
    const RegionDescriptor parsed(to_bytes(descriptor));
    const nb::gil_scoped_release release;
    return PyRemoteRegion(engine_->open(parsed));
  }

  void write(const PyRegion* source, size_t source_offset, const PyRemoteRegion& target, size_t target_offset,
             size_t length, std::optional<uint32_t> imm, nb::object future) {
    WriteRequest request;
    request.source = source != nullptr ? source->value.get() : nullptr;
    request.source_offset = source_offset;
    request.target = target.value.get();
    request.target_offset = target_offset;
    request.length = length;
    request.imm = imm;
    post(std::move(future), 1, source, {target.value},
         [&](CompletionSink* sink) { engine_->write(request, sink); });
  }

  void scatter(const PyRegion& source, const std::vector<PyScatterEntry>& entries,
               std::optional<uint32_t> imm, nb::object future) {
    std::vector<ScatterEntry> converted;
    std::vector<std::shared_ptr<const RemoteRegion>> targets;
    converted.reserve(entries.size());
    targets.reserve(entries.size());
    for (const auto& [source_offset, target, target_offset, length] : entries) {
      converted.push_back({source_offset, target->value, target_offset, length});
      targets.push_back(target->value);
    }
    post(std::move(future), entries.size(), &source, std::move(targets),
         [&](CompletionSink* sink) { engine_->scatter(*source.value, converted, imm, sink); });
  }

  void send(const nb::bytes& to, const nb::bytes& payload, nb::object future) {
    const Address address(to_bytes(to));
    const Bytes bytes = to_bytes(payload);
    post(std::move(future), 1, nullptr, {}, [&](Completer::Operation* operation) {
      completer_->follow(operation, engine_->send(address, bytes));
    });
  }

  std::tuple<nb::bytes, nb::bytes> recv(std::optional<double> timeout) {
    const Duration limit = to_duration(timeout).value_or(engine_->config().timeout);
    std::optional<Message> message;
    const bool received = wait_in_slices(limit, [&](Duration slice) {
      try {
        message = engine_->recv(slice);
        return true;
      } catch (const Error& error) {
        if (error.kind() != ErrorKind::kTimeout) throw;
        return false;
      }
    });
    if (!received) {
      throw Error(ErrorKind::kTimeout, "recv(): no message arrived within " + seconds_text(limit));
    }
    return {to_python(message->from.bytes()), to_python(message->payload)};
  }

  PyImmCounter imm_counter(uint32_t imm) {
    const nb::gil_scoped_release release;
    return {engine_, engine_->imm_counter(imm), imm};
  }

  PyPeerGroup peer_group(const std::vector<nb::bytes>& members, uint32_t id) {
    std::vector<Address> addresses;
    addresses.reserve(members.size());
    for (const nb::bytes& member : members) addresses.emplace_back(to_bytes(member));
    const nb::gil_scoped_release release;
    return PyPeerGroup(engine_->peer_group(addresses, id));
  }

  // A barrier that was entered cannot be left and entered again, so it is not waited for in slices: it runs
  // on a thread of its own, which ends by its deadline or by close() if Ctrl-C takes the caller away.
  void barrier(const PyPeerGroup& group, std::optional<double> timeout) {
    engine_->require_own_process();
    const Duration limit = to_duration(timeout).value_or(engine_->config().timeout);
    std::packaged_task<void()> task(
        [engine = engine_, members = group.value, limit] { engine->barrier(*members, limit); });
    std::future<void> entered = task.get_future();
    std::thread(std::move(task)).detach();
    // The engine's own deadline ends the wait; the factor only bounds it in case that it does not.
    wait_in_slices(2 * limit + std::chrono::seconds(10),
                   [&](Duration slice) { return entered.wait_for(slice) == std::future_status::ready; });
    const nb::gil_scoped_release release;
    entered.get();
  }

  nb::dict stats() const {
    EngineStats stats;
    {
      const nb::gil_scoped_release release;
      stats = engine_->stats();
    }
    nb::dict result;
    result["writes"] = stats.writes;
    result["write_bytes"] = stats.write_bytes;
    result["sends"] = stats.sends;
    result["receives"] = stats.receives;
    result["immediates"] = stats.immediates;
    result["unknown_immediates"] = stats.unknown_immediates;
    result["errors"] = stats.errors;
    result["polls"] = stats.polls;
    result["backpressure"] = stats.backpressure;
    result["worker_core"] = stats.worker_core;
    return result;
  }

  void close() {
    const nb::gil_scoped_release release;
    shut_down();
  }

  void require_own_process() const { engine_->require_own_process(); }

 private:
  template <typename Post>
  void post(nb::object future, size_t completions, const PyRegion* source,
            std::vector<std::shared_ptr<const RemoteRegion>> targets, Post&& post_operation) {
    engine_->require_own_process();  // before the completer's lock, which a fork may have left taken
    Completer::Operation* const operation = completer_->begin(
        std::move(future), completions, source != nullptr ? source->value : nullptr, std::move(targets));
    try {
      const nb::gil_scoped_release release;
      post_operation(operation);
    } catch (...) {
      completer_->abandon(operation);
      throw;
    }
  }

  void shut_down() {
    engine_->close();
    if (!engine_->forked()) completer_->stop();
  }

  std::shared_ptr<TransferEngine> engine_;
  std::shared_ptr<Completer> completer_;
};

EngineConfig make_config(std::string fabric, int endpoints, std::string bind_address, std::string nic,
                         int cpu, double timeout, const nb::dict& sim) {
  EngineConfig config;
  config.fabric = std::move(fabric);
  config.endpoints = endpoints;
  config.bind_address = std::move(bind_address);
  config.nic = std::move(nic);
  config.cpu = cpu;  // -1: one of its own, -2: any
  config.timeout = to_duration(timeout);
  config.sim.seed = nb::cast<uint64_t>(sim["seed"]);
  config.sim.network = nb::cast<std::string>(sim["network"]);
  config.sim.reorder = nb::cast<bool>(sim["reorder"]);
  config.sim.max_delay = nb::cast<uint32_t>(sim["max_delay"]);
  config.sim.max_pieces = nb::cast<uint32_t>(sim["max_pieces"]);
  config.sim.stall_every = nb::cast<uint32_t>(sim["stall_every"]);
  config.sim.stall_polls = nb::cast<uint32_t>(sim["stall_polls"]);
  config.sim.queue_depth = nb::cast<uint32_t>(sim["queue_depth"]);
  return config;
}

// The region's bytes as a writable array which keeps `self`, and so the region, alive.
nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>> region_view(nb::handle self) {
  const auto& region = nb::cast<const PyRegion&>(self);
  return {region.value->data(), {region.value->size()}, self};
}

}  // namespace

void bind_engine(nb::module_& m);

void bind_engine(nb::module_& m) {
  nb::register_exception_translator(translate_error);

  nb::class_<PyRegion>(m, "Region")
      .def("view", [](nb::handle_t<PyRegion> self) { return region_view(self); })
      .def_prop_ro("size", [](const PyRegion& self) { return self.value->size(); })
      .def_prop_ro("descriptor",
                   [](const PyRegion& self) { return to_python(self.value->descriptor().bytes()); });

  nb::class_<PyRemoteRegion>(m, "RemoteRegion").def_prop_ro("size", [](const PyRemoteRegion& self) {
    return self.value->size();
  });

  nb::class_<PyPeerGroup>(m, "PeerGroup")
      .def_prop_ro("size", [](const PyPeerGroup& self) { return self.value->size(); })
      .def_prop_ro("rank", [](const PyPeerGroup& self) { return self.value->rank(); });

  nb::class_<PyImmCounter>(m, "ImmCounter")
      .def_prop_ro("imm", &PyImmCounter::imm)
      .def_prop_ro("value", &PyImmCounter::value)
      .def("wait", &PyImmCounter::wait, nb::arg("n"), nb::arg("timeout").none() = nb::none());

  nb::class_<PyEngine>(m, "Engine", nb::is_weak_referenceable())
      .def(
          "__init__",
          [](PyEngine* self, std::string fabric, int endpoints, std::string bind_address, std::string nic,
             int cpu, double timeout, const nb::dict& sim) {
            new (self) PyEngine(make_config(std::move(fabric), endpoints, std::move(bind_address),
                                            std::move(nic), cpu, timeout, sim));
          },
          nb::kw_only(), nb::arg("fabric"), nb::arg("endpoints"), nb::arg("bind_address"), nb::arg("nic"),
          nb::arg("cpu"), nb::arg("timeout"), nb::arg("sim"))
      .def_prop_ro("fabric_name", &PyEngine::fabric_name)
      .def_prop_ro("address", &PyEngine::address)
      .def_prop_ro("max_message", &PyEngine::max_message)
      .def_prop_ro("closed", &PyEngine::closed)
      .def("register_buffer", &PyEngine::register_buffer, nb::arg("object"), nb::arg("writable"))
      .def("allocate", &PyEngine::allocate, nb::arg("size"))
      .def("open", &PyEngine::open, nb::arg("descriptor"))
      .def("write", &PyEngine::write, nb::arg("source").none(), nb::arg("source_offset"), nb::arg("target"),
           nb::arg("target_offset"), nb::arg("length"), nb::arg("imm").none(), nb::arg("future"))
      .def("scatter", &PyEngine::scatter, nb::arg("source"), nb::arg("entries"), nb::arg("imm").none(),
           nb::arg("future"))
      .def("send", &PyEngine::send, nb::arg("to"), nb::arg("payload"), nb::arg("future"))
      .def("recv", &PyEngine::recv, nb::arg("timeout").none() = nb::none())
      .def("imm_counter", &PyEngine::imm_counter, nb::arg("imm"))
      .def("peer_group", &PyEngine::peer_group, nb::arg("members"), nb::arg("id"))
      .def("barrier", &PyEngine::barrier, nb::arg("group"), nb::arg("timeout").none() = nb::none())
      .def("stats", &PyEngine::stats)
      .def("close", &PyEngine::close);

  m.def(
      "set_library_search_path",
      [](std::vector<std::string> folders) { set_library_search_path(std::move(folders)); },
      nb::arg("folders"));
  // Path and version of the libfabric that is used; loads it.
  m.def("libfabric", [] {
    const LibraryInfo library = libfabric_info();
    return std::tuple(library.path, library.version);
  });
}

}  // namespace pplx
