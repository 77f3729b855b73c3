// The custom calls' handlers of the CUDA platform, by target name, as XLA wants them registered.
#pragma once

#include <map>
#include <string>

namespace pplx::moe::cuda {

std::map<std::string, void*> cuda_handlers();
std::map<std::string, void*> cuda_half_handlers();  // those of send and recv apart; among the above

}  // namespace pplx::moe::cuda
