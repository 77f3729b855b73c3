// Ranks of one process as groups have them: members, couriers and an engine between, over an in-process
// network whose NICs reach the GPUs' memory. Without XLA. Ranks may share a GPU.
#pragma once

#include <atomic>
#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "xla_ffi/cuda/member.h"
#include "xla_ffi/cuda/tests/device.h"
#include "xla_ffi/tests/oracle.h"

namespace pplx::moe::cuda::testing {

using namespace pplx::moe::testing;

inline int gpu_count() {
  int count = 0;
  PPLX_MUST(cudaGetDeviceCount(&count));
  return count;
}

// As SimConfig::copy: a NIC that reads and writes host memory and that of every GPU, beside running kernels.
class Nic {
 public:
  static Nic& instance() {
    static auto* nic = new Nic;  // leaked: engines' threads may use it until the process ends
    return *nic;
  }
  void copy(void* to, const void* from, size_t bytes) {
    const std::lock_guard guard(mutex_);
    for (size_t done = 0; done < bytes; done += kBounce) {
      const size_t part = std::min(kBounce, bytes - done);
      move(bounce_.as(), static_cast<const std::byte*>(from) + done, part);
      move(static_cast<std::byte*>(to) + done, bounce_.as(), part);
    }
  }

 private:
  static constexpr size_t kBounce = 1 << 20;

  // Streams are made before any kernel runs.
  Nic() : bounce_(kBounce) {
    for (int device = 0; device < gpu_count(); ++device) {
      PPLX_MUST(cudaSetDevice(device));
      streams_[device];
    }
  }
  // One side is the bounce buffer.
  void move(std::byte* to, const std::byte* from, size_t bytes) {
    const int device = std::max(device_of(to), device_of(from));
    if (device < 0) {
      std::memcpy(to, from, bytes);
      return;
    }
    PPLX_MUST(cudaSetDevice(device));
    const cudaStream_t stream = streams_.at(device).get();
    PPLX_MUST(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream));
    PPLX_MUST(cudaStreamSynchronize(stream));
  }
  static int device_of(const std::byte* address) {
    cudaPointerAttributes attributes{};
    if (cudaPointerGetAttributes(&attributes, address) != cudaSuccess) {
      static_cast<void>(cudaGetLastError());
      return -1;
    }
    return attributes.type == cudaMemoryTypeDevice ? attributes.device : -1;
  }

  std::mutex mutex_;
  PinnedMemory bounce_;
  std::map<int, Stream> streams_;
};

struct MemberOptionsOf {
  std::function<RegionMemory(int rank)> regions = [](int) { return RegionMemory::kAuto; };
  bool nic_reaches_gpus = true;
  int num_sms = 4;
  std::function<int(int rank)> device = [](int rank) { return rank % gpu_count(); };
};

class MemberRank {
 public:
  MemberRank(const Problem& problem, int rank, const std::string& network, int64_t group,
             const MemberOptionsOf& options)
      : shape_(problem.shape(rank)), device_(options.device(rank)) {
    PPLX_MUST(cudaSetDevice(device_));
    stream_ = std::make_unique<Stream>();
    GroupConfig config;
    config.name = "members";
    config.depth = static_cast<uint32_t>(problem.depth);
    config.stall_timeout = config.first_stall_timeout = std::chrono::seconds(20);
    config.engine.sim.network = network;
    if (options.nic_reaches_gpus) {
      config.engine.sim.copy = [&nic = Nic::instance()](void* to, const void* from, size_t bytes) {
        nic.copy(to, from, bytes);
      };
    }
    MemberOptions own{.nvlink = std::vector<bool>(problem.ranks, false),
                      .proxies = true,
                      .num_sms = options.num_sms,
                      .regions = options.regions(rank)};
    own.nvlink[rank] = true;
    member_ = std::make_unique<Member>(group, device_, shape_, config, own);
  }

  Member& member() const { return *member_; }
  const MoeShape& shape() const { return shape_; }
  int device() const { return device_; }
  cudaStream_t stream() const { return stream_->get(); }
  std::string trouble() const {
    if (const auto failure = member_->failure()) return failure->what();
    if (const auto error = member_->take_data_error()) return error->first.what();
    return "";
  }
  KernelCall call(Kind kind, int tokens, uint32_t place = 0) const {
    const uint64_t tag = 1 + place * kKinds + static_cast<uint32_t>(kind);
    KernelCall call = member_->call(kind, tag, "place " + std::to_string(place), tokens);
    call.stream = stream();
    return call;
  }

 private:
  MoeShape shape_;
  int device_;
  std::unique_ptr<Stream> stream_;
  std::unique_ptr<Member> member_;
};

// As Cluster.
class MemberCluster {
 public:
  explicit MemberCluster(const Problem& problem, const MemberOptionsOf& options = {}) : problem_(problem) {
    static std::atomic<int64_t> clusters{0};
    const int64_t number = ++clusters;
    std::vector<Bytes> endpoints;
    for (int rank = 0; rank < problem.ranks; ++rank) {
      // Control blocks are a group's and a device's, and these ranks may share one.
      ranks_.push_back(std::make_unique<MemberRank>(problem, rank, "members " + std::to_string(number),
                                                    number * 1000 + rank, options));
      endpoints.push_back(ranks_.back()->member().endpoint());
    }
    for (auto& rank : ranks_) rank->member().connect(endpoints);
    for (auto& rank : ranks_) rank->member().publish();
  }
  // All at once, as each waits for its last messages.
  ~MemberCluster() {
    std::vector<std::jthread> closing;
    for (auto& rank : ranks_) closing.emplace_back([&rank] { rank->member().close(); });
  }
  MemberCluster(const MemberCluster&) = delete;
  MemberCluster& operator=(const MemberCluster&) = delete;

  const Problem& problem() const { return problem_; }
  int size() const { return problem_.ranks; }
  const MemberRank& operator[](int rank) const { return *ranks_[rank]; }
  void each(const std::function<void(int)>& body) const {
    for (int rank = 0; rank < size(); ++rank) {
      PPLX_MUST(cudaSetDevice(ranks_[rank]->device()));
      body(rank);
    }
  }
  // Waits until every rank's stream is idle. Kernels end by their deadlines.
  void sync() const {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    for (const auto& rank : ranks_) {
      for (cudaError_t state = cudaErrorNotReady; state != cudaSuccess;) {
        state = cudaStreamQuery(rank->stream());
        if (state != cudaErrorNotReady) must(state, "a rank's kernels");
        if (std::chrono::steady_clock::now() > deadline) {
          for (const auto& other : ranks_) other->member().fail("the test gives up");
          throw std::runtime_error("kernels hung");
        }
        std::this_thread::yield();
      }
    }
  }

 private:
  Problem problem_;
  std::vector<std::unique_ptr<MemberRank>> ranks_;
};

}  // namespace pplx::moe::cuda::testing
