// What a pair of GPUs can do at best, for benchmarks to compare with.
#pragma once

namespace pplx::moe::cuda {

// Microseconds from a store into the other GPU's memory to the load there that sees it: half a round trip,
// the median of several. Throws kFabric where the two do not reach each other.
double flag_latency_us(int device, int peer);

}  // namespace pplx::moe::cuda
