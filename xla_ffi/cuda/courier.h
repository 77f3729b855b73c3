// The thread beside a GPU: carries messages for ranks that NVLink does not reach, and news of failures both
// ways. Calls nothing of CUDA: kernels and the courier meet in pinned memory, and in what GDRCopy maps.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <exception>
#include <optional>
#include <thread>
#include <vector>

#include "proxy/moe/exchange_group.h"
#include "xla_ffi/cuda/control.h"
#include "xla_ffi/cuda/control_block.h"
#include "xla_ffi/cuda/faults.h"
#include "xla_ffi/layout.h"

namespace pplx::moe::cuda {

struct CourierConfig {
  ExchangeGroup& group;
  MoeShape shape;
  const Sites& sites;
  HostControl& host;
  const uint32_t* slots;       // [lanes][R] of each submitted message
  std::vector<bool> by_proxy;  // by rank; where none is, only news travel
  FindSite site_of_peer{};
  // [lanes] in the GPU's memory, mapped: HostControl's `arrived` once more, which kernels see sooner there.
  // Null: GDRCopy is not there.
  uint64_t* arrived_near = nullptr;
};

// What the host's part of exchanges took, in all.
struct CourierStats {
  uint64_t exchanges = 0;
  uint64_t posting_ns = 0;  // from a kernel's submission, as the courier sees it, until all is posted
  uint64_t arrival_ns = 0;  // from then on until the ranks' messages are here
};

class Courier {
 public:
  explicit Courier(CourierConfig config);
  // Ends the thread; whatever is under way stays where it is.
  ~Courier();
  Courier(const Courier&) = delete;
  Courier& operator=(const Courier&) = delete;
  // Waits until this many exchanges have been posted, or the group has failed.
  void drain(uint64_t exchanges, Clock::time_point deadline) const;
  CourierStats stats() const;

 private:
  // An exchange that was posted and has not arrived.
  struct Underway {
    uint64_t ticket;
    CallSite site;
    uint32_t round;
    Patience patience;
  };

  void work();
  bool post_next();
  bool receive_oldest();
  bool sound(Exchange& exchange, const Underway& underway) const;
  void tell(uint64_t number) const;  // kernels, that an exchange's messages are here
  int64_t body_bytes(const CallSite& site, uint32_t round, uint32_t slots) const;
  void watch();
  void report_failure(const FaultRecord& record);
  void note_data_error();
  FaultContext context() const { return {config_.group, config_.shape, config_.sites, config_.site_of_peer}; }

  CourierConfig config_;
  std::atomic<bool> carries_;
  uint32_t lanes_;
  std::atomic<uint64_t> next_{0};  // exchange to post
  std::atomic<uint64_t> arrived_{0}, posting_ns_{0}, arrival_ns_{0};
  std::deque<Underway> underway_;
  bool failure_seen_ = false;
  std::optional<Clock::time_point> noticed_;  // when a kernel said that a peer has failed
  bool blamed_ = false;  // a kernel's deadline was passed on to the oldest exchange under way
  uint64_t data_errors_noted_ = 0;
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

}  // namespace pplx::moe::cuda
