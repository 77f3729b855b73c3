// What goes home: combine and the transpose of dispatch. One reduced row for every slot.
//
// What this rank owes itself is reduced where it is gathered. Of few tokens every block sends and gathers its
// share; of many, some blocks send at once, the others find out where this rank's tokens are and gather them,
// and all gather when nothing is left to send.
#include "xla_ffi/cuda/kernels.h"
#include "xla_ffi/cuda/launch.cuh"
#include "xla_ffi/cuda/move.cuh"
#include "xla_ffi/cuda/slots.cuh"
#include "xla_ffi/cuda/sum.cuh"

namespace pplx::moe::cuda {
namespace {

// Of the blocks, where some only send at first.
constexpr double kSenderShare = 0.4;

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
  Span share = cuda::share(args.length(), args.begin(), args.gatherers);  // of the round's tokens, if any
  int32_t* slots = nullptr;
  bool counted = true;  // whether this block knows how many slots this rank's tokens have elsewhere

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

  // A part of a row to send, or of a token's to gather: the same code adds up either. It needs registers, so
  // that little else is kept.
  struct Work {
    Terms terms;
    uint64_t* word;  // to publish by, or this lane's to wait for; null: none
    int32_t rank;    // that it is waited for from
  };

  __device__ __forceinline__ void exchange_rows(bool poisoned) {
    const Roles<kSend, kRecv> roles(args);
    bool usable = true, sends = kSend && roles.sends;
    if constexpr (kRecv) {
      if (roles.places && !(roles.split && sends)) usable = number(roles.placers);
    }
    const Ring ring(tables.end + warp_id() * kRingBytes);
    Queue queue{};
    uint64_t* sent = nullptr;  // epoch of what was sent last
    // It waits until all has arrived there: best done when the next rows are on their way.
    const auto publish = [&] {
      if (sent != nullptr && lane_id() == 0) store_release(sent, exchange.epoch());
      sent = nullptr;
    };
    if (sends) {
      announce(roles.senders, poisoned);
      queue = exchange.queue(kSendQueue, poisoned ? 0 : *tables.most, args.partners.by * args.parts);
    } else if (!begin_gathering(roles, usable, queue)) {
      return;
    }
#pragma unroll 1
    for (;;) {
      const int32_t unit = queue.take();
      if (unit >= queue.end) {
        if (!sends) return;
        sends = false;
        publish();
        end_sending(roles.senders, poisoned);
        if constexpr (kRecv) {
          if (roles.split) usable = await_numbers();
        }
        if (!begin_gathering(roles, usable, queue)) return;
        continue;
      }
      Work work{.terms = {.weight = 1.0F}};
      if (sends ? !prepare_send(unit, work) : !prepare_gather(unit, work)) continue;
      const Span part = sends ? part_of_row(unit, args.part_shift, 1) : gathered_part(unit);
      if (!add_up<T, W>(
              ring, work.terms, part, [&] { return await_slots(work); }, publish))
        return;
      if (sends) {
        end_send(unit, work);
        sent = work.word;
      } else if (!end_gather(unit, work)) {
        return;
      }
    }
  }

  // Of a unit of work, rows being cut into 1 << shift parts at multiples of `grain` vectors.
  __device__ __forceinline__ Span part_of_row(int32_t unit, int32_t shift, int32_t grain) const {
    const int32_t vecs = args.row_bytes / 16, number = unit & ((1 << shift) - 1);
    const auto cut = [&](int32_t at) { return min(((vecs * at >> shift) + grain - 1) & -grain, vecs); };
    return {cut(number), cut(number + 1)};
  }
  __device__ __forceinline__ Span gathered_part(int32_t unit) const {
    return part_of_row(unit, args.gather_shift, args.gather_grain);
  }

  // Rows of this GPU that make up a slot: an entry a lane.
  __device__ __forceinline__ void take_rows(int32_t source, int32_t slot, Terms& terms) {
    int32_t row = slot_row(args, send.route, source, slot, exchange);
    const uint32_t kept = __ballot_sync(kAllLanes, row >= 0);
    terms.rows = __popc(kept);
    // Those that dispatch dropped leave gaps.
    if ((kept & (kept + 1)) != 0) row = __shfl_sync(kAllLanes, row, __fns(kept, 0, lane_id() + 1) & 31U);
    const bool mine = lane_id() < terms.rows;
    terms.row = static_cast<const std::byte*>(send.rows) + (mine ? int64_t{row} * args.row_bytes : 0);
    terms.weight = mine && send.weights != nullptr ? send.weights[row] : 1.0F;
  }

  // --- expert side ---

  __device__ __forceinline__ void announce(const Team& team, bool poisoned) {
    if (team.thread() != 0) return;
    const int32_t blocks = args.senders != 0 ? args.senders : static_cast<int32_t>(gridDim.x);
    for (int32_t rank = blockIdx.x; rank < shape.num_ranks; rank += blocks) {
      exchange.announce(rank, tables.received[rank], poisoned);
    }
  }

