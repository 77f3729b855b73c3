// Words that agents tell each other progress by, and waiting for them.
#pragma once

#include <cstdint>

#include "xla_ffi/cuda/control.h"

namespace pplx::moe::cuda {

inline constexpr int kWarp = 32;
inline constexpr uint32_t kAllLanes = 0xffffffffU;

// Reads and writes at system scope: the other side is a peer's GPU or the CPU.
__device__ inline uint64_t load_acquire(const uint64_t* word) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
}
// For words that say all by themselves.
__device__ inline uint64_t load_relaxed(const uint64_t* word) {
  uint64_t value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
}
__device__ inline void store_relaxed(uint64_t* word, uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" : : "l"(word), "l"(value) : "memory");
}
// What the calling thread knows of becomes visible first: its own writes, and those of threads that it has
// synchronised with.
__device__ inline void store_release(uint64_t* word, uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" : : "l"(word), "l"(value) : "memory");
}
template <typename T>
__device__ inline T load_volatile(const T* word) {
  return *const_cast<const volatile T*>(word);
}

__device__ inline uint64_t now_ns() {
  uint64_t ns;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
  return ns;
}

__device__ inline int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ inline int warp_id() { return static_cast<int>(threadIdx.x) / kWarp; }
__device__ inline uint32_t lanes_below() { return (1U << lane_id()) - 1U; }

__device__ inline int64_t warp_sum(int64_t value) {
#pragma unroll
  for (int width = kWarp / 2; width > 0; width /= 2) value += __shfl_xor_sync(kAllLanes, value, width);
  return value;
}

// Barriers of a block: some of its threads only announce that they have come, the others wait for all.
__device__ inline void arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" : : "r"(barrier), "r"(threads) : "memory");
}
__device__ inline void wait_at(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" : : "r"(barrier), "r"(threads) : "memory");
}

// Says once to the threads of a block that some of them have done something, in shared memory.
class Signal {
 public:
  __device__ explicit Signal(uint64_t& word) : at_(static_cast<uint32_t>(__cvta_generic_to_shared(&word))) {}
  // By one thread, before a barrier of the block: so many threads will have done it.
  __device__ void reset(uint32_t threads) const {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" : : "r"(at_), "r"(threads) : "memory");
  }
  // By each of these.
  __device__ void arrive() const {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0]; }" : : "r"(at_) : "memory");
  }
  __device__ void wait() const {
    uint32_t is_set = 0;
    while (is_set == 0) {
      asm volatile(
          "{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], 0; selp.u32 %0, 1, 0, p; }"
          : "=r"(is_set)
          : "r"(at_)
          : "memory");
    }
  }

 private:
  uint32_t at_;
};

// Some of a block's warps, which work together and meet at a barrier of their own.
struct Team {
  int first;  // thread
  int threads;
  int barrier;

  __device__ int thread() const { return static_cast<int>(threadIdx.x) - first; }
  __device__ int warp() const { return thread() / kWarp; }
  __device__ int warps() const { return threads / kWarp; }
  __device__ bool has_me() const { return thread() >= 0 && thread() < threads; }
  __device__ void sync() const { wait_at(barrier, threads); }
};

}  // namespace pplx::moe::cuda
