// What a seed stands for: a problem, a network, a program, a fault.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "proxy/engine/types.h"
#include "proxy/moe/wire.h"
#include "tests/sim/scheduler.h"
#include "xla_ffi/tests/oracle.h"

namespace pplx::sim {

enum class FaultKind : uint8_t {
  kNone,
  kKill,      // a rank dies; what is written to it is refused
  kFreeze,    // a rank falls silent for ever, and takes nothing
  kPause,     // a rank does not run for a while, shorter than the timeout
  kStop,      // the same, longer than the timeout: the others give it up
  kSuspend,   // no rank runs for longer than the timeout, as when a machine sleeps
  kStraggle,  // a rank comes to a call long after the others, alive all the while
  kNic,       // one of a rank's NICs breaks
  kLeave,     // a rank closes the group in the middle of the program
  kGiveUp,    // a rank fails the group
  kMismatch,  // a rank makes another call than the others
  kData,      // a rank's routing is wrong
};
inline constexpr int kFaultKinds = 12;
const char* fault_name(FaultKind kind);
std::optional<FaultKind> fault_named(const std::string& name);

struct Fault {
  FaultKind kind = FaultKind::kNone;
  uint32_t rank = 0;
  // Strikes in the rank's call number `call` (the close of the group is the last one), at this post or poll
  // of that call, or at its end.
  size_t call = 0, step = 0;
  Nanoseconds duration = 0;
  uint32_t nic = 0;
  bool tells = false;  // the rank's engine hears of the NIC's end
};

// One send of the program, which is the same on all ranks.
struct Entry {
  size_t part = 0;
  moe::Kind kind = moe::Kind::kDispatch;
};

// One execution.
struct Segment {
  int64_t run = 0;
  std::vector<Entry> sends;
  bool halves = false;    // ranks choose for each call whether to receive at once or later
  bool abandons = false;  // and may leave something unreceived behind
  bool bad = false;       // kData strikes here
};

struct Program {
  moe::testing::Problem problem;
  std::vector<std::vector<moe::testing::Inputs>> parts;  // by rank
  std::vector<Segment> segments;
  size_t calls = 0;  // at most, of a rank
  uint64_t exchanges = 0;
};

struct Wishes {  // of the command line; what is not wished for is drawn
  uint64_t seed = 0;
  std::optional<int> ranks;
  std::optional<uint64_t> exchanges;
  std::vector<FaultKind> faults;  // one of these; empty: any
  std::optional<uint32_t> fault_rank;
  std::optional<size_t> fault_call, fault_step;
};

struct Scenario {
  uint64_t seed = 0;
  std::vector<Program> programs;  // by generation; the fault is in the first
  EngineConfig engine;            // its network is named by the trial
  std::vector<size_t> nics;       // by process
  Duration timeout{}, stall_timeout{};
  Fault fault;

  std::string text() const;  // for people
};

Scenario draw(const Wishes& wishes);

}  // namespace pplx::sim
