// dispatch: tokens to the ranks of their experts, and out again by expert.
#include <cstring>
#include <numeric>

#include "xla_ffi/cpu_common.h"

namespace pplx::moe {
namespace {

// Physical experts that hold each logical one. Replicas share the load by token.
class ExpertTable {
 public:
  ExpertTable(const MoeShape& shape, const int32_t* map) : first_(shape.num_experts + 1, 0) {
    for (int32_t p = 0; p < shape.physical_experts(); ++p) {
      if (map[p] >= 0 && map[p] < shape.num_experts) ++first_[map[p] + 1];
    }
    for (int32_t e = 0; e < shape.num_experts; ++e) first_[e + 1] += first_[e];
    homes_.resize(first_.back());
    std::vector<int32_t> next(first_.begin(), first_.end() - 1);
    for (int32_t p = 0; p < shape.physical_experts(); ++p) {
      if (map[p] >= 0 && map[p] < shape.num_experts) homes_[next[map[p]]++] = p;
    }
  }
  // -1 when nobody hosts the expert.
  int32_t find(int32_t expert, uint32_t spread) const {
    const int32_t count = first_[expert + 1] - first_[expert];
    return count == 0 ? -1 : homes_[first_[expert] + (count == 1 ? 0 : spread % count)];
  }

 private:
  std::vector<int32_t> first_, homes_;
};

// Fills `home`; returns what is wrong with the indices, if anything.
std::optional<std::string> find_homes(const MoeShape& shape, const DispatchArgs& args, int32_t tokens,
                                      int32_t* home) {
  const ExpertTable table(shape, args.expert_map);
  const int32_t num_tokens = args.num_tokens;
  if (num_tokens < 0 || num_tokens > tokens) {
    return "num_tokens is " + std::to_string(num_tokens) + ", allowed are 0.." + std::to_string(tokens);
  }
  const int32_t top_k = shape.top_k;
  for (int32_t t = 0; t < tokens; ++t) {
    const int32_t* ids = args.indices + int64_t{t} * top_k;
    int32_t* out = home + int64_t{t} * top_k;
    if (t >= num_tokens) {
      std::fill(out, out + top_k, kPastEnd);
      continue;
    }
    for (int32_t k = 0; k < top_k; ++k) {
      if (ids[k] == -1) {
        out[k] = kNotRouted;
        continue;
      }
      const auto where = [&] {
        return "indices[" + std::to_string(t) + ", " + std::to_string(k) + "] is " + std::to_string(ids[k]);
      };
      if (ids[k] < 0 || ids[k] >= shape.num_experts) {
        return where() + ", allowed are -1 and 0.." + std::to_string(shape.num_experts - 1);
      }
      if (std::find(ids, ids + k, ids[k]) != ids + k) {
        return where() + " a second time: a token's experts must be distinct";
      }
      out[k] = table.find(ids[k], static_cast<uint32_t>(t + shape.rank));
      if (out[k] < 0) return where() + ", an expert that expert_map places nowhere";
    }
  }
  return std::nullopt;
}

// Where each (source, expert) pair's rows begin, from everybody's counts.
struct Placement {
  std::vector<int64_t> base;         // [experts] first row of an expert
  std::vector<int64_t> source_base;  // [source][expert] position of the source's first row in the expert's
  std::vector<int64_t> sizes;        // [experts] pairs, before clipping
  int64_t clip = 0;                  // rows kept of each expert
  int64_t dropped = 0;
  int64_t end = 0;  // one past the last row, padding included

