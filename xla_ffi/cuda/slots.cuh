// The slots of an exchange after dispatch, from a route's arrays: those that this rank received, and those that
// its own tokens have elsewhere. The arrays come back from the caller's program, so every index is checked.
#pragma once

#include "xla_ffi/cuda/plan.cuh"

namespace pplx::moe::cuda {

// In dynamic shared memory.
struct SlotTables {
  Counts counts;
  int32_t* received;    // [R] slots that this rank received in the round
  int32_t* announced;   // [R] slots that the source says it sends
  uint32_t* poisoned;   // [R] the source's data is wrong
  uint32_t* unsound;    // [1] the route is not one that dispatch returned
  int32_t words;

  __host__ __device__ SlotTables(const MoeShape& shape, int32_t* memory) {
    const int32_t ranks = (shape.num_ranks + 1) / 2 * 2;
    counts = {memory, memory + ranks, nullptr, nullptr};
    received = memory + 2 * ranks;
    announced = memory + 3 * ranks;
    poisoned = reinterpret_cast<uint32_t*>(memory + 4 * ranks);
    unsound = reinterpret_cast<uint32_t*>(memory + 5 * ranks);
    words = 5 * ranks + 2;
  }
};

// By a block: what was received. False: unusable, which is recorded.
__device__ inline bool read_received(const Args& args, const Route& route, Exchange& exchange,
                                     const SlotTables& tables) {
  const bool failed = *route.ok != 1;
  for (int32_t s = threadIdx.x; s < args.shape.num_ranks; s += kThreads) {
    const int32_t count = failed ? 0 : route.source_slots[int64_t{args.round} * args.shape.num_ranks + s];
    if (count < 0 || count > args.length()) *tables.unsound = 1;
    tables.received[s] = count;
  }
  __syncthreads();
  const bool usable = !failed && *tables.unsound == 0;
  if (!usable && blockIdx.x == 0 && threadIdx.x == 0) {
    exchange.data_error(failed ? Fault::kFailedRoute : Fault::kForeignRoute, args.shape.rank);
  }
  __syncthreads();
  return usable;
}

// By a team: where this rank's own tokens are. False: unusable, which is recorded.
template <int kTopK>
__device__ bool number_own_tokens(const Args& args, const Team& team, Span share, const int32_t* home,
                                  Exchange& exchange, const SlotTables& tables, int32_t* slots) {
  count_tokens<kTopK>(args, team, share, tables.counts,
                      CheckedHomes<kTopK>{args.shape, home, tables.unsound});
  team.sync();
  const bool usable = *tables.unsound == 0;
  team.sync();
  if (!usable) {
    if (blockIdx.x == 0 && team.thread() == 0) exchange.data_error(Fault::kForeignRoute, args.shape.rank);
    return false;
  }
  if (team.warp() == 0) {
    number_tokens<kTopK, false>(args, share, tables.counts, home, slots, nullptr);
  }
  team.sync();
  return true;
}

// By a team: every source's header. False: stopped. `expected`: slots that each must announce unless it is
// poisoned, or null.
__device__ inline bool await_headers(const Args& args, const Team& team, Exchange& exchange,
                                     const SlotTables& tables, const int32_t* expected) {
  for (int32_t source = team.thread(); source < args.shape.num_ranks; source += team.threads) {
    uint32_t count = 0;
    bool poisoned = false;
    if (!exchange.await_header(source, &count, &poisoned)) break;
    tables.announced[source] = static_cast<int32_t>(count);
    tables.poisoned[source] = poisoned ? 1 : 0;
    const int32_t wanted = expected == nullptr || poisoned ? static_cast<int32_t>(count) : expected[source];
    if (wanted != static_cast<int32_t>(count)) {
      exchange.fail(Fault::kMalformed, source, static_cast<int64_t>(Malformed::kSlots), count);
      break;
    }
  }
  team.sync();
  const bool going = !exchange.stopped();
  team.sync();
  return going;
}

// The rows of a slot, seen by a warp: lane i has entry i's, -1: none.
__device__ inline int32_t slot_row(const Args& args, const Route& route, int32_t source, int32_t slot,
                                   Exchange& exchange) {
  if (lane_id() >= args.shape.entries()) return -1;
  const int32_t row = route.slot_rows[args.slot_index(source, slot) * args.shape.entries() + lane_id()];
  if (row < route.rows) return row;
  exchange.data_error(Fault::kForeignRoute, args.shape.rank);
  return -1;
}

}  // namespace pplx::moe::cuda
