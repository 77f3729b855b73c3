// The transpose of combine: the cotangent of a combined token, out to every rank that has rows of it.
#include "xla_ffi/cuda/kernels.h"
#include "xla_ffi/cuda/launch.cuh"
#include "xla_ffi/cuda/move.cuh"
#include "xla_ffi/cuda/slots.cuh"

namespace pplx::moe::cuda {
namespace {

// Of the blocks, where some only send at first.
constexpr double kSenderShare = 0.36;

// Rows that no slot writes lie between those that some do.
bool has_holes(const MoeShape& shape) { return shape.alignment > 1 || shape.drop || shape.padded; }

template <typename T, int kTopK, bool kSend, bool kRecv>
struct Cotangents {
  const Args& args;
  const MoeShape& shape;
  const CombineTransposeSend& send;
  const CombineTransposeRecv& recv;
  Exchange& exchange;
  BlockState& state;
  const SlotTables& tables;
  bool clears_tail;
  Span share;  // of the round's tokens
  int32_t* slots = nullptr;

  __device__ const Route& route() const { return kSend ? send.route : recv.route; }

  __device__ __forceinline__ void run() {
    const bool open = state.stop == 0;
    for (int32_t i = threadIdx.x; i < tables.words; i += kThreads) tables.counts.ranks_before[i] = 0;
    __syncthreads();
    // A derivative that nobody asked for: nothing was sent.
    if (kRecv && !kSend && state.skip != 0) {
      const int64_t vecs = recv.route.rows * args.row_bytes / 16;
      for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < vecs;
           i += int64_t{gridDim.x} * kThreads) {
        static_cast<uint4*>(recv.d_y)[i] = {0, 0, 0, 0};
      }
      exchange.leave();
      return;
    }
    if (open) {
      slots = slot_notes(args, share, exchange, tables);
      const Team everybody{0, kThreads, 0};
      bool usable = read_received(args, route(), exchange, tables);
      if constexpr (kSend) {
        // A block that gives up would leave the others waiting for it.
        const bool own = number_own_tokens<kTopK>(args, everybody, args.gatherers, share, send.route.home,
                                                  exchange, tables, slots);
        usable = usable && own;
      }
      if (threadIdx.x == 0 && !usable) state.poisoned = 1;
      __syncthreads();
      const bool going = !exchange.stopped(), poisoned = state.poisoned != 0;
      __syncthreads();
      if (going) exchange_rows(poisoned);
    }
    exchange.template finish<kSend, kRecv>([&] {
      if constexpr (kRecv) {
        fill_nan(recv.d_y, recv.route.rows * shape.hidden, shape.dtype);
        fill_nan(recv.d_row_weights, recv.route.rows, DType::kFloat32);
      }
    });
  }

  __device__ __forceinline__ void exchange_rows(bool poisoned) {
    const Roles<kSend, kRecv> roles(args);
    if constexpr (kSend) {
      if (roles.sends) send_rows(roles.senders, poisoned);
    }
    if constexpr (kRecv) {
      if (roles.places) {
        await_headers(args, roles.placers, exchange, tables,
                      poisoned ? nullptr : static_cast<int32_t*>(tables.received));
      }
      roles.ready(state);
      if (!exchange.stopped() && !poisoned) receive_rows();
    }
  }

  // --- home side ---

  __device__ __forceinline__ void send_rows(const Team& team, bool poisoned) {
    const auto total = [&](int32_t rank) { return poisoned ? 0 : tables.counts.ranks_total[rank]; };
    if (team.thread() == 0) {
      const int32_t blocks = args.senders != 0 ? args.senders : static_cast<int32_t>(gridDim.x);
      for (int32_t rank = blockIdx.x; rank < shape.num_ranks; rank += blocks) {
        exchange.announce(rank, total(rank), poisoned);
      }
    }
    const Queue queue = exchange.queue(kSendQueue, poisoned ? 0 : args.length(), args.parts);
    for (int32_t unit = queue.take(); unit < queue.end; unit = queue.take()) {
      send_row(args.begin() + (unit >> args.part_shift), unit & (args.parts - 1));
    }
    if (!exchange.has_proxy()) return;
    team.sync();
    if (team.thread() == 0) exchange.submit(poisoned, total);
  }

  __device__ __forceinline__ Part part_of_row(int32_t number) const {
    const int32_t vecs = args.row_bytes / 16;
    return {(vecs * number >> args.part_shift) * 16, (vecs * (number + 1) >> args.part_shift) * 16, 0, 0};
  }

  __device__ __forceinline__ void send_row(int32_t token, int32_t number) {
    const Destinations to = destinations_of(args, send.route.home, slots, token);
    const bool away = to.leads && (!kRecv || to.rank != shape.rank);
    Places places{__ballot_sync(kAllLanes, away), nullptr, nullptr};
    if (places.lanes == 0) return;
    if (away) places.row = exchange.outgoing(to.rank) + args.first_slot + int64_t{to.slot} * args.stride;
    copy_bytes<false>(own_row(token), part_of_row(number), places);
    __syncwarp();
    if (away) exchange.publish(to.rank, to.slot, number);
  }

