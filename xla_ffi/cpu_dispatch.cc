// dispatch: tokens to the ranks of their experts, and out again by expert.
#include <cmath>
#include <cstring>
#include <numeric>

#include "xla_ffi/cpu_common.h"
#include "xla_ffi/quantize.h"

namespace pplx::moe {
namespace {

// Physical experts that hold each logical one, but for those of absent ranks. Replicas share the load by
// token.
class ExpertTable {
 public:
  ExpertTable(const MoeShape& shape, const int32_t* map, const std::vector<uint32_t>& absent)
      : first_(shape.num_experts + 1, 0) {
    std::vector<bool> away(shape.num_ranks, false);
    for (const uint32_t rank : absent) away[rank] = true;
    if (!absent.empty()) lost_.resize(shape.num_experts, false);
    const auto each = [&](auto&& visit) {
      for (int32_t p = 0; p < shape.physical_experts(); ++p) {
        if (map[p] < 0 || map[p] >= shape.num_experts) continue;
        if (away[p / shape.experts_per_rank]) {
          lost_[map[p]] = true;
        } else {
          visit(p, map[p]);
        }
      }
    };
    each([&](int32_t, int32_t expert) { ++first_[expert + 1]; });
    for (int32_t e = 0; e < shape.num_experts; ++e) first_[e + 1] += first_[e];
    homes_.resize(first_.back());
    std::vector<int32_t> next(first_.begin(), first_.end() - 1);
    each([&](int32_t p, int32_t expert) { homes_[next[expert]++] = p; });
  }
  // -1 when nobody hosts the expert.
  int32_t find(int32_t expert, uint32_t spread) const {
    const int32_t count = first_[expert + 1] - first_[expert];
    return count == 0 ? -1 : homes_[first_[expert] + (count == 1 ? 0 : spread % count)];
  }
  // Whether an absent rank hosts it, where nobody else does.
  bool lost(int32_t expert) const { return !lost_.empty() && lost_[expert]; }

 private:
  std::vector<int32_t> first_, homes_;
  std::vector<bool> lost_;  // empty where no rank is absent
};

// Fills `home`; returns what is wrong with the indices, if anything.
std::optional<std::string> find_homes(const MoeShape& shape, const DispatchSend& args, int32_t tokens,
                                      const std::vector<uint32_t>& absent) {
  const ExpertTable table(shape, args.expert_map, absent);
  const int32_t num_tokens = *args.num_tokens;
  if (num_tokens < 0 || num_tokens > tokens) {
    return "num_tokens is " + std::to_string(num_tokens) + ", allowed are 0.." + std::to_string(tokens);
  }
  const int32_t top_k = shape.top_k;
  for (int32_t t = 0; t < tokens; ++t) {
    const int32_t* ids = args.indices + int64_t{t} * top_k;
    int32_t* out = args.home + int64_t{t} * top_k;
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
      if (out[k] >= 0) continue;
      if (!table.lost(ids[k])) return where() + ", an expert that expert_map places nowhere";
      out[k] = kNotRouted;
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
    const int64_t room = rows / experts;  // of each expert in the padded layout
    clip = shape.padded ? room
                        : largest_clip(sizes.data(), experts, shape.alignment, rows,
                                       *std::max_element(sizes.begin(), sizes.end()));
    for (int32_t e = 0; e < experts; ++e) {
      base[e] = end;
      end += shape.padded ? room : round_up(kept(e), shape.alignment);
      dropped += sizes[e] - kept(e);
    }
  }
  int64_t kept(int32_t expert) const { return std::min(sizes[expert], clip); }
};

void report(const Call& call, const std::string& what) {
  call.group.report_data_error(
      Error(ErrorKind::kRouting, "group '" + call.group.config().name + "', dispatch '" +
                                     std::string(call.site.name) + "': " + what),
      call.shape.rank, call.run);
}

class DispatchSender {
 public:
  DispatchSender(const Call& call, const DispatchSend& args)
      : call_(call),
        shape_(call.shape),
        args_(args),
        weights_(args.weights),
        ordinals_(int64_t{call.tokens()} * shape_.top_k),
        counts_(shape_.physical_experts(), 0) {}

