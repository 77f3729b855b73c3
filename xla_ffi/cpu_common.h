// Shared by the CPU exchanges: the scan that numbers slots at home, checks of routes, poisoning.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "xla_ffi/cpu_exchange.h"
#include "xla_ffi/layout.h"
#include "xla_ffi/rows.h"

namespace pplx::moe {

// Calls `visit` with a null pointer of the row type that `dtype` names.
template <typename Visit>
auto with_dtype(DType dtype, Visit&& visit) {
  switch (dtype) {
    case DType::kBFloat16:
      return visit(static_cast<BFloat16*>(nullptr));
    case DType::kFloat16:
      return visit(static_cast<Float16*>(nullptr));
    case DType::kFloat32:
      break;
  }
  return visit(static_cast<float*>(nullptr));
}

// The slots of one round, from the home side: the tokens sent to each rank, in slot order.
class HomeSlots {
 public:
  HomeSlots(const MoeShape& shape, const int32_t* home, int32_t tokens, int32_t round)
      : shape_(shape),
        home_(home),
        slots_(shape.num_ranks),
        begin_(round * shape.chunk),
        end_(std::min(tokens, (round + 1) * shape.chunk)) {
    std::array<int32_t, kMaxTopK> ranks;
    for (int32_t token = begin_; token < end_; ++token) {
      const int count = destinations(home_ + int64_t{token} * shape_.top_k, shape_.top_k,
                                     shape_.experts_per_rank, ranks.data());
      for (int i = 0; i < count; ++i) slots_[ranks[i]].push_back(token);
    }
  }

  const std::vector<int32_t>& tokens_to(uint32_t rank) const { return slots_[rank]; }

  // visit(token, ranks, slots, count) for every token of the round, in order.
  template <typename Visit>
  void for_each_token(Visit&& visit) const {
    std::vector<int32_t> next(shape_.num_ranks, 0);
    std::array<int32_t, kMaxTopK> ranks, slots;
    for (int32_t token = begin_; token < end_; ++token) {
      const int count = destinations(home_ + int64_t{token} * shape_.top_k, shape_.top_k,
                                     shape_.experts_per_rank, ranks.data());
      for (int i = 0; i < count; ++i) slots[i] = next[ranks[i]]++;
      visit(token, ranks.data(), slots.data(), count);
    }
  }

 private:
  const MoeShape& shape_;
  const int32_t* home_;
  std::vector<std::vector<int32_t>> slots_;  // by rank
  int32_t begin_, end_;
};

// Peers in the order in which messages go out: the next rank first, so that not all write to one; this rank
// last, so that its own copies overlap with the network.
template <typename Visit>
void for_each_peer(const MoeShape& shape, Visit&& visit) {
  for (int32_t step = 1; step <= shape.num_ranks; ++step) {
    visit(static_cast<uint32_t>((shape.rank + step) % shape.num_ranks));
  }
}

// Whether a route's `home`, which comes back from the caller's program, indexes nothing out of bounds.
bool sound_home(const Call& call, const int32_t* home);
// Reports that it does not.
void report_foreign_route(const Call& call);

// Why the group cannot be used by this call, if so: closed, or failed in an earlier execution.
std::optional<Error> refusal(const Call& call);

// The slots that this rank received, one round at a time, from the route's arrays; those come back from the
// caller's program, so every index is checked.
class ReceivedSlots {
 public:
  ReceivedSlots(const Call& call, const Route& route);
  // False when the dispatch failed, or when the arrays are not what it returned (a data error, reported).
  bool usable() const { return sound_; }
  int32_t count(int32_t round, uint32_t source) const {
    return route_.source_slots[int64_t{round} * shape_.num_ranks + source];
  }
  // First slot of (round, source) in slot_start.
  int64_t first(int32_t round, uint32_t source) const {
    return first_[int64_t{round} * shape_.num_ranks + source];
  }
  // The pairs of a slot: [begin, end) in slot_rows.
  std::pair<int32_t, int32_t> pairs(int64_t slot) const {
    return {route_.slot_start[slot], route_.slot_start[slot + 1]};
  }
  int32_t row(int64_t pair) const { return route_.slot_rows[pair]; }

 private:
  bool check(const Call& call);

  const MoeShape& shape_;
  const Route& route_;
  std::vector<int64_t> first_;
  bool sound_ = true;
};

// Records that `source` sent poisoned data, once a call.
void note_poison(const Call& call, const Exchange& exchange, uint32_t source);

// The halves of an exchange as the classes below see them. A Sender has `bool prepare()`, false when its data
// is wrong, and `void send(Exchange&, round)`. A Receiver has `bool prepare(poisoned)`, false when its
// outputs will be poisoned, `bool receive(Exchange&, round)`, false when a peer broke the protocol,
// `void finish()` and `void poison()`.

template <typename Receiver>
std::optional<Error> end(const Call& call, Receiver& receiver, Exchange& exchange, int32_t round,
                         bool& sound) {
  sound = exchange.wait() && receiver.receive(exchange, round);
  if (sound) return exchange.raised();
  receiver.poison();
  return refusal(call);
}

template <typename Sender, typename Receiver>
std::optional<Error> run_both(const Call& call, Sender&& sender, Receiver&& receiver) {
  if (auto error = refusal(call)) return error;
  const bool usable = sender.prepare();
  bool sound = receiver.prepare(!usable);
  for (int32_t round = 0; round < call.rounds(); ++round) {
    Exchange exchange(call.group, call.site, round, call.run);
    sender.send(exchange, round);
    bool going = false;
    if (auto error = end(call, receiver, exchange, round, going); error || !going) return error;
  }
  sound ? receiver.finish() : receiver.poison();
  return std::nullopt;
}

template <typename Sender>
std::optional<Error> run_send(const Call& call, Sender&& sender, Ticket& ticket) {
  ticket = 0;
  if (auto error = refusal(call)) return error;
  if (call.rounds() != 1) {
    return Error(ErrorKind::kInvalidArgument, "send and recv apart need chunk >= tokens");
  }
  const bool usable = sender.prepare();
  Exchange exchange(call.group, call.site, 0, call.run);
  sender.send(exchange, 0);
  ticket = exchange.park(!usable);
  return std::nullopt;
}

template <typename Receiver>
std::optional<Error> run_recv(const Call& call, Receiver&& receiver, Ticket ticket) {
  if (auto error = refusal(call)) return error;
  if (call.group.failure()) {
    receiver.poison();
    return std::nullopt;
  }
  bool poisoned = false, going = false;
  Exchange exchange(call.group, call.site, ticket, call.run, &poisoned);
  const bool sound = receiver.prepare(poisoned);
  if (auto error = end(call, receiver, exchange, 0, going); error || !going) return error;
  sound ? receiver.finish() : receiver.poison();
  return std::nullopt;
}

}  // namespace pplx::moe
