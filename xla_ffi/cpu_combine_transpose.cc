// The transpose of combine: the cotangent of a combined token, out to every rank that has rows of it.
#include <cstring>

#include "xla_ffi/cpu_common.h"

namespace pplx::moe {
namespace {

class CotangentSender {
 public:
  CotangentSender(const Call& call, const CombineTransposeSend& args)
      : call_(call), shape_(call.shape), args_(args) {}

  bool prepare() {
    usable_ = ReceivedSlots(call_, args_.route).usable();
    return usable_;
  }

  void send(Exchange& exchange, int32_t round) const {
    const HomeSlots slots(shape_, args_.route.home, usable_ ? call_.tokens() : 0, round);
    const int64_t stride = shape_.row_stride();
    for_each_peer(shape_, [&](uint32_t peer) {
      const auto& tokens = slots.tokens_to(peer);
      std::byte* out = exchange.message(peer, sizeof(RegionHeader) + tokens.size() * stride);
      if (out == nullptr) return;
      out += sizeof(RegionHeader);
      for (const int32_t token : tokens) {
        std::memcpy(out, static_cast<const std::byte*>(args_.d_out) + token * shape_.row_bytes(),
                    shape_.row_bytes());
        out += stride;
      }
      exchange.post(static_cast<uint32_t>(tokens.size()), !usable_);
    });
  }

 private:
  const Call& call_;
  const MoeShape& shape_;
  const CombineTransposeSend& args_;
  bool usable_ = true;
};

template <typename T>
class CotangentReceiver {
 public:
  CotangentReceiver(const Call& call, const CombineTransposeRecv& args)
      : call_(call), shape_(call.shape), args_(args) {}

  bool prepare(bool poisoned) {
    usable_ = !poisoned;
    if (!usable_) return false;
    received_.emplace(call_, args_.route);
    usable_ = received_->usable();
    if (usable_) clear();
    return usable_;
  }

  bool receive(Exchange& exchange, int32_t round) const {
    if (!usable_) return true;
    for (int32_t source = 0; source < shape_.num_ranks; ++source) {
      if (exchange.poisoned(source)) {
        note_poison(call_, exchange, source);
        poison_source(round, source);
      } else if (!receive_from(exchange, round, source)) {
        return false;
      }
    }
    return true;
  }

  void finish() const {}

  void poison() const {
    fill_nan(static_cast<T*>(args_.d_y), args_.route.rows * shape_.hidden);
    fill_nan(args_.d_row_weights, args_.route.rows);
  }

 private:
  // Rows that no slot will write: padding, and the tail.
  void clear() const {
    std::fill_n(args_.d_row_weights, args_.route.rows, 0.0F);
    const bool holes = shape_.alignment > 1 || shape_.drop || shape_.padded;
    int64_t end = 0;
    for (int32_t e = 0; e < shape_.experts_per_rank; ++e) end += args_.group_sizes[e];
    end = std::clamp<int64_t>(end, 0, args_.route.rows);
    auto* rows = static_cast<std::byte*>(args_.d_y);
    const int64_t begin = holes ? 0 : end;
    const int64_t stop = shape_.zero_tail || shape_.padded ? args_.route.rows : end;
    if (stop > begin) std::memset(rows + begin * shape_.row_bytes(), 0, (stop - begin) * shape_.row_bytes());
  }

  bool receive_from(Exchange& exchange, int32_t round, uint32_t source) const {
    const int64_t hidden = shape_.hidden, stride = shape_.row_stride();
    const int32_t count = received_->count(round, source);
    if (exchange.header(source).slots != static_cast<uint32_t>(count) ||
        exchange.body_bytes(source) != static_cast<size_t>(count * stride)) {
      exchange.reject(source, "it sends " + std::to_string(exchange.header(source).slots) +
                                  " cotangent rows, expected are " + std::to_string(count));
      return false;
    }
    for (int32_t slot = 0; slot < count; ++slot) {
      const auto* d_out = reinterpret_cast<const T*>(exchange.body(source) + slot * stride);
      const auto [begin, end] = received_->pairs(received_->first(round, source) + slot);
      for (int32_t pair = begin; pair < end; ++pair) {
        const int32_t row = received_->row(pair);
        if (row < 0) continue;
        T* d_y = static_cast<T*>(args_.d_y) + int64_t{row} * hidden;
        if (args_.y == nullptr) {
          std::memcpy(static_cast<void*>(d_y), d_out, shape_.row_bytes());
        } else {
          scale_row(d_y, d_out, args_.row_weights[row], hidden);
          args_.d_row_weights[row] =
              dot_rows(static_cast<const T*>(args_.y) + int64_t{row} * hidden, d_out, hidden);
        }
      }
    }
    return true;
  }

  void poison_source(int32_t round, uint32_t source) const {
    const int64_t first = received_->first(round, source);
    for (int64_t slot = first; slot < first + received_->count(round, source); ++slot) {
      const auto [begin, end] = received_->pairs(slot);
      for (int32_t pair = begin; pair < end; ++pair) {
        const int32_t row = received_->row(pair);
        if (row < 0) continue;
        fill_nan(static_cast<T*>(args_.d_y) + int64_t{row} * shape_.hidden, shape_.hidden);
        fill_nan(args_.d_row_weights + row, 1);
      }
    }
  }

  const Call& call_;
  const MoeShape& shape_;
  const CombineTransposeRecv& args_;
  std::optional<ReceivedSlots> received_;
  bool usable_ = true;
};

// run(receiver) with a receiver of the rows' type.
template <typename Run>
std::optional<Error> with_receiver(const Call& call, const CombineTransposeRecv& recv, Run&& run) {
  return with_dtype(call.shape.dtype, [&](auto* type) {
    return run(CotangentReceiver<std::remove_pointer_t<decltype(type)>>(call, recv));
  });
}

}  // namespace

std::optional<Error> combine_transpose(const Call& call, const CombineTransposeSend& send,
                                       const CombineTransposeRecv& recv) {
  return with_receiver(
      call, recv, [&](auto&& receiver) { return run_both(call, CotangentSender(call, send), receiver); });
}

std::optional<Error> combine_transpose_send(const Call& call, const CombineTransposeSend& send,
                                            Ticket& ticket) {
  return run_send(call, CotangentSender(call, send), ticket);
}

std::optional<Error> combine_transpose_recv(const Call& call, const CombineTransposeRecv& recv,
                                            Ticket ticket) {
  if (ticket == 0) {
    std::memset(recv.d_y, 0, recv.route.rows * call.shape.row_bytes());
    std::fill_n(recv.d_row_weights, recv.route.rows, 0.0F);
    return std::nullopt;
  }
  return with_receiver(call, recv, [&](auto&& receiver) { return run_recv(call, receiver, ticket); });
}

}  // namespace pplx::moe
