// The exchanges' kernels, as host code sees them. Every function only enqueues on `stream`, and enqueues the
// same whatever the data: it may be captured into a CUDA graph.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "xla_ffi/cuda/control.h"
#include "xla_ffi/exchange_args.h"
#include "xla_ffi/layout.h"

namespace pplx::moe::cuda {

// One custom call.
struct KernelCall {
  Control* control = nullptr;
  MoeShape shape;
  RegionLayout layout;
  Kind kind = Kind::kDispatch;
  uint32_t site = 0;  // index in the group's table of call sites
  uint64_t tag = 0;
  int32_t tokens = 0;
  int32_t num_sms = 1;     // blocks that a kernel may use; equal on all ranks
  float* order = nullptr;  // out [], zero; null: none
  cudaStream_t stream = nullptr;
};

// Send and recv in one call, or apart: a send writes `ticket` [4], its recv reads it.
cudaError_t dispatch(const KernelCall& call, const DispatchSend& send, const DispatchRecv& recv);
cudaError_t dispatch_send(const KernelCall& call, const DispatchSend& send, float* ticket);
cudaError_t dispatch_recv(const KernelCall& call, const DispatchRecv& recv, const float* ticket);

cudaError_t combine(const KernelCall& call, const CombineSend& send, const CombineRecv& recv);
cudaError_t combine_send(const KernelCall& call, const CombineSend& send, float* ticket);
cudaError_t combine_recv(const KernelCall& call, const CombineRecv& recv, const float* ticket);

cudaError_t combine_transpose(const KernelCall& call, const CombineTransposeSend& send,
                              const CombineTransposeRecv& recv);
cudaError_t combine_transpose_send(const KernelCall& call, const CombineTransposeSend& send, float* ticket);
cudaError_t combine_transpose_recv(const KernelCall& call, const CombineTransposeRecv& recv,
                                   const float* ticket);

cudaError_t dispatch_transpose(const KernelCall& call, const DispatchTransposeSend& send,
                               const DispatchTransposeRecv& recv);
cudaError_t dispatch_transpose_send(const KernelCall& call, const DispatchTransposeSend& send, float* ticket);
cudaError_t dispatch_transpose_recv(const KernelCall& call, const DispatchTransposeRecv& recv,
                                    const float* ticket);

// Loads every kernel of a shape on the current device, so that none has to be loaded while others wait for
// it, and returns through `num_sms` how many blocks of the hungriest one the device runs at a time, one a
// multiprocessor at most. cudaErrorInvalidConfiguration: the shape's tables do not fit in shared memory.
cudaError_t load_kernels(const MoeShape& shape, int* num_sms);

}  // namespace pplx::moe::cuda
