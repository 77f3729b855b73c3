// The custom calls' handlers, by target name, as XLA wants them registered.
#pragma once

#include <map>
#include <string>

namespace pplx::moe {

std::map<std::string, void*> cpu_handlers();
std::map<std::string, void*> cpu_half_handlers();  // those of send and recv apart; among the above

}  // namespace pplx::moe
