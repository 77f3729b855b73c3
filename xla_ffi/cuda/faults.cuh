// What a kernel finds wrong, and waits that take long. Rarely or never run: it stays out of line, and takes
// what it needs as arguments, as an Exchange whose address is taken would live in memory.
#pragma once

#include "xla_ffi/cuda/state.cuh"

namespace pplx::moe::cuda {

// Where a rank's device memory is seen from here.
static __device__ std::byte* peer_of(const Args& args, int32_t rank) { return args.control->peers[rank]; }

static __device__ void write_fault(const Args& args, const BlockState& state, FaultRecord& record,
                                   Fault fault, uint32_t culprit, int64_t detail0, int64_t detail1,
                                   int64_t detail2) {
  record.fault = fault;
  record.kind = static_cast<uint32_t>(args.kind);
  record.site = args.site;
  record.culprit = culprit;
  record.tokens = args.tokens;
  record.exchange = state.number;
  record.detail[0] = detail0;
  record.detail[1] = detail1;
  record.detail[2] = detail2;
  __threadfence_system();
  *const_cast<volatile uint32_t*>(&record.complete) = 1;
}

// Final; the first one wins.
static __device__ __noinline__ void fail(const Args& args, BlockState& state, Fault fault, int32_t culprit,
                                         int64_t detail0, int64_t detail1) {
  Control& control = *args.control;
  const int32_t own = args.shape.rank;
  if (atomicCAS(&control.failure_claimed, 0U, 1U) == 0) {
    FaultRecord& record = control.host->failure;
    if (fault == Fault::kMismatch) {
      const auto lane = static_cast<int32_t>(state.number % args.layout.lanes);
      const std::byte* memory =
          peer_of(args, culprit) != nullptr
              ? peer_of(args, own) + args.layout.region_at(lane, culprit)
              : control.host_regions + (int64_t{lane} * args.shape.num_ranks + culprit) * args.region_bytes;
      record.theirs = *reinterpret_cast<const RegionHeader*>(memory);
    }
    write_fault(args, state, record, fault, culprit, detail0, detail1, 0);
    for (int32_t rank = 0; rank < args.shape.num_ranks && fault != Fault::kNotice; ++rank) {
      std::byte* memory = peer_of(args, rank);
      if (memory == nullptr) continue;
      store_release(reinterpret_cast<uint64_t*>(memory + args.layout.notice_at(own)),
                    1 + static_cast<uint64_t>(culprit));
    }
  }
  atomicExch(&control.failed, static_cast<uint32_t>(fault));
  *const_cast<volatile uint32_t*>(&state.stop) = 1;
}

// Recorded until check() takes it; the first one wins.
static __device__ __noinline__ void data_error(const Args& args, const BlockState& state, Fault fault,
                                               uint32_t culprit, int64_t detail0, int64_t detail1,
                                               int64_t detail2) {
  Control& control = *args.control;
  const unsigned long long turn = load_volatile(&control.host->data_errors_taken) + 1;
  if (atomicMax(&control.data_errors_claimed, turn) >= turn) return;
  write_fault(args, state, control.host->data_error, fault, culprit, detail0, detail1, detail2);
}

// What is looked at rarely: the host over PCIe, the peers' notices, the clock. False: `state` is stopped.
static __device__ bool go_on(const Args& args, BlockState& state, uint64_t& began, int32_t source) {
  const Control& control = *args.control;
  const uint64_t now = now_ns();
  if (began == 0) {
    began = now;
    *const_cast<volatile uint64_t*>(&control.host->entered) = state.number + 1;
  }
  if (load_volatile(&control.host->abort) != 0) {
    fail(args, state, Fault::kAborted, source, 0, 0);
    return false;
  }
  const std::byte* own = peer_of(args, args.shape.rank);
  for (int32_t rank = 0; rank < args.shape.num_ranks; ++rank) {
    const uint64_t notice =
        load_acquire(reinterpret_cast<const uint64_t*>(own + args.layout.notice_at(rank)));
    if (notice == 0) continue;
    fail(args, state, Fault::kNotice, static_cast<int32_t>(notice - 1), rank, 0);
    return false;
  }
  const uint64_t allowed = control.seen[args.site % kMaxSites] != 0
                               ? load_volatile(&control.host->stall_ns)
                               : load_volatile(&control.host->first_stall_ns);
  if (now - began < allowed) return true;
  fail(args, state, Fault::kTimeout, source, 0, 0);
  return false;
}

// What is wrong with a source's header: a rank's that is at the same exchange says the same of it.
static __device__ __forceinline__ Fault judge(const Args& args, uint64_t number, const RegionHeader& header,
                                              int32_t source) {
  const MoeShape& shape = args.shape;
  const bool sound = header.magic == kMagic && header.version == kWireVersion &&
                     header.source == static_cast<uint32_t>(source);
  const bool same = header.exchange == number && header.kind == static_cast<uint8_t>(args.kind) &&
                    header.tag == args.tag && header.tokens == static_cast<uint32_t>(args.tokens) &&
                    header.round == static_cast<uint32_t>(args.round) &&
                    header.hidden == static_cast<uint32_t>(shape.hidden) && header.format == shape.format() &&
                    header.top_k == shape.top_k && header.local_experts == shape.experts_per_rank;
  return !sound ? Fault::kMalformed : same ? Fault::kNone : Fault::kMismatch;
}
static __device__ __forceinline__ RegionHeader read_header(const std::byte* region) {
  RegionHeader header;
  constexpr int kVecs = offsetof(RegionHeader, site) / 16;
  static_assert(kVecs * 16 + 12 == offsetof(RegionHeader, site));
  uint4 some[kVecs + 1];
#pragma unroll
  for (int i = 0; i <= kVecs; ++i) some[i] = __ldcg(reinterpret_cast<const uint4*>(region) + i);
  memcpy(&header, some, offsetof(RegionHeader, site));
  return header;
}

// A rank that writes this rank's memory is at another exchange, which its header tells. False: not so, or it
// has none yet; ranks that are reached by proxy never have.
static __device__ bool differs(const Args& args, BlockState& state, int32_t source) {
  const auto lane = static_cast<int32_t>(state.number % args.layout.lanes);
  const std::byte* own = peer_of(args, args.shape.rank);
  if (load_acquire(reinterpret_cast<const uint64_t*>(own + args.layout.ready_at(lane, source))) <
      state.number + 1) {
    return false;
  }
  const Fault fault =
      judge(args, state.number, read_header(own + args.layout.region_at(lane, source)), source);
  if (fault != Fault::kNone) fail(args, state, fault, source, static_cast<int64_t>(Malformed::kHeader), 0);
  return fault != Fault::kNone;
}

// Whether any rank is at another exchange: whoever is late may be waiting for one that is.
static __device__ bool any_differs(const Args& args, BlockState& state) {
  for (int32_t rank = 0; rank < args.shape.num_ranks; ++rank) {
    if (differs(args, state, rank)) return true;
  }
  return false;
}

// Waits until the word has the exchange's epoch. False: stopped.
static __device__ __noinline__ bool await_slowly(const Args& args, BlockState& state, const uint64_t* word,
                                                 int32_t source) {
  const uint64_t epoch = state.number + 1;
  uint64_t began = 0;
  for (uint32_t looks = 1;; ++looks) {
    if (load_acquire(word) >= epoch) return true;
    if (looks % 128 == 0 && load_volatile(&args.control->failed) != 0) break;
    if (looks % 2048 == 0 && !go_on(args, state, began, source)) break;
  }
  *const_cast<volatile uint32_t*>(&state.stop) = 1;
  return false;
}

// Waits for a word that a source announces something by. 0: stopped.
static __device__ __noinline__ uint64_t await_count_slowly(const Args& args, BlockState& state,
                                                           const uint64_t* word, int32_t source) {
  uint64_t began = 0;
  for (uint32_t looks = 1;; ++looks) {
    const uint64_t value = load_relaxed(word);
    if (value >= announcement(state.number, 0)) return value;
    if (looks % 128 == 0 && load_volatile(&args.control->failed) != 0) break;
    if (looks % 2048 != 0) continue;
    if (any_differs(args, state) || !go_on(args, state, began, source)) break;
  }
  *const_cast<volatile uint32_t*>(&state.stop) = 1;
  return 0;
}

// What a source sends makes no sense: most likely it is at another exchange, which its header tells once it
// is here.
static __device__ __noinline__ void refuse_message(const Args& args, BlockState& state, int32_t source,
                                                   Malformed what, int64_t detail) {
  uint64_t began = 0;
  const auto lane = static_cast<int32_t>(state.number % args.layout.lanes);
  const auto* ready =
      reinterpret_cast<const uint64_t*>(peer_of(args, args.shape.rank) + args.layout.ready_at(lane, source));
  while (load_acquire(ready) < state.number + 1) {
    if (!go_on(args, state, began, source)) return;
  }
  if (!differs(args, state, source)) {
    fail(args, state, Fault::kMalformed, source, static_cast<int64_t>(what), detail);
  }
}

// Waits for the other blocks of the kernel, some of which may not have come in because the group had failed.
static __device__ __noinline__ void meet_slowly(const Args& args, BlockState& state, const uint32_t& met,
                                                uint32_t wanted) {
  uint64_t began = 0;
  for (uint32_t looks = 1; load_volatile(&met) < wanted; ++looks) {
    if (looks % 2048 == 0 ? go_on(args, state, began, args.shape.rank)
                          : load_volatile(&args.control->failed) == 0) {
      continue;
    }
    *const_cast<volatile uint32_t*>(&state.stop) = 1;
    return;
  }
}

}  // namespace pplx::moe::cuda
