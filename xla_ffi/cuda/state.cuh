// What a kernel is given, and what its blocks know.
#pragma once

#include "xla_ffi/cuda/control.h"
#include "xla_ffi/cuda/sync.cuh"

namespace pplx::moe::cuda {

inline constexpr int kThreads = 512;
// Of a block that both sends and receives: threads that see to headers while the others send.
inline constexpr int kPlacers = 128;
// So many ranks' addresses are kept in shared memory.
inline constexpr int kNearRanks = 64;

#ifdef PPLX_TRACE
// For tuning, with PPLX_TUNING: when each block came by, by its thread that calls first.
inline constexpr int kTraceEvents = 16, kTraceBlocks = 256;
__device__ uint64_t trace_times[kTraceEvents][kTraceBlocks];
__device__ inline void trace(int event) { trace_times[event][blockIdx.x] = now_ns(); }
#else
__device__ inline void trace(int) {}
#endif

// Divides numbers below 2^24 by one below 2^16, in few instructions.
struct Divisor {
  int32_t by;
  uint64_t magic;  // 2^40 / by, rounded up; 0: by is 0, and nothing is divided

  static Divisor of(int32_t by) { return {by, by == 0 ? 0 : ((1ULL << 40U) + by - 1) / by}; }
  __device__ __forceinline__ int32_t quotient(int32_t number) const {
    return static_cast<int32_t>((static_cast<uint32_t>(number) * magic) >> 40U);
  }
};

// Some of a kernel's blocks, which do something together.
struct Crew {
  int32_t first;
  Divisor blocks;
};

// What every kernel gets, by value.
struct Args {
  Control* control;
  MoeShape shape;
  RegionLayout layout;
  Kind kind;
  uint32_t site;
  uint64_t tag;
  int32_t tokens;
  int32_t round;
  int32_t parts, part_shift;  // of a row: 1 << part_shift, at most kMaxParts
  int32_t gather_shift;       // of a row that is gathered: 1 << gather_shift parts, no fewer than sent
  int32_t gather_grain;       // vectors that these are multiples of; 1 if rows are sent in parts as well
  int32_t senders;  // blocks that send before they receive, the others only receive; 0: every block does both
  Crew everybody;
  Crew gatherers;    // blocks that find out at first where this rank's tokens are
  Divisor partners;  // ranks that messages travel to and from
  float per_rank;    // 1 / experts_per_rank
  // What shape and layout say, worked out once by the host: the kernel's code is fetched anew at every
  // launch, so that what is short is quick.
  int32_t entries;
  int32_t row_bytes, token_bytes, scale_bytes, scales;
  int32_t slot_header_bytes, scales_at, home_stride;  // in a slot
  int64_t stride;
  int32_t first_slot;
  int64_t region_bytes, regions_at, counts_at, epochs_at, ready_at;
  float* order;
  float* ticket_out;
  const float* ticket_in;

  __device__ int32_t begin() const { return round * shape.chunk; }  // first token of the round
  __device__ int32_t length() const { return min(tokens - begin(), shape.chunk); }
  // Of a physical expert, at most kMaxExperts: no division.
  __device__ int32_t rank_of(int32_t expert) const {
    return __float2int_rz((static_cast<float>(expert) + 0.5F) * per_rank);
  }
  // Of a slot in the route's arrays, which have room for every token of every source.
  __device__ int32_t slot_index(int32_t source, int32_t slot) const {
    return shape.num_ranks * begin() + source * length() + slot;
  }
};

// An array in a block's dynamic shared memory. Where it lies comes from the host: then it takes no registers.
template <typename T>
struct SharedArray {
  int32_t at = -1;  // in words of 4 bytes; -1: there is none

  __host__ __device__ bool exists() const { return at >= 0; }
#ifdef __CUDACC__
  __device__ __forceinline__ operator T*() const {  // NOLINT(google-explicit-constructor)
    extern __shared__ int4 shared_memory[];
    return reinterpret_cast<T*>(reinterpret_cast<int32_t*>(shared_memory) + at);
  }
#endif
};

// A half-open range of a block's work.
struct Span {
  int32_t begin, end;
  __device__ int32_t size() const { return end - begin; }
};
// Of `count` units from `offset` on, those of this block, which is one of the crew.
__device__ __forceinline__ Span share(int32_t count, int32_t offset, const Crew& crew) {
  const int32_t block = static_cast<int32_t>(blockIdx.x) - crew.first;
  const int32_t each = crew.blocks.quotient(count);
  const int32_t more = count - each * crew.blocks.by;  // the first take one more
  const int32_t begin = offset + each * block + min(block, more);
  return {begin, begin + each + (block < more ? 1 : 0)};
}
// Of rows, of which there may be many.
__device__ inline Span share_of_rows(int64_t begin, int64_t end) {
  const int64_t blocks = gridDim.x, count = end - begin;
  return {static_cast<int32_t>(begin + count * blockIdx.x / blocks),
          static_cast<int32_t>(begin + count * (blockIdx.x + 1) / blocks)};
}

// Per block, in shared memory.
struct BlockState {
  uint64_t number;
  uint32_t stop;            // a wait failed, or the group cannot be used: outputs are poisoned at the end
  uint32_t poisoned;        // this rank's data is wrong
  uint32_t last;            // this block is the last to finish
  uint32_t skip;            // a derivative's recv whose send never was
  uint32_t tainted;         // a route's row was out of range
  uint32_t taken[kQueues];  // units of this block's share of the work
  uint64_t placed;          // a Signal: what the placers have found out is known
  std::byte* host_regions;
  std::byte* host_staging;
  unsigned long long bad;  // what is wrong with the data: the smallest of token, choice and fault
  uint64_t received[kMaxLanes];
  std::byte* peers[kNearRanks];
};

// Units of work [begin, end), taken one by one, by a warp each.
struct Queue {
  uint32_t* taken;
  int32_t begin, end;

  // At or past `end`: nothing is left.
  __device__ int32_t take() const {
    int32_t unit = 0;
    if (lane_id() == 0) unit = begin + static_cast<int32_t>(atomicAdd(taken, 1U));
    return __shfl_sync(kAllLanes, unit, 0);
  }
};

}  // namespace pplx::moe::cuda
