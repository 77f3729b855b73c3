#include "xla_ffi/cuda/probe.h"

#include <algorithm>
#include <vector>

#include "xla_ffi/cuda/device.h"
#include "xla_ffi/cuda/memory.h"
#include "xla_ffi/cuda/probe_kernel.h"

namespace pplx::moe::cuda {

double flag_latency_us(int device, int peer) {
  constexpr int kTurns = 2000;
  const std::string name =
      "flags between CUDA devices " + std::to_string(device) + " and " + std::to_string(peer);
  if (device == peer || !peer_access(device, peer)) {
    throw Error(ErrorKind::kInvalidArgument, name + ": they do not reach each other's memory");
  }
  // Kernels that wait for each other are launched when both are loaded and nothing stands before them.
  DeviceRegions asked(device, sizeof(uint64_t), "a flag"), answered(peer, sizeof(uint64_t), "a flag");
  asked.allow(peer);
  answered.allow(device);
  const PinnedMemory times(device, kTurns * sizeof(uint64_t));
  const Stream asking(device), answering(peer);
  auto* const first = reinterpret_cast<uint64_t*>(asked.data());
  auto* const second = reinterpret_cast<uint64_t*>(answered.data());
  {
    const OnDevice current(peer);
    check(answer_flags(answering.get(), second, first, kTurns), name);
  }
  {
    const OnDevice current(device);
    const cudaError_t asked_them =
        ask_flags(asking.get(), first, second, kTurns, reinterpret_cast<uint64_t*>(times.device_data()));
    // The other kernel still looks at its flag.
    if (asked_them != cudaSuccess) answering.wait(name);
    check(asked_them, name);
  }
  asking.wait(name);
  answering.wait(name);
  const auto* const begin = reinterpret_cast<const uint64_t*>(times.data());
  std::vector<uint64_t> sorted(begin, begin + kTurns);
  const auto middle = sorted.begin() + kTurns / 2;
  std::nth_element(sorted.begin(), middle, sorted.end());
  if (*middle == 0) throw Error(ErrorKind::kTimeout, name + ": no answer within two seconds");
  return static_cast<double>(*middle) / 2000.0;
}

}  // namespace pplx::moe::cuda
