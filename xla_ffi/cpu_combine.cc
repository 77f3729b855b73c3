// combine and the transposes: one reduced row back for every slot, or one cotangent row out to every slot.
#include <cstring>

#include "xla_ffi/cpu_common.h"

namespace pplx::moe {
namespace {

template <typename T>
const T* rows_at(const std::byte* base, int64_t index, int64_t stride) {
  return reinterpret_cast<const T*>(base + index * stride);
}

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

// A home-bound exchange (combine, dispatch transpose). `reduce(received, slot, out)` writes the expert side's
// row of a slot; `gather(exchange, slots)` reads what came home; `poison()` makes every output NaN.
template <typename Reduce, typename Gather, typename Poison>
std::optional<Error> exchange_home(const Call& call, const Route& route, int64_t stride, Reduce&& reduce,
                                   Gather&& gather, Poison&& poison) {
  if (auto error = refusal(call)) return error;
  const MoeShape& shape = call.shape;
  const ReceivedSlots received(call, route);
  const bool usable = received.usable();
  for (int32_t round = 0; round < call.rounds(); ++round) {
    Exchange exchange(call.group, call.site, round, call.run);
    for_each_peer(shape, [&](uint32_t peer) {
      const int32_t count = usable ? received.count(round, peer) : 0;
      std::byte* out = exchange.message(peer, sizeof(RegionHeader) + count * stride);
      if (out == nullptr) return;
      out += sizeof(RegionHeader);
      const int64_t first = usable ? received.first(round, peer) : 0;
      for (int32_t slot = 0; slot < count; ++slot, out += stride) reduce(received, first + slot, out);
      exchange.post(static_cast<uint32_t>(count), !usable);
    });
    const HomeSlots slots(shape, route.home, usable ? call.tokens() : 0, round);
    if (!exchange.wait() || (usable && !check_home_lengths(shape, exchange, slots, stride))) {
      poison();
      return refusal(call);
    }
    if (auto error = exchange.raised()) return error;
    for (int32_t source = 0; source < shape.num_ranks; ++source) {
      if (exchange.poisoned(source)) note_poison(call, exchange, source);
    }
    if (usable) gather(exchange, slots);
  }
  if (!usable) poison();
  return std::nullopt;
}

template <typename T>
class Combine {
 public:
  Combine(const Call& call, const CombineArgs& args) : call_(call), shape_(call.shape), args_(args) {}

  std::optional<Error> run() {
    return exchange_home(
        call_, args_.route, shape_.row_stride(),
        [&](const ReceivedSlots& received, int64_t slot, std::byte* out) {
          reduce(received, slot, reinterpret_cast<T*>(out));
        },
        [&](Exchange& exchange, const HomeSlots& slots) { gather(exchange, slots); },
        [&] { fill_nan(static_cast<T*>(args_.out), int64_t{call_.tokens()} * shape_.hidden); });
  }

 private:
  void reduce(const ReceivedSlots& received, int64_t slot, T* out) const {
    std::array<const T*, kMaxTopK> rows;
    std::array<float, kMaxTopK> weights;
    int count = 0;
    const auto [begin, end] = received.pairs(slot);
    for (int32_t pair = begin; pair < end; ++pair) {
      const int32_t row = received.row(pair);
      if (row < 0) continue;
      rows[count] = static_cast<const T*>(args_.y) + int64_t{row} * shape_.hidden;
      weights[count++] = args_.row_weights == nullptr ? 1.0F : args_.row_weights[row];
    }
    if (count == 0) {
      std::memset(static_cast<void*>(out), 0, shape_.row_bytes());
    } else {
      sum_rows(out, rows.data(), args_.row_weights == nullptr ? nullptr : weights.data(), count,
               shape_.hidden);
    }
  }

  void gather(Exchange& exchange, const HomeSlots& slots) const {
    const int64_t hidden = shape_.hidden;
    slots.for_each_token([&](int32_t token, const int32_t* ranks, const int32_t* slot, int count) {
      T* out = static_cast<T*>(args_.out) + token * hidden;
      if (args_.route.home[int64_t{token} * shape_.top_k] == kPastEnd) {
        std::memset(static_cast<void*>(out), 0, shape_.row_bytes());
        return;
      }
      std::array<const T*, kMaxTopK + 1> rows;
      int terms = 0;
      if (args_.accumulate != nullptr)
        rows[terms++] = static_cast<const T*>(args_.accumulate) + token * hidden;
      for (int i = 0; i < count; ++i) {
        if (exchange.poisoned(ranks[i])) {
          fill_nan(out, hidden);
          return;
        }
        rows[terms++] = rows_at<T>(exchange.body(ranks[i]), slot[i], shape_.row_stride());
      }
      if (terms == 0) {
        std::memset(static_cast<void*>(out), 0, shape_.row_bytes());
      } else {
        sum_rows(out, rows.data(), nullptr, terms, hidden);
      }
    });
  }

