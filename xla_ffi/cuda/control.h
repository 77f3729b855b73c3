// What the kernels of a group and its host side share: where regions lie, what number comes next, what went
// wrong. docs/protocol.md, section "On the GPU", is the reference.
#pragma once

#include <cstddef>
#include <cstdint>

#include "proxy/moe/wire.h"
#include "xla_ffi/layout.h"

namespace pplx::moe::cuda {

// A row may be cut into this many parts, each moved and announced by a warp of its own.
inline constexpr int kMaxParts = 8;
// Tables of experts and ranks lie in shared memory.
inline constexpr int kMaxExperts = 4096;
inline constexpr uint32_t kMaxSites = 4096;
inline constexpr int kMaxBlocks = 256;

// Work of an exchange that any warp may take.
enum QueueName { kSendQueue, kKeepQueue, kReceiveQueue, kClearQueue };
inline constexpr int kQueues = 4;

// What a kernel can find wrong.
enum class Fault : uint32_t {
  kNone = 0,
  // Failures: final.
  kTimeout,    // culprit did not come
  kMismatch,   // culprit is at another exchange, see `theirs`
  kMalformed,  // culprit's message makes no sense; detail: Malformed
  kNotice,     // culprit has failed
  kAborted,    // the host ended the wait: it knows why
  kWindow,     // more sends under way than depth; detail[0]: the oldest exchange not received
  kTicket,     // what is received is no ticket of this call
  // Data errors: the group goes on.
  kNumTokens,     // detail[0]
  kBadExpert,     // detail: token, choice, id
  kDuplicate,     // detail: token, choice, id
  kHomeless,      // detail: token, choice, id: expert_map places it nowhere
  kOverflow,      // detail: rows needed, rows there are
  kForeignRoute,  // the route's arrays are not those that dispatch returned
  kFailedRoute,   // the route is of a dispatch that failed
  kPoisoned,      // culprit has a data error
};

enum class Malformed : int64_t { kHeader, kSlots, kCounts, kEntry };

// In pinned host memory. Only the first of its sort is kept; `complete` is written last.
struct FaultRecord {
  uint32_t complete;
  Fault fault;
  uint32_t kind;  // Kind of the exchange
  uint32_t site;
  uint32_t culprit;
  uint32_t tokens;
  uint64_t exchange;
  int64_t detail[4];
  RegionHeader theirs;  // with kMismatch
};

// A packed exchange, for the proxy to post; pinned.
struct Submission {
  uint64_t epoch;  // exchange + 1, written last
  uint32_t kind, site, tokens, round;
  uint32_t poisoned;
  uint32_t reserved;
};

// Pinned host memory, mapped: what host and kernels tell each other while kernels run.
struct HostControl {
  // By kernels.
  FaultRecord failure, data_error;
  uint64_t entered;  // latest exchange in which a kernel waits, plus one
  Submission submissions[kMaxLanes];
  // By the host.
  uint64_t abort;              // not 0: every wait ends, everything poisons
  uint64_t data_errors_taken;  // how many data errors check() has taken
  uint64_t stall_ns, first_stall_ns;
  // Exchange + 1 whose messages by proxy are all here, and whose own ones have left.
  uint64_t arrived[kMaxLanes];
};

// Device memory of a group on one device of this process. Compiled programs hold its address: it is never
// freed, and serves the next equal group after a close.
struct Control {
  // By the host, while no kernel runs.
  uint32_t open;   // 0: everything poisons
  uint32_t lanes;  // 2 * depth
  HostControl* host;
  uint32_t* host_slots;     // [lanes][R] pinned: slots of each submitted message
  std::byte* const* peers;  // [R] each rank's device regions as seen from here; null: reached by proxy
  std::byte* host_regions;  // [lanes][R] of region_bytes, pinned: what comes by proxy; null: nothing does
  std::byte* host_staging;  // [lanes][R] of region_bytes, pinned: what goes by proxy
  uint32_t told_here;       // not 0: the host writes `relayed` itself, through a mapping of this memory
  // Scratch of the exchanges under way.
  uint32_t* ordinals;  // [lanes, max_tokens, K] of each choice, among this rank's tokens for the expert
  int32_t* slots;      // [lanes, max_tokens, K] of each choice's token on the choice's rank
  uint32_t* counts;    // [R, experts_per_rank] announced in round 0
  // [lanes, R + physical experts, kMaxBlocks] slots and pairs of each block's share of the tokens.
  uint32_t* shares;
  // By kernels.
  uint64_t next;  // number of the next exchange
  uint32_t sent_blocks[kMaxLanes], received_blocks[kMaxLanes], packed_blocks[kMaxLanes];
  uint32_t met_blocks[kMaxLanes];       // that have come to the kernel's barriers
  uint32_t taken[kMaxLanes][kQueues];   // units of the kernel's queues
  unsigned long long worst[kMaxLanes];  // of what blocks found wrong with the data, complemented; 0: nothing
  uint32_t step_spoiled[kMaxLanes];     // a round's outputs were poisoned
  uint32_t failed;                      // Fault of the group
  uint32_t failure_claimed;
  unsigned long long data_errors_claimed;
  uint64_t relayed[kMaxLanes];   // HostControl's `arrived`, as the last block or the host tells it
  uint64_t received[kMaxLanes];  // exchange + 1
  uint32_t poisoned[kMaxLanes];  // the send half of the lane's exchange found its data wrong
  uint8_t seen[kMaxSites];       // call sites that have run
};

// A number and its epoch in a word, which is whole whenever it is seen: no order is needed.
inline constexpr int kCountBits = 24;
inline constexpr uint32_t kCountLimit = 1U << kCountBits;
PPLX_HD inline uint64_t announcement(uint64_t exchange, uint32_t count) {
  return (exchange + 1) << kCountBits | count;
}

// Where things lie in a rank's device memory, which its peers write. All of it is zero at first.
struct RegionLayout {
  int32_t lanes = 2;
  int32_t ranks = 1;
  int32_t experts = 1;  // of a rank
  int32_t chunk = 1;
  int64_t region_bytes = 0;

  // A word a source: 1 + the culprit of the failure that the source had.
  PPLX_HD int64_t notice_at(int32_t source) const { return 8 * int64_t{source}; }
  // Epoch of a source's header in a lane: exchange + 1.
  PPLX_HD int64_t ready_at(int32_t lane, int32_t source) const {
    return round_up(8 * int64_t{ranks}, 128) + 8 * (int64_t{lane} * ranks + source);
  }
  // Epochs of a part of a slot: exchange + 1.
  PPLX_HD int64_t epoch_at(int32_t lane, int32_t source, int32_t slot, int32_t part) const {
    return round_up(8 * int64_t{ranks}, 128) + round_up(8 * int64_t{lanes} * ranks, 128) +
           8 * (((int64_t{lane} * ranks + source) * chunk + slot) * kMaxParts + part);
  }
  // What a source's dispatch announces, each a word with its epoch (announcement()): rows for each of the
  // rank's experts, then slots.
  PPLX_HD int64_t counts_at(int32_t lane, int32_t source) const {
    return round_up(epoch_at(lanes, 0, 0, 0), 128) + 8 * (int64_t{lane} * ranks + source) * (experts + 1);
  }
  PPLX_HD int64_t region_at(int32_t lane, int32_t source) const {
    return round_up(counts_at(lanes, 0), 128) + (int64_t{lane} * ranks + source) * region_bytes;
  }
  PPLX_HD int64_t bytes() const { return region_at(lanes, 0); }
};

}  // namespace pplx::moe::cuda
