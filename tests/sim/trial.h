// One seed's history, from the first group's connect to the last one's close, and what is wrong with it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "tests/sim/scenario.h"

namespace pplx::sim {

struct Report {
  std::vector<std::string> complaints;  // none: all is as it must be
  uint64_t exchanges = 0;               // that every rank of a group has been through
  uint64_t messages = 0;                // writes that engines took
  uint64_t compared = 0;                // calls whose outputs were compared with the oracle's
  uint64_t switches = 0, digest = 0;
  Nanoseconds virtual_time = 0;
  std::vector<uint64_t> steps;  // posts and polls of the fault's rank, by call
  bool struck = false;          // the fault
  bool failed = false;          // the group of the fault
};

// Once in a process: nonces go on counting.
Report run_trial(const Scenario& scenario);

}  // namespace pplx::sim
