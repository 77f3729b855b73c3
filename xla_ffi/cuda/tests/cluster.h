// Ranks as streams of one process: regions, control blocks, calls. They share one GPU unless told otherwise,
// so kernels of all ranks must run at the same time: few blocks each.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "xla_ffi/cuda/control.h"
#include "xla_ffi/cuda/kernels.h"
#include "xla_ffi/cuda/tests/device.h"
#include "xla_ffi/tests/oracle.h"

namespace pplx::moe::cuda::testing {

using namespace pplx::moe::testing;

inline constexpr uint64_t kMillisecond = 1'000'000;

// Words that kernels write while the host reads, or the other way about.
template <typename T>
T load(T& word) {
  return std::atomic_ref<T>(word).load(std::memory_order_acquire);
}
template <typename T>
void store(T& word, T value) {
  std::atomic_ref<T>(word).store(value, std::memory_order_release);
}

inline RegionLayout region_layout(const MoeShape& shape, int depth) {
  return {.lanes = 2 * depth,
          .ranks = shape.num_ranks,
          .experts = shape.experts_per_rank,
          .chunk = shape.chunk,
          .region_bytes = round_up(static_cast<int64_t>(sizeof(RegionHeader)) + shape.longest_body(), 128)};
}

struct ClusterOptions {
  int num_sms = 4;
  uint64_t stall_ns = 20'000 * kMillisecond;
  std::vector<int> devices = {};              // of each rank; empty: all on 0
  std::function<bool(int, int)> direct = {};  // which ranks write each other's memory; empty: all
  std::function<void(MoeShape&)> adjust_shape = {};
};

// One rank's memory.
class Rank {
 public:
  Rank(const MoeShape& shape, int depth, int device, const ClusterOptions& options)
      : shape_(shape),
        layout_(region_layout(shape, depth)),
        device_(device),
        num_sms_(options.num_sms),
        regions_(layout_.bytes()),
        ordinals_(4 * int64_t{layout_.lanes} * shape.max_tokens * shape.top_k),
        slots_(4 * int64_t{layout_.lanes} * shape.max_tokens * shape.top_k),
        counts_(4 * int64_t{shape.physical_experts()}),
        shares_(4 * int64_t{layout_.lanes} * (shape.num_ranks + shape.physical_experts()) * kMaxBlocks),
        peers_(sizeof(void*) * shape.num_ranks),
        control_(sizeof(Control)),
        host_(sizeof(HostControl)),
        host_slots_(4 * int64_t{layout_.lanes} * shape.num_ranks) {
    host().stall_ns = host().first_stall_ns = options.stall_ns;
  }

  const MoeShape& shape() const { return shape_; }
  const RegionLayout& layout() const { return layout_; }
  int device() const { return device_; }
  cudaStream_t stream() const { return stream_.get(); }
  std::byte* regions() const { return regions_.as(); }
  HostControl& host() const { return *host_.as<HostControl>(); }
  // What kernels found wrong; empty: nothing.
  std::string trouble() const {
    for (const FaultRecord* fault : {&host().failure, &host().data_error}) {
      if (fault->complete == 0) continue;
      return "fault " + std::to_string(static_cast<int>(fault->fault)) + " of exchange " +
             std::to_string(fault->exchange) + ", kind " + std::to_string(fault->kind) + ", culprit " +
             std::to_string(fault->culprit) + ", detail " + std::to_string(fault->detail[0]);
    }
    return "";
  }
  uint32_t& host_slots(uint32_t lane, int destination) const {
    return host_slots_.as<uint32_t>()[lane * shape_.num_ranks + destination];
  }
  std::byte* host_region(uint32_t lane, int source) const { return host_part(*host_regions_, lane, source); }
  std::byte* host_staging(uint32_t lane, int to) const { return host_part(*host_staging_, lane, to); }

  // peers[r] null: reached by proxy.
  void open(const std::vector<std::byte*>& peers) {
    Control control{};
    control.open = 1;
    control.lanes = layout_.lanes;
    control.host = &host();
    control.host_slots = host_slots_.as<uint32_t>();
    control.peers = peers_.as<std::byte*>();
    control.ordinals = ordinals_.as<uint32_t>();
    control.slots = slots_.as<int32_t>();
    control.counts = counts_.as<uint32_t>();
    control.shares = shares_.as<uint32_t>();
    if (std::find(peers.begin(), peers.end(), nullptr) != peers.end()) {
      const int64_t bytes = int64_t{layout_.lanes} * shape_.num_ranks * layout_.region_bytes;
      host_regions_ = std::make_unique<PinnedMemory>(bytes);
      host_staging_ = std::make_unique<PinnedMemory>(bytes);
      control.host_regions = host_regions_->as();
      control.host_staging = host_staging_->as();
    }
    PPLX_MUST(cudaMemcpy(peers_.as(), peers.data(), sizeof(void*) * peers.size(), cudaMemcpyHostToDevice));
    PPLX_MUST(cudaMemcpy(control_.as(), &control, sizeof(control), cudaMemcpyHostToDevice));
  }
  // While no kernel runs.
  void close() const {
    const uint32_t open = 0;
    PPLX_MUST(cudaMemcpy(&control_.as<Control>()->open, &open, sizeof(open), cudaMemcpyHostToDevice));
  }
  Control control() const {
    Control control;
    PPLX_MUST(cudaMemcpy(&control, control_.as(), sizeof(control), cudaMemcpyDeviceToHost));
    return control;
  }