  const Call& call_;
  const MoeShape& shape_;
  const CombineArgs& args_;
};

template <typename T>
class DispatchTranspose {
 public:
  DispatchTranspose(const Call& call, const DispatchTransposeArgs& args)
      : call_(call), shape_(call.shape), args_(args) {}

  std::optional<Error> run() {
    return exchange_home(
        call_, args_.route, shape_.dispatch_transpose_stride(),
        [&](const ReceivedSlots& received, int64_t slot, std::byte* out) { reduce(received, slot, out); },
        [&](Exchange& exchange, const HomeSlots& slots) { gather(exchange, slots); },
        [&] {
          fill_nan(static_cast<T*>(args_.d_x), int64_t{call_.tokens()} * shape_.hidden);
          fill_nan(args_.d_weights, int64_t{call_.tokens()} * shape_.top_k);
        });
  }

 private:
  void reduce(const ReceivedSlots& received, int64_t slot, std::byte* out) const {
    std::array<const T*, kMaxTopK> rows;
    std::array<float, kMaxTopK> weights{};
    int count = 0, entry = 0;
    const auto [begin, end] = received.pairs(slot);
    for (int32_t pair = begin; pair < end; ++pair, ++entry) {
      const int32_t row = received.row(pair);
      if (row < 0) continue;  // dropped: no gradient
      rows[count++] = static_cast<const T*>(args_.d_tokens) + int64_t{row} * shape_.hidden;
      weights[entry] = args_.d_row_weights[row];
    }
    if (count == 0) {
      std::memset(out, 0, shape_.row_bytes());
    } else {
      sum_rows(reinterpret_cast<T*>(out), rows.data(), nullptr, count, shape_.hidden);
    }
    std::memcpy(out + shape_.row_stride(), weights.data(), 4 * shape_.entries());
  }

  void gather(Exchange& exchange, const HomeSlots& slots) const {
    const int64_t hidden = shape_.hidden, stride = shape_.dispatch_transpose_stride();
    slots.for_each_token([&](int32_t token, const int32_t* ranks, const int32_t* slot, int count) {
      T* d_x = static_cast<T*>(args_.d_x) + token * hidden;
      float* d_weights = args_.d_weights + int64_t{token} * shape_.top_k;
      const int32_t* home = args_.route.home + int64_t{token} * shape_.top_k;
      std::fill_n(d_weights, shape_.top_k, 0.0F);
      std::array<const T*, kMaxTopK> rows;
      for (int i = 0; i < count; ++i) {
        if (exchange.poisoned(ranks[i])) {
          fill_nan(d_x, hidden);
          fill_nan(d_weights, shape_.top_k);
          return;
        }
        rows[i] = rows_at<T>(exchange.body(ranks[i]), slot[i], stride);
        const auto* returned =
            reinterpret_cast<const float*>(exchange.body(ranks[i]) + slot[i] * stride + shape_.row_stride());
        // Bounded, as a route that is not dispatch's may list an expert more than once.
        for (int32_t k = 0, entry = 0; k < shape_.top_k && entry < shape_.entries(); ++k) {
          if (home[k] >= 0 && home[k] / shape_.experts_per_rank == ranks[i]) d_weights[k] = returned[entry++];
        }
      }
      if (count == 0) {
        std::memset(static_cast<void*>(d_x), 0, shape_.row_bytes());
      } else {
        sum_rows(d_x, rows.data(), nullptr, count, hidden);
      }
    });
  }

  const Call& call_;
  const MoeShape& shape_;
  const DispatchTransposeArgs& args_;
};

template <typename T>
class CombineTranspose {
 public:
  CombineTranspose(const Call& call, const CombineTransposeArgs& args)
      : call_(call), shape_(call.shape), args_(args) {}