  bool prepare() {
    const int64_t choices = int64_t{call_.tokens()} * shape_.top_k;
    const auto& absent = call_.group.config().absent;
    if (const auto wrong = find_homes(shape_, args_, call_.tokens(), absent)) {
      report(call_, "rank " + std::to_string(shape_.rank) + ": " + *wrong);
      std::fill_n(args_.home, choices, kNotRouted);
      sound_ = false;
    } else if (!absent.empty()) {
      make_up();
    }
    for (int64_t at = 0; at < choices; ++at) {
      if (args_.home[at] >= 0) ordinals_[at] = counts_[args_.home[at]]++;
    }
    return sound_;
  }

  void send(Exchange& exchange, int32_t round) {
    const HomeSlots slots(shape_, args_.home, call_.tokens(), round);
    const int64_t header_bytes = sizeof(RegionHeader);
    const int64_t counts_bytes = round == 0 ? shape_.counts_bytes() : 0;
    const int64_t stride = shape_.dispatch_stride();
    quantize(round);
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
      exchange.post(static_cast<uint32_t>(tokens.size()), !sound_);
    });
  }

 private:
  // A token's remaining experts take over the weight of those that are lost, so that its sum stays what it
  // was.
  void make_up() {
    LossCounts counts;
    made_up_.assign(args_.weights, args_.weights + int64_t{call_.tokens()} * shape_.top_k);
    weights_ = made_up_.data();
    for (int32_t t = 0; t < *args_.num_tokens; ++t) {
      const int64_t at = int64_t{t} * shape_.top_k;
      float all = 0, left = 0;
      int32_t routed = 0, kept = 0;
      for (int32_t k = 0; k < shape_.top_k; ++k) {
        if (args_.indices[at + k] < 0) continue;
        ++routed;
        all += args_.weights[at + k];
        if (args_.home[at + k] < 0) continue;
        ++kept;
        left += args_.weights[at + k];
      }
      counts.routed += routed != 0 ? 1 : 0;
      if (kept == routed) continue;
      ++counts.tokens;
      if (std::isfinite(all - left)) counts.weight += all - left;
      if (kept == 0) {
        ++counts.whole;
        continue;
      }
      const float share =
          all > left && left >= 0 ? (all - left) / all : 0;  // of odd weights there is no telling
      ++counts.by_share[std::min(3, static_cast<int>(share * 4))];
      const float factor = all / left;
      if (share <= 0 || !std::isfinite(factor)) continue;
      for (int32_t k = 0; k < shape_.top_k; ++k) made_up_[at + k] *= factor;
    }
    if (call_.losses != nullptr) call_.losses->add(counts);
  }

