// dispatch: tokens to the ranks of their experts, and out again by expert.
//
// Tokens for this rank itself go straight to their rows. Of few tokens every block sends and receives its
// share, some of its warps looking after the headers meanwhile. Of many, some blocks send and the others
// receive, until nothing is left to send: stores over NVLink would hold up those to memory in one
// multiprocessor.
#include "xla_ffi/cuda/kernels.h"
#include "xla_ffi/cuda/launch.cuh"
#include "xla_ffi/cuda/move.cuh"
#include "xla_ffi/cuda/routing.cuh"
#include "xla_ffi/cuda/slots.cuh"

namespace pplx::moe::cuda {
namespace {

// Of the blocks, where some only send at first.
constexpr double kSenderShare = 0.36;
// More parts of a row cost more in epochs than more warps gain.
constexpr int32_t kMostUnits = 6;

template <typename T, int kTopK, bool kSend, bool kRecv>
struct Dispatch {
  const Args& args;
  const MoeShape& shape;
  const DispatchSend& send;
  const DispatchRecv& recv;
  Exchange& exchange;
  BlockState& state;
  const DispatchTables& tables;
  Span share;  // of the round's tokens
  // Of this rank's tokens, [T, K]: in shared memory, of which only the share's part is, or in the scratch.
  int32_t* homes = nullptr;
  int32_t* slots = nullptr;
  uint32_t* ordinals = nullptr;