  // `place` tells calls of one kind apart.
  KernelCall call(Kind kind, int tokens, uint32_t place = 0) const {
    const uint32_t site = place * kKinds + static_cast<uint32_t>(kind);
    return {.control = control_.as<Control>(),
            .shape = shape_,
            .layout = layout_,
            .kind = kind,
            .site = site,
            .tag = tag(site),
            .tokens = tokens,
            .num_sms = num_sms_,
            .stream = stream_.get()};
  }
  static uint64_t tag(uint32_t site) { return 0x9e3779b97f4a7c15U * (site + 1); }

 private:
  std::byte* host_part(const PinnedMemory& memory, uint32_t lane, int rank) const {
    return memory.as() + (int64_t{lane} * shape_.num_ranks + rank) * layout_.region_bytes;
  }

  MoeShape shape_;
  RegionLayout layout_;
  int device_, num_sms_;
  Stream stream_;
  DeviceMemory regions_, ordinals_, slots_, counts_, shares_, peers_, control_;
  PinnedMemory host_, host_slots_;
  std::unique_ptr<PinnedMemory> host_regions_, host_staging_;
};

class Cluster {
 public:
  explicit Cluster(const Problem& problem, const ClusterOptions& options = {})
      : problem_(problem), options_(options) {
    for (int rank = 0; rank < problem.ranks; ++rank) {
      MoeShape shape = problem.shape(rank);
      if (options.adjust_shape) options.adjust_shape(shape);
      PPLX_MUST(cudaSetDevice(device(rank)));
      int num_sms = 0;
      PPLX_MUST(load_kernels(shape, &num_sms));
      if (num_sms < options.num_sms) throw std::runtime_error("the device runs too few blocks at a time");
      ranks_.push_back(std::make_unique<Rank>(shape, problem.depth, device(rank), options));
    }
    for (int rank = 0; rank < problem.ranks; ++rank) {
      PPLX_MUST(cudaSetDevice(device(rank)));
      std::vector<std::byte*> peers;
      for (int peer = 0; peer < problem.ranks; ++peer) {
        if (device(peer) != device(rank)) reach(device(peer));
        peers.push_back(direct(rank, peer) ? ranks_[peer]->regions() : nullptr);
      }
      ranks_[rank]->open(peers);
    }
  }

  const Problem& problem() const { return problem_; }
  int size() const { return problem_.ranks; }
  Rank& operator[](int rank) { return *ranks_[rank]; }
  const Rank& operator[](int rank) const { return *ranks_[rank]; }
  bool direct(int a, int b) const { return a == b || !options_.direct || options_.direct(a, b); }
  int device(int rank) const { return options_.devices.empty() ? 0 : options_.devices[rank]; }

  // body(rank) with the rank's device current.
  void each(const std::function<void(int)>& body) const {
    for (int rank = 0; rank < size(); ++rank) {
      PPLX_MUST(cudaSetDevice(device(rank)));
      body(rank);
    }
  }

  // Waits until every rank's stream is idle. Kernels that hang are told to end.
  void sync() const {
    const auto idle = [&] {
      bool all = true;
      each([&](int rank) {
        const cudaError_t state = cudaStreamQuery((*this)[rank].stream());
        if (state != cudaErrorNotReady) must(state, "a rank's kernels");
        all = all && state == cudaSuccess;
      });
      return all;
    };
    if (wait(idle, std::chrono::seconds(60))) return;
    for (const auto& rank : ranks_) store<uint64_t>(rank->host().abort, 1);
    if (!wait(idle, std::chrono::seconds(10))) {
      // Nothing on the device can be freed any more, so no destructor may run.
      std::fputs("kernels hang and do not heed the abort word\n", stderr);
      std::_Exit(3);
    }
    throw std::runtime_error("kernels hung until they were told to end");
  }

  static bool wait(const std::function<bool()>& ready, std::chrono::nanoseconds limit) {
    const auto deadline = std::chrono::steady_clock::now() + limit;
    while (!ready()) {
      if (std::chrono::steady_clock::now() > deadline) return false;
      std::this_thread::yield();
    }
    return true;
  }

 private:
  static void reach(int device) {
    const cudaError_t error = cudaDeviceEnablePeerAccess(device, 0);
    if (error == cudaErrorPeerAccessAlreadyEnabled) {
      cudaGetLastError();
    } else {
      must(error, "peer access");
    }
  }

  Problem problem_;
  ClusterOptions options_;
  std::vector<std::unique_ptr<Rank>> ranks_;
};

}  // namespace pplx::moe::cuda::testing
