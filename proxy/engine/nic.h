// An engine's NICs, its ways to each peer, and what is counted on them. All guarded by the progress lock.
#pragma once

#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "proxy/engine/op.h"
#include "proxy/engine/types.h"
#include "proxy/fabric/fabric.h"

namespace pplx {

inline constexpr size_t kSendSlots = 64;  // buffers of a chunk

struct Nic {
  std::unique_ptr<Fabric> fabric;
  FabricCaps caps;
  std::vector<FabricMemory> send_memory;  // by chunk
  std::optional<Error> down;              // why it was taken out
  std::optional<Error> failing;           // reported while polling; taken out after it
  size_t outstanding = 0;
  size_t deepest = 0;
  OpList abandoned;  // that its fabric holds although their callers have been told
  uint32_t sampled = 0;
  LatencyHistogram latency;
};

// From one of our NICs to one of a peer's.
struct Path {
  uint32_t nic = 0;
  uint32_t remote = 0;
  static constexpr uint32_t kNone = UINT32_MAX;
  uint32_t number = kNone;  // of the peer's NIC, by our fabric
  bool primary = false;     // used while any primary path works
  bool dead = false;
  bool listed = false;  // in pending_paths_
  uint32_t next_rail = 0;
  uint32_t completed = 0;          // tick of the last operation that came to a good end
  uint32_t messaged = 0;           // the same, of messages
  std::optional<uint32_t> silent;  // tick since which nothing has come of it, though something was late
  OpQueue pending;                 // not yet taken by the fabric
  OpList posted;
  Traffic traffic;  // but for what is outstanding and queued
};

struct Peer {
  std::string label;
  Bytes address;
  std::vector<Path> paths;
  std::vector<uint16_t> active;  // paths that new operations take
  uint32_t next_path = 0;
  std::optional<Error> failed;    // set once, for good: an engine that restarts has a new address
  OpQueue waiting;                // for `ready`
  bool ready = true;              // may be written to: see FabricCaps::mutual
  uint32_t greeted = 0;           // tick at which it was told of this engine last, where it has to know
  uint32_t messages = 0;          // send buffers that it holds
  uint32_t abandoned = 0;         // operations that fabrics hold although their callers have been told
  bool removed = false;           // for good: if it is met again it gets a new number
  uint64_t last_message = 0;      // number of the latest message to it
  std::set<uint64_t> unanswered;  // numbers of messages that have not completed
};

inline void count(Traffic& traffic, const FabricOp& op) {
  switch (op.kind) {
    case FabricOp::Kind::kWrite:
      ++traffic.writes;
      traffic.write_bytes += op.length;
      break;
    case FabricOp::Kind::kRead:
      ++traffic.reads;
      traffic.read_bytes += op.length;
      break;
    default:
      ++traffic.messages;
  }
}

}  // namespace pplx
