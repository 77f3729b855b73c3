// The proxy's log: to stderr, at the level that PPLX_LOG_LEVEL names (default warn).
//
// spdlog stays behind log.cc: its headers take seconds to compile wherever they are included.
#pragma once

#include <cstdint>
#include <sstream>
#include <string>
#include <string_view>

namespace pplx {

enum class LogLevel { kDebug, kInfo, kWarn, kError };

bool log_enabled(LogLevel level) noexcept;
void write_log(LogLevel level, const std::string& text) noexcept;

// key=value, for tools that read logs; values with spaces or quotes are quoted.
struct Field {
  std::string_view key;
  std::string value;

  Field(std::string_view name, std::string text) : key(name), value(std::move(text)) {}
  Field(std::string_view name, uint64_t number) : key(name), value(std::to_string(number)) {}
};
std::ostream& operator<<(std::ostream& out, const Field& field);

// The parts one after the other, formatted only if the level is on.
template <typename... Parts>
void log(LogLevel level, const Parts&... parts) {
  if (!log_enabled(level)) return;
  std::ostringstream text;
  (text << ... << parts);
  write_log(level, text.str());
}

}  // namespace pplx
