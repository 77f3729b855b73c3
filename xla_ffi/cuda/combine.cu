// What goes home: combine and the transpose of dispatch. One reduced row for every slot.
//
// What this rank owes itself is reduced where it is gathered. Of few tokens every block sends and gathers its
// share; of many, some blocks send and the others gather, until nothing is left to send.
#include "xla_ffi/cuda/kernels.h"
#include "xla_ffi/cuda/launch.cuh"
#include "xla_ffi/cuda/move.cuh"
#include "xla_ffi/cuda/slots.cuh"

namespace pplx::moe::cuda {
namespace {

// Vectors of each lane at a time, when sending and when gathering.
constexpr int kSendVecs = 3, kVecs = 2;
// Of the blocks, where some only send at first.
constexpr double kSenderShare = 0.5;

// Of combine and dispatch's transpose alike.
struct HomeSend {
  const void* rows;      // [M, H]
  const float* weights;  // [M], or null
  const float* returns;  // [M] numbers that go along, or null
  Route route;
};
struct HomeRecv {
  const int32_t* home;  // [T, K]
  const void* start;    // [T, H] added, or null
  void* out;            // [T, H]
  float* returned;      // [T, K], or null
};

// T: the rows' type; W: what they travel home in.
template <typename T, typename W, int kTopK, bool kSend, bool kRecv>
struct Home {
  const Args& args;
  const MoeShape& shape;
  const HomeSend& send;
  const HomeRecv& recv;
  Exchange& exchange;
  BlockState& state;
  const SlotTables& tables;
  Span share;  // of the round's tokens
  int32_t* slots = nullptr;

  static constexpr int kWidth = kVec<T>;

  __device__ __forceinline__ void run() {
    const bool open = state.stop == 0;
    for (int32_t i = threadIdx.x; i < tables.words; i += kThreads) tables.counts.ranks_before[i] = 0;
    __syncthreads();
    // A derivative that nobody asked for: nothing was sent.
    if (kRecv && !kSend && args.kind == Kind::kDispatchTranspose && state.skip != 0) {
      clear();
      exchange.leave();
      return;
    }
    if (open) {
      slots = slot_notes(args, share, exchange, tables);
      if constexpr (kSend) {
        if (!read_received(args, send.route, exchange, tables)) {
          if (threadIdx.x == 0) state.poisoned = 1;
          for (int32_t s = threadIdx.x; s < shape.num_ranks; s += kThreads) tables.received[s] = 0;
        }
        __syncthreads();
      }
      if (threadIdx.x == 0) trace(2);
      const bool poisoned = state.poisoned != 0;  // before the receiving side is judged
      __syncthreads();
      exchange_rows(poisoned);
    }
    exchange.template finish<kSend, kRecv>([&] {
      if constexpr (kRecv) poison();
    });
  }

  __device__ __forceinline__ void exchange_rows(bool poisoned) {
    const Roles<kSend, kRecv> roles(args);
    bool usable = true;
    if constexpr (kRecv) {
      if (roles.places) usable = number(roles.placers);
    }
    if constexpr (kSend) {
      if (roles.sends) send_rows(roles.senders, poisoned);
    }
    if constexpr (kRecv) {
      if (roles.places) await_all(roles.placers, usable);
      roles.ready();
      if (!exchange.stopped() && load_volatile(&state.poisoned) == 0) gather_rows();
    }
  }

  // --- expert side ---

  __device__ __forceinline__ void send_rows(const Team& team, bool poisoned) {
    if (team.thread() == 0) {
      const int32_t blocks = args.senders != 0 ? args.senders : static_cast<int32_t>(gridDim.x);
      for (int32_t rank = blockIdx.x; rank < shape.num_ranks; rank += blocks) {
        exchange.announce(rank, tables.received[rank], poisoned);
      }
    }
    const int32_t ranks = kRecv ? shape.num_ranks - 1 : shape.num_ranks;
    const Queue queue = exchange.queue(kSendQueue, poisoned ? 0 : *tables.most, ranks * args.parts);
    for (int32_t unit = queue.take(); unit < queue.end; unit = queue.take()) {
      const SlotPart to = slot_part(args, unit, ranks);
      if (to.slot < tables.received[to.rank]) send_row(to.rank, to.slot, to.part);
    }
    if (team.thread() == 0) trace(5);
    if (!exchange.has_proxy()) return;
    team.sync();
    if (team.thread() == 0) {
      exchange.submit(poisoned, [&](int32_t rank) { return tables.received[rank]; });
    }
  }

