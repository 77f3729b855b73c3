#include "proxy/log.h"

#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

#include <cstdlib>
#include <memory>
#include <string_view>

namespace pplx {
namespace {

// environment.py refuses any other name, and documents these.
spdlog::level::level_enum level_named(std::string_view name) {
  if (name == "debug") return spdlog::level::debug;
  if (name == "info") return spdlog::level::info;
  if (name == "error") return spdlog::level::err;
  if (name == "off") return spdlog::level::off;
  return spdlog::level::warn;
}

spdlog::logger& logger() {
  // Leaked: threads may log while static objects are destroyed.
  static auto* logger = [] {
    auto* made = new spdlog::logger("pplx", std::make_shared<spdlog::sinks::stderr_sink_mt>());
    const char* level = std::getenv("PPLX_LOG_LEVEL");
    made->set_level(level != nullptr ? level_named(level) : spdlog::level::warn);
    made->set_pattern("[%H:%M:%S.%f %P %^%l%$] %v");
    made->flush_on(spdlog::level::warn);
    return made;
  }();
  return *logger;
}

spdlog::level::level_enum level_of(LogLevel level) {
  switch (level) {
    case LogLevel::kDebug:
      return spdlog::level::debug;
    case LogLevel::kInfo:
      return spdlog::level::info;
    case LogLevel::kWarn:
      return spdlog::level::warn;
    case LogLevel::kError:
      break;
  }
  return spdlog::level::err;
}

}  // namespace

std::ostream& operator<<(std::ostream& out, const Field& field) {
  out << field.key << '=';
  if (!field.value.empty() && field.value.find_first_of(" \"=\n") == std::string::npos) {
    return out << field.value;
  }
  out << '"';
  for (const char c : field.value) {
    if (c == '"' || c == '\\') out << '\\';
    if (c == '\n') {
      out << "\\n";
    } else {
      out << c;
    }
  }
  return out << '"';
}

bool log_enabled(LogLevel level) noexcept { return logger().should_log(level_of(level)); }

void write_log(LogLevel level, const std::string& text) noexcept {
  logger().log(level_of(level), spdlog::string_view_t(text));
}

}  // namespace pplx
