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
#include "xla_ffi/engine_handles.h"
#include "xla_ffi/engine_support.h"
#include "xla_ffi/verbs_config.h"

namespace pplx {
namespace {

EngineConfig make_config(std::string fabric, int endpoints, std::string bind_address, std::string nic,
                         const std::vector<std::tuple<std::string, std::string>>& nics, int cpu,
                         double timeout, const nb::dict& sim, const nb::dict& verbs, std::string job) {
  EngineConfig config;
  config.fabric = std::move(fabric);
  config.endpoints = endpoints;
  config.bind_address = std::move(bind_address);
  config.nic = std::move(nic);
  for (const auto& [name, address] : nics) config.nics.push_back({name, address});
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
  config.sim.max_write = nb::cast<uint64_t>(sim["max_write"]);
  config.sim.mutual = nb::cast<bool>(sim["mutual"]);
  if (sim.contains("fences")) config.sim.fences = nb::cast<bool>(sim["fences"]);
  if (sim.contains("message_bytes")) config.sim.message_bytes = nb::cast<uint32_t>(sim["message_bytes"]);
  config.verbs = to_verbs_config(verbs);
  config.job = std::move(job);
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
             const std::vector<std::tuple<std::string, std::string>>& nics, int cpu, double timeout,
             const nb::dict& sim, const nb::dict& verbs, std::string job) {
            new (self) PyEngine(make_config(std::move(fabric), endpoints, std::move(bind_address),
                                            std::move(nic), nics, cpu, timeout, sim, verbs, std::move(job)));
          },
          nb::kw_only(), nb::arg("fabric"), nb::arg("endpoints"), nb::arg("bind_address"), nb::arg("nic"),
          nb::arg("nics"), nb::arg("cpu"), nb::arg("timeout"), nb::arg("sim"), nb::arg("verbs"),
          nb::arg("job") = std::string())
      .def_prop_ro("fabric_name", &PyEngine::fabric_name)
      .def_prop_ro("address", &PyEngine::address)
      .def_prop_ro("max_message", &PyEngine::max_message)
      .def_prop_ro("closed", &PyEngine::closed)
      .def("register_buffer", &PyEngine::register_buffer, nb::arg("object"), nb::arg("writable"))
      .def("allocate", &PyEngine::allocate, nb::arg("size"))
      .def("open", &PyEngine::open, nb::arg("descriptor"))
      .def("write", &PyEngine::write, nb::arg("source").none(), nb::arg("source_offset"), nb::arg("target"),
           nb::arg("target_offset"), nb::arg("length"), nb::arg("imm").none(), nb::arg("future"),
           nb::arg("id"))
      .def("read", &PyEngine::read, nb::arg("target"), nb::arg("target_offset"), nb::arg("source"),
           nb::arg("source_offset"), nb::arg("length"), nb::arg("future"), nb::arg("id"))
      .def("paged_write", &PyEngine::paged_write, nb::arg("source"), nb::arg("source_pages"),
           nb::arg("target"), nb::arg("target_pages"), nb::arg("count"), nb::arg("page_bytes"),
           nb::arg("imm").none(), nb::arg("group"), nb::arg("future"), nb::arg("id"))
      .def("open_group", &PyEngine::open_group, nb::arg("group"), nb::arg("descriptors"))
      .def("scatter_group", &PyEngine::scatter_group, nb::arg("source"), nb::arg("targets"),
           nb::arg("entries"), nb::arg("imm").none(), nb::arg("future"))
      .def("new_id", &PyEngine::new_id)
      .def("cancel", &PyEngine::cancel, nb::arg("id"))
      .def("remove_nic", &PyEngine::remove_nic, nb::arg("index"))
      .def("remove_peer", &PyEngine::remove_peer, nb::arg("address"))
      .def("when", &PyEngine::when, nb::arg("counter"), nb::arg("n"), nb::arg("future"), nb::arg("id"))
      .def("when_message", &PyEngine::when_message, nb::arg("future"), nb::arg("id"))
      .def("open_pool", &PyEngine::open_pool, nb::arg("descriptor"))
      .def("send_to_pool", &PyEngine::send_to_pool, nb::arg("pool"), nb::arg("source"), nb::arg("offset"),
           nb::arg("length"), nb::arg("future"))
      .def("start_timeline", &PyEngine::start_timeline, nb::arg("events"))
      .def("stop_timeline", &PyEngine::stop_timeline)
      .def("timeline", &PyEngine::timeline)
      .def("scatter", &PyEngine::scatter, nb::arg("source"), nb::arg("entries"), nb::arg("imm").none(),
           nb::arg("future"))
      .def("send", &PyEngine::send, nb::arg("to"), nb::arg("payload"), nb::arg("future"))
      .def("recv", &PyEngine::recv, nb::arg("timeout").none() = nb::none())
      .def("imm_counter", &PyEngine::imm_counter, nb::arg("imm"))
      .def("release_immediate", &PyEngine::release_immediate, nb::arg("imm"))
      .def("peer_group", &PyEngine::peer_group, nb::arg("members"), nb::arg("id"))
      .def("barrier", &PyEngine::barrier, nb::arg("group"), nb::arg("timeout").none() = nb::none())
      .def("stats", &PyEngine::stats)
      .def("close", &PyEngine::close);

  nb::class_<PyGroupRegions>(m, "GroupRegions");  // NOLINT(bugprone-unused-raii)
  nb::class_<PyRemotePool>(m, "RemotePool").def_prop_ro("buffer_bytes", [](const PyRemotePool& self) {
    return self.value->buffer_bytes();
  });

  nb::class_<PyWatchWord>(m, "WatchWord")
      .def(nb::init<const PyEngine&, uint64_t, const nb::object&, const std::vector<PyPreparedWrite>&,
                    const nb::object&>(),
           nb::arg("engine"), nb::arg("address"), nb::arg("keepalive").none(), nb::arg("writes"),
           nb::arg("changed").none())
      .def_prop_ro("address", &PyWatchWord::address)
      .def_prop_ro("value", &PyWatchWord::value)
      .def_prop_ro("seen", &PyWatchWord::seen)
      .def_prop_ro("posted", &PyWatchWord::posted)
      .def_prop_ro("completed", &PyWatchWord::completed)
      .def("increment", &PyWatchWord::increment, nb::arg("by"))
      .def("check", &PyWatchWord::raise)
      .def("close", &PyWatchWord::close);

  nb::class_<PyReceivePool>(m, "ReceivePool")
      .def(nb::init<const PyEngine&, const PyRegion*, size_t, size_t, size_t>(), nb::arg("engine"),
           nb::arg("region").none(), nb::arg("buffer_bytes"), nb::arg("buffers"), nb::arg("max_waiting"))
      .def_prop_ro("descriptor", &PyReceivePool::descriptor)
      .def_prop_ro("buffers", &PyReceivePool::buffers)
      .def_prop_ro("free_buffers", &PyReceivePool::free_buffers)
      .def_prop_ro("waiting", &PyReceivePool::waiting)
      .def_prop_ro("lost", &PyReceivePool::lost)
      .def_prop_ro("region", &PyReceivePool::region)
      .def("recv", &PyReceivePool::recv, nb::arg("timeout").none() = nb::none())
      .def("release", &PyReceivePool::release, nb::arg("buffer"));

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