  __device__ __forceinline__ void end_sending(const Team& team, bool poisoned) {
    if (lane_id() == 0) trace(5);
    if (!exchange.has_proxy()) return;
    team.sync();
    if (team.thread() == 0) {
      exchange.submit(poisoned, [&](int32_t rank) { return tables.received[rank]; });
    }
  }

  // False: there is no such slot.
  __device__ __forceinline__ bool prepare_send(int32_t unit, Work& work) {
    const SlotPart to = slot_part(args, unit);
    if (to.slot >= tables.received[to.rank]) return false;
    take_rows(to.rank, to.slot, work.terms);
    work.terms.out = exchange.outgoing(to.rank) + args.first_slot + int64_t{to.slot} * args.stride;
    work.word = exchange.epoch_of_sent(to.rank, to.slot, to.part);
    return true;
  }
  __device__ __forceinline__ void end_send(int32_t unit, const Work& work) {
    if (send.returns != nullptr && (unit & (args.parts - 1)) == 0 && lane_id() < args.entries) {
      const SlotPart to = slot_part(args, unit);
      const int32_t row = slot_row(args, send.route, to.rank, to.slot, exchange);
      reinterpret_cast<float*>(work.terms.out + args.home_stride)[lane_id()] =
          row >= 0 ? send.returns[row] : 0.0F;
    }
    __syncwarp();
  }

  // --- home side ---

  __device__ __forceinline__ bool number(const Team& team) {
    return number_own_tokens<kTopK>(args, team, args.gatherers, share, recv.home, exchange, tables, slots);
  }
  // By all threads of a block that was not among them. False: unusable, or stopped.
  __device__ __forceinline__ bool await_numbers() {
    exchange.await_crew(meetings(args), args.gatherers);
    counted = false;
    return load_volatile(&args.control->worst[exchange.lane()]) == 0;
  }

  // Of the parts that a row is gathered in.
  __device__ __forceinline__ bool is_first(int32_t unit) const {
    return (unit & ((1 << args.gather_shift) - 1)) == 0;
  }

  // False: there is nothing to gather.
  __device__ __forceinline__ bool begin_gathering(const Roles<kSend, kRecv>& roles, bool usable,
                                                  Queue& queue) {
    if (!kRecv) return false;
    if (roles.places) await_all(roles.placers, usable);
    roles.ready(state);
    if (threadIdx.x == 0) trace(8);
    queue = exchange.queue(kKeepQueue, args.length(), 1 << args.gather_shift);
    return !exchange.stopped() && load_volatile(&state.poisoned) == 0;
  }

  __device__ __forceinline__ void await_all(const Team& team, bool usable) {
    if (team.thread() == 0) trace(4);
    if (!await_headers(args, team, exchange, tables,
                       usable && counted ? static_cast<int32_t*>(tables.counts.ranks_total) : nullptr))
      usable = false;
    if (team.thread() == 0) trace(7);
    // There is nothing to add up; by each thread, as it goes on without waiting for others.
    if (!usable) *const_cast<volatile uint32_t*>(&state.poisoned) = 1;
  }

  // Whether this lane's destination is this rank, in the same exchange: what it adds up never travels.
  __device__ __forceinline__ bool is_here(const Destinations& to) const {
    return kSend && to.rank == shape.rank;
  }
  __device__ __forceinline__ const std::byte* sum_of(const Destinations& to) const {
    if (to.rank < 0 || is_here(to)) return nullptr;
    return exchange.incoming(to.rank) + args.first_slot + int64_t{to.slot} * args.stride;
  }
  __device__ __forceinline__ int32_t slot_here(const Destinations& to, uint32_t here) const {
    return __shfl_sync(kAllLanes, to.slot, __ffs(static_cast<int>(here)) - 1);
  }

  // False: nothing is to be added up.
  __device__ __forceinline__ bool prepare_gather(int32_t unit, Work& work) {
    const int32_t token = args.begin() + (unit >> args.gather_shift);
    const Destinations to = destinations_of(args, recv.home, slots, token);
    Terms& terms = work.terms;
    terms.out = static_cast<std::byte*>(recv.out) + int64_t{token} * args.row_bytes;
    if (__ballot_sync(kAllLanes, to.rank >= 0 && tables.poisoned[max(to.rank, 0)] != 0) != 0) {
      write_nans(terms.out, token, unit);
      return false;
    }
    const uint32_t here = __ballot_sync(kAllLanes, is_here(to));
    if (kSend && here != 0) take_rows(shape.rank, slot_here(to, here), terms);
    terms.home = true;
    terms.own = here != 0;
    if (recv.start != nullptr && __shfl_sync(kAllLanes, to.expert, 0) != kPastEnd)
      terms.start = static_cast<const std::byte*>(recv.start) + int64_t{token} * args.row_bytes;
    if (to.leads && !is_here(to)) {
      const int32_t part = (unit & ((1 << args.gather_shift) - 1)) >> (args.gather_shift - args.part_shift);
      work.word = exchange.epoch_of_received(to.rank, to.slot, part);
      work.rank = to.rank;
    }
    sort_partials(to, to.leaders & ~here, terms);
    return true;
  }

