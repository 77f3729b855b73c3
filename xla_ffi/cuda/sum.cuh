// Rows added up, by a warp. Rows come through a ring in shared memory, so that several are on their way while
// one is added: registers would hold too few, and the code stays short.
#pragma once

#include <type_traits>

#include "xla_ffi/cuda/state.cuh"
#include "xla_ffi/cuda/vec.cuh"

namespace pplx::moe::cuda {

// Of a warp; each stage holds some vectors of a row. With 24 multiprocessors and this much under way the sums
// of scattered rows leave an H200 at the rate of its links (docs/performance.md).
inline constexpr int kRingStages = 4, kStageVecs = 4;
// With a stage more, for this rank's own term.
inline constexpr int kRingBytes = (kRingStages + 1) * kStageVecs * 16 * kWarp;

// What becomes one row: the sum of some rows, each times its weight. At home that is this rank's own term,
// and other ranks' sums are the others, added up in ascending order of ranks.
struct Terms {
  const std::byte* row;     // lane i has the i-th: first rows of this rank, then other ranks' sums
  float weight;             // its; 1 for sums
  int32_t rows, partials;   // how many of either
  int32_t partials_before;  // of ranks before this one
  const std::byte* start;   // at home: added first, or null
  std::byte* out;
  bool home;
  bool own;  // at home: this rank has a term, even if no row is left of it
};

// The calling thread's own pieces of a ring's stage.
class Ring {
 public:
  __device__ explicit Ring(std::byte* of_warp)
      : at_(static_cast<uint32_t>(__cvta_generic_to_shared(of_warp)) + lane_id() * 16) {}

  __device__ __forceinline__ void fetch(int stage, int piece, const std::byte* from) const {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
                 :
                 : "r"(place(stage, piece)), "l"(__cvta_generic_to_global(from))
                 : "memory");
  }
  // What has been fetched since the last time makes a group, even if that is nothing.
  __device__ __forceinline__ void commit() const { asm volatile("cp.async.commit_group;" : : : "memory"); }
  // All groups but for the last kLater.
  template <int kLater>
  __device__ __forceinline__ void wait() const {
    asm volatile("cp.async.wait_group %0;" : : "n"(kLater) : "memory");
  }
  __device__ __forceinline__ void write(int stage, int piece, uint4 value) const {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
                 :
                 : "r"(place(stage, piece)), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
                 : "memory");
  }
  __device__ __forceinline__ uint4 read(int stage, int piece) const {
    uint4 value;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(place(stage, piece))
                 : "memory");
    return value;
  }

 private:
  __device__ __forceinline__ uint32_t place(int stage, int piece) const {
    return at_ + (stage * kStageVecs + piece) * 16 * kWarp;
  }
  uint32_t at_;
};

