// The caller's routing, checked, and which physical experts serve it. Tables of a dispatch's block.
#pragma once

#include "xla_ffi/cuda/placement.cuh"
#include "xla_ffi/cuda/plan.cuh"

namespace pplx::moe::cuda {

struct DispatchTables {
  Counts counts;
  SharedArray<int32_t> places;    // [E] the expert's place, or, with replicas, its first one in `replicas`
  SharedArray<int32_t> copies;    // [E]
  SharedArray<int32_t> replicas;  // [physical experts] by expert
  SharedArray<int32_t> source_slots;  // [R]
  SharedArray<int32_t> most_slots;    // [1] of any source
  PlacementTables rows;
  SharedArray<int32_t> scratch;  // [E]
  // [kNearChoices] of the block's share of the tokens, if it is small: physical experts, and what Control's
  // scratch of these names holds otherwise.
  SharedArray<int32_t> homes;
  SharedArray<int32_t> slots;
  SharedArray<uint32_t> ordinals;
  SharedArray<int32_t> replicated;
  int32_t words;

  explicit DispatchTables(const MoeShape& shape) {
    int32_t at = 0;
    const auto take = [&](int32_t count) {
      const SharedArray<int32_t> taken{at};
      at += (count + 1) / 2 * 2;
      return taken;
    };
    const int32_t physical = shape.physical_experts(), ranks = shape.num_ranks;
    counts = {take(ranks), take(ranks), take(physical), take(physical)};
    counted = at;
    source_slots = take(ranks);
    most_slots = take(1);
    replicated = take(1);
    rows.source_base = take(physical);
    zeroed = at;
    places = take(shape.num_experts);
    copies = take(shape.num_experts);
    replicas = take(physical);
    scratch = take(shape.num_experts);
    rows.base = take(shape.experts_per_rank + 1);
    rows.kept = take(shape.experts_per_rank);
    rows.needed = take(1);
    rows.dropped = take(1);
    homes = take(kNearChoices);
    slots = take(kNearChoices);
    ordinals = {take(kNearChoices).at};
    words = at;
  }
  int32_t counted, zeroed;  // the first words, which are `counts`, and which must be zero at first
};

// By a team: which physical expert serves a token; docs/protocol.md: of several copies, number (token + rank)
// mod copies.
static __device__ void find_places(const MoeShape& shape, const Team& team, const int32_t* map,
                                   const DispatchTables& tables) {
  const int32_t physical = shape.physical_experts();
  const int32_t mine = team.thread() < physical ? map[team.thread()] : -1;
  const auto in_range = [&](int32_t expert) { return expert >= 0 && expert < shape.num_experts; };
  for (int32_t e = team.thread(); e < shape.num_experts; e += team.threads) tables.places[e] = -1;
  team.sync();
  for (int32_t p = team.thread(); p < physical; p += team.threads) {
    const int32_t expert = p < team.threads ? mine : map[p];
    if (in_range(expert) && atomicCAS(&tables.places[expert], -1, p) != -1) *tables.replicated = 1;
  }
  team.sync();
  if (*tables.replicated == 0) return;
  for (int32_t e = team.thread(); e < shape.num_experts; e += team.threads) {
    tables.copies[e] = 0;
    tables.scratch[e] = 0;
  }
  team.sync();
  for (int32_t p = team.thread(); p < physical; p += team.threads) {
    if (in_range(map[p])) atomicAdd(&tables.copies[map[p]], 1);
  }
  team.sync();
  if (team.warp() == 0) {
    int32_t end = 0;
    for (int32_t first = 0; first < shape.num_experts; first += kWarp) {
      const int32_t e = first + lane_id();
      const int32_t own = e < shape.num_experts ? tables.copies[e] : 0;
      int32_t sum = own;
#pragma unroll
      for (int width = 1; width < kWarp; width *= 2) {
        const int32_t other = __shfl_up_sync(kAllLanes, sum, width);
        if (lane_id() >= width) sum += other;
      }
      if (e < shape.num_experts) tables.places[e] = end + sum - own;
      end += __shfl_sync(kAllLanes, sum, kWarp - 1);
    }
    __syncwarp();
    // In ascending order of places, which is the order of a replica's number.
    for (int32_t first = 0; first < physical; first += kWarp) {
      const int32_t p = first + lane_id();
      const int32_t expert = p < physical ? map[p] : -1;
      const bool valid = in_range(expert);
      const uint32_t same = __match_any_sync(kAllLanes, valid ? expert : -1 - lane_id());
      if (valid) {
        tables.replicas[tables.places[expert] + tables.scratch[expert] + __popc(same & lanes_below())] = p;
      }
      __syncwarp();
      if (valid && (same & lanes_below()) == 0) tables.scratch[expert] += __popc(same);
      __syncwarp();
    }
  }
  team.sync();
}

// The routing of this rank's tokens as the caller gives it, checked.
template <int kTopK>
struct Routing {
  const MoeShape& shape;
  const DispatchSend& send;
  const DispatchTables& tables;
  Span share;
  int32_t* homes;
  int32_t num_tokens;
  unsigned long long* bad;

  __device__ int32_t load(int32_t token, int32_t k) const {
    return __ldg(send.indices + int64_t{token} * shape.top_k + k);
  }
  __device__ int32_t home(int32_t token, int32_t k, int32_t id, bool valid) const {
    const ChoiceLane<kTopK> lane;
    const bool names = valid && token < num_tokens && id != -1;
    // Twice in a token, if an earlier lane of the token has it too.
    const uint32_t same = __match_any_sync(kAllLanes, names ? id : -1 - lane_id());
    int32_t home = kNotRouted;
    if (valid && token >= num_tokens) {
      home = kPastEnd;
    } else if (names) {
      home = find(token, k, id, (same & lane.token_lanes & lanes_below()) != 0);
    }
    if (valid && token >= share.begin && token < share.end) {
      const int64_t at = int64_t{token} * shape.top_k + k;
      send.home[at] = home;
      homes[at] = home;
    }
    return home;
  }

 private:
  __device__ int32_t find(int32_t token, int32_t k, int32_t id, bool again) const {
    if (id < 0 || id >= shape.num_experts) return wrong(token, k, Fault::kBadExpert);
    if (again) return wrong(token, k, Fault::kDuplicate);
    int32_t place = tables.places[id];
    if (*tables.replicated != 0) {
      const int32_t copies = tables.copies[id];
      place = copies == 0 ? -1 : tables.replicas[place + static_cast<uint32_t>(token + shape.rank) % copies];
    }
    return place >= 0 ? place : wrong(token, k, Fault::kHomeless);
  }

  __device__ int32_t wrong(int32_t token, int32_t k, Fault fault) const {
    atomicMin(bad, static_cast<unsigned long long>(token) << 16 | static_cast<unsigned long long>(k) << 8 |
                       static_cast<unsigned long long>(fault));
    return kNotRouted;
  }
};

}  // namespace pplx::moe::cuda
