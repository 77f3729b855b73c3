// What the extension modules' handles to groups have in common.
#pragma once

#include <nanobind/nanobind.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "proxy/error.h"
#include "proxy/moe/exchange_group.h"

namespace pplx::moe {

inline nanobind::bytes to_python(const Bytes& bytes) { return nanobind::bytes(bytes.data(), bytes.size()); }

inline std::vector<Bytes> from_python(const std::vector<nanobind::bytes>& all) {
  std::vector<Bytes> out;
  out.reserve(all.size());
  for (const nanobind::bytes& bytes : all) {
    const auto* data = reinterpret_cast<const std::byte*>(bytes.c_str());
    out.emplace_back(data, data + bytes.size());
  }
  return out;
}

// A kind's Python name and text, for pplx_jax to raise.
using Report = std::pair<std::string, std::string>;
inline std::optional<Report> to_report(const std::optional<Error>& error) {
  if (!error) return std::nullopt;
  return Report(error_name(error->kind()), error->what());
}

inline nanobind::dict stats_dict(const GroupStats& stats, int32_t rank) {
  nanobind::dict out;
  out["rank"] = rank;
  out["fabric"] = stats.fabric;
  out["exchanges"] = stats.exchanges;
  out["waits_over_10s"] = stats.waits_over_10s;
  out["region_bytes"] = stats.region_bytes;
  out["staging_bytes"] = stats.staging_bytes;
  out["registrations"] = stats.registrations;
  nanobind::list peers;
  for (const PeerStats& peer : stats.peers) {
    nanobind::dict entry;
    entry["process"] = peer.process;
    entry["sent_bytes"] = peer.sent_bytes;
    entry["received_bytes"] = peer.received_bytes;
    entry["waited_seconds"] = std::chrono::duration<double>(peer.waited).count();
    entry["longest_wait_seconds"] = std::chrono::duration<double>(peer.longest_wait).count();
    entry["recent_wait_seconds"] = std::chrono::duration<double>(peer.recent_wait).count();
    peers.append(entry);
  }
  out["peers"] = peers;
  out["writes"] = stats.engine.writes;
  out["immediates"] = stats.engine.immediates;
  out["unknown_immediates"] = stats.engine.unknown_immediates;
  return out;
}

// `connector(group)` is called from XLA's threads with the GIL, by the first exchange of a group that nobody
// connected.
inline std::function<void(int64_t)> python_connector(nanobind::callable connector) {
  // Leaked with the registry: a handler may run while the interpreter shuts down.
  auto* held = new nanobind::callable(std::move(connector));
  return [held](int64_t group) {
    if (!nanobind::is_alive() || Py_IsInitialized() == 0) return;
    nanobind::gil_scoped_acquire acquire;
    try {
      (*held)(group);
    } catch (nanobind::python_error& error) {
      const nanobind::object type = nanobind::borrow(error.type());
      const std::string name = nanobind::cast<std::string>(type.attr("__name__"));
      const std::string text = nanobind::cast<std::string>(nanobind::str(error.value()));
      throw Error(ErrorKind::kFabric, "connecting at the first exchange failed with " + name + ": " + text);
    }
  };
}

}  // namespace pplx::moe
