// One exchange as its kernel sees it: its number, where messages go and come from, what may stop it.
#pragma once

#include "xla_ffi/cuda/faults.cuh"
#include "xla_ffi/cuda/state.cuh"

namespace pplx::moe::cuda {

// Who does what in a kernel that sends and receives. Of few tokens each block's warps take sides: some see to
// the headers while the others plan and send. Of many, all plan, the first blocks send, and see to the
// headers afterwards.
template <bool kSend, bool kRecv>
struct Roles {
  static constexpr int kReady = 4, kPlanned = 5;  // barriers

  bool split, sends, places;
  Team senders, placers;

  __device__ explicit Roles(const Args& args)
      : split(!kSend || !kRecv || args.senders != 0),
        sends(kSend && (!kRecv || (split ? static_cast<int32_t>(blockIdx.x) < args.senders
                                         : static_cast<int>(threadIdx.x) < kThreads - kPlacers))),
        places(kRecv && (split || static_cast<int>(threadIdx.x) >= kThreads - kPlacers)),
        senders{0, split ? kThreads : kThreads - kPlacers, 1},
        placers{split ? 0 : kThreads - kPlacers, split ? kThreads : kPlacers, 2} {}

  __device__ __forceinline__ bool plans() const { return split || sends; }
  __device__ __forceinline__ Team planners() const { return split ? Team{0, kThreads, 1} : senders; }
  // What the planners of few tokens have found out is known to the placers after this.
  __device__ __forceinline__ void planned() const {
    if (split) return;
    if (sends) {
      arrive(kPlanned, kThreads);
      __syncwarp();
    } else {
      wait_at(kPlanned, kThreads);
    }
  }
  // What the placers have found out is known after this, to each warp of few tokens without waiting for those
  // that still send.
  __device__ __forceinline__ void ready(BlockState& state) const {
    const Signal placed(state.placed);
    if (split) {
      wait_at(kReady, kThreads);
    } else if (places) {
      placed.arrive();
      __syncwarp();
    } else {
      placed.wait();
      __syncwarp();
    }
  }
};

class Exchange {
 public:
  __device__ Exchange(const Args& args, BlockState& state) : args_(args), state_(state) {}

  // By all threads. Takes the number of a send, or that of a recv from its ticket.
  template <bool kSend>
  __device__ __forceinline__ void begin() {
    Control& control = *args_.control;
    const int thread = static_cast<int>(threadIdx.x);
    uint32_t open_seen = 1;
    // All at once, as each takes a while.
    if (thread == 0) {
      trace(0);
      const uint32_t open = load_volatile(&control.open), failed = load_volatile(&control.failed);
      const uint64_t next = load_volatile(&control.next);
      state_.host_regions = control.host_regions;
      state_.host_staging = control.host_staging;
      state_.number = kSend ? next : 0;
      state_.stop = open == 0 || failed != 0 ? 1 : 0;
      state_.poisoned = state_.last = state_.skip = state_.tainted = 0;
      for (uint32_t& taken : state_.taken) taken = 0;
      Signal(state_.placed).reset(kPlacers);
      state_.bad = ~0ULL;
    } else if (thread >= kWarp && thread < kWarp + static_cast<int>(kMaxLanes)) {
      state_.received[thread - kWarp] = load_volatile(&control.received[thread - kWarp]);
    } else if (thread >= kThreads - kNearRanks && thread - (kThreads - kNearRanks) < args_.shape.num_ranks) {
      const int rank = thread - (kThreads - kNearRanks);
      open_seen = load_volatile(&control.open);
      state_.peers[rank] = open_seen != 0 ? control.peers[rank] : nullptr;
    }
    // One decision a block, whoever read what while the group was being closed.
    bool shut = false;
    if (thread >= kThreads - kNearRanks && thread - (kThreads - kNearRanks) < args_.shape.num_ranks) {
      shut = open_seen == 0;
    } else if (thread == 0) {
      shut = state_.stop != 0;
      if constexpr (!kSend) read_ticket();
    }
    shut = __syncthreads_or(shut ? 1 : 0) != 0;
    if (thread == 0) {
      state_.stop = shut ? 1 : 0;
      if (!shut && state_.skip == 0) {
        if constexpr (kSend) {
          check_window();
        } else {
          check_ticket();
        }
      }
    }
    __syncthreads();
    number_ = state_.number;
    lane_ = static_cast<int32_t>(number_ % args_.layout.lanes);
    if (thread == 0) trace(1);
  }