  // The round's tokens, once each although several ranks may get them.
  void quantize(int32_t round) {
    rows_ = static_cast<const std::byte*>(args_.x);
    scales_ = static_cast<const std::byte*>(args_.scales);
    first_ = 0;
    if (shape_.quant == Quant::kNone || args_.scales != nullptr) return;
    first_ = round * shape_.chunk;
    const int32_t count = std::min(call_.tokens() - first_, shape_.chunk);
    quantized_.resize(count * (shape_.token_bytes() + shape_.scale_bytes()));
    std::byte* rows = quantized_.data();
    std::byte* scales = rows + count * shape_.token_bytes();
    with_dtype(shape_.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      for (int32_t i = 0; i < count; ++i) {
        const int32_t* home = args_.home + int64_t{first_ + i} * shape_.top_k;
        if (std::all_of(home, home + shape_.top_k, [](int32_t expert) { return expert < 0; })) continue;
        quantize_row(reinterpret_cast<uint8_t*>(rows + i * shape_.token_bytes()),
                     scales + i * shape_.scale_bytes(),
                     static_cast<const T*>(args_.x) + int64_t{first_ + i} * shape_.hidden, shape_.hidden,
                     shape_.quant);
      }
    });
    rows_ = rows;
    scales_ = scales;
  }

  void pack(std::byte* out, int32_t token, int32_t peer) {
    SlotHeader header{.token = static_cast<uint32_t>(token), .entries = 0};
    const int64_t at = int64_t{token} * shape_.top_k;
    for (int32_t k = 0; k < shape_.top_k; ++k) {
      const int32_t expert = args_.home[at + k];
      if (expert < 0 || expert / shape_.experts_per_rank != peer) continue;
      const SlotEntry entry{.weight = weights_[at + k],
                            .ordinal = ordinals_[at + k],
                            .local_expert = static_cast<uint16_t>(expert % shape_.experts_per_rank),
                            .column = static_cast<uint8_t>(k),
                            .reserved = 0};
      std::memcpy(out + sizeof(header) + header.entries++ * sizeof(entry), &entry, sizeof(entry));
    }
    std::memcpy(out, &header, sizeof(header));
    out += shape_.slot_header_bytes();
    std::memcpy(out, rows_ + (token - first_) * shape_.token_bytes(), shape_.token_bytes());
    if (shape_.scale_bytes() == 0) return;
    std::memcpy(out + shape_.token_stride(), scales_ + (token - first_) * shape_.scale_bytes(),
                shape_.scale_bytes());
  }

  const Call& call_;
  const MoeShape& shape_;
  const DispatchSend& args_;
  const float* weights_;            // [T, K] as they travel
  std::vector<float> made_up_;      // the same, where ranks are absent
  std::vector<uint32_t> ordinals_;  // [T, K] among this rank's tokens for the expert
  std::vector<uint32_t> counts_;    // [physical experts] of this rank's tokens
  bool sound_ = true;
  std::vector<std::byte> quantized_;
  const std::byte* rows_ = nullptr;  // as they travel, from token first_ on
  const std::byte* scales_ = nullptr;
  int32_t first_ = 0;
};

class DispatchReceiver {
 public:
  DispatchReceiver(const Call& call, const DispatchRecv& args)
      : call_(call), shape_(call.shape), args_(args) {}

  bool prepare(bool poisoned) {
    sound_ = !poisoned;
    return sound_;
  }

  bool receive(Exchange& exchange, int32_t round) {
    if (round == 0 && !read_counts(exchange)) return false;
    for (int32_t source = 0; source < shape_.num_ranks; ++source) {
      if (exchange.poisoned(source)) note_poison(call_, exchange, source);
      if (!unpack(exchange, source, round)) return false;
    }
    return round + 1 < call_.rounds() || complete(exchange);
  }

  void finish() {
    if (!sound_) {
      poison();
      return;
    }
    const int64_t slots = int64_t{shape_.num_ranks} * call_.tokens();
    std::fill(args_.route.slot_start + slot_, args_.route.slot_start + slots + 1, pair_);
    std::fill(args_.route.slot_rows + pair_, args_.route.slot_rows + slots * shape_.entries(), -1);
    int64_t kept = 0;
    const auto end_of = [&](int32_t e) {
      return e + 1 < shape_.experts_per_rank ? placement_->base[e + 1] : placement_->end;
    };
    for (int32_t e = 0; e < shape_.experts_per_rank; ++e) {
      const int64_t rows = placement_->kept(e);
      args_.group_sizes[e] = static_cast<int32_t>(shape_.padded ? rows : round_up(rows, shape_.alignment));
      kept += rows;
      clear(placement_->base[e] + rows, end_of(e), shape_.zero_tail || !shape_.padded);
    }
    clear(placement_->end, args_.route.rows, shape_.zero_tail);
    *args_.num_rows = static_cast<int32_t>(kept);
    *args_.num_dropped = static_cast<int32_t>(placement_->dropped);
    *args_.route.ok = 1;
  }

