// What goes home: combine and the transpose of dispatch. One reduced row for every slot.
#include <cstring>

#include "xla_ffi/cpu_common.h"

namespace pplx::moe {
namespace {

// Checks the length of every source's message against the slots that home has open with it.
bool check_home_lengths(const MoeShape& shape, Exchange& exchange, const HomeSlots& slots, int64_t stride) {
  for (int32_t source = 0; source < shape.num_ranks; ++source) {
    const size_t expected = exchange.poisoned(source) ? 0 : slots.tokens_to(source).size();
    if (exchange.header(source).slots != expected || exchange.body_bytes(source) != expected * stride) {
      exchange.reject(source, "it returns " + std::to_string(exchange.header(source).slots) +
                                  " rows, expected are " + std::to_string(expected));
      return false;
    }
  }
  return true;
}

// T: the rows' type; W: what they travel home in.
template <typename T, typename W>
class HomeSender {
 public:
  // `rows` [M, H]; each slot's are summed, times `weights` [M] unless those are null. With `returns`, one
  // number of each row, `returned` [M], goes along.
  HomeSender(const Call& call, const Route& route, const void* rows, const float* weights, bool returns,
             const float* returned, int64_t stride)
      : call_(call),
        shape_(call.shape),
        route_(route),
        rows_(static_cast<const T*>(rows)),
        weights_(weights),
        returns_(returns),
        returned_(returned),
        stride_(stride) {}

  bool prepare() {
    received_.emplace(call_, route_);
    return received_->usable();
  }

  void send(Exchange& exchange, int32_t round) {
    const bool usable = received_->usable();
    for_each_peer(shape_, [&](uint32_t peer) {
      const int32_t count = usable ? received_->count(round, peer) : 0;
      std::byte* out = exchange.message(peer, sizeof(RegionHeader) + count * stride_);
      if (out == nullptr) return;
      out += sizeof(RegionHeader);
      const int64_t first = usable ? received_->first(round, peer) : 0;
      for (int32_t slot = 0; slot < count; ++slot, out += stride_) reduce(first + slot, out);
      exchange.post(static_cast<uint32_t>(count), !usable);
    });
  }

 private:
  void reduce(int64_t slot, std::byte* out) const {
    std::array<const T*, kMaxTopK> rows;
    std::array<float, kMaxTopK> weights, returned{};
    int count = 0, entry = 0;
    const auto [begin, end] = received_->pairs(slot);
    for (int32_t pair = begin; pair < end; ++pair, ++entry) {
      const int32_t row = received_->row(pair);
      if (row < 0) continue;  // dropped: no term, no gradient
      if (returns_) returned[entry] = returned_[row];
      if (weights_ != nullptr) weights[count] = weights_[row];
      rows[count++] = rows_ + int64_t{row} * shape_.hidden;
    }
    if (count == 0) {
      std::memset(out, 0, shape_.home_stride());
    } else {
      sum_rows(reinterpret_cast<W*>(out), static_cast<const W*>(nullptr), rows.data(),
               weights_ == nullptr ? nullptr : weights.data(), count, shape_.hidden);
    }
    if (returns_) std::memcpy(out + shape_.home_stride(), returned.data(), 4 * shape_.entries());
  }

  const Call& call_;
  const MoeShape& shape_;
  const Route& route_;
  const T* rows_;
  const float* weights_;
  bool returns_;
  const float* returned_;
  int64_t stride_;
  std::optional<ReceivedSlots> received_;
};

template <typename T, typename W>
class HomeReceiver {
 public:
  // out [T, H]; `start` [T, H] is added, or null. `returned` [T, K], or null: the numbers that came along.
  HomeReceiver(const Call& call, const int32_t* home, const void* start, void* out, float* returned,
               int64_t stride)
      : call_(call),
        shape_(call.shape),
        home_(home),
        start_(static_cast<const T*>(start)),
        out_(static_cast<T*>(out)),
        returned_(returned),
        stride_(stride) {}

  bool prepare(bool poisoned) {
    usable_ = !poisoned;
    if (usable_ && !sound_home(call_, home_)) {
      usable_ = false;
      report_foreign_route(call_);
    }
    return usable_;
  }

  bool receive(Exchange& exchange, int32_t round) {
    const HomeSlots slots(shape_, home_, usable_ ? call_.tokens() : 0, round);
    if (usable_ && !check_home_lengths(shape_, exchange, slots, stride_)) return false;
    for (int32_t source = 0; source < shape_.num_ranks; ++source) {
      if (exchange.poisoned(source)) note_poison(call_, exchange, source);
    }
    if (!usable_) return true;
    slots.for_each_token([&](int32_t token, const int32_t* ranks, const int32_t* slot, int count) {
      gather(exchange, token, ranks, slot, count);
    });
    return true;
  }

  void finish() const {}

  void poison() const {
    fill_nan(out_, int64_t{call_.tokens()} * shape_.hidden);
    if (returned_ != nullptr) fill_nan(returned_, int64_t{call_.tokens()} * shape_.top_k);
  }

