// Who goes where: experts to places, and the scan that numbers slots. Every block counts what lies before its
// own share of the tokens by itself, so that no block waits for another.
#pragma once

#include "xla_ffi/cuda/exchange.cuh"

namespace pplx::moe::cuda {

// Most ranks that are counted by ballots; more are counted by atomics on shared memory.
inline constexpr int kBallotRanks = 16;

// A team's counts, in shared memory; zero before count_tokens.
struct Counts {
  int32_t* ranks_before;   // [R] slots of this round before the block's share
  int32_t* ranks_total;    // [R] slots of this round
  int32_t* experts_before;  // [physical experts] pairs before the block's share, or null
  int32_t* experts_total;   // [physical experts] pairs, or null
};

// homes(token, out[kTopK]): physical experts, below 0: none. All threads of the team, for every token.
template <int kTopK, typename Homes>
__device__ void count_tokens(const Args& args, const Team& team, Span share, const Counts& counts,
                             Homes&& homes) {
  const MoeShape& shape = args.shape;
  const int32_t begin = args.begin(), end = begin + args.length();
  const bool ballots = shape.num_ranks <= kBallotRanks;
  int32_t before = 0, total = 0;  // of the rank with this lane's number
  for (int32_t first = team.warp() * kWarp; first < args.tokens; first += team.threads) {
    const int32_t token = first + lane_id();
    int32_t home[kTopK];
#pragma unroll
    for (int k = 0; k < kTopK; ++k) home[k] = kNotRouted;
    if (token < args.tokens) homes(token, home);
    const bool mine = token < share.begin, in_round = token >= begin && token < end;
    uint32_t ranks = 0;
#pragma unroll
    for (int k = 0; k < kTopK; ++k) {
      if (home[k] < 0) continue;
      if (counts.experts_before != nullptr) {
        if (mine) atomicAdd(&counts.experts_before[home[k]], 1);
        if (counts.experts_total != nullptr) atomicAdd(&counts.experts_total[home[k]], 1);
      }
      const int32_t rank = home[k] / shape.experts_per_rank;
      if (ballots) {
        ranks |= 1U << rank;
        continue;
      }
      bool earlier = false;
#pragma unroll
      for (int j = 0; j < k; ++j) earlier = earlier || (home[j] >= 0 && home[j] / shape.experts_per_rank == rank);
      if (earlier || !in_round) continue;
      atomicAdd(&counts.ranks_total[rank], 1);
      if (mine) atomicAdd(&counts.ranks_before[rank], 1);
    }
    if (!ballots) continue;
    const uint32_t earlier_lanes = __ballot_sync(kAllLanes, mine && in_round);
    for (int rank = 0; rank < shape.num_ranks; ++rank) {
      const uint32_t voters = __ballot_sync(kAllLanes, in_round && (ranks >> rank & 1U) != 0);
      if (lane_id() != rank) continue;
      total += __popc(voters);
      before += __popc(voters & earlier_lanes);
    }
  }
  if (ballots && lane_id() < shape.num_ranks) {
    atomicAdd(&counts.ranks_total[lane_id()], total);
    atomicAdd(&counts.ranks_before[lane_id()], before);
  }
}

// By one warp, after count_tokens and a barrier; advances the counts before the share to those after it.
// Slots [T, K] of each choice's token on the choice's rank; with kOrdinals those [T, K] of each choice too.
template <int kTopK, bool kOrdinals>
__device__ void number_tokens(const Args& args, Span share, const Counts& counts, const int32_t* home,
                              int32_t* slots, uint32_t* ordinals) {
  constexpr int kTokens = kWarp / kTopK;
  const MoeShape& shape = args.shape;
  const int token_lane = lane_id() / kTopK * kTopK, k = lane_id() % kTopK;
  const uint32_t token_lanes = ((1ULL << kTopK) - 1U) << token_lane;
  const uint32_t earlier_tokens = (1U << token_lane) - 1U;
  for (int32_t first = share.begin; first < share.end; first += kTokens) {
    const int32_t token = first + lane_id() / kTopK;
    const bool valid = token < share.end && k < shape.top_k;
    const int64_t at = int64_t{token} * shape.top_k + k;
    const int32_t expert = valid ? home[at] : kNotRouted;
    const int32_t rank = expert >= 0 ? expert / shape.experts_per_rank : -1 - lane_id();
    const uint32_t same_rank = __match_any_sync(kAllLanes, rank);
    const bool leader = rank >= 0 && (same_rank & token_lanes & lanes_below()) == 0;
    const uint32_t leaders = __ballot_sync(kAllLanes, leader) & same_rank;
    const int32_t slot = rank < 0 ? -1 : counts.ranks_before[rank] + __popc(leaders & earlier_tokens);
    int32_t ordinal = 0;
    uint32_t same_expert = 0;
    if constexpr (kOrdinals) {
      same_expert = __match_any_sync(kAllLanes, expert >= 0 ? expert : -1 - lane_id());
      if (expert >= 0) ordinal = counts.experts_before[expert] + __popc(same_expert & lanes_below());
    }
    __syncwarp();
    if (rank >= 0 && (same_rank & lanes_below()) == 0) counts.ranks_before[rank] += __popc(leaders);
    if (kOrdinals && expert >= 0 && (same_expert & lanes_below()) == 0) {
      counts.experts_before[expert] += __popc(same_expert);
    }
    if (valid) {
      slots[at] = slot;
      if constexpr (kOrdinals) ordinals[at] = ordinal;
    }
    __syncwarp();
  }
}

// A token's destinations, seen by a warp: lane k has the token's choice k.
struct Destinations {
  int32_t expert;     // physical, of this lane's choice; below 0: none
  int32_t rank;       // of the choice, -1: none
  int32_t slot;       // of the token on that rank
  uint32_t group;     // lanes of the token's choices on the same rank
  uint32_t leaders;   // the first lane of each rank's
  bool leads;

  // The choice's place among those of its rank.
  __device__ int entry() const { return __popc(group & lanes_below()); }
};

__device__ inline Destinations destinations_of(const MoeShape& shape, const int32_t* home,
                                               const int32_t* slots, int32_t token) {
  const bool valid = lane_id() < shape.top_k;
  const int64_t at = int64_t{token} * shape.top_k + lane_id();
  Destinations to;
  to.expert = valid ? home[at] : kNotRouted;
  to.slot = valid ? slots[at] : -1;
  to.rank = to.expert >= 0 ? to.expert / shape.experts_per_rank : -1;
  to.group = __match_any_sync(kAllLanes, to.rank >= 0 ? to.rank : -1 - lane_id());
  to.leads = to.rank >= 0 && (to.group & lanes_below()) == 0;
  to.leaders = __ballot_sync(kAllLanes, to.leads);
  return to;
}

// Homes that come back from the caller's program: none where one is out of range, which `sound` says.
template <int kTopK>
struct CheckedHomes {
  const MoeShape& shape;
  const int32_t* home;
  uint32_t* unsound;

  __device__ void operator()(int32_t token, int32_t (&out)[kTopK]) const {
#pragma unroll
    for (int k = 0; k < kTopK; ++k) {
      if (k >= shape.top_k) continue;
      const int32_t expert = home[int64_t{token} * shape.top_k + k];
      if (expert < kPastEnd || expert >= shape.physical_experts()) {
        *unsound = 1;
      } else {
        out[k] = expert;
      }
    }
  }
};

}  // namespace pplx::moe::cuda