  void poison() {
    const int64_t rows = args_.route.rows, slots = int64_t{shape_.num_ranks} * call_.tokens();
    if (shape_.quant == Quant::kNone) {
      with_dtype(shape_.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        fill_nan(static_cast<T*>(args_.tokens), rows * shape_.hidden);
      });
    } else {
      std::memset(args_.tokens, kNanE4m3, rows * shape_.token_bytes());
      if (shape_.quant == Quant::kFp8) {
        fill_nan(static_cast<float*>(args_.scales), rows * shape_.scales());
      } else {
        std::memset(args_.scales, kNanE8m0, rows * shape_.scale_bytes());
      }
    }
    fill_nan(args_.row_weights, rows);
    std::fill_n(args_.group_sizes, shape_.experts_per_rank, 0);
    *args_.num_rows = *args_.num_dropped = *args_.route.ok = 0;
    std::fill_n(args_.route.source_slots, int64_t{call_.rounds()} * shape_.num_ranks, 0);
    std::fill_n(args_.route.slot_start, slots + 1, 0);
    std::fill_n(args_.route.slot_rows, slots * shape_.entries(), -1);
  }

 private:
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
    if (placement_->dropped != 0 && !shape_.drop && sound_) {
      sound_ = false;
      report(call_, "rank " + std::to_string(shape_.rank) + overflow());
    }
    return true;
  }

  std::string overflow() const {
    int64_t needed = 0, most = 0;
    for (const int64_t size : placement_->sizes) {
      needed += round_up(size, shape_.alignment);
      most = std::max(most, size);
    }
    const std::string limit =
        shape_.padded
            ? " receives " + std::to_string(most) + " rows for one expert, room is for " +
                  std::to_string(placement_->clip)
            : " receives " + std::to_string(needed) + " rows, rows=" + std::to_string(args_.route.rows);
    return limit + ": raise rows=, or drop what exceeds it with on_overflow=\"drop\"";
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
    const int64_t row_bytes = shape_.token_bytes(), scale_bytes = shape_.scale_bytes();
    std::memcpy(static_cast<std::byte*>(args_.tokens) + at * row_bytes, row, row_bytes);
    if (scale_bytes != 0) {
      std::memcpy(static_cast<std::byte*>(args_.scales) + at * scale_bytes, row + shape_.token_stride(),
                  scale_bytes);
    }
    args_.row_weights[at] = entry.weight;
    return static_cast<int32_t>(at);
  }

  void clear(int64_t begin, int64_t end, bool rows) {
    if (begin == end) return;
    const auto zero = [&](void* array, int64_t bytes) {
      if (bytes != 0) std::memset(static_cast<std::byte*>(array) + begin * bytes, 0, (end - begin) * bytes);
    };
    zero(args_.row_weights, sizeof(float));
    if (!rows) return;
    zero(args_.tokens, shape_.token_bytes());
    zero(args_.scales, shape_.scale_bytes());
  }

  const Call& call_;
  const MoeShape& shape_;
  const DispatchRecv& args_;
  std::vector<uint32_t> received_;  // [source][expert]
  std::vector<int64_t> pairs_;      // [source] unpacked so far
  std::optional<Placement> placement_;
  bool sound_ = true;  // this rank's data
  int64_t slot_ = 0;
  int32_t pair_ = 0;
};

}  // namespace

std::optional<Error> dispatch(const Call& call, const DispatchSend& send, const DispatchRecv& recv) {
  return run_both(call, DispatchSender(call, send), DispatchReceiver(call, recv));
}

std::optional<Error> dispatch_send(const Call& call, const DispatchSend& send, Ticket& ticket) {
  return run_send(call, DispatchSender(call, send), ticket);
}

std::optional<Error> dispatch_recv(const Call& call, const DispatchRecv& recv, Ticket ticket) {
  return run_recv(call, DispatchReceiver(call, recv), ticket);
}

}  // namespace pplx::moe
