// Who goes where: the scan that numbers the slots of this rank's tokens.
//
// Few tokens: every block counts what lies before its own share of them by itself, so that no block waits for
// another. Many: each counts its share, and all meet to add up what lies before.
#pragma once

#include "xla_ffi/cuda/exchange.cuh"

namespace pplx::moe::cuda {

// Most ranks that are counted by ballots; more are counted by atomics on shared memory.
inline constexpr int kBallotRanks = 16;

// So many choices of a block's share of the tokens are kept in shared memory.
inline constexpr int32_t kNearChoices = 128;

// Zero at first.
struct Counts {
  SharedArray<int32_t> ranks_before;    // [R] slots of this round before the block's share
  SharedArray<int32_t> ranks_total;     // [R] slots of this round
  SharedArray<int32_t> experts_before;  // [physical experts] pairs before the block's share, or none
  SharedArray<int32_t> experts_total;   // [physical experts] pairs, or none
};

// Where a lane stands when a warp looks at several tokens' choices at once, kTopK lanes a token.
template <int kTopK>
struct ChoiceLane {
  static constexpr int kTokens = kWarp / kTopK;  // of a warp
  int token = lane_id() / kTopK;
  int k = lane_id() % kTopK;
  uint32_t token_lanes = ((1ULL << kTopK) - 1U) << (lane_id() / kTopK * kTopK);
};

// By a team, of the tokens in `span`: adds up `counts`, experts' in all with `totals`. choices.load(token, k)
// is what the choice is told by, choices.home(token, k, loaded, valid) its physical expert, below 0: none; by
// whole warps.
template <int kTopK, typename Choices>
__device__ __forceinline__ void count_tokens(const Args& args, const Team& team, Span span, Span share,
                                             const Counts& counts, bool totals, const Choices& choices) {
  constexpr int kAtOnce = 3;
  const ChoiceLane<kTopK> lane;
  const MoeShape& shape = args.shape;
  const int32_t round_begin = args.begin(), round_end = round_begin + args.length();
  const int32_t step = team.warps() * lane.kTokens;
  const bool ballots = shape.num_ranks <= kBallotRanks;
  int32_t before = 0, total = 0;  // of the rank with this lane's number
  for (int32_t first = span.begin + team.warp() * lane.kTokens; first < span.end; first += kAtOnce * step) {
    int32_t loaded[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int32_t token = first + i * step + lane.token;
      loaded[i] = token < span.end && lane.k < shape.top_k ? choices.load(token, lane.k) : kNotRouted;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i * step >= span.end) break;
      const int32_t token = first + i * step + lane.token;
      const bool valid = token < span.end && lane.k < shape.top_k;
      const int32_t home = choices.home(token, lane.k, loaded[i], valid);
      const bool routed = home >= 0, mine = token < share.begin;
      const bool in_round = token >= round_begin && token < round_end;
      if (routed && counts.experts_before.exists()) {
        if (mine) atomicAdd(&counts.experts_before[home], 1);
        if (totals) atomicAdd(&counts.experts_total[home], 1);
      }
      const int32_t rank = routed ? args.rank_of(home) : -1;
      const uint32_t same = __match_any_sync(kAllLanes, routed ? rank : -1 - lane_id()) & lane.token_lanes;
      const bool leads = routed && in_round && (same & lanes_below()) == 0;
      if (!ballots) {
        if (leads) atomicAdd(&counts.ranks_total[rank], 1);
        if (leads && mine) atomicAdd(&counts.ranks_before[rank], 1);
        continue;
      }
      const uint32_t earlier = __ballot_sync(kAllLanes, mine);
      for (int32_t r = 0; r < shape.num_ranks; ++r) {
        const uint32_t voters = __ballot_sync(kAllLanes, leads && rank == r);
        if (lane_id() != r) continue;
        total += __popc(voters);
        before += __popc(voters & earlier);
      }
    }
  }
  if (ballots && lane_id() < shape.num_ranks) {
    if (total != 0) atomicAdd(&counts.ranks_total[lane_id()], total);
    if (before != 0) atomicAdd(&counts.ranks_before[lane_id()], before);
  }
}

