#include "xla_ffi/cuda/courier.h"

#include <pthread.h>
#include <sched.h>
#include <sys/prctl.h>

#include <algorithm>
#include <chrono>
#include <string>
#include <utility>

#include "proxy/log.h"
#include "xla_ffi/call_site.h"
#include "xla_ffi/cuda/gdr_window.h"

namespace pplx::moe::cuda {
namespace {

// All of a process's exchanges on a GPU count as one execution: only the device knows where one ends.
constexpr int64_t kRun = 0;
constexpr auto kWatchEvery = std::chrono::milliseconds(5);
constexpr auto kNoticeGrace = std::chrono::milliseconds(300);
constexpr unsigned kSpins = 2000;
constexpr auto kNap = std::chrono::microseconds(20);
// So long after a submission nobody naps: the answer is on its way.
constexpr auto kBrisk = std::chrono::milliseconds(2);

template <typename T>
T load(T& word) {
  return std::atomic_ref(word).load(std::memory_order_acquire);
}
template <typename T>
void store(T& word, T value) {
  std::atomic_ref(word).store(value, std::memory_order_release);
}

uint64_t nanoseconds(Clock::duration duration) {
  return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(duration).count());
}

}  // namespace

Courier::Courier(CourierConfig config)
    : config_(std::move(config)),
      carries_(std::find(config_.by_proxy.begin(), config_.by_proxy.end(), true) != config_.by_proxy.end()),
      lanes_(2 * config_.group.config().depth),
      thread_([this] { work(); }) {
  pthread_setname_np(thread_.native_handle(), "pplx-courier");
}

Courier::~Courier() {
  stop_ = true;
  thread_.join();
}