  __device__ uint64_t epoch() const { return number_ + 1; }
  __device__ int32_t lane() const { return lane_; }
  __device__ __forceinline__ bool stopped() const { return load_volatile(&state_.stop) != 0; }
  __device__ __forceinline__ void stop() { *const_cast<volatile uint32_t*>(&state_.stop) = 1; }

  // A rank's device memory as seen from here; null: it is reached by proxy.
  __device__ std::byte* peer(int32_t rank) const {
    return args_.shape.num_ranks <= kNearRanks ? state_.peers[rank] : args_.control->peers[rank];
  }
  // Of `items` times `factor` units: the kernel's where blocks take sides, else the block's share.
  __device__ __forceinline__ Queue queue(QueueName name, int32_t items, int32_t factor) const {
    if (args_.senders != 0) return {&args_.control->taken[lane_][name], 0, items * factor};
    const Span own = share(items, 0, args_.everybody);
    return {&state_.taken[name], own.begin * factor, own.end * factor};
  }
  // By all threads: every block of the crew has come here `times` times. Blocks run at the same time, and a
  // kernel has one crew that meets.
  __device__ __forceinline__ void meet(uint32_t times, const Crew& crew) {
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(&args_.control->met_blocks[lane_], 1U);
    }
    await_crew(times, crew);
  }
  // By all threads, also of blocks that are not of the crew.
  __device__ __forceinline__ void await_crew(uint32_t times, const Crew& crew) {
    if (threadIdx.x == 0) {
      meet_slowly(args_, state_, args_.control->met_blocks[lane_], times * crew.blocks.by);
      __threadfence();
    }
    __syncthreads();
  }

  __device__ __forceinline__ bool direct(int32_t rank) const { return peer(rank) != nullptr; }
  __device__ __forceinline__ bool has_proxy() const { return state_.host_staging != nullptr; }
  // The region that this rank's message to `rank` is written to, or packed for the proxy in.
  __device__ std::byte* outgoing(int32_t rank) const {
    std::byte* memory = peer(rank);
    if (memory != nullptr) return memory + region_at(args_.shape.rank);
    return state_.host_staging + of_lane(rank) * args_.region_bytes;
  }
  __device__ const std::byte* incoming(int32_t source) const {
    if (direct(source)) return own() + region_at(source);
    return state_.host_regions + of_lane(source) * args_.region_bytes;
  }

  // By one thread, after its team's writes to the region and a barrier: the message's header.
  __device__ __forceinline__ void announce(int32_t rank, uint32_t slots, bool poisoned) const {
    if (!direct(rank)) return;
    auto& header = *reinterpret_cast<RegionHeader*>(outgoing(rank));
    const MoeShape& shape = args_.shape;
    header.magic = kMagic;
    header.version = kWireVersion;
    header.kind = static_cast<uint8_t>(args_.kind);
    header.flags = poisoned ? kPoisoned : 0;
    header.source = shape.rank;
    header.exchange = number_;
    header.tag = args_.tag;
    header.tokens = args_.tokens;
    header.round = args_.round;
    header.hidden = shape.hidden;
    header.slots = slots;
    header.culprit = shape.rank;
    header.bytes = static_cast<uint32_t>(args_.first_slot + static_cast<int64_t>(slots) * args_.stride);
    header.format = shape.format();
    header.top_k = static_cast<uint8_t>(shape.top_k);
    header.local_experts = static_cast<uint16_t>(shape.experts_per_rank);
    auto* ready = reinterpret_cast<uint64_t*>(peer(rank) + ready_at(shape.rank));
    store_release(ready, epoch());
  }
  // A part of a slot's epoch on the rank it is sent to. Null: it goes by proxy.
  __device__ __forceinline__ uint64_t* epoch_of_sent(int32_t rank, int32_t slot, int32_t part) const {
    std::byte* memory = peer(rank);
    if (memory == nullptr) return nullptr;
    return reinterpret_cast<uint64_t*>(memory + epoch_at(args_.shape.rank, slot, part));
  }
  // By one lane, after its warp's writes to a part of a slot and a __syncwarp.
  __device__ __forceinline__ void publish(int32_t rank, int32_t slot, int32_t part) const {
    uint64_t* word = epoch_of_sent(rank, slot, part);
    if (word != nullptr) store_release(word, epoch());
  }
  // By one thread of each block once the block has packed its part of what goes by proxy, after a barrier.
  // `slots(rank)`: of the whole message.
  template <typename Slots>
  __device__ __forceinline__ void submit(bool poisoned, Slots&& slots) {
    Control& control = *args_.control;
    __threadfence_system();
    const uint32_t packers = args_.senders != 0 ? args_.senders : gridDim.x;
    if (atomicAdd(&control.packed_blocks[lane_], 1U) + 1 != packers) return;
    __threadfence_system();
    control.packed_blocks[lane_] = 0;
    for (int32_t rank = 0; rank < args_.shape.num_ranks; ++rank) {
      control.host_slots[int64_t{lane_} * args_.shape.num_ranks + rank] = direct(rank) ? 0 : slots(rank);
    }
    Submission& to = control.host->submissions[lane_];
    to.kind = static_cast<uint32_t>(args_.kind);
    to.site = args_.site;
    to.tokens = args_.tokens;
    to.round = args_.round;
    to.poisoned = poisoned ? 1 : 0;
    store_release(&to.epoch, epoch());
  }

