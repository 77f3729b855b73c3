// Files beside the program that runs, wherever it was built.
#pragma once

#include <filesystem>
#include <string>

namespace pplx::moe::cuda::testing {

inline std::string beside(const char* name) {
  return (std::filesystem::read_symlink("/proc/self/exe").parent_path() / name).string();
}

}  // namespace pplx::moe::cuda::testing
