#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace pplx::moe::cuda {

// `own` and `theirs` are zero at first; each kernel ends after two seconds at the latest.
cudaError_t answer_flags(cudaStream_t stream, const uint64_t* own, uint64_t* theirs, int turns);
cudaError_t ask_flags(cudaStream_t stream, const uint64_t* own, uint64_t* theirs, int turns,
                      uint64_t* nanoseconds);

}  // namespace pplx::moe::cuda
