// Private state of an ExchangeGroup, shared by exchange_group.cc, monitor.cc and exchange.cc.
#pragma once

#include <algorithm>
#include <cmath>

#include "proxy/moe/exchange_group.h"
#include "proxy/process_watch.h"

namespace pplx::moe {

struct ExchangeGroup::Peer {
  // Where the completions of heartbeats to it go.
  struct Beats final : CompletionSink {
    CompletionCounter* control = nullptr;
    std::optional<Error> error;  // the first, once `any`
    std::atomic<bool> any{false};
    std::atomic<bool> refused{false}, taken{false};  // some, since the monitor looked last
    void complete(const Error* failure) noexcept override {
      if (failure == nullptr) {
        taken = true;
      } else if (failure->kind() == ErrorKind::kPeer) {
        if (!any) error = *failure;
        any = refused = true;
      }
      control->complete(failure);
    }
    // By the monitor, each round: for how many none was taken and some were refused. A NIC that is lost
    // refuses many at once, and others may take the next.
    uint32_t rounds = 0;
    uint32_t refused_rounds() {
      const bool some = refused.exchange(false);
      if (taken.exchange(false)) {
        rounds = 0;
      } else if (some) {
        ++rounds;
      }
      return rounds;
    }
  };

  uint32_t nonce = 0;
  uint32_t shards = 1;  // immediates a message of this peer consists of
  std::string process;
  bool absent = false;  // takes no part
  std::shared_ptr<RemoteRegion> regions, notice_region;
  std::shared_ptr<RemoteRegion> headers;  // its header_region_; null: it reads them in its regions
  uint32_t pieces = 1;                    // writes that a message from or to it consists of
  std::vector<ImmCounter> arrivals;       // by lane
  ImmCounter heartbeats, closings, failures;
  std::atomic<bool> failure_read{false};
  std::atomic<bool> gone{false};        // closed the group in good order,
  std::atomic<uint64_t> last_words{0};  // after sending this many exchanges
  uint64_t signs = 0;                   // of life, by the monitor alone
  Clock::time_point last_sign;
  ProcessWatch watch;  // and
  uint32_t ended = 0;  // for how many rounds it has told so, likewise
  Beats beats;
  std::atomic<uint64_t> sent_bytes{0}, received_bytes{0};
  std::atomic<int64_t> waited_ns{0}, longest_wait_ns{0};
  std::atomic<double> recent_wait_ns{0};  // as of the exchange
  std::atomic<uint64_t> recent_exchange{0};

  // Those for whom nobody waits cost nothing: their means fade as the number of exchanges tells.
  static constexpr double kRecent = 64;
  double recent_wait(uint64_t exchange) const {
    const uint64_t since = exchange - std::min<uint64_t>(exchange, recent_exchange);
    return recent_wait_ns * std::pow(1 - 1 / kRecent, static_cast<double>(since));
  }
  // By the holder of the exchange.
  void note_wait(uint64_t exchange, int64_t nanoseconds) {
    waited_ns += nanoseconds;
    if (nanoseconds > longest_wait_ns) longest_wait_ns = nanoseconds;
    recent_wait_ns = recent_wait(exchange) + static_cast<double>(nanoseconds) / kRecent;
    recent_exchange = exchange;
  }
};

struct ExchangeGroup::Lane {
  // Where the completions of messages to one peer go, so that a refused one tells by whom.
  struct Sent final : CompletionSink {
    Lane* lane = nullptr;
    std::optional<Error> error;  // the first, once `refused`
    std::atomic<bool> refused{false};
    void complete(const Error* failure) noexcept override {
      if (failure != nullptr && !refused) {
        error = *failure;
        refused = true;
      }
      lane->local.complete(failure);
    }
  };

  explicit Lane(uint32_t num_ranks) : sent(num_ranks) {
    for (Sent& to : sent) to.lane = this;
  }

  std::vector<Sent> sent;   // by peer
  CompletionCounter local;  // of everything that was posted from this lane's send buffer
  uint64_t posted = 0;
};

}  // namespace pplx::moe
