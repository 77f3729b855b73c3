// Python bindings of TransferEngine: the thin half. pplx_jax/engine.py checks arguments and carries the
// documentation; this file converts, releases the GIL and keeps memory alive.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "proxy/engine/engine.h"
#include "proxy/fabric/library_path.h"
#include "proxy/process.h"
#include "xla_ffi/engine_support.h"

namespace pplx {
namespace {

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