 private:
  void gather(Exchange& exchange, int32_t token, const int32_t* ranks, const int32_t* slot, int count) const {
    T* out = out_ + int64_t{token} * shape_.hidden;
    const int32_t* home = home_ + int64_t{token} * shape_.top_k;
    float* returned = returned_ == nullptr ? nullptr : returned_ + int64_t{token} * shape_.top_k;
    if (returned != nullptr) std::fill_n(returned, shape_.top_k, 0.0F);
    const T* start =
        start_ == nullptr || home[0] == kPastEnd ? nullptr : start_ + int64_t{token} * shape_.hidden;
    std::array<const W*, kMaxTopK> rows;
    for (int i = 0; i < count; ++i) {
      if (exchange.poisoned(ranks[i])) {
        fill_nan(out, shape_.hidden);
        if (returned != nullptr) fill_nan(returned, shape_.top_k);
        return;
      }
      const std::byte* row = exchange.body(ranks[i]) + slot[i] * stride_;
      rows[i] = reinterpret_cast<const W*>(row);
      if (returned == nullptr) continue;
      const auto* numbers = reinterpret_cast<const float*>(row + shape_.home_stride());
      // Bounded, as a route that is not dispatch's may list an expert more than once.
      for (int32_t k = 0, entry = 0; k < shape_.top_k && entry < shape_.entries(); ++k) {
        if (home[k] >= 0 && home[k] / shape_.experts_per_rank == ranks[i]) returned[k] = numbers[entry++];
      }
    }
    if (count == 0 && start == nullptr) {
      std::memset(static_cast<void*>(out), 0, shape_.row_bytes());
    } else {
      sum_rows(out, start, rows.data(), nullptr, count, shape_.hidden);
    }
  }

  const Call& call_;
  const MoeShape& shape_;
  const int32_t* home_;
  const T* start_;
  T* out_;
  float* returned_;
  int64_t stride_;
  bool usable_ = true;
};

// visit(T*, W*), both null: the rows' type and what they travel home in.
template <typename Visit>
auto with_dtypes(const MoeShape& shape, Visit&& visit) {
  return with_dtype(shape.dtype, [&](auto* type) {
    return shape.home_dtype == shape.dtype ? visit(type, type) : visit(type, static_cast<float*>(nullptr));
  });
}

template <typename T, typename W>
HomeSender<T, W> sender(const Call& call, const CombineSend& args, T*, W*) {
  return {call, args.route, args.y, args.row_weights, false, nullptr, call.shape.home_stride()};
}
template <typename T, typename W>
HomeSender<T, W> sender(const Call& call, const DispatchTransposeSend& args, T*, W*) {
  return {call,
          args.route,
          args.d_tokens,
          nullptr,
          true,
          args.d_row_weights,
          call.shape.dispatch_transpose_stride()};
}
template <typename T, typename W>
HomeReceiver<T, W> receiver(const Call& call, const CombineRecv& args, T*, W*) {
  return {call, args.home, args.accumulate, args.out, nullptr, call.shape.home_stride()};
}
template <typename T, typename W>
HomeReceiver<T, W> receiver(const Call& call, const DispatchTransposeRecv& args, T*, W*) {
  return {call, args.home, nullptr, args.d_x, args.d_weights, call.shape.dispatch_transpose_stride()};
}

template <typename Send, typename Recv>
std::optional<Error> both(const Call& call, const Send& send, const Recv& recv) {
  return with_dtypes(call.shape, [&](auto* t, auto* w) {
    return run_both(call, sender(call, send, t, w), receiver(call, recv, t, w));
  });
}
template <typename Send>
std::optional<Error> only_send(const Call& call, const Send& send, Ticket& ticket) {
  return with_dtypes(call.shape,
                     [&](auto* t, auto* w) { return run_send(call, sender(call, send, t, w), ticket); });
}
template <typename Recv>
std::optional<Error> only_recv(const Call& call, const Recv& recv, Ticket ticket) {
  return with_dtypes(call.shape,
                     [&](auto* t, auto* w) { return run_recv(call, receiver(call, recv, t, w), ticket); });
}

}  // namespace

std::optional<Error> combine(const Call& call, const CombineSend& send, const CombineRecv& recv) {
  return both(call, send, recv);
}
std::optional<Error> combine_send(const Call& call, const CombineSend& send, Ticket& ticket) {
  return only_send(call, send, ticket);
}
std::optional<Error> combine_recv(const Call& call, const CombineRecv& recv, Ticket ticket) {
  return only_recv(call, recv, ticket);
}

std::optional<Error> dispatch_transpose(const Call& call, const DispatchTransposeSend& send,
                                        const DispatchTransposeRecv& recv) {
  return both(call, send, recv);
}
std::optional<Error> dispatch_transpose_send(const Call& call, const DispatchTransposeSend& send,
                                             Ticket& ticket) {
  return only_send(call, send, ticket);
}
std::optional<Error> dispatch_transpose_recv(const Call& call, const DispatchTransposeRecv& recv,
                                             Ticket ticket) {
  if (ticket == 0) {
    std::memset(recv.d_x, 0, call.tokens() * call.shape.row_bytes());
    std::fill_n(recv.d_weights, int64_t{call.tokens()} * call.shape.top_k, 0.0F);
    return std::nullopt;
  }
  return only_recv(call, recv, ticket);
}

}  // namespace pplx::moe