  __device__ const std::byte* own_row(int32_t token) const {
    return static_cast<const std::byte*>(send.d_out) + int64_t{token} * args.row_bytes;
  }

  // --- expert side ---

  // By every warp: own tokens, then the tail, then the other sources', from the next rank on.
  __device__ __forceinline__ void receive_rows() {
    if constexpr (kSend) {
      const Queue keeps = exchange.queue(kKeepQueue, args.length(), args.parts);
      for (int32_t unit = keeps.take(); unit < keeps.end; unit = keeps.take()) {
        keep_row(args.begin() + (unit >> args.part_shift), unit & (args.parts - 1));
      }
    }
    const Span zeros = tail();
    const Queue clears{&state.taken[kClearQueue], zeros.begin, zeros.end};
    for (int32_t row = clears.take(); row < clears.end; row = clears.take()) {
      clear_bytes(static_cast<std::byte*>(recv.d_y) + int64_t{row} * args.row_bytes, shape.row_bytes());
    }
    const Queue receives = exchange.queue(kReceiveQueue, *tables.most, args.partners.by * args.parts);
    for (int32_t unit = receives.take(); unit < receives.end; unit = receives.take()) {
      const SlotPart from = slot_part(args, unit);
      if (from.slot >= tables.received[from.rank]) continue;
      if (tables.poisoned[from.rank] != 0) {
        poison_rows(from.rank, from.slot);
      } else if (!receive_row(from.rank, from.slot, from.part)) {
        return;
      }
    }
  }

  // Of a source whose data is wrong.
  __device__ __forceinline__ void poison_rows(int32_t source, int32_t slot) {
    const int32_t row = slot_row(args, recv.route, source, slot, exchange);
    float nans[kVec<T>];
#pragma unroll
    for (int j = 0; j < kVec<T>; ++j) nans[j] = __builtin_nanf("");
    const uint4 value = pack<T>(nans);
    for (uint32_t rows = __ballot_sync(kAllLanes, row >= 0); rows != 0; rows &= rows - 1) {
      const int64_t to = __shfl_sync(kAllLanes, row, __ffs(static_cast<int>(rows)) - 1);
      auto* d_y = static_cast<std::byte*>(recv.d_y) + int64_t{to} * args.row_bytes;
      for (int64_t at = lane_id() * 16; at < shape.row_bytes(); at += kWarp * 16) store_vec(d_y + at, value);
      if (lane_id() == 0) recv.d_row_weights[to] = __builtin_nanf("");
    }
  }

  __device__ __forceinline__ Span tail() const {
    if (!clears_tail || args.round != 0) return {0, 0};
    int64_t end = 0;
    for (int32_t e = lane_id(); e < shape.experts_per_rank; e += kWarp) end += recv.group_sizes[e];
    end = min(max(warp_sum(end), int64_t{0}), recv.route.rows);
    return share_of_rows(end, recv.route.rows);
  }

  __device__ __forceinline__ void keep_row(int32_t token, int32_t number) {
    const Destinations to = destinations_of(args, send.route.home, slots, token);
    const uint32_t here = __ballot_sync(kAllLanes, to.rank == shape.rank);
    if (here == 0) return;
    const int32_t slot = __shfl_sync(kAllLanes, to.slot, __ffs(static_cast<int>(here)) - 1);
    spread<false>(own_row(token), slot_row(args, recv.route, shape.rank, slot, exchange), number);
  }

  // False: stopped.
  __device__ __forceinline__ bool receive_row(int32_t source, int32_t slot, int32_t number) {
    bool here = true;
    if (lane_id() == 0) here = exchange.await_slot(source, slot, number);
    if (!__shfl_sync(kAllLanes, here, 0)) return false;
    __syncwarp();
    spread<true>(exchange.incoming(source) + args.first_slot + int64_t{slot} * args.stride,
                 slot_row(args, recv.route, source, slot, exchange), number);
    return true;
  }