  __device__ __forceinline__ Span part_of_row(int32_t number) const {
    const int32_t vecs = args.row_bytes / 16;
    return {vecs * number / args.parts, vecs * (number + 1) / args.parts};
  }

  __device__ __forceinline__ void send_row(int32_t source, int32_t slot, int32_t number) {
    const int32_t row = slot_row(args, send.route, source, slot, exchange);
    std::byte* out = exchange.outgoing(source) + args.first_slot + int64_t{slot} * args.stride;
    const uint32_t rows = __ballot_sync(kAllLanes, row >= 0);
    const float weight = send.weights != nullptr && row >= 0 ? send.weights[row] : 1.0F;
    const Span part = part_of_row(number);
    for (int32_t base = part.begin; base < part.end; base += kSendVecs * kWarp) {
      float acc[kSendVecs][kWidth];
      reduce(rows, row, weight, base, part.end, acc);
#pragma unroll
      for (int i = 0; i < kSendVecs; ++i) {
        const int32_t at = base + i * kWarp + lane_id();
        if (at < part.end) store_values<W>(out + int64_t{at} * kWidth * sizeof(W), acc[i]);
      }
    }
    if (number == 0 && send.returns != nullptr && lane_id() < args.entries) {
      reinterpret_cast<float*>(out + args.home_stride)[lane_id()] = row >= 0 ? send.returns[row] : 0.0F;
    }
    __syncwarp();
    if (lane_id() == 0) exchange.publish(source, slot, number);
  }

  // Sums of the rows that the lanes in `lanes` hold, at some vectors of each lane.
  template <int kVecs>
  __device__ __forceinline__ void reduce(uint32_t lanes, int32_t row, float weight, int32_t base, int32_t end,
                                         float (&acc)[kVecs][kWidth]) const {
    constexpr int kAtOnce = 4;
    const float none = start_of_sum(lanes == 0);
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) acc[i][j] = none;
    }
    while (lanes != 0) {
      uint4 some[kAtOnce][kVecs];
      float weights[kAtOnce];
      int count = 0;
#pragma unroll
      for (int m = 0; m < kAtOnce; ++m) {
        if (lanes == 0) continue;
        const int lane = __ffs(static_cast<int>(lanes)) - 1;
        lanes &= lanes - 1;
        ++count;
        weights[m] = __shfl_sync(kAllLanes, weight, lane);
        const auto* from =
            static_cast<const T*>(send.rows) + int64_t{__shfl_sync(kAllLanes, row, lane)} * shape.hidden;
#pragma unroll
        for (int i = 0; i < kVecs; ++i) {
          const int32_t at = base + i * kWarp + lane_id();
          some[m][i] = at < end ? load_vec(from + int64_t{at} * kWidth) : uint4{0, 0, 0, 0};
        }
      }
#pragma unroll
      for (int m = 0; m < kAtOnce; ++m) {
        if (m >= count) continue;
#pragma unroll
        for (int i = 0; i < kVecs; ++i) {
          float values[kWidth];
          unpack<T>(some[m][i], values);
          accumulate(acc[i], values, weights[m]);
        }
      }
    }
  }

  // --- home side ---

  __device__ __forceinline__ bool number(const Team& team) {
    return number_own_tokens<kTopK>(args, team, share, recv.home, exchange, tables, slots);
  }

  __device__ __forceinline__ void await_all(const Team& team, bool usable) {
    if (team.thread() == 0) trace(4);
    if (!await_headers(args, team, exchange, tables, usable ? tables.counts.ranks_total : nullptr))
      usable = false;
    if (team.thread() != 0) return;
    trace(7);
    if (!usable) state.poisoned = 1;  // there is nothing to add up
  }