  __device__ __forceinline__ void run() {
    const bool open = state.stop == 0;
    if (open && kSend) {
      if (args.senders == 0 && share.size() * shape.top_k <= kNearChoices) {
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
      const Roles<kSend, kRecv> roles(args);
      if constexpr (kSend) {
        if (roles.plans()) plan(roles.planners());
      }
      if (threadIdx.x == 0) trace(4);
      // Where all blocks planned together they may have been stopped.
      if (!roles.split || __syncthreads_or(exchange.stopped() ? 1 : 0) == 0) exchange_rows(roles);
    }
    exchange.template finish<kSend, kRecv>([&] {
      if constexpr (kRecv) poison();
      // A closed or failed group may have planned nothing.
      if constexpr (kSend) {
        if (args.control->open == 0 || args.control->failed != 0) {
          fill(send.home, int64_t{args.tokens} * shape.top_k, kNotRouted);
        }
      }
    });
  }

  // Whether each block counts its own share only.
  __device__ __forceinline__ bool adds_up() const {
    return args.senders != 0 && shape.rounds(args.tokens) == 1;
  }

  __device__ __forceinline__ void exchange_rows(const Roles<kSend, kRecv>& roles) {
    if constexpr (kSend) {
      if (roles.sends) {
        roles.planned();
        send_rows(roles.senders, load_volatile(&state.bad) != ~0ULL);
      }
    }
    if constexpr (kRecv) {
      bool placed = false;
      if (roles.places) placed = place_rows(roles.placers);
      roles.ready(state);
      if (placed) describe(roles.placers);
      if (kSend && roles.places) roles.planned();
      if (!exchange.stopped() && load_volatile(&state.poisoned) == 0) receive_rows();
      if (roles.places && blockIdx.x == 0 && !exchange.stopped()) check_headers(roles.placers);
    }
  }

  // --- home side ---

  // By a team.
  __device__ __forceinline__ void plan(const Team& team) {
    int32_t num_tokens = *send.num_tokens;
    find_places(shape, team, send.expert_map, tables);
    if (threadIdx.x == 0) trace(2);
    const bool miscounted = num_tokens < 0 || num_tokens > args.tokens;
    if (miscounted) num_tokens = 0;
    if (miscounted && threadIdx.x == 0) state.bad = static_cast<unsigned long long>(Fault::kNumTokens);
    const bool announces = static_cast<int32_t>(blockIdx.x) < shape.num_ranks;
    const bool totals = adds_up() || (announces && args.round == 0);
    const Routing<kTopK> routing{shape, send, tables, share, homes, num_tokens, &state.bad};
    const Span span = adds_up() ? share : Span{0, args.tokens};
    count_tokens<kTopK>(args, team, span, share, tables.counts, totals, routing);
    team.sync();
    if (threadIdx.x == 0) trace(3);
    if (adds_up()) {
      // Where others count the rest, what is wrong anywhere must be known everywhere.
      unsigned long long& worst = args.control->worst[exchange.lane()];
      if (threadIdx.x == 0 && state.bad != ~0ULL) atomicMax(&worst, ~state.bad);
      add_up_shares(args, args.everybody, exchange, tables.counts);
      if (exchange.stopped()) return;  // nothing is announced that is not all
      if (threadIdx.x == 0) state.bad = ~load_volatile(&worst);
      team.sync();
    }
    const bool sound = state.bad == ~0ULL;
    if (!sound) {
      if (threadIdx.x == 0) {
        state.poisoned = 1;
        if (blockIdx.x == 0) report();
      }
      for (int32_t i = team.thread(); i < tables.counted; i += team.threads)
        tables.counts.ranks_before[i] = 0;
      for (int32_t i = share.begin * shape.top_k + team.thread(); i < share.end * shape.top_k;
           i += team.threads) {
        send.home[i] = homes[i] = kNotRouted;
      }
      team.sync();
    }
    const Team announcers{kThreads / 4, team.threads - kThreads / 4, 0};
    if (team.warp() == 0) {
      number_tokens<kTopK, true>(args, share, tables.counts, homes, slots, ordinals);
    } else if (announcers.has_me()) {
      each_announced([&](int32_t rank) { announce_counts(announcers, rank); });
    }
    // Any block may take any token.
    if (args.senders != 0) {
      exchange.meet(adds_up() ? 2 : 1, args.everybody);
    } else {
      team.sync();
    }
    // Headers last: nobody waits for them before rows, and each waits for all that its warp has written.
    if (team.thread() == team.threads - 1) {
      each_announced([&](int32_t rank) { exchange.announce(rank, tables.counts.ranks_total[rank], !sound); });
    }
  }

  // Ranks that this block tells what it sends them.
  template <typename Visit>
  __device__ __forceinline__ void each_announced(Visit&& visit) const {
    for (int32_t rank = blockIdx.x; rank < shape.num_ranks; rank += gridDim.x) visit(rank);
  }

  __device__ __forceinline__ void report() {
    const auto fault = static_cast<Fault>(state.bad & 0xffU);
    if (fault == Fault::kNumTokens) return exchange.data_error(fault, shape.rank, *send.num_tokens);
    const auto token = static_cast<int64_t>(state.bad >> 16),
               k = static_cast<int64_t>(state.bad >> 8 & 0xffU);
    exchange.data_error(fault, shape.rank, token, k, send.indices[token * shape.top_k + k]);
  }

  __device__ __forceinline__ void announce_counts(const Team& team, int32_t rank) {
    const int32_t experts = shape.experts_per_rank;
    const int32_t* counts = tables.counts.experts_total + rank * experts;
    if (exchange.direct(rank)) {
      for (int32_t e = team.thread(); e < experts && args.round == 0; e += team.threads) {
        exchange.announce_count(rank, e, counts[e]);
      }
      if (team.thread() == 0) exchange.announce_count(rank, experts, tables.counts.ranks_total[rank]);
      if (team.thread() == 0) trace(15);
    } else if (args.round == 0) {
      auto* out = reinterpret_cast<int32_t*>(exchange.outgoing(rank) + sizeof(RegionHeader));
      const int32_t words = static_cast<int32_t>(shape.counts_bytes() / 4);
      for (int32_t e = team.thread(); e < words; e += team.threads) out[e] = e < experts ? counts[e] : 0;
    }
  }

  __device__ __forceinline__ void send_rows(const Team& team, bool poisoned) {
    const Queue queue = exchange.queue(kSendQueue, args.length(), args.parts);
    for (int32_t unit = queue.take(); unit < queue.end && !poisoned; unit = queue.take()) {
      send_row(args.begin() + (unit >> args.part_shift), unit & (args.parts - 1));
    }
    if (lane_id() == 0) trace(5);
    if (!exchange.has_proxy()) return;
    team.sync();
    if (team.thread() == 0) {
      exchange.submit(poisoned, [&](int32_t rank) { return poisoned ? 0 : tables.counts.ranks_total[rank]; });
    }
  }

  __device__ __forceinline__ void send_row(int32_t token, int32_t number) {
    const Destinations to = destinations_of(args, homes, slots, token);
    const bool away = to.rank >= 0 && (!kRecv || to.rank != shape.rank);
    Places places{__ballot_sync(kAllLanes, away && to.leads), nullptr, nullptr};
    if (places.lanes == 0) return;
    if (away) {
      const int64_t at = int64_t{token} * shape.top_k + lane_id();
      const float weight = send.weights[at];
      std::byte* slot = exchange.outgoing(to.rank) + args.first_slot + int64_t{to.slot} * args.stride;
      auto* entry = reinterpret_cast<uint32_t*>(slot + sizeof(SlotHeader)) + 3 * to.entry();
      entry[0] = __float_as_uint(weight);
      entry[1] = ordinals[at];
      entry[2] = static_cast<uint32_t>(to.expert - to.rank * shape.experts_per_rank) |
                 static_cast<uint32_t>(lane_id()) << 16;
      if (to.leads) {
        *reinterpret_cast<uint2*>(slot) = {static_cast<uint32_t>(token),
                                           static_cast<uint32_t>(__popc(to.group))};
        places.row = slot + args.slot_header_bytes;
        places.scales = slot + args.scales_at;
      }
    }
    move_token(token, number, places);
    __syncwarp();
    if (away && to.leads) exchange.publish(to.rank, to.slot, number);
  }

  // Of this rank's own tokens.
  __device__ __forceinline__ void move_token(int32_t token, int32_t number, const Places& places) {
    const Part part = part_of_token(args, number);
    const bool quantizes = shape.quant != Quant::kNone && send.scales == nullptr;
    if (quantizes) {
      quantize_part(shape.quant, static_cast<const T*>(send.x) + int64_t{token} * shape.hidden, part, places);
      return;
    }
    copy_bytes<false>(static_cast<const std::byte*>(send.x) + int64_t{token} * args.token_bytes, part,
                      places);
    if (args.scales != 0)
      copy_scales<false>(shape.quant,
                         static_cast<const std::byte*>(send.scales) + int64_t{token} * args.scale_bytes, part,
                         places);
  }

  // --- expert side ---

  // Whether there are rows to receive.
  __device__ __forceinline__ bool place_rows(const Team& team) {
    // Of few tokens it is on the way: once for practice, so that the instructions come while others plan.
#pragma unroll 1
    for (bool practice = args.senders == 0;; practice = false) {
      if (!practice) {
        if (exchange.has_proxy()) await_proxied(team);
        read_counts(team);
        // Whoever finds something wrong below must not send others another way.
        team.sync();
        const bool usable = !exchange.stopped() && (kSend || state.poisoned == 0);
        team.sync();
        if (!usable) return false;
        if (team.thread() == 0) trace(6);
      }
      place(shape, team, recv.route.rows, tables.rows);
      team.sync();
      if (!practice) break;
      if (team.thread() == 0) trace(14);
    }
    if (team.thread() == 0) trace(7);
    if (*tables.rows.dropped == 0 || shape.drop) return true;
    if (team.thread() == 0) {
      state.poisoned = 1;
      if (blockIdx.x == 0) {
        exchange.data_error(Fault::kOverflow, shape.rank, *tables.rows.needed,
                            shape.padded ? recv.route.rows / shape.experts_per_rank : recv.route.rows);
      }
    }
    return false;
  }

  __device__ __forceinline__ void note_slots(int32_t source, uint32_t count) {
    tables.source_slots[source] = static_cast<int32_t>(count);
    if (source != shape.rank || !kSend) atomicMax(tables.most_slots, static_cast<int32_t>(count));
  }

  __device__ __forceinline__ void await_proxied(const Team& team) {
    for (int32_t source = team.thread(); source < shape.num_ranks; source += team.threads) {
      uint32_t count = 0;
      bool poisoned = false;
      if (exchange.direct(source)) continue;
      if (!exchange.await_header(source, &count, &poisoned)) break;
      note_slots(source, count);
    }
    team.sync();  // all is here before anybody reads on
  }

  // What every source announces; what comes by proxy is here.
  __device__ __forceinline__ void read_counts(const Team& team) {
    constexpr int kAtOnce = 4;
    const int32_t experts = shape.experts_per_rank, all = shape.num_ranks * experts;
    const bool many_rounds = args.tokens > shape.chunk;
    const int32_t near = team.thread();  // whose slots this thread looks at first
    const uint64_t* slots_word = near < shape.num_ranks ? exchange.count_word(near, experts) : nullptr;
    uint64_t slots_value = slots_word != nullptr ? load_relaxed(slots_word) : 0;
#pragma unroll 1
    for (int32_t first = team.thread(); first < all; first += kAtOnce * team.threads) {
      uint64_t counts[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int32_t i = first + j * team.threads;
        if (i >= all) continue;
        // As experts of all ranks: the source has the place of the rank.
        const int32_t source = args.rank_of(i), expert = i - source * experts;
        const uint64_t* word = exchange.count_word(source, expert);
        counts[j] =
            args.round != 0 ? args.control->counts[i]
            : word != nullptr
                ? load_relaxed(word)
                : __ldcg(reinterpret_cast<const uint32_t*>(exchange.incoming(source) + sizeof(RegionHeader)) +
                         expert);
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int32_t i = first + j * team.threads;
        if (i >= all) continue;
        const int32_t source = args.rank_of(i);
        const uint64_t* word = exchange.count_word(source, i - source * experts);
        if (args.round == 0 && word != nullptr) {
          if (!exchange.await_count(counts[j], word, source, args.tokens, Malformed::kCounts)) return;
        } else if (counts[j] > static_cast<uint32_t>(args.tokens)) {
          exchange.fail(Fault::kMalformed, source, static_cast<int64_t>(Malformed::kCounts),
                        static_cast<int64_t>(counts[j]));
          return;
        }
        // Later rounds need them when others have taken their place.
        if (blockIdx.x == 0 && args.round == 0 && many_rounds)
          args.control->counts[i] = static_cast<uint32_t>(counts[j]);
        tables.rows.source_base[i] = static_cast<int32_t>(counts[j]);
      }
    }
#pragma unroll 1
    for (int32_t source = near; source < shape.num_ranks; source += team.threads) {
      const uint64_t* word = source == near ? slots_word : exchange.count_word(source, experts);
      if (word == nullptr) continue;
      if (source != near) slots_value = load_relaxed(word);
      if (!exchange.await_count(slots_value, word, source, args.length(), Malformed::kSlots)) return;
      note_slots(source, static_cast<uint32_t>(slots_value));
    }
  }

  // By a team of one block: that the counts were of this exchange, which the headers tell. They come later.
  __device__ __forceinline__ void check_headers(const Team& team) {
    for (int32_t source = team.thread(); source < shape.num_ranks; source += team.threads) {
      uint32_t count = 0;
      bool poisoned = false;
      if (!exchange.direct(source)) continue;
      if (!exchange.await_header(source, &count, &poisoned)) return;
      if (static_cast<int32_t>(count) == tables.source_slots[source]) continue;
      exchange.fail(Fault::kMalformed, source, static_cast<int64_t>(Malformed::kSlots), count);
      return;
    }
  }

  // Outputs but for the rows themselves: what is small, and rows that nobody sends.
  __device__ __forceinline__ void describe(const Team& team) {
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
      route.slot_start[first + i] = static_cast<int32_t>((first + i) * args.entries);
    }
    for (int32_t source = 0; source < shape.num_ranks; ++source) {
      for (int64_t slot = tables.source_slots[source] + thread; slot < length; slot += threads) {
        for (int32_t entry = 0; entry < args.entries; ++entry) {
          route.slot_rows[args.slot_index(source, static_cast<int32_t>(slot)) * args.entries + entry] = -1;
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

  __device__ __forceinline__ void clear_row(int64_t row) {
    clear_bytes(static_cast<std::byte*>(recv.tokens) + int64_t{row} * args.token_bytes, shape.token_bytes());
    auto* scales = static_cast<std::byte*>(recv.scales) + int64_t{row} * args.scale_bytes;
    for (int64_t i = lane_id(); i < shape.scale_bytes(); i += kWarp) scales[i] = std::byte{0};
  }

  __device__ __forceinline__ Span tail() const {
    const int32_t end = tables.rows.base[shape.experts_per_rank];
    if (!shape.zero_tail || args.round != 0) return {0, 0};
    return share_of_rows(end, recv.route.rows);
  }

  // By every warp: own tokens while nothing else has come, the tail, and what comes.
  __device__ __forceinline__ void receive_rows() {
    const Queue keeps = exchange.queue(kKeepQueue, kSend ? args.length() : 0, args.parts);
    const Queue receives = exchange.queue(kReceiveQueue, *tables.most_slots, args.partners.by * args.parts);
    const Span zeros = tail();
    const Queue clears{&state.taken[kClearQueue], zeros.begin, zeros.end};
    bool keeping = kSend, clearing = zeros.size() > 0;
    // Of few tokens half of the warps look at what has come first: none moves two rows while another has
    // none.
    bool first_come = args.senders == 0 && warp_id() % 2 == 0;
    if (threadIdx.x == 0) trace(8);
    int32_t unit = receives.begin - 1;  // none yet
    while (unit < receives.end || keeping || clearing) {
      bool waits = true;
      if (first_come) {
        first_come = waits = false;
      } else if (keeping) {
        const int32_t own = keeps.take();
        keeping = own < keeps.end;
        if (keeping) keep_row(args.begin() + (own >> args.part_shift), own & (args.parts - 1));
        if (lane_id() == 0) trace(9);
        waits = false;
      } else if (clearing) {
        const int32_t row = clears.take();
        clearing = row < clears.end;
        if (clearing) clear_row(row);
        waits = false;
      }
      if (unit < receives.begin) unit = receives.take();
      while (unit < receives.end) {
        const SlotPart here = slot_part(args, unit);
        if (here.slot < tables.source_slots[here.rank]) {
          bool come = true, going = true;
          if (lane_id() == 0) {
            if (waits) {
              come = going = exchange.await_slot(here.rank, here.slot, here.part);
            } else {
              come = exchange.has_arrived(here.rank, here.slot, here.part);
            }
          }
          if (!__shfl_sync(kAllLanes, going, 0)) return;
          if (!__shfl_sync(kAllLanes, come, 0)) break;
          __syncwarp();
          if (lane_id() == 0) trace(12);
          if (!receive_row(here.rank, here.slot, here.part)) return;
          if (lane_id() == 0) trace(13);
        }
        unit = receives.take();
      }
    }
  }

  // Row of a pair, or -1 where it is dropped.
  __device__ __forceinline__ int32_t row_of(int32_t source, int32_t expert, uint32_t ordinal) const {
    const int64_t position =
        tables.rows.source_base[source * shape.experts_per_rank + expert] + int64_t{ordinal};
    const int64_t row = tables.rows.base[expert] + position;
    return position < tables.rows.kept[expert] && row < recv.route.rows ? static_cast<int32_t>(row) : -1;
  }

  __device__ __forceinline__ Places rows_of(int32_t row) const {
    return {__ballot_sync(kAllLanes, row >= 0),
            static_cast<std::byte*>(recv.tokens) + int64_t{row} * args.token_bytes,
            static_cast<std::byte*>(recv.scales) + int64_t{row} * args.scale_bytes};
  }

  // One of this rank's own tokens whose experts are here.
  __device__ __forceinline__ void keep_row(int32_t token, int32_t number) {
    const Destinations to = destinations_of(args, homes, slots, token);
    const uint32_t here = __ballot_sync(kAllLanes, to.rank == shape.rank);
    if (here == 0) return;
    const bool mine = to.rank == shape.rank;
    const int64_t at = int64_t{token} * shape.top_k + lane_id();
    const int32_t row =
        mine ? row_of(shape.rank, to.expert - shape.rank * shape.experts_per_rank, ordinals[at]) : -1;
    if (number == 0) {
      const int32_t slot = __shfl_sync(kAllLanes, to.slot, __ffs(static_cast<int>(here)) - 1);
      int32_t* rows = recv.route.slot_rows + args.slot_index(shape.rank, slot) * args.entries;
      if (mine) {
        rows[to.entry()] = row;
        if (row >= 0) recv.row_weights[row] = send.weights[at];
      }
      if (lane_id() >= __popc(here) && lane_id() < args.entries) rows[lane_id()] = -1;
    }
    move_token(token, number, rows_of(row));
  }

  // What has arrived. False: stopped.
  __device__ __forceinline__ bool receive_row(int32_t source, int32_t slot, int32_t number) {
    const std::byte* from = exchange.incoming(source) + args.first_slot + int64_t{slot} * args.stride;
    const std::byte* token = from + args.slot_header_bytes;
    const Part part = part_of_token(args, number);
    bool sound = true;
    const Places places = copy_bytes_to<true>(token, part, [&] {
      const int32_t row = entry_row(source, slot, from, number == 0, sound);
      return rows_of(sound ? row : -1);
    });
    if (!sound) {
      if (lane_id() == 0) exchange.refuse(source, Malformed::kEntry, slot);
      return false;
    }
    if (args.scales != 0) copy_scales<true>(shape.quant, from + args.scales_at, part, places);
    return true;
  }

  // Of a received slot, by a warp: lane i gets entry i's row, -1: none. All lanes get whether all are sound.
  __device__ __forceinline__ int32_t entry_row(int32_t source, int32_t slot, const std::byte* from,
                                               bool keeps, bool& sound) {
    const bool could = lane_id() < args.entries;
    const auto* entry = reinterpret_cast<const uint32_t*>(from + sizeof(SlotHeader)) + 3 * lane_id();
    const uint32_t entries = __ldcg(reinterpret_cast<const uint32_t*>(from) + 1);
    const uint32_t weight = could ? __ldcg(entry) : 0, ordinal = could ? __ldcg(entry + 1) : 0;
    const uint32_t expert = could ? __ldcg(entry + 2) & 0xffffU : 0;
    const bool is = could && lane_id() < static_cast<int>(entries);
    const bool fits = entries <= static_cast<uint32_t>(args.entries) &&
                      (!is || (expert < static_cast<uint32_t>(shape.experts_per_rank) &&
                               ordinal < static_cast<uint32_t>(args.tokens)));
    sound = __all_sync(kAllLanes, fits) != 0;
    const int32_t row = sound && is ? row_of(source, static_cast<int32_t>(expert), ordinal) : -1;
    if (keeps && row >= 0) recv.row_weights[row] = __uint_as_float(weight);
    if (keeps && could) recv.route.slot_rows[args.slot_index(source, slot) * args.entries + lane_id()] = row;
    return row;
  }

  __device__ __forceinline__ void poison() {
    const Route& route = recv.route;
    if (shape.quant == Quant::kNone) {
      fill_nan(recv.tokens, route.rows * shape.hidden, shape.dtype);
    } else {
      fill(static_cast<uint8_t*>(recv.tokens), route.rows * args.token_bytes, uint8_t{0x7f});
      if (shape.quant == Quant::kFp8) {
        fill_nan(recv.scales, route.rows * shape.scales(), DType::kFloat32);
      } else {
        fill(static_cast<uint8_t*>(recv.scales), route.rows * args.scale_bytes, uint8_t{0xff});
      }
    }
    fill_nan(recv.row_weights, route.rows, DType::kFloat32);
    fill(recv.group_sizes, shape.experts_per_rank, 0);
    const int64_t slots_in_all = int64_t{shape.num_ranks} * args.tokens;
    fill(route.source_slots, int64_t{shape.rounds(args.tokens)} * shape.num_ranks, 0);
    fill(route.slot_start, slots_in_all + 1, 0);
    fill(route.slot_rows, slots_in_all * args.entries, -1);
    if (threadIdx.x == 0) *recv.num_rows = *recv.num_dropped = *route.ok = 0;
  }
};

template <typename T, int kTopK, bool kSend, bool kRecv>
__global__ void __launch_bounds__(kThreads, 1)
    dispatch_kernel(const __grid_constant__ Args args, const __grid_constant__ DispatchSend send,
                    const __grid_constant__ DispatchRecv recv,
                    const __grid_constant__ DispatchTables tables) {
  __shared__ BlockState state;
  Exchange exchange(args, state);
  exchange.begin<kSend>();
  Dispatch<T, kTopK, kSend, kRecv>{
      args,     args.shape, send,   recv,
      exchange, state,      tables, share(args.length(), args.begin(), args.everybody)}
      .run();
}

size_t table_bytes(const MoeShape& shape) {
  return sizeof(int32_t) * static_cast<size_t>(DispatchTables(shape).words);
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
    return launch_rounds(
        call, ticket_out, ticket_in,
        {.sender_share = kSend && kRecv ? kSenderShare : 1, .most_units = kMostUnits}, [&](const Args& args) {
          return launch(kernel, call, table_bytes(call.shape), args, send, recv, DispatchTables(call.shape));
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