  Placement(const MoeShape& shape, const std::vector<uint32_t>& counts, int64_t rows)
      : base(shape.experts_per_rank), source_base(counts.size()), sizes(shape.experts_per_rank, 0) {
    const int32_t experts = shape.experts_per_rank;
    for (int32_t s = 0; s < shape.num_ranks; ++s) {
      for (int32_t e = 0; e < experts; ++e) {
        source_base[int64_t{s} * experts + e] = sizes[e];
        sizes[e] += counts[int64_t{s} * experts + e];
      }
    }
    clip = largest_clip(sizes.data(), experts, shape.alignment, rows,
                        *std::max_element(sizes.begin(), sizes.end()));
    for (int32_t e = 0; e < experts; ++e) {
      base[e] = end;
      end += round_up(kept(e), shape.alignment);
      dropped += sizes[e] - kept(e);
    }
  }
  int64_t kept(int32_t expert) const { return std::min(sizes[expert], clip); }
};

void poison(const MoeShape& shape, const DispatchArgs& args, int32_t tokens) {
  with_dtype(shape.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    fill_nan(static_cast<T*>(args.tokens), args.route.rows * shape.hidden);
  });
  fill_nan(args.row_weights, args.route.rows);
  std::fill_n(args.group_sizes, shape.experts_per_rank, 0);
  *args.num_rows = *args.num_dropped = *args.route.ok = 0;
  const int64_t slots = int64_t{shape.num_ranks} * tokens;
  std::fill_n(args.route.home, int64_t{tokens} * shape.top_k, kNotRouted);
  std::fill_n(args.route.source_slots, int64_t{shape.rounds(tokens)} * shape.num_ranks, 0);
  std::fill_n(args.route.slot_start, slots + 1, 0);
  std::fill_n(args.route.slot_rows, slots * shape.entries(), -1);
}

class Dispatch {
 public:
  Dispatch(const Call& call, const DispatchArgs& args)
      : call_(call),
        shape_(call.shape),
        args_(args),
        ordinals_(int64_t{call.tokens()} * shape_.top_k),
        counts_(shape_.physical_experts(), 0) {}

  std::optional<Error> run() {
    if (auto error = refusal(call_)) return error;
    if (const auto wrong = find_homes(shape_, args_, call_.tokens(), args_.route.home)) {
      data_error("rank " + std::to_string(shape_.rank) + ": " + *wrong);
      std::fill_n(args_.route.home, int64_t{call_.tokens()} * shape_.top_k, kNotRouted);
    }
    for (int32_t t = 0; t < call_.tokens(); ++t) {
      for (int32_t k = 0; k < shape_.top_k; ++k) {
        const int64_t at = int64_t{t} * shape_.top_k + k;
        if (args_.route.home[at] >= 0) ordinals_[at] = counts_[args_.route.home[at]]++;
      }
    }
    for (int32_t round = 0; round < call_.rounds(); ++round) {
      Exchange exchange(call_.group, call_.site, round, call_.run);
      send(exchange, HomeSlots(shape_, args_.route.home, call_.tokens(), round), round);
      const bool sound = exchange.wait() && receive(exchange, round);
      if (!sound) {
        poison(shape_, args_, call_.tokens());
        return refusal(call_);
      }
      if (auto error = exchange.raised()) return error;
    }
    if (!wrong_.empty()) {
      poison(shape_, args_, call_.tokens());
    } else {
      finish();
    }
    return std::nullopt;
  }

 private:
  void data_error(const std::string& what) {
    wrong_ = what;
    call_.group.report_data_error(
        Error(ErrorKind::kRouting, "group '" + call_.group.config().name + "', dispatch '" +
                                       std::string(call_.site.name) + "': " + what),
        shape_.rank, call_.run);
  }

  void send(Exchange& exchange, const HomeSlots& slots, int32_t round) {
    const int64_t header_bytes = sizeof(RegionHeader);
    const int64_t counts_bytes = round == 0 ? shape_.counts_bytes() : 0;
    const int64_t stride = shape_.dispatch_stride();
    for_each_peer(shape_, [&](uint32_t peer) {
      const auto& tokens = slots.tokens_to(peer);
      std::byte* out = exchange.message(peer, header_bytes + counts_bytes + tokens.size() * stride);
      if (out == nullptr) return;
      out += header_bytes;
      if (round == 0) {
        std::memset(out, 0, counts_bytes);
        std::memcpy(out, counts_.data() + int64_t{peer} * shape_.experts_per_rank,
                    4 * shape_.experts_per_rank);
        out += counts_bytes;
      }
      for (const int32_t token : tokens) {
        pack(out, token, static_cast<int32_t>(peer));
        out += stride;
      }
      exchange.post(static_cast<uint32_t>(tokens.size()), !wrong_.empty());
    });
  }

