// Bugs on purpose: mutants.py writes copies of sources under test in which each can be switched on.
#pragma once

#include <string>

namespace pplx::sim {

// Whether the bug of this name is switched on (--mutant).
bool mutated(const char* name) noexcept;
void switch_on(std::string name);

}  // namespace pplx::sim
