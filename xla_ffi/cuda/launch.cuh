// Host code that the kernels' files share: which kernel, how many blocks, one launch a round.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <numeric>
#include <type_traits>
#include <vector>

#include "xla_ffi/cuda/exchange.cuh"
#include "xla_ffi/cuda/kernels.h"

namespace pplx::moe::cuda {

// visit(null pointer of the row type that `dtype` names).
template <typename Visit>
auto with_row_type(DType dtype, Visit&& visit) {
#ifdef PPLX_TUNING
  static_cast<void>(dtype);
  return visit(static_cast<__nv_bfloat16*>(nullptr));  // quicker to compile
#else
  switch (dtype) {
    case DType::kBFloat16:
      return visit(static_cast<__nv_bfloat16*>(nullptr));
    case DType::kFloat16:
      return visit(static_cast<__half*>(nullptr));
    case DType::kFloat32:
      break;
  }
  return visit(static_cast<float*>(nullptr));
#endif
}

// How a kernel's blocks share the work. Equal on all ranks.
struct Division {
  double sender_share = 1;     // of the blocks, where there are tokens enough for blocks to take sides
  bool senders_begin = false;  // with sending: the other blocks find out where this rank's tokens are
  int32_t most_units = kThreads / kWarp;  // that a block's rows are cut into, if there are few; 1: none is
};

inline int64_t slot_stride(const MoeShape& shape, Kind kind) {
  switch (kind) {
    case Kind::kDispatch:
      return shape.dispatch_stride();
    case Kind::kCombine:
      return shape.home_stride();
    case Kind::kDispatchTranspose:
      return shape.dispatch_transpose_stride();
    case Kind::kCombineTranspose:
      break;
  }
  return shape.row_stride();
}

// From so many tokens a block on, blocks take sides.
inline constexpr int32_t kManyTokens = 6;
// Then rows are gathered in so many parts: whole ones would leave most warps idle at the end.
inline constexpr int32_t kGatherParts = 2;
inline constexpr int32_t kGatherGrain = 128;  // vectors; a power of two

// enqueue(args) for each round of a step.
template <typename Enqueue>
cudaError_t launch_rounds(const KernelCall& call, float* ticket_out, const float* ticket_in,
                          const Division& wanted, Enqueue&& enqueue) {
  const int32_t rounds = call.shape.rounds(call.tokens);
  if (rounds > 1 && (ticket_out != nullptr || ticket_in != nullptr)) return cudaErrorNotSupported;
  const int32_t length = std::min(call.shape.chunk, call.tokens);
  const int32_t per_block = (length + call.num_sms - 1) / call.num_sms;
  // Few rows are cut into parts, so that every warp has something to move.
  int32_t parts = 1;
  while (parts < kMaxParts && 2 * parts * per_block <= wanted.most_units) parts *= 2;
  const bool sides = call.num_sms > 1 && call.shape.num_ranks > 1 && per_block >= kManyTokens;
  int32_t gather_parts = kGatherParts;
  double sender_share = wanted.sender_share;
#ifdef PPLX_TUNING
  if (const char* given = getenv("PPLX_PARTS"); given != nullptr) parts = atoi(given);
  if (const char* given = getenv("PPLX_GATHER_PARTS"); given != nullptr) gather_parts = atoi(given);
  if (const char* given = getenv("PPLX_SENDER_SHARE"); given != nullptr) sender_share = atof(given);
#endif
  const int32_t senders = sides ? std::clamp(static_cast<int32_t>(call.num_sms * sender_share + 0.5), 1,
                                             call.num_sms - (wanted.senders_begin ? 1 : 0))
                                : 0;
  const MoeShape& shape = call.shape;
  const bool half = ticket_out != nullptr || ticket_in != nullptr;
  const int32_t gathered = sides ? std::max(parts, gather_parts) : parts;
  const int32_t not_gathering = wanted.senders_begin && senders < call.num_sms ? senders : 0;
  for (int32_t round = 0; round < rounds; ++round) {
    const bool counted = call.kind == Kind::kDispatch && round == 0;
    const Args args{
        .control = call.control,
        .shape = call.shape,
        .layout = call.layout,
        .kind = call.kind,
        .site = call.site,
        .tag = call.tag,
        .tokens = call.tokens,
        .round = round,
        .parts = parts,
        .part_shift = std::countr_zero(static_cast<uint32_t>(parts)),
        .gather_shift = std::countr_zero(static_cast<uint32_t>(gathered)),
        .gather_grain =
            sides && parts == 1 && shape.row_bytes() >= gathered * kGatherGrain * 16 ? kGatherGrain : 1,
        .senders = senders,
        .everybody = {0, Divisor::of(call.num_sms)},
        .gatherers = {not_gathering, Divisor::of(call.num_sms - not_gathering)},
        .partners = Divisor::of(half ? shape.num_ranks : shape.num_ranks - 1),
        .per_rank = 1.0F / static_cast<float>(call.shape.experts_per_rank),
        .entries = shape.entries(),
        .row_bytes = static_cast<int32_t>(shape.row_bytes()),
        .token_bytes = static_cast<int32_t>(shape.token_bytes()),
        .scale_bytes = static_cast<int32_t>(shape.scale_bytes()),
        .scales = static_cast<int32_t>(shape.scales()),
        .slot_header_bytes = static_cast<int32_t>(shape.slot_header_bytes()),
        .scales_at = static_cast<int32_t>(shape.slot_header_bytes() + shape.token_stride()),
        .home_stride = static_cast<int32_t>(shape.home_stride()),
        .stride = slot_stride(shape, call.kind),
        .first_slot = static_cast<int32_t>(sizeof(RegionHeader) + (counted ? shape.counts_bytes() : 0)),
        .region_bytes = call.layout.region_bytes,
        .regions_at = call.layout.region_at(0, 0),
        .counts_at = call.layout.counts_at(0, 0),
        .epochs_at = call.layout.epoch_at(0, 0, 0, 0),
        .ready_at = call.layout.ready_at(0, 0),
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

// Of a multiprocessor's memory; the rest is first-level cache.
inline constexpr int kSharedPercent = 72;

// Loads a kernel and lowers `num_sms` to what runs at a time.
template <typename Kernel>
cudaError_t load_kernel(Kernel* kernel, size_t shared_bytes, int* num_sms) {
  const auto* function = reinterpret_cast<const void*>(kernel);
  int device = 0, multiprocessors = 0, blocks = 0;
  // The limit is the function's, which other groups use as well: it is only ever raised.
  static std::mutex mutex;
  const std::lock_guard guard(mutex);
  cudaFuncAttributes attributes{};
  cudaError_t error = cudaFuncGetAttributes(&attributes, function);
  if (error == cudaSuccess && attributes.maxDynamicSharedSizeBytes < static_cast<int>(shared_bytes)) {
    error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes));
  }
  // The same for all: a multiprocessor has to drain before it divides its memory anew.
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout, kSharedPercent);
  }
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
static void print_trace(const char* name, int blocks) {
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
  // Event 10 ends a block's work.
  std::vector<int> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int a, int b) { return times[10][a] > times[10][b]; });
  for (const int block : {order[0], order[1 % blocks], order[blocks / 2]}) {
    std::printf("    block %d:", block);
    for (int event = 0; event < kTraceEvents; ++event) {
      if (times[event][block] < zero) continue;
      std::printf(" %d:%.1f", event, static_cast<double>(times[event][block] - zero) / 1e3);
    }
    std::printf("\n");
  }
}
#endif

cudaError_t load_dispatch(const MoeShape& shape, int* num_sms);
cudaError_t load_combine(const MoeShape& shape, int* num_sms);
cudaError_t load_combine_transpose(const MoeShape& shape, int* num_sms);

}  // namespace pplx::moe::cuda