  // A cotangent to the rows that the lanes hold.
  template <bool kShared>
  __device__ __forceinline__ void spread(const std::byte* from, int32_t row, int32_t number) {
    constexpr int kWidth = kVec<T>;
    const Part part = part_of_row(number);
    uint32_t rows = __ballot_sync(kAllLanes, row >= 0);
    if (recv.y == nullptr) {
      copy_bytes<kShared>(from, part,
                          {rows, static_cast<std::byte*>(recv.d_y) + int64_t{row} * args.row_bytes, nullptr});
      return;
    }
    for (; rows != 0; rows &= rows - 1) {
      const int64_t to = __shfl_sync(kAllLanes, row, __ffs(static_cast<int>(rows)) - 1);
      const float weight = recv.row_weights[to];
      const auto* y = static_cast<const std::byte*>(recv.y) + int64_t{to} * args.row_bytes;
      auto* d_y = static_cast<std::byte*>(recv.d_y) + int64_t{to} * args.row_bytes;
      // A lane's own terms in order, then the lanes' sums pairwise: the order never changes.
      float dot = 0.0F;
      for (int32_t base = part.begin; base < part.end; base += 4 * kWarp * 16) {
        uint4 some[4], others[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int32_t at = base + (i * kWarp + lane_id()) * 16;
          if (at >= part.end) continue;
          some[i] = kShared ? load_shared_vec(from + at) : load_vec(from + at);
          others[i] = load_vec(y + at);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int32_t at = base + (i * kWarp + lane_id()) * 16;
          if (at >= part.end) continue;
          float d_out[kWidth], values[kWidth], scaled[kWidth];
          unpack<T>(some[i], d_out);
          unpack<T>(others[i], values);
#pragma unroll
          for (int j = 0; j < kWidth; ++j) {
            scaled[j] = __fmul_rn(weight, d_out[j]);
            dot = __fadd_rn(dot, __fmul_rn(values[j], d_out[j]));
          }
          store_vec(d_y + at, pack<T>(scaled));
        }
      }
#pragma unroll
      for (int width = kWarp / 2; width > 0; width /= 2) {
        dot = __fadd_rn(dot, __shfl_xor_sync(kAllLanes, dot, width));
      }
      if (lane_id() == 0) recv.d_row_weights[to] = dot;
    }
  }
};

template <typename T, int kTopK, bool kSend, bool kRecv>
__global__ void __launch_bounds__(kThreads, 1)
    cotangent_kernel(const __grid_constant__ Args args, const __grid_constant__ CombineTransposeSend send,
                     const __grid_constant__ CombineTransposeRecv recv,
                     const __grid_constant__ SlotTables tables, bool clears_tail) {
  __shared__ BlockState state;
  Exchange exchange(args, state);
  exchange.begin<kSend>();
  Cotangents<T, kTopK, kSend, kRecv>{args,   args.shape,  send,
                                     recv,   exchange,    state,
                                     tables, clears_tail, share(args.length(), args.begin(), args.everybody)}
      .run();
}

size_t table_bytes(const MoeShape& shape) { return SlotTables(shape).bytes(); }

template <bool kSend, bool kRecv, typename Visit>
auto with_kernel(const MoeShape& shape, Visit&& visit) {
  return with_row_type(shape.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return shape.top_k <= 8 ? visit(&cotangent_kernel<T, 8, kSend, kRecv>)
                            : visit(&cotangent_kernel<T, 16, kSend, kRecv>);
  });
}

// What no slot writes is zero.
cudaError_t clear(const KernelCall& call, const CombineTransposeRecv& recv) {
  const MoeShape& shape = call.shape;
  cudaError_t error =
      cudaMemsetAsync(recv.d_row_weights, 0, static_cast<size_t>(4 * recv.route.rows), call.stream);
  if (error != cudaSuccess || !has_holes(shape)) return error;
  return cudaMemsetAsync(recv.d_y, 0, static_cast<size_t>(recv.route.rows * shape.row_bytes()), call.stream);
}

// Rows are whole, as each has a dot product.
template <bool kSend, bool kRecv>
cudaError_t enqueue(const KernelCall& call, const CombineTransposeSend& send,
                    const CombineTransposeRecv& recv, float* ticket_out, const float* ticket_in) {
  const bool clears_tail = call.shape.zero_tail && !has_holes(call.shape);
  return with_kernel<kSend, kRecv>(call.shape, [&](auto* kernel) {
    return launch_rounds(call, ticket_out, ticket_in,
                         {.sender_share = kSend && kRecv ? kSenderShare : 1, .most_units = 1},
                         [&](const Args& args) {
                           return launch(kernel, call, table_bytes(call.shape), args, send, recv,
                                         SlotTables(call.shape), clears_tail);
                         });
  });
}

}  // namespace

cudaError_t combine_transpose(const KernelCall& call, const CombineTransposeSend& send,
                              const CombineTransposeRecv& recv) {
  if (const cudaError_t error = clear(call, recv); error != cudaSuccess) return error;
  return enqueue<true, true>(call, send, recv, nullptr, nullptr);
}
cudaError_t combine_transpose_send(const KernelCall& call, const CombineTransposeSend& send, float* ticket) {
  return enqueue<true, false>(call, send, {}, ticket, nullptr);
}
cudaError_t combine_transpose_recv(const KernelCall& call, const CombineTransposeRecv& recv,
                                   const float* ticket) {
  if (const cudaError_t error = clear(call, recv); error != cudaSuccess) return error;
  return enqueue<false, true>(call, {}, recv, nullptr, ticket);
}

cudaError_t load_combine_transpose(const MoeShape& shape, int* num_sms) {
  const auto load = [&](auto* kernel) { return load_kernel(kernel, table_bytes(shape), num_sms); };
  cudaError_t error = with_kernel<true, true>(shape, load);
  if (error == cudaSuccess) error = with_kernel<true, false>(shape, load);
  if (error == cudaSuccess) error = with_kernel<false, true>(shape, load);
  return error;
}

}  // namespace pplx::moe::cuda
