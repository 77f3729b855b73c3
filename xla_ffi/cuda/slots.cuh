// The slots of an exchange after dispatch, from a route's arrays: those that this rank received, and those
// that its own tokens have elsewhere. The arrays come back from the caller's program, so every index is
// checked.
#pragma once

#include "xla_ffi/cuda/plan.cuh"

namespace pplx::moe::cuda {

struct SlotTables {
  Counts counts;
  SharedArray<int32_t> received;   // [R] slots that this rank received in the round
  SharedArray<int32_t> announced;  // [R] slots that the source says it sends
  SharedArray<uint32_t> poisoned;  // [R] the source's data is wrong
  SharedArray<uint32_t> unsound;   // [1] the route is not one that dispatch returned
  SharedArray<int32_t> most;       // [1] slots that travel between two ranks
  int32_t words;                   // of the above
  SharedArray<int32_t> near;       // [kNearChoices] slots of the share's tokens, if there are few
  SharedArray<std::byte> end;      // of all that, a multiple of 16 bytes

  explicit SlotTables(const MoeShape& shape) {
    const int32_t ranks = (shape.num_ranks + 1) / 2 * 2;
    counts = {{0}, {ranks}, {}, {}};
    received = {2 * ranks};
    announced = {3 * ranks};
    poisoned = {4 * ranks};
    unsound = {5 * ranks};
    most = {5 * ranks + 1};
    words = 5 * ranks + 2;
    near = {words};
    end = {static_cast<int32_t>(round_up(words + kNearChoices, 4))};
  }
  size_t bytes() const { return 4 * static_cast<size_t>(end.at); }
};

// A part of a slot of another rank.
struct SlotPart {
  int32_t rank, slot, part;
};
// The unit of work with a number: of the partners in turn, from the next rank on.
__device__ __forceinline__ SlotPart slot_part(const Args& args, int32_t unit) {
  const int32_t part = unit & (args.parts - 1), at = unit >> args.part_shift;
  const int32_t slot = args.partners.quotient(at);
  const int32_t rank = args.shape.rank + (at - slot * args.partners.by) + 1;
  return {rank < args.shape.num_ranks ? rank : rank - args.shape.num_ranks, slot, part};
}

// By a block: what was received. False: unusable, which is recorded.
__device__ __forceinline__ bool read_received(const Args& args, const Route& route, Exchange& exchange,
                                              const SlotTables& tables) {
  const bool failed = *route.ok != 1;
  for (int32_t s = threadIdx.x; s < args.shape.num_ranks; s += kThreads) {
    const int32_t count = failed ? 0 : route.source_slots[int64_t{args.round} * args.shape.num_ranks + s];
    if (count < 0 || count > args.length()) *tables.unsound = 1;
    tables.received[s] = count;
    atomicMax(tables.most, count);
  }
  __syncthreads();
  const bool usable = !failed && *tables.unsound == 0;
  if (!usable && blockIdx.x == 0 && threadIdx.x == 0) {
    exchange.data_error(failed ? Fault::kFailedRoute : Fault::kForeignRoute, args.shape.rank);
  }
  __syncthreads();
  return usable;
}

// Where the slots of this rank's tokens are noted down, [T, K].
__device__ __forceinline__ int32_t* slot_notes(const Args& args, Span share, const Exchange& exchange,
                                               const SlotTables& tables) {
  if (args.senders == 0 && share.size() * args.shape.top_k <= kNearChoices) {
    return tables.near - share.begin * args.shape.top_k;
  }
  return args.control->slots + int64_t{exchange.lane()} * args.shape.max_tokens * args.shape.top_k;
}

// How often a crew meets that numbers tokens together.
__device__ __forceinline__ bool adds_up_shares(const Args& args) {
  return args.senders != 0 && args.shape.rounds(args.tokens) == 1;
}
__device__ __forceinline__ uint32_t meetings(const Args& args) { return adds_up_shares(args) ? 2 : 1; }

// By a team, which is the whole block where blocks take sides: where this rank's own tokens are. False:
// unusable, which is recorded, or stopped.
template <int kTopK>
__device__ __forceinline__ bool number_own_tokens(const Args& args, const Team& team, const Crew& crew,
                                                  Span share, const int32_t* home, Exchange& exchange,
                                                  const SlotTables& tables, int32_t* slots) {
  const CheckedHomes choices{args.shape, home, tables.unsound};
  const bool adds_up = adds_up_shares(args);
  const Span span = adds_up ? share : Span{0, args.tokens};
  count_tokens<kTopK>(args, team, span, share, tables.counts, false, choices);
  team.sync();
  bool usable = *tables.unsound == 0;
  team.sync();
  unsigned long long& worst = args.control->worst[exchange.lane()];
  if (args.senders != 0 && team.thread() == 0 && !usable) atomicMax(&worst, 1ULL);
  if (adds_up) {
    // Where others count the rest, what is wrong anywhere must be known everywhere.
    add_up_shares(args, crew, exchange, tables.counts);
    usable = load_volatile(&worst) == 0;
    team.sync();
  }
  if (usable && team.warp() == 0) {
    number_tokens<kTopK, false>(args, share, tables.counts, home, slots, nullptr);
  }
  if (!usable && blockIdx.x == crew.first && team.thread() == 0) {
    exchange.data_error(Fault::kForeignRoute, args.shape.rank);
  }
  if (args.senders != 0) {
    exchange.meet(meetings(args), crew);
  } else {
    team.sync();
  }
  return usable;
}

// By a team: every source's header. False: stopped. `expected`: slots that each must announce unless it is
// poisoned, or null.
__device__ __forceinline__ bool await_headers(const Args& args, const Team& team, Exchange& exchange,
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
__device__ __forceinline__ int32_t slot_row(const Args& args, const Route& route, int32_t source,
                                            int32_t slot, Exchange& exchange) {
  if (lane_id() >= args.entries) return -1;
  const int32_t row = route.slot_rows[args.slot_index(source, slot) * args.entries + lane_id()];
  if (row >= -1 && row < route.rows) return row;
  exchange.data_error(Fault::kForeignRoute, args.shape.rank);
  exchange.taint();
  return -1;
}

}  // namespace pplx::moe::cuda