  // Behind the rows come the sums that the lanes in `away` have, ranks ascending.
  __device__ __forceinline__ void sort_partials(const Destinations& to, uint32_t away, Terms& terms) {
    int32_t place = 0;
    for (uint32_t left = away; left != 0; left &= left - 1) {
      if (__shfl_sync(kAllLanes, to.rank, __ffs(static_cast<int>(left)) - 1) < to.rank) ++place;
    }
    const auto sum = reinterpret_cast<uint64_t>(sum_of(to));
    for (uint32_t left = away; left != 0; left &= left - 1) {
      const int lane = __ffs(static_cast<int>(left)) - 1;
      const uint64_t from = __shfl_sync(kAllLanes, sum, lane);
      if (lane_id() != terms.rows + __shfl_sync(kAllLanes, place, lane)) continue;
      terms.row = reinterpret_cast<const std::byte*>(from);
      terms.weight = 1.0F;
    }
    terms.partials = __popc(away);
    terms.partials_before =
        __popc(__ballot_sync(kAllLanes, (away >> lane_id() & 1U) != 0 && to.rank < shape.rank));
  }

  // False: stopped.
  __device__ __forceinline__ bool end_gather(int32_t unit, const Work& work) {
    if (recv.returned == nullptr || !is_first(unit)) return true;
    if (!await_slots(work)) return false;  // of a part without values
    const int32_t token = args.begin() + (unit >> args.gather_shift);
    const Destinations to = destinations_of(args, recv.home, slots, token);
    const uint32_t here = __ballot_sync(kAllLanes, is_here(to));
    int32_t row = -1;
    if (kSend && here != 0) row = slot_row(args, send.route, shape.rank, slot_here(to, here), exchange);
    const int entry = to.entry();
    const int32_t own_row = __shfl_sync(kAllLanes, row, entry);
    if (lane_id() >= shape.top_k) return true;
    recv.returned[int64_t{token} * shape.top_k + lane_id()] =
        to.rank < 0 || entry >= args.entries ? 0.0F
        : !is_here(to) ? __ldcg(reinterpret_cast<const float*>(sum_of(to) + args.home_stride) + entry)
        : kSend && own_row >= 0 ? send.returns[own_row]
                                : 0.0F;
    return true;
  }

  __device__ __forceinline__ void write_nans(std::byte* out, int32_t token, int32_t unit) const {
    constexpr float kNan = __builtin_nanf("");
    const Span part = gathered_part(unit);
    float nans[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) nans[j] = kNan;
    for (int32_t at = part.begin + lane_id(); at < part.end; at += kWarp) {
      store_vec(out + int64_t{at} * 16, pack<T>(nans));
    }
    if (is_first(unit) && recv.returned != nullptr && lane_id() < shape.top_k) {
      recv.returned[int64_t{token} * shape.top_k + lane_id()] = kNan;
    }
  }

  // By a warp: what each lane waits for. False: stopped.
  __device__ __forceinline__ bool await_slots(const Work& work) {
    const bool come = work.word == nullptr || exchange.await(work.word, work.rank);
    const bool all = __ballot_sync(kAllLanes, !come) == 0;
    __syncwarp();
    return all;
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
                const __grid_constant__ HomeRecv recv, const __grid_constant__ SlotTables tables) {
  __shared__ BlockState state;
  Exchange exchange(args, state);
  exchange.begin<kSend>();
  Home<T, W, kTopK, kSend, kRecv>{args, args.shape, send, recv, exchange, state, tables}.run();
}

size_t shared_bytes(const MoeShape& shape) {
  return SlotTables(shape).bytes() + kThreads / kWarp * kRingBytes;
}

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
    return launch_rounds(call, ticket_out, ticket_in,
                         {.sender_share = kSend && kRecv ? kSenderShare : 1, .senders_begin = kSend && kRecv},
                         [&](const Args& args) {
                           return launch(kernel, call, shared_bytes(call.shape), args, send, recv,
                                         SlotTables(call.shape));
                         });
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
  const auto load = [&](auto* kernel) { return load_kernel(kernel, shared_bytes(shape), num_sms); };
  cudaError_t error = with_kernel<true, true>(shape, load);
  if (error == cudaSuccess) error = with_kernel<true, false>(shape, load);
  if (error == cudaSuccess) error = with_kernel<false, true>(shape, load);
  return error;
}

#ifdef PPLX_TRACE
void print_combine_trace(int blocks) { print_trace("combine", blocks); }
#endif

}  // namespace pplx::moe::cuda
