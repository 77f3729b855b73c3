// VerbsConfig from the dict that pplx_jax.verbs.VerbsOptions becomes.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <chrono>
#include <cstdint>
#include <string>

#include "proxy/fabric/verbs_config.h"

namespace pplx {

inline VerbsConfig to_verbs_config(const nanobind::dict& options) {
  namespace nb = nanobind;
  VerbsConfig config;
  config.gid_index = nb::cast<int>(options["gid_index"]);
  config.traffic_class = nb::cast<int>(options["traffic_class"]);
  config.service_level = nb::cast<int>(options["service_level"]);
  config.send_depth = nb::cast<uint32_t>(options["send_depth"]);
  config.outstanding = nb::cast<uint32_t>(options["outstanding"]);
  config.receives = nb::cast<uint32_t>(options["receives"]);
  config.ack_timeout = nb::cast<int>(options["ack_timeout"]);
  config.retries = nb::cast<int>(options["retries"]);
  config.relaxed_ordering = nb::cast<bool>(options["relaxed_ordering"]);
  config.connect_timeout =
      std::chrono::nanoseconds(static_cast<int64_t>(nb::cast<double>(options["connect_timeout"]) * 1e9));
  return config;
}

}  // namespace pplx