  void pack(std::byte* out, int32_t token, int32_t peer) {
    SlotHeader header{.token = static_cast<uint32_t>(token), .entries = 0};
    const int64_t at = int64_t{token} * shape_.top_k;
    for (int32_t k = 0; k < shape_.top_k; ++k) {
      const int32_t expert = args_.route.home[at + k];
      if (expert < 0 || expert / shape_.experts_per_rank != peer) continue;
      const SlotEntry entry{.weight = args_.weights[at + k],
                            .ordinal = ordinals_[at + k],
                            .local_expert = static_cast<uint16_t>(expert % shape_.experts_per_rank),
                            .column = static_cast<uint8_t>(k),
                            .reserved = 0};
      std::memcpy(out + sizeof(header) + header.entries++ * sizeof(entry), &entry, sizeof(entry));
    }
    std::memcpy(out, &header, sizeof(header));
    std::memcpy(out + shape_.slot_header_bytes(),
                static_cast<const std::byte*>(args_.x) + token * shape_.row_bytes(), shape_.row_bytes());
  }

  bool receive(Exchange& exchange, int32_t round) {
    if (round == 0 && !read_counts(exchange)) return false;
    for (int32_t source = 0; source < shape_.num_ranks; ++source) {
      if (exchange.poisoned(source)) note_poison(call_, exchange, source);
      if (!unpack(exchange, source, round)) return false;
    }
    return round + 1 < call_.rounds() || complete(exchange);
  }

  // Rows that were announced but never came would be left as they are.
  bool complete(Exchange& exchange) {
    const int32_t experts = shape_.experts_per_rank;
    for (int32_t source = 0; source < shape_.num_ranks; ++source) {
      const uint32_t* counts = received_.data() + int64_t{source} * experts;
      if (std::accumulate(counts, counts + experts, int64_t{0}) == pairs_[source]) continue;
      exchange.reject(source, "its slots do not add up to its counts");
      return false;
    }
    return true;
  }

  bool read_counts(Exchange& exchange) {
    const int32_t experts = shape_.experts_per_rank;
    received_.resize(int64_t{shape_.num_ranks} * experts);
    pairs_.assign(shape_.num_ranks, 0);
    for (int32_t source = 0; source < shape_.num_ranks; ++source) {
      if (exchange.body_bytes(source) < static_cast<size_t>(shape_.counts_bytes())) {
        exchange.reject(source, "its message is too short for its counts");
        return false;
      }
      uint32_t* counts = received_.data() + int64_t{source} * experts;
      std::memcpy(counts, exchange.body(source), 4 * experts);
      if (std::any_of(counts, counts + experts, [&](uint32_t n) { return n > call_.site.tokens; })) {
        exchange.reject(source, "it announces more rows for an expert than it has tokens");
        return false;
      }
    }
    placement_.emplace(shape_, received_, args_.route.rows);
    if (placement_->dropped != 0 && !shape_.drop && wrong_.empty()) {
      int64_t needed = 0;
      for (const int64_t size : placement_->sizes) needed += round_up(size, shape_.alignment);
      data_error("rank " + std::to_string(shape_.rank) + " receives " + std::to_string(needed) +
                 " rows, rows=" + std::to_string(args_.route.rows) +
                 ": raise rows=, or drop what exceeds it with on_overflow=\"drop\"");
    }
    return true;
  }

