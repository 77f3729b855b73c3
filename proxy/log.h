// The proxy's logger: to stderr, at the level that PPLX_LOG_LEVEL names (default warn).
#pragma once

#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

#include <cstdlib>
#include <memory>

namespace pplx {

inline spdlog::logger& log() {
  // Leaked: threads may log while static objects are destroyed.
  static auto* logger = [] {
    auto* made = new spdlog::logger("pplx", std::make_shared<spdlog::sinks::stderr_sink_mt>());
    const char* level = std::getenv("PPLX_LOG_LEVEL");
    made->set_level(level != nullptr ? spdlog::level::from_str(level) : spdlog::level::warn);
    made->set_pattern("[%H:%M:%S.%f %P %^%l%$] %v");
    made->flush_on(spdlog::level::warn);
    return made;
  }();
  return *logger;
}

}  // namespace pplx