// Vectors `part` of a row of T; sums travel as W, and what is not at home is stored as that. `await()` is
// called before the first of other ranks' sums is read; false if it says so. `meanwhile()` is called when the
// first rows are on their way.
template <typename T, typename W, typename Await, typename Meanwhile>
__device__ __forceinline__ bool add_up(const Ring& ring, const Terms& terms, Span part, Await&& await,
                                       Meanwhile&& meanwhile) {
  constexpr int kWidth = kVec<T>;
  constexpr int kPieces = kWidth / kVec<W>;  // that the sum of a vector travels in
  constexpr int kVecs = kStageVecs / kPieces;
  const int32_t count = terms.rows + terms.partials;
  float acc[kVecs][kWidth];
  constexpr int kOwn = kRingStages;  // the stage that has this rank's term, as it would have travelled

  // The next to fetch.
  int32_t next = 0, next_base = part.begin;
  int next_stage = 0;
  bool waits = terms.partials != 0;
  const auto fetch = [&] {
    if (next_base < part.end && count != 0) {
      if (waits && next >= terms.rows) {
        if (!await()) return false;
        waits = false;
      }
      const bool sum = next >= terms.rows && kPieces > 1;
      const auto* from = reinterpret_cast<const std::byte*>(
          __shfl_sync(kAllLanes, reinterpret_cast<uint64_t>(terms.row), next));
#pragma unroll
      for (int i = 0; i < kVecs; ++i) {
        const int32_t at = next_base + i * kWarp + lane_id();
        if (at >= part.end) continue;
        if (!sum) {
          ring.fetch(next_stage, i, from + int64_t{at} * 16);
          continue;
        }
#pragma unroll
        for (int p = 0; p < kPieces; ++p) {
          ring.fetch(next_stage, i * kPieces + p, from + (int64_t{at} * kPieces + p) * 16);
        }
      }
      next_stage = (next_stage + 1) % kRingStages;
      if (++next == count) {
        next = 0;
        next_base += kVecs * kWarp;
      }
    }
    ring.commit();
    return true;
  };
  const auto begin_sum = [&](bool empty) {
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) acc[i][j] = start_of_sum(empty);
    }
  };
  const auto add = [&](int i, int j, uint4 piece) {
    float values[kVec<W>];
    unpack<W>(piece, values);
#pragma unroll
    for (int k = 0; k < kVec<W>; ++k) acc[i][j + k] = __fadd_rn(acc[i][j + k], values[k]);
  };
  const auto add_own = [&] {
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
#pragma unroll
      for (int p = 0; p < kPieces; ++p) add(i, p * kVec<W>, ring.read(kOwn, i * kPieces + p));
    }
  };
  // This rank's own term is complete.
  const auto turn_to_partials = [&](int32_t base) {
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
#pragma unroll
      for (int p = 0; p < kPieces; ++p) ring.write(kOwn, i * kPieces + p, pack<W>(acc[i] + p * kVec<W>));
    }
    begin_sum(!terms.own && terms.partials == 0);
    if (terms.start == nullptr) return;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int32_t at = base + i * kWarp + lane_id();
      if (at < part.end) load_values<T, false>(terms.start + int64_t{at} * 16, acc[i]);
    }
  };

#pragma unroll 1
  for (int stage = 0; stage < kRingStages; ++stage) {
    if (!fetch()) return false;
  }
  meanwhile();
  int stage = 0;
#pragma unroll 1
  for (int32_t base = part.begin; base < part.end; base += kVecs * kWarp) {
    begin_sum(terms.rows == 0);
#pragma unroll 1
    for (int32_t k = 0; k < count; ++k) {
      const bool sum = k >= terms.rows;
      if (k == terms.rows) turn_to_partials(base);
      if (sum && terms.own && k - terms.rows == terms.partials_before) add_own();
      const float weight = __shfl_sync(kAllLanes, terms.weight, k);
      ring.wait<kRingStages - 1>();
#pragma unroll
      for (int i = 0; i < kVecs; ++i) {
        if (sum && kPieces > 1) {
#pragma unroll
          for (int p = 0; p < kPieces; ++p) add(i, p * kVec<W>, ring.read(stage, i * kPieces + p));
        } else {
          float values[kWidth];
          unpack<T>(ring.read(stage, i), values);
          accumulate(acc[i], values, weight);
        }
      }
      stage = (stage + 1) % kRingStages;
      if (!fetch()) return false;
    }
    if (terms.home) {
      if (terms.partials == 0) turn_to_partials(base);
      if (terms.own && terms.partials_before >= terms.partials) add_own();
    }
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int32_t at = base + i * kWarp + lane_id();
      if (at >= part.end) continue;
      if (kPieces == 1 || terms.home) {
        store_vec(terms.out + int64_t{at} * 16, pack<T>(acc[i]));
      } else {
        store_values<W>(terms.out + int64_t{at} * kWidth * sizeof(W), acc[i]);
      }
    }
  }
  return true;
}

}  // namespace pplx::moe::cuda