// By all threads, after each block of the crew has counted its own share into the totals: turns them into
// those of all, and finds what lies before the share. Every block of the crew comes here.
__device__ __forceinline__ void add_up_shares(const Args& args, const Crew& crew, Exchange& exchange,
                                              const Counts& counts) {
  const int32_t ranks = args.shape.num_ranks;
  const int32_t entries = ranks + (counts.experts_total.exists() ? args.shape.physical_experts() : 0);
  uint32_t* shares =
      args.control->shares + int64_t{exchange.lane()} * (ranks + args.shape.physical_experts()) * kMaxBlocks;
  const auto at = [&](int32_t entry) -> int32_t& {
    return entry < ranks ? counts.ranks_total[entry] : counts.experts_total[entry - ranks];
  };
  for (int32_t entry = threadIdx.x; entry < entries; entry += kThreads) {
    shares[int64_t{entry} * kMaxBlocks + blockIdx.x] = at(entry);
  }
  exchange.meet(1, crew);
  if (exchange.stopped()) return;
  // A warp takes an entry at a time, a lane several neighbouring blocks' counts of it.
  constexpr int kEach = kMaxBlocks / kWarp / 4, kWarps = kThreads / kWarp, kAtOnce = 4;
  const uint32_t own = blockIdx.x, begin = crew.first, end = begin + crew.blocks.by;
  for (int32_t first = warp_id(); first < entries; first += kAtOnce * kWarps) {
    uint4 some[kAtOnce][kEach];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int32_t entry = first + i * kWarps;
      if (entry >= entries) continue;
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const uint32_t block = 4 * (j * kWarp + lane_id());
        if (block < end && block + 4 > begin)
          some[i][j] = __ldcg(reinterpret_cast<const uint4*>(shares + int64_t{entry} * kMaxBlocks + block));
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int32_t entry = first + i * kWarps;
      if (entry >= entries) continue;
      uint32_t total = 0, before = 0;
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const uint32_t counts_of[4] = {some[i][j].x, some[i][j].y, some[i][j].z, some[i][j].w};
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const uint32_t block = 4 * (j * kWarp + lane_id()) + w;
          if (block >= begin && block < end) total += counts_of[w];
          if (block >= begin && block < own) before += counts_of[w];
        }
      }
      total = __reduce_add_sync(kAllLanes, total);
      before = __reduce_add_sync(kAllLanes, before);
      if (lane_id() != 0) continue;
      at(entry) = static_cast<int32_t>(total);
      (entry < ranks ? counts.ranks_before[entry] : counts.experts_before[entry - ranks]) =
          static_cast<int32_t>(before);
    }
  }
  __syncthreads();
}

// By one warp, after count_tokens and a barrier; advances the counts before the share to those after it.
// Slots [T, K] of each choice's token on the choice's rank; with kOrdinals those [T, K] of each choice too.
template <int kTopK, bool kOrdinals>
__device__ __forceinline__ void number_tokens(const Args& args, Span share, const Counts& counts,
                                              const int32_t* home, int32_t* slots, uint32_t* ordinals) {
  const ChoiceLane<kTopK> lane;
  const MoeShape& shape = args.shape;
  const uint32_t earlier_tokens = (lane.token_lanes & -lane.token_lanes) - 1U;
  for (int32_t first = share.begin; first < share.end; first += lane.kTokens) {
    const int32_t token = first + lane.token;
    const bool valid = token < share.end && lane.k < shape.top_k;
    const int64_t at = int64_t{token} * shape.top_k + lane.k;
    const int32_t expert = valid ? home[at] : kNotRouted;
    const int32_t rank = expert >= 0 ? args.rank_of(expert) : -1 - lane_id();
    const uint32_t same_rank = __match_any_sync(kAllLanes, rank);
    const bool leader = rank >= 0 && (same_rank & lane.token_lanes & lanes_below()) == 0;
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
  int32_t expert;    // physical, of this lane's choice; below 0: none
  int32_t rank;      // of the choice, -1: none
  int32_t slot;      // of the token on that rank
  uint32_t group;    // lanes of the token's choices on the same rank
  uint32_t leaders;  // the first lane of each rank's
  bool leads;

  // The choice's place among those of its rank.
  __device__ int entry() const { return __popc(group & lanes_below()); }
};

__device__ inline Destinations destinations_of(const Args& args, const int32_t* home, const int32_t* slots,
                                               int32_t token) {
  const bool valid = lane_id() < args.shape.top_k;
  const int64_t at = int64_t{token} * args.shape.top_k + lane_id();
  Destinations to;
  to.expert = valid ? home[at] : kNotRouted;
  to.slot = valid ? slots[at] : -1;
  to.rank = to.expert >= 0 ? args.rank_of(to.expert) : -1;
  to.group = __match_any_sync(kAllLanes, to.rank >= 0 ? to.rank : -1 - lane_id());
  to.leads = to.rank >= 0 && (to.group & lanes_below()) == 0;
  to.leaders = __ballot_sync(kAllLanes, to.leads);
  return to;
}

// Homes that come back from the caller's program: none where one is out of range, which `unsound` says.
struct CheckedHomes {
  const MoeShape& shape;
  const int32_t* homes;
  uint32_t* unsound;

  __device__ int32_t load(int32_t token, int32_t k) const { return homes[int64_t{token} * shape.top_k + k]; }
  __device__ int32_t home(int32_t, int32_t, int32_t loaded, bool valid) const {
    if (!valid) return kNotRouted;
    if (loaded >= kPastEnd && loaded < shape.physical_experts()) return loaded;
    *unsound = 1;
    return kNotRouted;
  }
};

}  // namespace pplx::moe::cuda
