// A flag back and forth between two GPUs, one thread on each. It stands for nothing else that was written: it
// needs no order, which would take longer.
#include "xla_ffi/cuda/probe_kernel.h"
#include "xla_ffi/cuda/sync.cuh"

namespace pplx::moe::cuda {
namespace {

constexpr uint64_t kLongestNs = 2'000'000'000;

__device__ bool await_turn(const uint64_t* word, uint64_t turn, uint64_t end) {
  for (uint32_t looks = 1; load_relaxed(word) < turn; ++looks) {
    if (looks % 1024 == 0 && now_ns() > end) return false;
  }
  return true;
}

__global__ void answer_kernel(const uint64_t* own, uint64_t* theirs, int turns) {
  const uint64_t end = now_ns() + kLongestNs;
  for (int turn = 1; turn <= turns; ++turn) {
    if (!await_turn(own, turn, end)) return;
    store_relaxed(theirs, turn);
  }
}

// nanoseconds[i]: of the i-th round trip; 0 where no answer came.
__global__ void ask_kernel(const uint64_t* own, uint64_t* theirs, int turns, uint64_t* nanoseconds) {
  const uint64_t end = now_ns() + kLongestNs;
  for (int turn = 1; turn <= turns; ++turn) {
    const uint64_t begin = now_ns();
    store_relaxed(theirs, turn);
    if (!await_turn(own, turn, end)) return;
    nanoseconds[turn - 1] = now_ns() - begin;
  }
}

}  // namespace

cudaError_t answer_flags(cudaStream_t stream, const uint64_t* own, uint64_t* theirs, int turns) {
  answer_kernel<<<1, 1, 0, stream>>>(own, theirs, turns);
  return cudaGetLastError();
}
cudaError_t ask_flags(cudaStream_t stream, const uint64_t* own, uint64_t* theirs, int turns,
                      uint64_t* nanoseconds) {
  ask_kernel<<<1, 1, 0, stream>>>(own, theirs, turns, nanoseconds);
  return cudaGetLastError();
}

}  // namespace pplx::moe::cuda
