// dispatch: tokens to the ranks of their experts, and out again by expert.
//
// Half of a block's warps send, the others receive; a warp that has sent its share helps to receive. Tokens
// for this rank itself go straight to their rows.
#include "xla_ffi/cuda/kernels.h"
#include "xla_ffi/cuda/launch.cuh"
#include "xla_ffi/cuda/move.cuh"
#include "xla_ffi/cuda/placement.cuh"
#include "xla_ffi/cuda/plan.cuh"

namespace pplx::moe::cuda {
namespace {

// So many choices of a block's share of the tokens are kept in shared memory.
constexpr int32_t kNearChoices = 512;

// In dynamic shared memory.
struct Tables {
  Counts counts;
  int32_t* places;       // [E] the expert's place, or, with replicas, its first one in `replicas`
  int32_t* copies;       // [E]
  int32_t* replicas;     // [physical experts] by expert
  int32_t* source_slots;  // [R]
  PlacementTables rows;
  int32_t* scratch;  // [E], until rows are placed
  // Of the block's share of the tokens, if it is small: docs of Control say what.
  int32_t* homes;
  int32_t* slots;
  uint32_t* ordinals;
  int32_t* replicated;
  int32_t words;

  __host__ __device__ Tables(const MoeShape& shape, int32_t* memory) {
    int32_t* at = memory;
    const auto take = [&](int32_t count) {
      int32_t* taken = at;
      at += (count + 1) / 2 * 2;
      return taken;
    };
    const int32_t physical = shape.physical_experts(), ranks = shape.num_ranks;
    counts = {take(ranks), take(ranks), take(physical), take(physical)};
    source_slots = take(ranks);
    replicated = take(1);
    zeroed = static_cast<int32_t>(at - memory);
    places = take(shape.num_experts);
    copies = take(shape.num_experts);
    replicas = take(physical);
    scratch = take(physical > shape.num_experts ? physical : shape.num_experts);
    rows.source_base = scratch;
    rows.base = take(shape.experts_per_rank + 1);
    rows.kept = take(shape.experts_per_rank);
    rows.needed = reinterpret_cast<int64_t*>(take(2));
    rows.dropped = take(1);
    homes = take(kNearChoices);
    slots = take(kNearChoices);
    ordinals = reinterpret_cast<uint32_t*>(take(kNearChoices));
    words = static_cast<int32_t>(at - memory);
  }
  int32_t zeroed;  // the first words, which must be zero at first
};

// Which physical expert serves a token; docs/protocol.md: of several copies, number (token + rank) mod copies.
__device__ void find_places(const MoeShape& shape, const int32_t* map, const Tables& tables) {
  const auto in_range = [&](int32_t expert) { return expert >= 0 && expert < shape.num_experts; };
  for (int32_t e = threadIdx.x; e < shape.num_experts; e += kThreads) tables.places[e] = -1;
  __syncthreads();
  for (int32_t p = threadIdx.x; p < shape.physical_experts(); p += kThreads) {
    const int32_t expert = map[p];
    if (in_range(expert) && atomicCAS(&tables.places[expert], -1, p) != -1) *tables.replicated = 1;
  }
  __syncthreads();
  if (*tables.replicated == 0) return;
  for (int32_t e = threadIdx.x; e < shape.num_experts; e += kThreads) {
    tables.copies[e] = 0;
    tables.scratch[e] = 0;
  }
  __syncthreads();
  for (int32_t p = threadIdx.x; p < shape.physical_experts(); p += kThreads) {
    if (in_range(map[p])) atomicAdd(&tables.copies[map[p]], 1);
  }
  __syncthreads();
  if (warp_id() == 0) {
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
    for (int32_t first = 0; first < shape.physical_experts(); first += kWarp) {
      const int32_t p = first + lane_id();
      const int32_t expert = p < shape.physical_experts() ? map[p] : -1;
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
  __syncthreads();
}

// The routing of this rank's tokens as the caller gives it, checked.
template <int kTopK>
struct Routing {
  const MoeShape& shape;
  const DispatchSend& send;
  const Tables& tables;
  Span share;
  int32_t* homes;
  int32_t num_tokens;
  unsigned long long* bad;

  __device__ void operator()(int32_t token, int32_t (&home)[kTopK]) const {
    int32_t ids[kTopK];
#pragma unroll
    for (int k = 0; k < kTopK; ++k) {
      ids[k] = -1;
      if (k < shape.top_k) ids[k] = __ldg(send.indices + int64_t{token} * shape.top_k + k);
    }
    const bool past = token >= num_tokens;
#pragma unroll
    for (int k = 0; k < kTopK; ++k) {
      if (k >= shape.top_k) continue;
      if (past) {
        home[k] = kPastEnd;
      } else if (ids[k] != -1) {
        home[k] = find(token, k, ids);
      }
      if (token < share.begin || token >= share.end) continue;
      const int64_t at = int64_t{token} * shape.top_k + k;
      send.home[at] = home[k];
      homes[at] = home[k];
    }
  }

  __device__ int32_t find(int32_t token, int k, const int32_t (&ids)[kTopK]) const {
    if (ids[k] < 0 || ids[k] >= shape.num_experts) return wrong(token, k, Fault::kBadExpert);
#pragma unroll
    for (int j = 0; j < kTopK; ++j) {
      if (j < k && ids[j] == ids[k]) return wrong(token, k, Fault::kDuplicate);
    }
    int32_t place = tables.places[ids[k]];
    if (*tables.replicated != 0) {
      const int32_t copies = tables.copies[ids[k]];
      place = copies == 0 ? -1 : tables.replicas[place + static_cast<uint32_t>(token + shape.rank) % copies];
    }
    return place >= 0 ? place : wrong(token, k, Fault::kHomeless);
  }

  __device__ int32_t wrong(int32_t token, int k, Fault fault) const {
    atomicMin(bad, static_cast<unsigned long long>(token) << 16 | static_cast<unsigned long long>(k) << 8 |
                       static_cast<unsigned long long>(fault));
    return kNotRouted;
  }
};

template <typename T, int kTopK, bool kSend, bool kRecv>
struct Dispatch {
  const Args& args;
  const MoeShape& shape;
  const DispatchSend& send;
  const DispatchRecv& recv;
  Exchange& exchange;
  BlockState& state;
  const Tables& tables;
  Span share;  // of the round's tokens
  // Of this rank's tokens, [T, K]: in shared memory, of which only the share's part is, or in the scratch.
  int32_t* homes = nullptr;
  int32_t* slots = nullptr;
  uint32_t* ordinals = nullptr;

  static constexpr int kHalf = kThreads / 2;

  __device__ void run() {
    const bool open = state.stop == 0;
    if (open && kSend) {
      if (share.size() * shape.top_k <= kNearChoices) {
        const int32_t first = share.begin * shape.top_k;
        homes = tables.homes - first;
        slots = tables.slots - first;
        ordinals = tables.ordinals - first;
      } else {
        const int64_t scratch = int64_t{exchange.lane()} * shape.max_tokens * shape.top_k;
        homes = send.home;
        slots = args.control->slots + scratch;
        ordinals = args.control->ordinals + scratch;
      }
    }
    for (int32_t i = threadIdx.x; i < tables.zeroed; i += kThreads) tables.counts.ranks_before[i] = 0;
    __syncthreads();
    if (open) {
      if constexpr (kSend) plan();
      if (threadIdx.x == 0) trace(4);
      const bool poisoned = state.poisoned != 0;  // before the receivers judge their own part
      __syncthreads();
      const Team senders{0, kRecv ? kHalf : kThreads, 1};
      const Team receivers{kSend ? kHalf : 0, kSend ? kHalf : kThreads, 2};
      if (kRecv && receivers.has_me()) {
        place_rows(receivers);
      } else if (kSend && senders.has_me()) {
        send_rows(senders, poisoned);
      }
      if constexpr (kRecv) receive_rows();
    }
    exchange.template finish<kSend, kRecv>([&] {
      if constexpr (kRecv) poison();
    });
  }

  // --- home side ---

  __device__ void plan() {
    find_places(shape, send.expert_map, tables);
    if (threadIdx.x == 0) trace(2);
    int32_t num_tokens = *send.num_tokens;
    if (num_tokens < 0 || num_tokens > args.tokens) {
      if (threadIdx.x == 0) state.bad = static_cast<unsigned long long>(Fault::kNumTokens);
      num_tokens = 0;
    }
    Counts counts = tables.counts;
    const bool announces = static_cast<int32_t>(blockIdx.x) < shape.num_ranks;
    if (!announces || args.round != 0) counts.experts_total = nullptr;
    count_tokens<kTopK>(args, {0, kThreads, 0}, share, counts,
                        Routing<kTopK>{shape, send, tables, share, homes, num_tokens, &state.bad});
    __syncthreads();
    const bool sound = state.bad == ~0ULL;
    if (threadIdx.x == 0) trace(3);
    if (!sound) {
      if (threadIdx.x == 0) {
        state.poisoned = 1;
        if (blockIdx.x == 0) report();
      }
      for (int32_t i = threadIdx.x; i < tables.zeroed; i += kThreads) tables.counts.ranks_before[i] = 0;
      for (int64_t i = int64_t{share.begin} * shape.top_k + threadIdx.x;
           i < int64_t{share.end} * shape.top_k; i += kThreads) {
        send.home[i] = homes[i] = kNotRouted;
      }
      __syncthreads();
    }
    if (warp_id() == 0) {
      number_tokens<kTopK, true>(args, share, tables.counts, homes, slots, ordinals);
    } else if (static_cast<int>(threadIdx.x) >= kHalf) {
      const Team announcers{kHalf, kHalf, 3};
      for (int32_t rank = blockIdx.x; rank < shape.num_ranks; rank += gridDim.x) {
        announce(announcers, rank, !sound);
      }
    }
    __syncthreads();
  }

  __device__ void report() {
    const auto fault = static_cast<Fault>(state.bad & 0xffU);
    if (fault == Fault::kNumTokens) return exchange.data_error(fault, shape.rank, *send.num_tokens);
    const auto token = static_cast<int64_t>(state.bad >> 16), k = static_cast<int64_t>(state.bad >> 8 & 0xffU);
    exchange.data_error(fault, shape.rank, token, k, send.indices[token * shape.top_k + k]);
  }

  __device__ void announce(const Team& team, int32_t rank, bool poisoned) {
    if (args.round == 0) {
      auto* out = reinterpret_cast<int32_t*>(exchange.outgoing(rank) + sizeof(RegionHeader));
      const int32_t words = static_cast<int32_t>(shape.counts_bytes() / 4), experts = shape.experts_per_rank;
      for (int32_t e = team.thread(); e < words; e += team.threads) {
        out[e] = e < experts ? tables.counts.experts_total[rank * experts + e] : 0;
      }
    }
    team.sync();
    if (team.thread() == 0) exchange.announce(rank, tables.counts.ranks_total[rank], poisoned);
  }

  __device__ void send_rows(const Team& team, bool poisoned) {
    const int32_t units = share.size() * args.parts;
    for (int32_t unit = team.warp(); unit < units; unit += team.warps()) {
      send_row(share.begin + unit / args.parts, unit % args.parts);
    }
    if (team.thread() == 0) trace(5);
    if (!exchange.has_proxy()) return;
    team.sync();
    if (team.thread() == 0) {
      exchange.submit(poisoned, [&](int32_t rank) { return tables.counts.ranks_total[rank]; });
    }
  }

  __device__ void send_row(int32_t token, int32_t number) {
    const Destinations to = destinations_of(shape, homes, slots, token);
    const bool away = to.rank >= 0 && (!kRecv || to.rank != shape.rank);
    Places places{__ballot_sync(kAllLanes, away && to.leads), nullptr, nullptr};
    if (places.lanes == 0) return;
    if (away) {
      const int64_t at = int64_t{token} * shape.top_k + lane_id();
      std::byte* slot = exchange.outgoing(to.rank) + args.first_slot() + to.slot * args.stride();
      auto* entry = reinterpret_cast<uint32_t*>(slot + sizeof(SlotHeader)) + 3 * to.entry();
      entry[0] = __float_as_uint(send.weights[at]);
      entry[1] = ordinals[at];
      entry[2] = static_cast<uint32_t>(to.expert % shape.experts_per_rank) |
                 static_cast<uint32_t>(lane_id()) << 16;
      if (to.leads) {
        *reinterpret_cast<uint2*>(slot) = {static_cast<uint32_t>(token),
                                           static_cast<uint32_t>(__popc(to.group))};
        places.row = slot + shape.slot_header_bytes();
        places.scales = places.row + shape.token_stride();
      }
    }
    move_token(token, number, places);
    __syncwarp();
    if (away && to.leads) exchange.publish(to.rank, to.slot, number);
  }

  // Of this rank's own tokens.
  __device__ void move_token(int32_t token, int32_t number, const Places& places) {
    const Part part = part_of_token(shape, number, args.parts);
    const bool quantizes = shape.quant != Quant::kNone && send.scales == nullptr;
    if (quantizes) {
      quantize_part(shape, static_cast<const T*>(send.x) + int64_t{token} * shape.hidden, part, places);
      return;
    }
    copy_bytes<false>(static_cast<const std::byte*>(send.x) + token * shape.token_bytes(), part, places);
    copy_scales<false>(shape, static_cast<const std::byte*>(send.scales) + token * shape.scale_bytes(), part,
                       places);
  }

  // --- expert side ---

  __device__ void place_rows(const Team& team) {
    for (int32_t source = team.thread(); source < shape.num_ranks; source += team.threads) {
      uint32_t count = 0;
      bool poisoned = false;
      if (!exchange.await_header(source, &count, &poisoned)) break;
      tables.source_slots[source] = static_cast<int32_t>(count);
    }
    team.sync();
    // Whoever finds something wrong below must not send others another way.
    bool usable = !exchange.stopped() && state.poisoned == 0, placed = false;
    if (team.thread() == 0) trace(6);
    team.sync();
    if (usable) {
      read_counts(team);
      team.sync();
      usable = !exchange.stopped();
      team.sync();
      if (usable) {
        place(shape, team, recv.route.rows, tables.rows);
        team.sync();
        if (*tables.rows.dropped != 0 && !shape.drop) {
          if (team.thread() == 0) {
            state.poisoned = 1;
            if (blockIdx.x == 0) {
              exchange.data_error(Fault::kOverflow, shape.rank, *tables.rows.needed,
                                  shape.padded ? recv.route.rows / shape.experts_per_rank : recv.route.rows);
            }
          }
        } else {
          placed = true;
        }
      }
    }
    team.sync();
    if (team.thread() == 0) {
      trace(7);
      __threadfence_block();
      *const_cast<volatile uint32_t*>(&state.placed) = 1;
    }
    if (placed) describe(team);
  }

  __device__ void read_counts(const Team& team) {
    const int32_t experts = shape.experts_per_rank, all = shape.num_ranks * experts;
    for (int32_t i = team.thread(); i < all; i += team.threads) {
      const int32_t source = i / experts;
      uint32_t count;
      if (args.round == 0) {
        const auto* counts = reinterpret_cast<const uint32_t*>(exchange.incoming(source) + sizeof(RegionHeader));
        count = __ldcg(counts + i % experts);
        if (count > static_cast<uint32_t>(args.tokens)) {
          exchange.fail(Fault::kMalformed, source, static_cast<int64_t>(Malformed::kCounts), count);
        }
        // Later rounds need them when the region holds another message.
        if (blockIdx.x == 0 && shape.rounds(args.tokens) > 1) args.control->counts[i] = count;
      } else {
        count = args.control->counts[i];
      }
      tables.rows.source_base[i] = static_cast<int32_t>(count);
    }
  }

  // Outputs but for the rows themselves: what is small, and rows that nobody sends.
  __device__ void describe(const Team& team) {
    const int32_t experts = shape.experts_per_rank, length = args.length();
    const Route& route = recv.route;
    const int64_t thread = int64_t{blockIdx.x} * team.threads + team.thread();
    const int64_t threads = int64_t{gridDim.x} * team.threads;
    if (blockIdx.x == 0) {
      for (int32_t s = team.thread(); s < shape.num_ranks; s += team.threads) {
        route.source_slots[int64_t{args.round} * shape.num_ranks + s] = tables.source_slots[s];
      }
    }
    const int64_t first = args.slot_index(0, 0), count = int64_t{shape.num_ranks} * length;
    const bool last = args.begin() + length == args.tokens;
    for (int64_t i = thread; i < count + (last ? 1 : 0); i += threads) {
      route.slot_start[first + i] = static_cast<int32_t>((first + i) * shape.entries());
    }
    for (int32_t source = 0; source < shape.num_ranks; ++source) {
      for (int64_t slot = tables.source_slots[source] + thread; slot < length; slot += threads) {
        for (int32_t entry = 0; entry < shape.entries(); ++entry) {
          route.slot_rows[args.slot_index(source, static_cast<int32_t>(slot)) * shape.entries() + entry] = -1;
        }
      }
    }
    if (args.round != 0) return;
    if (blockIdx.x == 0) {
      int64_t kept = 0;
      for (int32_t e = team.thread(); e < experts; e += team.threads) {
        const int32_t rows = tables.rows.kept[e];
        recv.group_sizes[e] = shape.padded ? rows : aligned(shape, rows);
      }
      if (team.warp() == 0) {
        for (int32_t e = lane_id(); e < experts; e += kWarp) kept += tables.rows.kept[e];
        kept = warp_sum(kept);
        if (lane_id() == 0) {
          *recv.num_rows = static_cast<int32_t>(kept);
          *recv.num_dropped = *tables.rows.dropped;
          *route.ok = 1;
        }
      }
    }
    const int32_t end = tables.rows.base[experts];
    for (int64_t row = end + thread; row < route.rows; row += threads) recv.row_weights[row] = 0.0F;
    if (shape.alignment == 1 && !shape.padded) return;
    const int32_t warp = static_cast<int32_t>(blockIdx.x) * team.warps() + team.warp();
    for (int32_t e = warp; e < experts; e += static_cast<int32_t>(gridDim.x) * team.warps()) {
      for (int32_t row = tables.rows.base[e] + tables.rows.kept[e]; row < tables.rows.base[e + 1]; ++row) {
        if (lane_id() == 0) recv.row_weights[row] = 0.0F;
        if (shape.zero_tail || !shape.padded) clear_row(row);
      }
    }
  }

  __device__ void clear_row(int64_t row) {
    clear_bytes(static_cast<std::byte*>(recv.tokens) + row * shape.token_bytes(), shape.token_bytes());
    auto* scales = static_cast<std::byte*>(recv.scales) + row * shape.scale_bytes();
    for (int64_t i = lane_id(); i < shape.scale_bytes(); i += kWarp) scales[i] = std::byte{0};
  }

  __device__ Span tail() const {
    const int64_t end = tables.rows.base[shape.experts_per_rank];
    if (!shape.zero_tail || args.round != 0) return {0, 0};
    return cuda::share(static_cast<int32_t>(recv.route.rows - end), static_cast<int32_t>(end));
  }

  // By every warp: own tokens, then the tail, then the other sources', from the next rank on.
  __device__ void receive_rows() {
    if (lane_id() == 0) {
      while (load_volatile(&state.placed) == 0) {
      }
      __threadfence_block();
    }
    __syncwarp();
    if (exchange.stopped() || state.poisoned != 0) return;
    const Span zeros = tail();
    const auto size = [&](int32_t step) {
      if (step == 1) return zeros.size();
      const int32_t source = step == 0 ? shape.rank : (shape.rank + step - 1) % shape.num_ranks;
      return (step == 0 && kSend ? share : cuda::share(tables.source_slots[source])).size() * args.parts;
    };
    int32_t before = 0, step = 0, here = size(0);
    for (;;) {
      int32_t unit = 0;
      if (lane_id() == 0) unit = atomicAdd(&state.next_unit, 1);
      unit = __shfl_sync(kAllLanes, unit, 0);
      while (unit >= before + here) {
        before += here;
        if (++step > shape.num_ranks) return;
        if (threadIdx.x == kHalf) trace(7 + min(step, 2));
        here = size(step);
      }
      const int32_t at = (unit - before) / args.parts, part = (unit - before) % args.parts;
      if (step == 1) {
        clear_row(zeros.begin + unit - before);
      } else if (step == 0 && kSend) {
        keep_row(share.begin + at, part);
      } else {
        const int32_t source = step == 0 ? shape.rank : (shape.rank + step - 1) % shape.num_ranks;
        if (!receive_row(source, cuda::share(tables.source_slots[source]).begin + at, part)) return;
      }
    }
  }

  // Row of a pair, or -1 where it is dropped.
  __device__ int32_t row_of(int32_t source, int32_t expert, uint32_t ordinal) const {
    const int64_t position = tables.rows.source_base[source * shape.experts_per_rank + expert] + int64_t{ordinal};
    return position < tables.rows.kept[expert] ? static_cast<int32_t>(tables.rows.base[expert] + position) : -1;
  }

  __device__ Places rows_of(int32_t row) const {
    return {__ballot_sync(kAllLanes, row >= 0),
            static_cast<std::byte*>(recv.tokens) + row * shape.token_bytes(),
            static_cast<std::byte*>(recv.scales) + row * shape.scale_bytes()};
  }

  // One of this rank's own tokens whose experts are here.
  __device__ void keep_row(int32_t token, int32_t number) {
    const Destinations to = destinations_of(shape, homes, slots, token);
    const uint32_t here = __ballot_sync(kAllLanes, to.rank == shape.rank);
    if (here == 0) return;
    const bool mine = to.rank == shape.rank;
    const int64_t at = int64_t{token} * shape.top_k + lane_id();
    const int32_t row =
        mine ? row_of(shape.rank, to.expert % shape.experts_per_rank, ordinals[at]) : -1;
    if (number == 0) {
      const int32_t slot = __shfl_sync(kAllLanes, to.slot, __ffs(static_cast<int>(here)) - 1);
      int32_t* rows = recv.route.slot_rows + args.slot_index(shape.rank, slot) * shape.entries();
      if (mine) {
        rows[to.entry()] = row;
        if (row >= 0) recv.row_weights[row] = send.weights[at];
      }
      if (lane_id() >= __popc(here) && lane_id() < shape.entries()) rows[lane_id()] = -1;
    }
    move_token(token, number, rows_of(row));
  }

  // False: stopped.
  __device__ bool receive_row(int32_t source, int32_t slot, int32_t number) {
    bool here = true;
    if (lane_id() == 0) here = exchange.await_slot(source, slot, number);
    if (!__shfl_sync(kAllLanes, here, 0)) return false;
    const std::byte* from = exchange.incoming(source) + args.first_slot() + slot * args.stride();
    const std::byte* token = from + shape.slot_header_bytes();
    const Part part = part_of_token(shape, number, args.parts);
    bool sound = true;
    const Places places = copy_bytes_to<true>(token, part, [&] {
      const int32_t row = entry_row(source, slot, from, number == 0, sound);
      return rows_of(sound ? row : -1);
    });
    if (!sound) {
      if (lane_id() == 0) exchange.fail(Fault::kMalformed, source, static_cast<int64_t>(Malformed::kEntry), slot);
      return false;
    }
    copy_scales<true>(shape, token + shape.token_stride(), part, places);
    return true;
  }

  // Of a received slot, by a warp: lane i gets entry i's row, -1: none. All lanes get whether all are sound.
  __device__ int32_t entry_row(int32_t source, int32_t slot, const std::byte* from, bool keeps, bool& sound) {
    const bool could = lane_id() < shape.entries();
    const auto* entry = reinterpret_cast<const uint32_t*>(from + sizeof(SlotHeader)) + 3 * lane_id();
    const uint32_t entries = __ldcg(reinterpret_cast<const uint32_t*>(from) + 1);
    const uint32_t weight = could ? __ldcg(entry) : 0, ordinal = could ? __ldcg(entry + 1) : 0;
    const uint32_t expert = could ? __ldcg(entry + 2) & 0xffffU : 0;
    const bool is = could && lane_id() < static_cast<int>(entries);
    const bool fits = entries <= static_cast<uint32_t>(shape.entries()) &&
                      (!is || (expert < static_cast<uint32_t>(shape.experts_per_rank) &&
                               ordinal < static_cast<uint32_t>(args.tokens)));
    sound = __all_sync(kAllLanes, fits) != 0;
    const int32_t row = sound && is ? row_of(source, static_cast<int32_t>(expert), ordinal) : -1;
    if (keeps && row >= 0) recv.row_weights[row] = __uint_as_float(weight);
    if (keeps && could) recv.route.slot_rows[args.slot_index(source, slot) * shape.entries() + lane_id()] = row;
    return row;
  }

  __device__ void poison() {
    const Route& route = recv.route;
    if (shape.quant == Quant::kNone) {
      fill_nan(recv.tokens, route.rows * shape.hidden, shape.dtype);
    } else {
      fill(static_cast<uint8_t*>(recv.tokens), route.rows * shape.token_bytes(), uint8_t{0x7f});
      if (shape.quant == Quant::kFp8) {
        fill_nan(recv.scales, route.rows * shape.scales(), DType::kFloat32);
      } else {
        fill(static_cast<uint8_t*>(recv.scales), route.rows * shape.scale_bytes(), uint8_t{0xff});
      }
    }
    fill_nan(recv.row_weights, route.rows, DType::kFloat32);
    fill(recv.group_sizes, shape.experts_per_rank, 0);
    const int64_t slots_in_all = int64_t{shape.num_ranks} * args.tokens;
    fill(route.source_slots, int64_t{shape.rounds(args.tokens)} * shape.num_ranks, 0);
    fill(route.slot_start, slots_in_all + 1, 0);
    fill(route.slot_rows, slots_in_all * shape.entries(), -1);
    if (threadIdx.x == 0) *recv.num_rows = *recv.num_dropped = *route.ok = 0;
    if constexpr (kSend) {
      // A closed or failed group has planned nothing.
      if (args.control->open == 0 || args.control->failed != 0) {
        fill(send.home, int64_t{args.tokens} * shape.top_k, kNotRouted);
      }
    }
  }
};

template <typename T, int kTopK, bool kSend, bool kRecv>
__global__ void __launch_bounds__(kThreads, 1)
    dispatch_kernel(const __grid_constant__ Args args, const __grid_constant__ DispatchSend send,
                    const __grid_constant__ DispatchRecv recv) {
  extern __shared__ int64_t memory[];
  __shared__ BlockState state;
  const Tables tables(args.shape, reinterpret_cast<int32_t*>(memory));
  Exchange exchange(args, state);
  exchange.begin<kSend>();
  Dispatch<T, kTopK, kSend, kRecv>{args,  args.shape, send,   recv,
                                   exchange, state,   tables, share(args.length(), args.begin())}
      .run();
}

size_t table_bytes(const MoeShape& shape) {
  return sizeof(int32_t) * static_cast<size_t>(Tables(shape, nullptr).words);
}

// visit(kernel): the kernel of a shape.
template <bool kSend, bool kRecv, typename Visit>
auto with_kernel(const MoeShape& shape, Visit&& visit) {
  const auto with_type = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return shape.top_k <= 8 ? visit(&dispatch_kernel<T, 8, kSend, kRecv>)
                            : visit(&dispatch_kernel<T, 16, kSend, kRecv>);
  };
  if constexpr (!kSend) {
    return with_type(static_cast<float*>(nullptr));
  } else {
    return with_row_type(shape.dtype, with_type);
  }
}

template <bool kSend, bool kRecv>
cudaError_t enqueue(const KernelCall& call, const DispatchSend& send, const DispatchRecv& recv,
                    float* ticket_out, const float* ticket_in) {
  return with_kernel<kSend, kRecv>(call.shape, [&](auto* kernel) {
    return launch_rounds(call, ticket_out, ticket_in, false, [&](const Args& args) {
      return launch(kernel, call, table_bytes(call.shape), args, send, recv);
    });
  });
}

}  // namespace

cudaError_t dispatch(const KernelCall& call, const DispatchSend& send, const DispatchRecv& recv) {
  return enqueue<true, true>(call, send, recv, nullptr, nullptr);
}
cudaError_t dispatch_send(const KernelCall& call, const DispatchSend& send, float* ticket) {
  return enqueue<true, false>(call, send, {}, ticket, nullptr);
}
cudaError_t dispatch_recv(const KernelCall& call, const DispatchRecv& recv, const float* ticket) {
  return enqueue<false, true>(call, {}, recv, nullptr, ticket);
}

cudaError_t load_dispatch(const MoeShape& shape, int* num_sms) {
  const auto load = [&](auto* kernel) { return load_kernel(kernel, table_bytes(shape), num_sms); };
  cudaError_t error = with_kernel<true, true>(shape, load);
  if (error == cudaSuccess) error = with_kernel<true, false>(shape, load);
  if (error == cudaSuccess) error = with_kernel<false, true>(shape, load);
  return error;
}

#ifdef PPLX_TRACE
void print_dispatch_trace(int blocks) { print_trace("dispatch", blocks); }
#endif

}  // namespace pplx::moe::cuda
