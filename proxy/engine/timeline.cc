#include "proxy/engine/timeline.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <string_view>

namespace pplx {
namespace {

const char* name_of(Timeline::What what) {
  switch (what) {
    case Timeline::What::kWrite:
      return "write";
    case Timeline::What::kRead:
      return "read";
    case Timeline::What::kMessage:
      return "message";
    case Timeline::What::kImmediate:
      return "immediate";
    case Timeline::What::kArrivedMessage:
      return "message arrived";
    case Timeline::What::kBackpressure:
      return "back-pressure";
    case Timeline::What::kError:
      return "error";
  }
  return "?";
}

std::string quoted(std::string_view text) {
  std::string out = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char escaped[8];
      std::snprintf(escaped, sizeof escaped, "\\u%04x", static_cast<unsigned>(c));
      out += escaped;
    } else {
      out += c;
    }
  }
  return out + '"';
}

// The format's unit is the microsecond.
std::string micros(uint64_t nanoseconds) {
  char text[32];
  std::snprintf(text, sizeof text, "%llu.%03llu", static_cast<unsigned long long>(nanoseconds / 1000),
                static_cast<unsigned long long>(nanoseconds % 1000));
  return text;
}

}  // namespace

// The Trace Event Format: a process an engine, a thread a NIC. Operations of a NIC overlap, so they are
// asynchronous events ("b", "e") with an id each; what has no duration is an instant ("i"), and the number of
// outstanding operations a counter ("C").
std::string Timeline::json(const std::vector<std::string>& peers,
                           const std::vector<std::string>& nics) const {
  const std::string pid = std::to_string(getpid());
  std::string out = "{\"displayTimeUnit\":\"ns\",\"traceEvents\":[";
  bool first = true;
  auto emit = [&](const std::string& body) {
    out += first ? "\n{" : ",\n{";
    first = false;
    out += body + ",\"pid\":" + pid + "}";
  };
  for (size_t nic = 0; nic < nics.size(); ++nic) {
    emit("\"ph\":\"M\",\"name\":\"thread_name\",\"tid\":" + std::to_string(nic) +
         ",\"args\":{\"name\":" + quoted("NIC " + std::to_string(nic) + " " + nics[nic]) + "}");
  }
  const uint64_t kept = std::min<uint64_t>(added_, events_.size());
  for (uint64_t i = added_ - kept; i < added_; ++i) {
    const Event& event = events_[static_cast<size_t>(i % events_.size())];
    const std::string tid = std::to_string(event.nic);
    std::string args = "\"bytes\":" + std::to_string(event.bytes);
    if (event.peer < peers.size()) args += ",\"peer\":" + quoted(peers[event.peer]);
    if (event.has_imm) args += ",\"imm\":" + std::to_string(event.imm);
    const std::string name = std::string("\"name\":\"") + name_of(event.what) + "\",\"cat\":\"engine\"";
    if (event.end > event.start) {
      const std::string id = ",\"id\":" + std::to_string(i) + ",\"tid\":" + tid;
      std::string begun = name + id;
      begun += ",\"ph\":\"b\",\"ts\":";
      begun += micros(event.start);
      begun += ",\"args\":{";
      begun += args;
      emit(begun + "}");
      emit(name + id + ",\"ph\":\"e\",\"ts\":" + micros(event.end));
      std::string counter = "\"name\":\"outstanding, NIC ";
      counter += tid;
      counter += "\",\"ph\":\"C\",\"ts\":";
      counter += micros(event.end);
      counter += ",\"args\":{\"operations\":";
      counter += std::to_string(event.outstanding);
      emit(counter + "}");
    } else {
      std::string instant = name;
      instant += ",\"tid\":";
      instant += tid;
      instant += ",\"ph\":\"i\",\"s\":\"t\",\"ts\":";
      instant += micros(event.start);
      instant += ",\"args\":{";
      instant += args;
      emit(instant + "}");
    }
  }
  return out + "\n]}\n";
}

}  // namespace pplx