  // What a dispatch announces besides its header, and looked at before it: rows for each of the destination's
  // experts, and slots as the last.
  __device__ __forceinline__ void announce_count(int32_t rank, int32_t index, uint32_t count) const {
    if (!direct(rank)) return;
    store_relaxed(reinterpret_cast<uint64_t*>(peer(rank) + counts_at(args_.shape.rank)) + index,
                  announcement(number_, count));
  }
  // Null: it comes by proxy, with the header.
  __device__ __forceinline__ const uint64_t* count_word(int32_t source, int32_t index) const {
    if (!direct(source)) return nullptr;
    return reinterpret_cast<const uint64_t*>(own() + counts_at(source)) + index;
  }
  // By one thread, of what has just been read of such a word: waits for it. Refused above `most`. False:
  // stopped.
  __device__ __forceinline__ bool await_count(uint64_t& value, const uint64_t* word, int32_t source,
                                              uint32_t most, Malformed what) {
    if (value < announcement(number_, 0)) value = await_count_slowly(args_, state_, word, source);
    if (value == 0) return false;
    const auto count = static_cast<uint32_t>(value) & (kCountLimit - 1);
    if (count > most) refuse(source, what, count);
    value = count;
    return count <= most;
  }

  // By one thread: waits for a source's header and checks it. False: stopped.
  __device__ __forceinline__ bool await_header(int32_t source, uint32_t* slots, bool* poisoned) {
    if (direct(source)) {
      if (!await(reinterpret_cast<const uint64_t*>(own() + ready_at(source)), source)) return false;
    } else if (!await_host(source)) {
      return false;
    }
    const RegionHeader header = read_header(incoming(source));
    const Fault fault = judge(args_, number_, header, source);
    if (fault != Fault::kNone) {
      fail(fault, source, static_cast<int64_t>(Malformed::kHeader));
      return false;
    }
    *slots = header.slots;
    *poisoned = (header.flags & kPoisoned) != 0;
    if (*slots > static_cast<uint32_t>(args_.length())) {
      fail(Fault::kMalformed, source, static_cast<int64_t>(Malformed::kSlots), *slots);
      return false;
    }
    if (*poisoned && source != args_.shape.rank && blockIdx.x == 0) {
      data_error(Fault::kPoisoned, static_cast<uint32_t>(header.culprit));
    }
    return true;
  }
  // Of a slot from `source`. Null: it came by proxy, and is here once its header is.
  __device__ __forceinline__ uint64_t* epoch_of_received(int32_t source, int32_t slot, int32_t part) const {
    if (!direct(source)) return nullptr;
    return reinterpret_cast<uint64_t*>(own() + epoch_at(source, slot, part));
  }
  __device__ __forceinline__ bool has_arrived(int32_t source, int32_t slot, int32_t part) const {
    const uint64_t* word = epoch_of_received(source, slot, part);
    return word == nullptr || load_acquire(word) >= epoch();
  }
  // By one lane: a part of a slot.
  __device__ __forceinline__ bool await_slot(int32_t source, int32_t slot, int32_t part) {
    const uint64_t* word = epoch_of_received(source, slot, part);
    return word == nullptr || await(word, source);
  }
  // By one lane: until a word has the exchange's epoch. False: stopped.
  __device__ __forceinline__ bool await(const uint64_t* word, int32_t source) {
    return load_acquire(word) >= epoch() || await_slowly(args_, state_, word, source);
  }

