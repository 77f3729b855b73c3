#include "proxy/engine/core.h"

#include <pthread.h>
#include <sched.h>
#include <sys/prctl.h>
#include <time.h>

#include <algorithm>

#include "proxy/engine/doubts.h"
#include "proxy/engine/pools.h"
#include "proxy/engine/watch.h"
#include "proxy/log.h"
#include "proxy/presence.h"

namespace pplx {
namespace {

constexpr auto kMaintenance = std::chrono::milliseconds(10);
constexpr uint32_t kGreetAgain = 1000;   // ms between two greetings of a peer that has to know this engine
constexpr uint32_t kSuspectAfter = 100;  // ms without a completion before a peer's process is looked at
constexpr int kFlushPolls = 16;

void sleep_for(long nanoseconds) {
  timespec nap{0, nanoseconds};
  nanosleep(&nap, nullptr);
}

}  // namespace

EngineCore::EngineCore(const EngineConfig& config)
    : config_(config),
      gpu_writes_(config.cuda),
      pools_(std::make_unique<Pools>(*this)),
      doubts_(std::make_unique<Doubts>(*this)) {
  add_nics();
  add_send_buffers();
}

EngineCore::~EngineCore() {
  withdraw_from_forks(this);
  close();
}

void EngineCore::start() {
  keep_in_forks(this, weak_from_this());
  if (config_.cpu == EngineConfig::kOwnCore) {
    const std::string& nic = config_.nics.empty() ? config_.nic : config_.nics.front().name;
    core_claim_ = CoreClaim::take(cores_for(config_.near.empty() ? nic : config_.near));
    if (core_claim_) worker_core_ = core_claim_->core();
  } else {
    worker_core_ = config_.cpu;
  }
  worker_ = std::thread([this] { run_worker(); });
  std::string opened;
  for (const Nic& nic : nics_) opened += (opened.empty() ? "" : ", ") + nic.fabric->name();
  log(LogLevel::kInfo, "engine ", self_.label(), " on ", opened);
}

void EngineCore::require_open() const {
  require_own_process();
  if (closed()) throw Error(ErrorKind::kClosed, "the TransferEngine is closed");
}

Deadline EngineCore::deadline(std::optional<Duration> timeout) const {
  require_own_process();  // every wait asks for its deadline first
  auto now = Clock::now();
  auto wanted = std::max(timeout.value_or(config_.timeout), Duration(0));
  return wanted > Deadline::max() - now ? Deadline::max() : now + wanted;
}

bool EngineCore::try_lock() {
  if (!lock_.try_lock()) return false;
  holder_.store(std::this_thread::get_id(), std::memory_order_relaxed);
  return true;
}

void EngineCore::unlock() {
  holder_.store(std::thread::id(), std::memory_order_relaxed);
  lock_.unlock();
  // Whoever failed to get the lock before this pushed first, so that nothing stays behind unseen.
  if (!submissions_.empty()) [[unlikely]]
    kick();
}

void EngineCore::kick() {
  if (!try_lock()) return;
  drain();
  unlock();
}

size_t EngineCore::progress() {
  require_own_process();
  // Pollers would otherwise take the lock again before a blocked thread wakes up.
  if (blocked_.load(std::memory_order_relaxed) != 0 || !try_lock()) return 0;
  bump(foreign_polls_);
  size_t count = poll_locked();
  unlock();
  return count;
}

size_t EngineCore::poll_locked() {
  drain();
  if (fabric_closed_) return 0;
  bump(counters_.polls);
  size_t count = 0;
  if (nics_.size() == 1 && !nics_[0].down) [[likely]] {
    count = nics_[0].fabric->poll(*this);
  } else {
    for (polling_ = 0; polling_ < nics_.size(); ++polling_) {
      if (!nics_[polling_].down) count += nics_[polling_].fabric->poll(*this);
    }
    polling_ = 0;
  }
  if (failing_) [[unlikely]]
    lose_failing_nics();
  if (!greetings_.empty()) [[unlikely]]
    answer_greetings();
  pools_->work();
  doubts_->work();
  if (!words_.empty()) count += look_at_words();
  if (!pending_paths_.empty()) post_pending();
  if (!outgoing_.empty()) flush_messages();
  return count;
}

void EngineCore::run_worker() {
  pthread_setname_np(pthread_self(), "pplx-engine");
  prctl(PR_SET_TIMERSLACK, 1000UL, 0, 0, 0);  // naps of 50 us would otherwise last 100
  if (int core = worker_core_; core >= 0 && !pin_to_core(core)) {
    worker_core_ = EngineConfig::kAnyCore;
    log(LogLevel::kWarn, "the worker could not be pinned to core ", core);
  }
  constexpr long kShortNap = 50'000, kLongNap = 1'000'000, kStandBack = 500'000;
  long nap = kShortNap;
  unsigned idle = 0;
  uint64_t foreign = 0;
  Deadline maintained = started_;
  Duration ran{0};
  while (!closed()) {
    auto now = Clock::now();
    if (now - maintained >= kMaintenance) {
      ran += std::min<Duration>(now - maintained, Presence::kAbsent);
      maintained = now;
      tick_.store(static_cast<uint32_t>(ran / std::chrono::milliseconds(1)), std::memory_order_relaxed);
      std::vector<std::shared_ptr<const Region>> given_back;
      Locked locked(*this);
      maintain();
      given_back.swap(given_back_);
    }
    // Somebody who waits drives progress better than we could: every poll of ours would only be in the way.
    if (uint64_t polls = foreign_polls_.load(std::memory_order_relaxed); polls != foreign) {
      foreign = polls;
      sleep_for(kStandBack);
      continue;
    }
    size_t count = 0;
    if (blocked_.load(std::memory_order_relaxed) == 0 && try_lock()) {
      count = poll_locked();
      unlock();
    }
    if (count != 0) {
      idle = 0;
      nap = kShortNap;
    } else if (++idle < 32) {
      sched_yield();
    } else {
      bool busy =
          outstanding_.load(std::memory_order_relaxed) != 0 || watching_.load(std::memory_order_relaxed) != 0;
      // Whoever writes a watch word waits for us alone; a core of our own can be spent on that.
      if (core_claim_ && spin_for_words_.load(std::memory_order_relaxed)) continue;
      sleep_for(nap);
      nap = busy ? kShortNap : std::min(nap * 2, kLongNap);
    }
  }
}

void EngineCore::maintain() {
  if (fabric_closed_) return;
  uint32_t now = tick_.load(std::memory_order_relaxed);
  auto limit = static_cast<uint32_t>(
      std::clamp<int64_t>(config_.timeout / std::chrono::milliseconds(1), 1, INT32_MAX));
  auto late = [&](const Op* op) { return op != nullptr && now - op->stamp > limit; };
  auto error = [&](const Op& op) {
    return explain(op, Error(ErrorKind::kTimeout, "no completion within " + std::to_string(limit) + " ms"));
  };
  auto fail_late = [&](OpQueue& queue) {
    while (late(queue.front())) {
      Op* op = queue.pop();
      Error late_error = error(*op);
      finish(op, &late_error);
    }
  };
  pools_->maintain(now, limit);
  doubts_->maintain(now, limit);
  fail_late_messages(now, limit);
  relieve_messages(now);
  if (!removed_.empty()) disconnect_removed();
  // By number, here and below: whoever is told of a completion may get to know further peers.
  for (size_t number = 0; number < peers_.size(); ++number) {
    Peer& peer = peers_[number];
    if (peer.removed) continue;
    fail_late(peer.waiting);
    // A greeting may be lost with its NIC.
    if (!peer.ready && !peer.failed && peer.waiting.front() != nullptr && now - peer.greeted > kGreetAgain) {
      greet(static_cast<uint32_t>(number), kHello);
    }
    for (size_t i = 0; i < peer.paths.size(); ++i) {
      Path& path = peer.paths[i];
      // Long ago stays long ago.
      for (uint32_t* tick : {&path.completed, &path.messaged}) {
        if (now - *tick > INT32_MAX) *tick = now - INT32_MAX;
      }
      Op* oldest = path.posted.front() != nullptr ? path.posted.front() : path.pending.front();
      if (oldest == nullptr) continue;
      if (now - oldest->stamp > kSuspectAfter && !nics_[path.nic].down &&
          !nics_[path.nic].fabric->alive(path.number)) {
        fail_peer(peer, Error(ErrorKind::kPeer, "the process of " + peer.label + " is gone"));
        break;
      }
      const bool stuck = late(oldest) && is_stuck(peer, path, oldest, now, limit);
      while (late(path.posted.front())) abandon(peer, path.posted.front(), error(*path.posted.front()));
      fail_late(path.pending);
      if (stuck) {
        lose_path(peer, static_cast<uint16_t>(i),
                  Error(ErrorKind::kPeer, "nothing has come of it for " + std::to_string(limit) +
                                              " ms, though the peer answers on others"));
      }
    }
  }
}

void EngineCore::close() {
  if (forked()) {
    closing_ = true;
    return;
  }
  if (closing_.exchange(true)) {
    // A callback may not wait for a close that waits for the callback.
    for (unsigned idle = 0; !close_done_.load(std::memory_order_acquire) && !callbacks_.is_current();) {
      back_off(idle++);
    }
    return;
  }
  if (worker_.joinable()) worker_.join();
  // Peers may still wait for acknowledgements of what has already arrived here.
  for (int i = 0; i < kFlushPolls; ++i) progress();
  std::vector<std::shared_ptr<const Region>> given_back;
  {
    Locked locked(*this);
    const Error error(ErrorKind::kClosed, "the TransferEngine was closed before the operation completed");
    fabric_closed_ = true;
    drain();
    for (size_t number = 0; number < peers_.size(); ++number) fail_peer(peers_[number], error);
    flush_messages();
    close_waiters(error);
    pools_->close(error);
    for (Nic& nic : nics_) {
      if (!nic.down) nic.fabric->close();
      while (Op* op = nic.abandoned.front()) give_back(op);
    }
    given_back.swap(given_back_);
  }
  callbacks_.stop();
  close_done_.store(true, std::memory_order_release);
}

}  // namespace pplx
