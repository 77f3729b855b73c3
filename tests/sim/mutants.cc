#include "tests/sim/mutants.h"

#include <utility>

namespace pplx::sim {
namespace {

std::string g_name;

}  // namespace

bool mutated(const char* name) noexcept { return g_name == name; }
void switch_on(std::string name) { g_name = std::move(name); }

}  // namespace pplx::sim
