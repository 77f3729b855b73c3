// Host code that the kernels' files share: which kernel, how many blocks, one launch a round.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <type_traits>

#include "xla_ffi/cuda/exchange.cuh"
#include "xla_ffi/cuda/kernels.h"

namespace pplx::moe::cuda {

// visit(null pointer of the row type that `dtype` names).
template <typename Visit>
auto with_row_type(DType dtype, Visit&& visit) {
  switch (dtype) {
    case DType::kBFloat16:
      return visit(static_cast<__nv_bfloat16*>(nullptr));
    case DType::kFloat16:
      return visit(static_cast<__half*>(nullptr));
    case DType::kFloat32:
      break;
  }
  return visit(static_cast<float*>(nullptr));
}

// How many warps a row is cut into: few tokens are spread over all of them. Equal on all ranks.
inline int32_t parts_of(int32_t tokens, int num_sms) {
  constexpr int32_t kSenders = kThreads / kWarp / 2;
  const int32_t per_block = (tokens + num_sms - 1) / num_sms;
  int32_t parts = 1;
  while (parts < kMaxParts && 2 * parts * per_block <= kSenders) parts *= 2;
  return parts;
}

// enqueue(args) for each round of a step.
template <typename Enqueue>
cudaError_t launch_rounds(const KernelCall& call, float* ticket_out, const float* ticket_in, bool whole_rows,
                          Enqueue&& enqueue) {
  const int32_t rounds = call.shape.rounds(call.tokens);
  if (rounds > 1 && (ticket_out != nullptr || ticket_in != nullptr)) return cudaErrorNotSupported;
  for (int32_t round = 0; round < rounds; ++round) {
    const int32_t length = std::min(call.shape.chunk, call.tokens);
    const Args args{.control = call.control,
                    .shape = call.shape,
                    .layout = call.layout,
                    .kind = call.kind,
                    .site = call.site,
                    .tag = call.tag,
                    .tokens = call.tokens,
                    .round = round,
                    .parts = whole_rows ? 1 : parts_of(length, call.num_sms),
                    .order = call.order,
                    .ticket_out = ticket_out,
                    .ticket_in = ticket_in};
    if (const cudaError_t error = enqueue(args); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <typename... Arguments>
cudaError_t launch(void (*kernel)(Arguments...), const KernelCall& call, size_t shared_bytes,
                   const std::type_identity_t<Arguments>&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(call.num_sms));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = call.stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Loads a kernel and lowers `num_sms` to what runs at a time.
template <typename Kernel>
cudaError_t load_kernel(Kernel* kernel, size_t shared_bytes, int* num_sms) {
  const auto* function = reinterpret_cast<const void*>(kernel);
  int device = 0, multiprocessors = 0, blocks = 0;
  cudaError_t error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(shared_bytes));
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, function, kThreads, shared_bytes);
  }
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess && blocks < 1) error = cudaErrorInvalidConfiguration;
  if (error == cudaSuccess) *num_sms = std::min(*num_sms, multiprocessors);
  return error;
}

#ifdef PPLX_TRACE
// Microseconds since the earliest block began: the first, the mean and the last block.
inline void print_trace(const char* name, int blocks) {
  static uint64_t times[kTraceEvents][kTraceBlocks];
  cudaDeviceSynchronize();
  cudaMemcpyFromSymbol(times, trace_times, sizeof(times));
  const uint64_t zero = *std::min_element(times[0], times[0] + blocks);
  std::printf("  %s:", name);
  for (int event = 0; event < kTraceEvents; ++event) {
    double sum = 0, first = 1e30, last = -1e30;
    int count = 0;
    for (int block = 0; block < blocks; ++block) {
      if (times[event][block] < zero) continue;
      const double at = static_cast<double>(times[event][block] - zero) / 1e3;
      sum += at;
      first = std::min(first, at);
      last = std::max(last, at);
      ++count;
    }
    if (count != 0) std::printf(" %d:[%.1f %.1f %.1f]", event, first, sum / count, last);
  }
  std::printf("\n");
}
#endif

cudaError_t load_dispatch(const MoeShape& shape, int* num_sms);
cudaError_t load_combine(const MoeShape& shape, int* num_sms);
cudaError_t load_combine_transpose(const MoeShape& shape, int* num_sms);

}  // namespace pplx::moe::cuda
