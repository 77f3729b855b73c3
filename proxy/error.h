// Typed errors of the proxy. Each carries what was tried, with whom, and what to do.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>

namespace pplx {

enum class ErrorKind {
  kInvalidArgument,  // the caller's arguments are wrong; nothing was done
  kFabric,           // a library or provider is missing or refused an operation
  kPeer,             // a peer died, aborted or broke the protocol
  kTimeout,          // a deadline passed
  kClosed,           // the engine or group is closed
  kMismatch,         // two ranks reached different exchanges
  kRouting,          // the data is wrong: expert id out of range, duplicate, too many rows
  kCancelled,        // the caller took the operation back
};

// The name under which Python raises the kind; error texts that cross XLA start with it.
constexpr std::string_view error_name(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::kInvalidArgument:
      return "ValueError";
    case ErrorKind::kFabric:
      return "FabricError";
    case ErrorKind::kPeer:
      return "PeerError";
    case ErrorKind::kTimeout:
      return "TimeoutError";
    case ErrorKind::kClosed:
      return "GroupClosedError";
    case ErrorKind::kMismatch:
      return "MismatchError";
    case ErrorKind::kCancelled:
      return "CancelledError";
    case ErrorKind::kRouting:
      return "RoutingError";
  }
  return "FabricError";
}

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& what) : std::runtime_error(what), kind_(kind) {}
  ErrorKind kind() const noexcept { return kind_; }

 private:
  ErrorKind kind_;
};

}  // namespace pplx
