// The oracle's problems as GPUs take them: rows are multiples of 16 bytes.
#pragma once

#include "xla_ffi/tests/cases.h"

namespace pplx::moe::cuda::testing {

using namespace pplx::moe::testing;

// Every problem of the CPU's grid with its rows widened, and widths that matter to kernels.
inline std::vector<Case> gpu_cases() {
  std::vector<Case> all = cases();
  for (Case& c : all) {
    const int multiple = c.problem.quant != Quant::kNone ? 16 : c.problem.dtype == DType::kFloat32 ? 4 : 8;
    c.problem.hidden = static_cast<int>(round_up(c.problem.hidden, multiple));
  }
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    const std::string suffix = dtype == DType::kFloat32    ? "_f32"
                               : dtype == DType::kBFloat16 ? "_bf16"
                                                           : "_f16";
    for (const int hidden : {16, 64, 128, 144, 1040, 7168}) {
      const std::string name = "gpu_hidden" + std::to_string(hidden);
      const int steps = hidden > 1000 ? 3 : 10;
      const int tokens = hidden > 1000 ? 5 : 12;
      Problem problem{.hidden = hidden, .max_tokens = tokens, .dtype = dtype};
      all.push_back({name + suffix, problem, steps});
      problem.quant = Quant::kFp8;
      all.push_back({name + "_fp8" + suffix, problem, steps});
      problem.quant = Quant::kFp8Ue8m0;
      problem.home_dtype = DType::kFloat32;
      all.push_back({name + "_fp8_ue8m0_wide_home" + suffix, problem, steps});
    }
    // Rows that some blocks send whole and others gather in parts.
    for (const int hidden : {2048, 2056}) {
      Problem problem{.ranks = 3, .hidden = hidden, .max_tokens = 80, .dtype = dtype};
      const std::string name = "gpu_gathered_hidden" + std::to_string(hidden);
      all.push_back({name + suffix, problem, 3});
      problem.home_dtype = DType::kFloat32;
      all.push_back({name + "_wide_home" + suffix, problem, 3});
    }
    // More tokens than a block has threads, more experts than a warp.
    all.push_back({"gpu_thousands" + suffix,
                   {.ranks = 2, .experts = 64, .top_k = 8, .hidden = 16, .max_tokens = 1500, .dtype = dtype},
                   3});
    all.push_back({"gpu_experts" + suffix,
                   {.ranks = 2, .experts = 2100, .top_k = 8, .hidden = 16, .max_tokens = 100, .dtype = dtype},
                   3});
  }
  return all;
}

inline std::vector<Case> gpu_cases_of_one_round() {
  std::vector<Case> all = gpu_cases();
  std::erase_if(all, [](const Case& c) { return c.problem.chunk != 0; });
  return all;
}

}  // namespace pplx::moe::cuda::testing
