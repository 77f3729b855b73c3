// The host's part between ranks that do not write each other's memory, without a network: takes what kernels
// submit, puts the header in front, copies it into the receiver's memory, tells the receiver.
#pragma once

#include <gtest/gtest.h>

#include <thread>
#include <vector>

#include "xla_ffi/cuda/tests/cluster.h"

namespace pplx::moe::cuda::testing {

class Proxy {
 public:
  explicit Proxy(Cluster& cluster)
      : cluster_(cluster),
        taken_(cluster.size(), Epochs(lanes(), 0)),
        delivered_(cluster.size(), std::vector<Epochs>(lanes(), Epochs(cluster.size(), 0))),
        thread_([this](const std::stop_token& stop) {
          while (!stop.stop_requested()) {
            if (!poll()) std::this_thread::yield();
          }
        }) {}
  ~Proxy() { stop(); }
  Proxy(const Proxy&) = delete;
  Proxy& operator=(const Proxy&) = delete;

  // What is submitted from now on goes nowhere.
  void stop() {
    thread_.request_stop();
    if (thread_.joinable()) thread_.join();
  }

 private:
  using Epochs = std::vector<uint64_t>;

  uint32_t lanes() const { return static_cast<uint32_t>(cluster_[0].layout().lanes); }

  bool poll() {
    bool moved = false;
    for (int source = 0; source < cluster_.size(); ++source) {
      for (uint32_t lane = 0; lane < lanes(); ++lane) {
        Submission& submission = cluster_[source].host().submissions[lane];
        const uint64_t epoch = load(submission.epoch);
        if (epoch == taken_[source][lane]) continue;
        moved = true;
        check(submission, epoch, source, lane);
        for (int to = 0; to < cluster_.size(); ++to) {
          if (!cluster_.direct(source, to)) deliver(submission, epoch, source, to, lane);
        }
        taken_[source][lane] = epoch;
        for (int to = 0; to < cluster_.size(); ++to) publish(to, lane);
      }
    }
    return moved;
  }

  void check(const Submission& submission, uint64_t epoch, int source, uint32_t lane) const {
    EXPECT_GT(epoch, taken_[source][lane]);
    EXPECT_EQ((epoch - 1) % lanes(), lane);
    EXPECT_LT(submission.kind, kKinds);
    EXPECT_EQ(submission.site % kKinds, submission.kind);
    EXPECT_LT(static_cast<int>(submission.round),
              cluster_[source].shape().rounds(static_cast<int>(submission.tokens)));
  }

  int64_t bytes(const Submission& submission, const MoeShape& shape, uint32_t slots) const {
    const auto kind = static_cast<Kind>(submission.kind);
    const int64_t stride = kind == Kind::kDispatch           ? shape.dispatch_stride()
                           : kind == Kind::kCombine          ? shape.home_stride()
                           : kind == Kind::kCombineTranspose ? shape.row_stride()
                                                             : shape.dispatch_transpose_stride();
    const bool counts = kind == Kind::kDispatch && submission.round == 0;
    return static_cast<int64_t>(sizeof(RegionHeader)) + (counts ? shape.counts_bytes() : 0) + slots * stride;
  }

  void deliver(const Submission& submission, uint64_t epoch, int source, int to, uint32_t lane) {
    const Rank& from = cluster_[source];
    const MoeShape& shape = from.shape();
    const uint32_t slots = from.host_slots(lane, to);
    const int64_t length = bytes(submission, shape, slots);
    ASSERT_LE(length, from.layout().region_bytes) << "slots " << slots;
    // The test's kernels may run on: nothing in the staging buffer may change before it is delivered.
    std::byte* message = from.host_staging(lane, to);
    RegionHeader header{};
    header.magic = kMagic;
    header.version = kWireVersion;
    header.kind = static_cast<uint8_t>(submission.kind);
    header.source = static_cast<uint32_t>(source);
    header.exchange = epoch - 1;
    header.tag = Rank::tag(submission.site);
    header.tokens = submission.tokens;
    header.round = submission.round;
    header.hidden = static_cast<uint32_t>(shape.hidden);
    header.slots = slots;
    header.culprit = ~0U;
    header.bytes = static_cast<uint32_t>(length);
    header.format = shape.format();
    header.top_k = static_cast<uint8_t>(shape.top_k);
    header.local_experts = static_cast<uint16_t>(shape.experts_per_rank);
    if (submission.poisoned != 0) {
      header.flags |= kPoisoned;
      header.culprit = header.source;
    }
    std::memcpy(message, &header, sizeof(header));
    std::memcpy(cluster_[to].host_region(lane, source), message, length);
    delivered_[to][lane][source] = epoch;
  }

  // When all that comes by proxy is here and what goes that way has left.
  void publish(int rank, uint32_t lane) const {
    uint64_t epoch = taken_[rank][lane];
    bool proxied = false;
    for (int source = 0; source < cluster_.size(); ++source) {
      if (cluster_.direct(source, rank)) continue;
      proxied = true;
      epoch = std::min(epoch, delivered_[rank][lane][source]);
    }
    uint64_t& arrived = cluster_[rank].host().arrived[lane];
    if (proxied && epoch > arrived) store(arrived, epoch);
  }

  Cluster& cluster_;
  std::vector<Epochs> taken_;                   // [rank][lane]
  std::vector<std::vector<Epochs>> delivered_;  // [rank][lane][source]
  std::jthread thread_;
};

}  // namespace pplx::moe::cuda::testing
