// The custom calls' handlers, by target name, as XLA wants them registered.
#pragma once

#include <map>
#include <string>

namespace pplx::moe {

std::map<std::string, void*> cpu_handlers();

}  // namespace pplx::moe