  bool unpack(Exchange& exchange, int32_t source, int32_t round) {
    const uint32_t slots = exchange.header(source).slots;
    const size_t counts_bytes = round == 0 ? shape_.counts_bytes() : 0;
    const size_t stride = shape_.dispatch_stride();
    const int32_t most = std::min(shape_.chunk, call_.tokens() - round * shape_.chunk);
    if (slots > static_cast<uint32_t>(most) || exchange.body_bytes(source) != counts_bytes + slots * stride) {
      exchange.reject(source,
                      "the length of its message does not fit its " + std::to_string(slots) + " slots");
      return false;
    }
    args_.route.source_slots[int64_t{round} * shape_.num_ranks + source] = static_cast<int32_t>(slots);
    const std::byte* in = exchange.body(source) + counts_bytes;
    const uint32_t* counts = received_.data() + int64_t{source} * shape_.experts_per_rank;
    for (uint32_t slot = 0; slot < slots; ++slot, in += stride) {
      SlotHeader header;
      std::memcpy(&header, in, sizeof(header));
      if (header.entries > static_cast<uint32_t>(shape_.entries())) {
        exchange.reject(source, "a slot lists more experts than a token has");
        return false;
      }
      args_.route.slot_start[slot_++] = pair_;
      pairs_[source] += header.entries;
      for (uint32_t i = 0; i < header.entries; ++i) {
        SlotEntry entry;
        std::memcpy(&entry, in + sizeof(header) + i * sizeof(entry), sizeof(entry));
        if (entry.local_expert >= shape_.experts_per_rank || entry.ordinal >= counts[entry.local_expert]) {
          exchange.reject(source, "a slot names an expert or row that its counts do not announce");
          return false;
        }
        args_.route.slot_rows[pair_++] = place(source, entry, in + shape_.slot_header_bytes());
      }
    }
    return true;
  }

  // Copies the row to its place and returns that, or -1 when it is dropped.
  int32_t place(int32_t source, const SlotEntry& entry, const std::byte* row) {
    const int64_t position =
        placement_->source_base[int64_t{source} * shape_.experts_per_rank + entry.local_expert] +
        entry.ordinal;
    if (position >= placement_->kept(entry.local_expert)) return -1;
    const int64_t at = placement_->base[entry.local_expert] + position;
    std::memcpy(static_cast<std::byte*>(args_.tokens) + at * shape_.row_bytes(), row, shape_.row_bytes());
    args_.row_weights[at] = entry.weight;
    return static_cast<int32_t>(at);
  }

  void finish() {
    const int64_t slots = int64_t{shape_.num_ranks} * call_.tokens();
    std::fill(args_.route.slot_start + slot_, args_.route.slot_start + slots + 1, pair_);
    std::fill(args_.route.slot_rows + pair_, args_.route.slot_rows + slots * shape_.entries(), -1);
    int64_t kept = 0;
    auto* tokens = static_cast<std::byte*>(args_.tokens);
    const auto clear = [&](int64_t begin, int64_t end, bool rows) {
      if (rows && begin != end)
        std::memset(tokens + begin * shape_.row_bytes(), 0, (end - begin) * shape_.row_bytes());
      std::fill(args_.row_weights + begin, args_.row_weights + end, 0.0F);
    };
    for (int32_t e = 0; e < shape_.experts_per_rank; ++e) {
      const int64_t rows = placement_->kept(e);
      const int64_t padded = round_up(rows, shape_.alignment);
      args_.group_sizes[e] = static_cast<int32_t>(padded);
      kept += rows;
      clear(placement_->base[e] + rows, placement_->base[e] + padded, true);
    }
    clear(placement_->end, args_.route.rows, shape_.zero_tail);
    *args_.num_rows = static_cast<int32_t>(kept);
    *args_.num_dropped = static_cast<int32_t>(placement_->dropped);
    *args_.route.ok = 1;
  }

  const Call& call_;
  const MoeShape& shape_;
  const DispatchArgs& args_;
  std::vector<uint32_t> ordinals_;  // [T, K] among this rank's tokens for the expert
  std::vector<uint32_t> counts_;    // [physical experts] of this rank's tokens
  std::vector<uint32_t> received_;  // [source][expert]
  std::vector<int64_t> pairs_;      // [source] unpacked so far
  std::optional<Placement> placement_;
  std::string wrong_;  // this rank's data error
  int64_t slot_ = 0;
  int32_t pair_ = 0;
};

}  // namespace

std::optional<Error> dispatch(const Call& call, const DispatchArgs& args) {
  return Dispatch(call, args).run();
}

}  // namespace pplx::moe