void Courier::drain(uint64_t exchanges, Clock::time_point deadline) const {
  while (carries_ && next_ < exchanges && !config_.group.failure() && Clock::now() < deadline) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

CourierStats Courier::stats() const {
  return {.exchanges = arrived_, .posting_ns = posting_ns_, .arrival_ns = arrival_ns_};
}

void Courier::work() {
  // The default slack of 50 us would make a nap several times as long.
  prctl(PR_SET_TIMERSLACK, 1000UL, 0, 0, 0);
  unsigned idle = 0;
  auto watched = Clock::now();
  while (!stop_) {
    const auto now = Clock::now();
    try {
      // What peers send needs this side to look too; the engine's own thread naps between two looks.
      if (carries_) config_.group.progress();
      const bool moved = carries_ && (post_next() || receive_oldest());
      idle = moved ? 0 : idle + 1;
      if (now - watched >= kWatchEvery) {
        watch();
        watched = now;
      }
    } catch (const std::exception& error) {
      config_.group.fail(
          Error(ErrorKind::kFabric, std::string("the courier of a GPU stopped: ") + error.what()),
          config_.group.config().rank);
      watch();
      carries_ = false;
    }
    const bool brisk = !underway_.empty() && now - underway_.front().patience.since < kBrisk;
    if (!carries_) {
      std::this_thread::sleep_for(kWatchEvery);
    } else if (idle > kSpins && !brisk) {
      std::this_thread::sleep_for(kNap);
    } else if (idle > kSpins / 2 || brisk) {
      sched_yield();
    }
  }
}

// --- messages --------------------------------------------------------------------------------------------

int64_t Courier::body_bytes(const CallSite& site, uint32_t round, uint32_t slots) const {
  const MoeShape& shape = config_.shape;
  switch (site.kind) {
    case Kind::kDispatch:
      return (round == 0 ? shape.counts_bytes() : 0) + slots * shape.dispatch_stride();
    case Kind::kCombine:
      return slots * shape.home_stride();
    case Kind::kCombineTranspose:
      return slots * shape.row_stride();
    case Kind::kDispatchTranspose:
      return slots * shape.dispatch_transpose_stride();
  }
  return 0;
}

bool Courier::post_next() {
  const uint64_t number = next_;
  const auto lane = static_cast<uint32_t>(number % lanes_);
  Submission& submission = config_.host.submissions[lane];
  if (load(submission.epoch) < number + 1) return false;
  const auto began = Clock::now();
  const Site* site = config_.sites.at(submission.site);
  if (site == nullptr || submission.kind >= kKinds) {
    throw Error(ErrorKind::kPeer,
                "a kernel submitted exchange " + std::to_string(number) + " of no known call");
  }
  const uint32_t round = submission.round;
  const bool poisoned = submission.poisoned != 0;
  const CallSite call =
      call_site(config_.shape, static_cast<Kind>(submission.kind), site->tag, submission.tokens, site->name);
  Exchange exchange(config_.group, call, round, kRun);
  const auto ranks = static_cast<uint32_t>(config_.shape.num_ranks);
  const auto own = static_cast<uint32_t>(config_.shape.rank);
  for (uint32_t step = 1; step <= ranks; ++step) {
    const uint32_t peer = (own + step) % ranks;
    // Where NVLink carries the rows the header alone comes this way, for its checks and to be counted.
    const uint32_t slots = config_.by_proxy[peer] ? config_.slots[lane * ranks + peer] : 0;
    const int64_t body = config_.by_proxy[peer] ? body_bytes(call, round, slots) : 0;
    exchange.packed(peer, sizeof(RegionHeader) + static_cast<size_t>(body));
    exchange.post(slots, poisoned);
  }
  underway_.push_back({.ticket = exchange.park(poisoned), .site = call, .round = round, .patience = {}});
  posting_ns_ += nanoseconds(underway_.back().patience.since - began);
  next_ = number + 1;
  return true;
}

// The oldest first: ranks post in one order, so that it is the first to be complete.
bool Courier::receive_oldest() {
  if (underway_.empty() || config_.group.closed()) return false;
  Underway& oldest = underway_.front();
  bool poisoned = false;
  Exchange exchange(config_.group, oldest.site, oldest.ticket, kRun, &poisoned);
  if (!exchange.poll(oldest.patience)) {
    exchange.park(poisoned);
    return false;
  }
  if (!exchange.wait() || !sound(exchange, oldest)) {
    underway_.clear();
    watch();
    return false;
  }
  tell(oldest.ticket - 1);
  arrival_ns_ += nanoseconds(Clock::now() - oldest.patience.since);
  ++arrived_;
  underway_.pop_front();
  return true;
}

void Courier::tell(uint64_t number) const {
  const size_t lane = number % lanes_;
  if (config_.arrived_near != nullptr) {
    store(config_.arrived_near[lane], number + 1);
    push_stores();
  }
  store(config_.host.arrived[lane], number + 1);
}

bool Courier::sound(Exchange& exchange, const Underway& underway) const {
  for (uint32_t source = 0; source < config_.by_proxy.size(); ++source) {
    const uint32_t slots = exchange.header(source).slots;
    const bool rows = config_.by_proxy[source];
    const int64_t expected = rows ? body_bytes(underway.site, underway.round, slots) : 0;
    if (slots <= (rows ? static_cast<uint32_t>(config_.shape.chunk) : 0U) &&
        exchange.body_bytes(source) == static_cast<size_t>(expected)) {
      continue;
    }
    exchange.reject(source, "the length of its message does not fit its " + std::to_string(slots) + " slots");
    return false;
  }
  return true;
}

// --- news ------------------------------------------------------------------------------------------------

void Courier::watch() {
  ExchangeGroup& group = config_.group;
  if (!group.closed()) group.read_notices();
  if (!failure_seen_) {
    if (const auto record = read_fault(config_.host.failure)) report_failure(*record);
  }
  note_data_error();
  const uint64_t entered = load(config_.host.entered);
  if (entered > 0 && !group.failure() && !group.closed()) {
    if (const auto rank = group.gone_before(entered - 1)) {
      group.fail(Error(ErrorKind::kPeer, "group '" + group.config().name + "', exchange " +
                                             std::to_string(entered - 1) + ": " + group.rank_name(*rank) +
                                             " has closed the group and will not come"),
                 *rank);
    }
  }
  if (group.failure()) store(config_.host.abort, uint64_t{1});
}

void Courier::report_failure(const FaultRecord& record) {
  ExchangeGroup& group = config_.group;
  if (record.fault == Fault::kTimeout && !underway_.empty() && !blamed_) {
    // A kernel knows that messages are missing, their ranks are known here: the next look names them.
    underway_.front().patience.since = Clock::time_point{};
    blamed_ = true;
    return;
  }
  if (record.fault == Fault::kNotice && !group.failure()) {
    // Over the network comes what that failure was, a little later than over NVLink that there was one.
    if (!noticed_) noticed_ = Clock::now();
    if (Clock::now() - *noticed_ < kNoticeGrace) return;
  }
  failure_seen_ = true;
  // The host ended the wait: it knows why, or is closing.
  if (record.fault == Fault::kAborted) return;
  group.fail(fault_error(context(), record), record.culprit);
}

void Courier::note_data_error() {
  const auto record = read_fault(config_.host.data_error);
  const uint64_t taken = load(config_.host.data_errors_taken);
  if (!record || data_errors_noted_ > taken) return;
  data_errors_noted_ = taken + 1;
  const Error error = fault_error(context(), *record);
  log(LogLevel::kWarn, Field("group", config_.group.config().name), ' ',
      Field("rank", config_.group.config().rank), ' ', Field("exchange", record->exchange), ' ',
      Field("event", "data_error"), ' ', Field("error", std::string(error_name(error.kind()))), ' ',
      Field("message", error.what()));
}

}  // namespace pplx::moe::cuda