  std::optional<Error> run() {
    if (auto error = refusal(call_)) return error;
    const ReceivedSlots received(call_, args_.route);
    const bool usable = received.usable();
    if (usable) clear();
    for (int32_t round = 0; round < call_.rounds(); ++round) {
      Exchange exchange(call_.group, call_.site, round, call_.run);
      send(exchange, HomeSlots(shape_, args_.route.home, usable ? call_.tokens() : 0, round), !usable);
      if (!exchange.wait() || (usable && !receive(exchange, received, round))) {
        poison();
        return refusal(call_);
      }
      if (auto error = exchange.raised()) return error;
    }
    if (!usable) poison();
    return std::nullopt;
  }

 private:
  void poison() const {
    fill_nan(static_cast<T*>(args_.d_y), args_.route.rows * shape_.hidden);
    fill_nan(args_.d_row_weights, args_.route.rows);
  }

  // Rows that no slot will write: padding between experts, and the tail.
  void clear() const {
    std::fill_n(args_.d_row_weights, args_.route.rows, 0.0F);
    const bool padded = shape_.alignment > 1 || shape_.drop;
    int64_t end = 0;
    for (int32_t e = 0; e < shape_.experts_per_rank; ++e) end += args_.group_sizes[e];
    end = std::clamp<int64_t>(end, 0, args_.route.rows);
    auto* rows = static_cast<std::byte*>(args_.d_y);
    const int64_t begin = padded ? 0 : end;
    const int64_t stop = shape_.zero_tail ? args_.route.rows : end;
    if (stop > begin) std::memset(rows + begin * shape_.row_bytes(), 0, (stop - begin) * shape_.row_bytes());
  }

  void send(Exchange& exchange, const HomeSlots& slots, bool poisoned) const {
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
      exchange.post(static_cast<uint32_t>(tokens.size()), poisoned);
    });
  }

  bool receive(Exchange& exchange, const ReceivedSlots& received, int32_t round) const {
    for (int32_t source = 0; source < shape_.num_ranks; ++source) {
      if (exchange.poisoned(source)) {
        note_poison(call_, exchange, source);
        poison_source(received, round, source);
      } else if (!receive_from(exchange, received, round, source)) {
        return false;
      }
    }
    return true;
  }

  bool receive_from(Exchange& exchange, const ReceivedSlots& received, int32_t round, uint32_t source) const {
    const int64_t hidden = shape_.hidden, stride = shape_.row_stride();
    const int32_t count = received.count(round, source);
    if (exchange.header(source).slots != static_cast<uint32_t>(count) ||
        exchange.body_bytes(source) != static_cast<size_t>(count * stride)) {
      exchange.reject(source, "it sends " + std::to_string(exchange.header(source).slots) +
                                  " cotangent rows, expected are " + std::to_string(count));
      return false;
    }
    for (int32_t slot = 0; slot < count; ++slot) {
      const T* d_out = rows_at<T>(exchange.body(source), slot, stride);
      const auto [begin, end] = received.pairs(received.first(round, source) + slot);
      for (int32_t pair = begin; pair < end; ++pair) {
        const int32_t row = received.row(pair);
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

  void poison_source(const ReceivedSlots& received, int32_t round, uint32_t source) const {
    const int64_t first = received.first(round, source);
    for (int64_t slot = first; slot < first + received.count(round, source); ++slot) {
      const auto [begin, end] = received.pairs(slot);
      for (int32_t pair = begin; pair < end; ++pair) {
        const int32_t row = received.row(pair);
        if (row < 0) continue;
        fill_nan(static_cast<T*>(args_.d_y) + int64_t{row} * shape_.hidden, shape_.hidden);
        fill_nan(args_.d_row_weights + row, 1);
      }
    }
  }

  const Call& call_;
  const MoeShape& shape_;
  const CombineTransposeArgs& args_;
};

template <template <typename> class Operation, typename Args>
std::optional<Error> run(const Call& call, const Args& args) {
  return with_dtype(call.shape.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return Operation<T>(call, args).run();
  });
}

}  // namespace

std::optional<Error> combine(const Call& call, const CombineArgs& args) { return run<Combine>(call, args); }

std::optional<Error> dispatch_transpose(const Call& call, const DispatchTransposeArgs& args) {
  return run<DispatchTranspose>(call, args);
}

std::optional<Error> combine_transpose(const Call& call, const CombineTransposeArgs& args) {
  return run<CombineTranspose>(call, args);
}

}  // namespace pplx::moe