  // By one thread: what comes by proxy. One block, which does not send first, asks the host, as the questions
  // take the bus that the messages travel on.
  __device__ __forceinline__ bool await_host(int32_t source) {
    uint64_t& relayed = args_.control->relayed[lane_];
    if (args_.control->told_here != 0 || blockIdx.x + 1 != gridDim.x) return await(&relayed, source);
    if (!await(&args_.control->host->arrived[lane_], source)) return false;
    store_release(&relayed, epoch());
    return true;
  }

  // What a source sends makes no sense: a mismatch, if its header says so.
  __device__ __forceinline__ void refuse(int32_t source, Malformed what, int64_t detail) {
    if (direct(source)) return refuse_message(args_, state_, source, what, detail);
    fail(Fault::kMalformed, source, static_cast<int64_t>(what), detail);
  }
  // Final; the first one wins.
  __device__ __forceinline__ void fail(Fault fault, int32_t culprit, int64_t detail0 = 0,
                                       int64_t detail1 = 0) {
    cuda::fail(args_, state_, fault, culprit, detail0, detail1);
  }
  // Recorded until check() takes it; the first one wins.
  __device__ __forceinline__ void data_error(Fault fault, uint32_t culprit, int64_t detail0 = 0,
                                             int64_t detail1 = 0, int64_t detail2 = 0) {
    cuda::data_error(args_, state_, fault, culprit, detail0, detail1, detail2);
  }

  // By all threads, instead of finish(): a derivative's recv whose send never was counts nowhere.
  __device__ __forceinline__ void leave() {
    if (blockIdx.x == 0 && threadIdx.x == 0 && args_.order != nullptr) *args_.order = 0.0F;
  }

  // By all threads, last. `poison()` is run by the last block, when all others are done with the outputs, if
  // they are not to be used.
  template <bool kSend, bool kRecv, typename Poison>
  __device__ __forceinline__ void finish(Poison&& poison) {
    __syncthreads();
    if (threadIdx.x == 0) trace(10);
    Control& control = *args_.control;
    uint32_t& finished = kRecv ? control.received_blocks[lane_] : control.sent_blocks[lane_];
    if (threadIdx.x == 0) {
      // Each block says how it went when it is counted, so that the last one knows at once.
      const uint32_t failed = load_volatile(&control.failed), open = load_volatile(&control.open);
      const uint32_t own =
          1 + (failed != 0 || open == 0 ? kFailedBlock : 0) + (state_.tainted != 0 ? kTaintedBlock : 0);
      __threadfence();
      const uint32_t all = atomicAdd(&finished, own) + own;
      if (all % kFailedBlock == gridDim.x) {
        state_.last = all % kTaintedBlock >= kFailedBlock ? kFailed
                      : all >= kTaintedBlock              ? kTainted
                                                          : kSound;
        if (state_.last == kSound && state_.stop == 0 && state_.poisoned == 0 && args_.round == 0) {
          end<kSend, kRecv>(finished, false);
          state_.last = 0;
        } else {
          __threadfence();
        }
      }
    }
    __syncthreads();
    if (state_.last == 0) return;
    // Of a step of several rounds: what one round has found holds for those after it.
    const bool spoiled = state_.last != kSound || state_.stop != 0 || state_.poisoned != 0 ||
                         (args_.round != 0 && load_volatile(&control.step_spoiled[lane_before()]) != 0);
    if (spoiled) poison();
    if (threadIdx.x == 0) end<kSend, kRecv>(finished, spoiled);
  }

  __device__ __forceinline__ void taint() { *const_cast<volatile uint32_t*>(&state_.tainted) = 1; }

 private:
  static constexpr uint32_t kSound = 1, kTainted = 2, kFailed = 3;
  // What blocks are counted by: themselves, those that saw the group failed, those with a tainted route.
  static constexpr uint32_t kFailedBlock = 1U << 10U, kTaintedBlock = 1U << 20U;
  static_assert(kMaxBlocks < kFailedBlock);
  static constexpr uint64_t kNoNumber = ~0ULL;
  static constexpr float kNoTicket = 65535.0F;  // 0 would be that of a recv that nobody differentiates