  __device__ __forceinline__ void gather_rows() {
    const Queue queue = exchange.queue(kKeepQueue, args.length(), args.parts);
    for (int32_t unit = queue.take(); unit < queue.end; unit = queue.take()) {
      if (!gather_row(args.begin() + unit / args.parts, unit % args.parts)) return;
    }
  }

  // False: stopped.
  __device__ __forceinline__ bool gather_row(int32_t token, int32_t number) {
    const Destinations to = destinations_of(args, recv.home, slots, token);
    std::byte* out = static_cast<std::byte*>(recv.out) + int64_t{token} * args.row_bytes;
    const Span part = part_of_row(number);
    float* returned = number == 0 && recv.returned != nullptr && lane_id() < shape.top_k
                          ? recv.returned + int64_t{token} * shape.top_k + lane_id()
                          : nullptr;
    if (__ballot_sync(kAllLanes, to.rank >= 0 && tables.poisoned[max(to.rank, 0)] != 0) != 0) {
      constexpr float kNan = __builtin_nanf("");
      float nans[kWidth];
#pragma unroll
      for (int j = 0; j < kWidth; ++j) nans[j] = kNan;
      for (int32_t at = part.begin + lane_id(); at < part.end; at += kWarp) {
        store_vec(out + int64_t{at} * 16, pack<T>(nans));
      }
      if (returned != nullptr) *returned = kNan;
      return true;
    }
    const bool here = kSend && to.rank == shape.rank;  // reduced in place
    const std::byte* from = nullptr;
    if (to.rank >= 0 && !here)
      from = exchange.incoming(to.rank) + args.first_slot + int64_t{to.slot} * args.stride;
    // Of this rank's own slot: its rows, an entry a lane.
    int32_t row = -1;
    float weight = 1.0F;
    const uint32_t own = __ballot_sync(kAllLanes, here);
    if (kSend && own != 0) {
      const int32_t slot = __shfl_sync(kAllLanes, to.slot, __ffs(static_cast<int>(own)) - 1);
      row = slot_row(args, send.route, shape.rank, slot, exchange);
      if (send.weights != nullptr && row >= 0) weight = send.weights[row];
    }
    const uint32_t own_rows = __ballot_sync(kAllLanes, row >= 0);
    const int32_t first_choice = __shfl_sync(kAllLanes, to.expert, 0);
    const std::byte* start =
        recv.start == nullptr || first_choice == kPastEnd
            ? nullptr
            : static_cast<const std::byte*>(recv.start) + int64_t{token} * args.row_bytes;
    const uint32_t away = to.leaders & ~own;
    bool arrived = false;
    for (int32_t base = part.begin; base < part.end; base += kVecs * kWarp) {
      // What this rank owes itself needs nobody else: it is reduced while the others' rows are on their way.
      float mine[kVecs][kWidth];
      uint4 near[kVecs];
      if (arrived) load_partial(from, away, base, part.end, near);
      if constexpr (kSend) reduce(own_rows, row, weight, base, part.end, mine);
      if (!arrived) {
        if (!await_slots(to, here, number)) return false;
        arrived = true;
        load_partial(from, away, base, part.end, near);
      }
      add_up(to, from, away, mine, near, start, base, part.end, out);
    }
    if (number == 0 && recv.returned != nullptr) {
      if (!arrived && !await_slots(to, here, number)) return false;  // a part without values
      const int entry = to.entry();
      const int32_t own_row = __shfl_sync(kAllLanes, row, entry);
      if (returned != nullptr) {
        *returned = to.rank < 0 || entry >= args.entries ? 0.0F
                    : !here ? __ldcg(reinterpret_cast<const float*>(from + args.home_stride) + entry)
                    : kSend && own_row >= 0 ? send.returns[own_row]
                                            : 0.0F;
      }
    }
    return true;
  }

  // By a warp: a token's slots on other ranks. False: stopped.
  __device__ __forceinline__ bool await_slots(const Destinations& to, bool here, int32_t number) {
    bool come = true;
    if (to.leads && !here) come = exchange.await_slot(to.rank, to.slot, number);
    const bool all = __ballot_sync(kAllLanes, !come) == 0;
    __syncwarp();
    return all;
  }

