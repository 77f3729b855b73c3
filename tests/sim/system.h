// The system that code under test sees while a scheduler runs: see system.cc.
#pragma once

#include "tests/sim/scheduler.h"

namespace pplx::sim {

// Throws std::runtime_error when something of the system is not the simulation's: before anything else.
void check_system();

}  // namespace pplx::sim