  // By one thread of the last block: the exchange is over.
  template <bool kSend, bool kRecv>
  __device__ __forceinline__ void end(uint32_t& finished, bool spoiled) {
    Control& control = *args_.control;
    const bool failed = state_.last == kFailed;
    control.step_spoiled[lane_] = spoiled ? 1 : 0;
    finished = control.met_blocks[lane_] = 0;
    control.worst[lane_] = 0;
    for (uint32_t& taken : control.taken[lane_]) taken = 0;
    control.seen[args_.site % kMaxSites] = 1;
    if (args_.order != nullptr) *args_.order = 0.0F;
    if constexpr (kSend) {
      if (!failed) control.next = number_ + 1;
      if (args_.ticket_out != nullptr) {
        control.poisoned[lane_] = state_.poisoned != 0 || state_.last == kTainted ? 1 : 0;
        for (int digit = 0; digit < 4; ++digit) {
          args_.ticket_out[digit] =
              failed ? kNoTicket : static_cast<float>(epoch() >> (16 * digit) & 0xffffU);
        }
      }
    }
    if constexpr (kRecv) {
      if (!failed) control.received[lane_] = epoch();
    }
    trace(11);
  }

  __device__ std::byte* own() const { return peer(args_.shape.rank); }
  // Of the round before this one.
  __device__ int32_t lane_before() const { return lane_ == 0 ? args_.layout.lanes - 1 : lane_ - 1; }
  // The same as RegionLayout says.
  __device__ int32_t of_lane(int32_t source) const { return lane_ * args_.shape.num_ranks + source; }
  __device__ int64_t region_at(int32_t source) const {
    return args_.regions_at + of_lane(source) * args_.region_bytes;
  }
  __device__ int64_t ready_at(int32_t source) const { return args_.ready_at + 8 * of_lane(source); }
  __device__ int64_t counts_at(int32_t source) const {
    return args_.counts_at + 8 * int64_t{of_lane(source)} * (args_.shape.experts_per_rank + 1);
  }
  __device__ int64_t epoch_at(int32_t source, int32_t slot, int32_t part) const {
    return args_.epochs_at + 8 * ((int64_t{of_lane(source)} * args_.shape.chunk + slot) * kMaxParts + part);
  }

  __device__ __forceinline__ void check_window() {
    const uint64_t lanes = args_.layout.lanes, depth = lanes / 2;
    if (state_.number < depth) return;
    const uint64_t oldest = state_.number - depth;
    if (state_.received[oldest % lanes] >= oldest + 1) return;
    fail(Fault::kWindow, args_.shape.rank, static_cast<int64_t>(oldest));
  }

  // The number is the ticket's whatever the group's state: all blocks must take the same lane for it. Where
  // the ticket makes no sense that is 0.
  __device__ __forceinline__ void read_ticket() {
    uint64_t ticket = 0;
    bool sound = true;
    for (int digit = 0; digit < 4; ++digit) {
      const float value = args_.ticket_in[digit];
      sound = sound && value >= 0.0F && value < 65536.0F && value == floorf(value);
      if (sound) ticket |= static_cast<uint64_t>(value) << (16 * digit);
    }
    const bool transposed = args_.kind == Kind::kDispatchTranspose || args_.kind == Kind::kCombineTranspose;
    state_.skip = sound && ticket == 0 && transposed ? 1 : 0;
    state_.number = sound && ticket != 0 ? ticket - 1 : kNoNumber;
  }
  __device__ __forceinline__ void check_ticket() {
    const uint64_t number = state_.number, lanes = args_.layout.lanes;
    const uint64_t next = load_volatile(&args_.control->next);
    if (number >= next || next - number > lanes || state_.received[number % lanes] > number) {
      fail(Fault::kTicket, args_.shape.rank, static_cast<int64_t>(number + 1));
      return;
    }
    state_.poisoned = load_volatile(&args_.control->poisoned[number % lanes]);
  }

  const Args& args_;
  BlockState& state_;
  uint64_t number_ = 0;
  int32_t lane_ = 0;
};

}  // namespace pplx::moe::cuda