  // The first 16 bytes of each vector of the first of other ranks' sums, before they are needed.
  __device__ __forceinline__ void load_partial(const std::byte* from, uint32_t away, int32_t base,
                                               int32_t end, uint4 (&near)[kVecs]) const {
    if (away == 0 || sizeof(W) != sizeof(T)) return;
    const auto* partial = reinterpret_cast<const std::byte*>(
        __shfl_sync(kAllLanes, reinterpret_cast<uint64_t>(from), __ffs(static_cast<int>(away)) - 1));
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int32_t at = base + i * kWarp + lane_id();
      if (at < end) near[i] = load_shared_vec(partial + int64_t{at} * 16);
    }
  }

  // Some vectors of each lane: what is given, then every rank's sum, ranks ascending.
  __device__ __forceinline__ void add_up(const Destinations& to, const std::byte* from, uint32_t away,
                                         const float (&mine)[kVecs][kWidth], const uint4 (&near)[kVecs],
                                         const std::byte* start, int32_t base, int32_t end,
                                         std::byte* out) const {
    float acc[kVecs][kWidth];
    const float none = start_of_sum(to.leaders == 0);
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int32_t at = base + i * kWarp + lane_id();
#pragma unroll
      for (int j = 0; j < kWidth; ++j) acc[i][j] = none;
      if (start != nullptr && at < end) load_values<T, false>(start + int64_t{at} * 16, acc[i]);
    }
    for (uint32_t left = to.leaders; left != 0;) {
      const bool waits = (left >> lane_id() & 1U) != 0;
      const uint32_t rank = __reduce_min_sync(kAllLanes, waits ? static_cast<uint32_t>(to.rank) : ~0U);
      const uint32_t chosen = __ballot_sync(kAllLanes, waits && static_cast<uint32_t>(to.rank) == rank);
      left &= ~chosen;
      float sums[kWidth];
      if (kSend && rank == static_cast<uint32_t>(shape.rank)) {
#pragma unroll
        for (int i = 0; i < kVecs; ++i) {
#pragma unroll
          for (int j = 0; j < kWidth; ++j) sums[j] = to_float(from_float<W>(mine[i][j]));
          accumulate(acc[i], sums, 1.0F);
        }
        continue;
      }
      const bool loaded = sizeof(W) == sizeof(T) && (away & (0U - away)) == chosen;
      const auto* partial = reinterpret_cast<const std::byte*>(
          __shfl_sync(kAllLanes, reinterpret_cast<uint64_t>(from), __ffs(static_cast<int>(chosen)) - 1));
#pragma unroll
      for (int i = 0; i < kVecs; ++i) {
        const int32_t at = base + i * kWarp + lane_id();
        if (at >= end) continue;
        if (loaded) {
          unpack<T>(near[i], sums);
        } else {
          load_values<W, true>(partial + int64_t{at} * kWidth * sizeof(W), sums);
        }
        accumulate(acc[i], sums, 1.0F);
      }
    }
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int32_t at = base + i * kWarp + lane_id();
      if (at < end) store_vec(out + int64_t{at} * 16, pack<T>(acc[i]));
    }
  }

  __device__ __forceinline__ void poison() {
    fill_nan(recv.out, int64_t{args.tokens} * shape.hidden, shape.dtype);
    if (recv.returned != nullptr)
      fill_nan(recv.returned, int64_t{args.tokens} * shape.top_k, DType::kFloat32);
  }

  __device__ __forceinline__ void clear() {
    const int64_t vecs = int64_t{args.tokens} * args.row_bytes / 16,
                  numbers = int64_t{args.tokens} * shape.top_k;
    const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x,
                  threads = int64_t{gridDim.x} * kThreads;
    for (int64_t i = thread; i < vecs; i += threads) static_cast<uint4*>(recv.out)[i] = {0, 0, 0, 0};
    for (int64_t i = thread; i < numbers; i += threads) recv.returned[i] = 0.0F;
  }
};

