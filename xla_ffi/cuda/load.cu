#include <climits>

#include "xla_ffi/cuda/kernels.h"
#include "xla_ffi/cuda/launch.cuh"

namespace pplx::moe::cuda {

cudaError_t load_kernels(const MoeShape& shape, int* num_sms) {
  *num_sms = INT_MAX;
  cudaError_t error = load_dispatch(shape, num_sms);
  if (error == cudaSuccess) error = load_combine(shape, num_sms);
  if (error == cudaSuccess) error = load_combine_transpose(shape, num_sms);
  return error;
}

}  // namespace pplx::moe::cuda