template <typename T, typename W, int kTopK, bool kSend, bool kRecv>
__global__ void __launch_bounds__(kThreads, 1)
    home_kernel(const __grid_constant__ Args args, const __grid_constant__ HomeSend send,
                const __grid_constant__ HomeRecv recv) {
  extern __shared__ int64_t memory[];
  __shared__ BlockState state;
  const SlotTables tables(args.shape, reinterpret_cast<int32_t*>(memory));
  Exchange exchange(args, state);
  exchange.begin<kSend>();
  Home<T, W, kTopK, kSend, kRecv>{args,     args.shape, send,   recv,
                                  exchange, state,      tables, share(args.length(), args.begin())}
      .run();
}

size_t table_bytes(const MoeShape& shape) { return static_cast<size_t>(SlotTables(shape, nullptr).bytes()); }

template <bool kSend, bool kRecv, typename Visit>
auto with_kernel(const MoeShape& shape, Visit&& visit) {
  return with_row_type(shape.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto with_top_k = [&](auto* wide) {
      using W = std::remove_pointer_t<decltype(wide)>;
      return shape.top_k <= 8 ? visit(&home_kernel<T, W, 8, kSend, kRecv>)
                              : visit(&home_kernel<T, W, 16, kSend, kRecv>);
    };
    return shape.home_dtype == shape.dtype ? with_top_k(type) : with_top_k(static_cast<float*>(nullptr));
  });
}

template <bool kSend, bool kRecv>
cudaError_t enqueue(const KernelCall& call, const HomeSend& send, const HomeRecv& recv, float* ticket_out,
                    const float* ticket_in) {
  return with_kernel<kSend, kRecv>(call.shape, [&](auto* kernel) {
    return launch_rounds(
        call, ticket_out, ticket_in, {.sender_share = kSend && kRecv ? kSenderShare : 1},
        [&](const Args& args) { return launch(kernel, call, table_bytes(call.shape), args, send, recv); });
  });
}

HomeSend home_send(const CombineSend& send) { return {send.y, send.row_weights, nullptr, send.route}; }
HomeSend home_send(const DispatchTransposeSend& send) {
  return {send.d_tokens, nullptr, send.d_row_weights, send.route};
}
HomeRecv home_recv(const CombineRecv& recv) { return {recv.home, recv.accumulate, recv.out, nullptr}; }
HomeRecv home_recv(const DispatchTransposeRecv& recv) {
  return {recv.home, nullptr, recv.d_x, recv.d_weights};
}

}  // namespace

cudaError_t combine(const KernelCall& call, const CombineSend& send, const CombineRecv& recv) {
  return enqueue<true, true>(call, home_send(send), home_recv(recv), nullptr, nullptr);
}
cudaError_t combine_send(const KernelCall& call, const CombineSend& send, float* ticket) {
  return enqueue<true, false>(call, home_send(send), {}, ticket, nullptr);
}
cudaError_t combine_recv(const KernelCall& call, const CombineRecv& recv, const float* ticket) {
  return enqueue<false, true>(call, {}, home_recv(recv), nullptr, ticket);
}

cudaError_t dispatch_transpose(const KernelCall& call, const DispatchTransposeSend& send,
                               const DispatchTransposeRecv& recv) {
  return enqueue<true, true>(call, home_send(send), home_recv(recv), nullptr, nullptr);
}
cudaError_t dispatch_transpose_send(const KernelCall& call, const DispatchTransposeSend& send,
                                    float* ticket) {
  return enqueue<true, false>(call, home_send(send), {}, ticket, nullptr);
}
cudaError_t dispatch_transpose_recv(const KernelCall& call, const DispatchTransposeRecv& recv,
                                    const float* ticket) {
  return enqueue<false, true>(call, {}, home_recv(recv), nullptr, ticket);
}

cudaError_t load_combine(const MoeShape& shape, int* num_sms) {
  const auto load = [&](auto* kernel) { return load_kernel(kernel, table_bytes(shape), num_sms); };
  cudaError_t error = with_kernel<true, true>(shape, load);
  if (error == cudaSuccess) error = with_kernel<true, false>(shape, load);
  if (error == cudaSuccess) error = with_kernel<false, true>(shape, load);
  return error;
}

#ifdef PPLX_TRACE
void print_combine_trace(int blocks) { print_trace("combine", blocks); }
#endif

}  // namespace pplx::moe::cuda
