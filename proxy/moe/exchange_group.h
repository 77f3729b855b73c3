// One rank's end of an exchange group: numbered exchanges over lanes, counted arrivals, checked headers,
// deadlines, failure. It moves messages and knows nothing of tokens; docs/protocol.md is the reference.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "proxy/engine/engine.h"
#include "proxy/log.h"
#include "proxy/moe/buffers.h"
#include "proxy/moe/launches.h"
#include "proxy/moe/wire.h"
#include "proxy/presence.h"
#include "proxy/process.h"

namespace pplx::moe {

struct GroupConfig {
  std::string name;
  uint32_t rank = 0;
  uint32_t num_ranks = 1;
  uint32_t depth = 1;                           // exchanges in flight between send and recv; 2 * depth lanes
  size_t region_bytes = 0;                      // one source's region in one lane: the longest message
  size_t staging_bytes = 0;                     // send buffer of one lane, at least region_bytes
  uint64_t fingerprint = 0;                     // of everything all ranks must agree on
  std::string fingerprint_text;                 // the same, for people
  Duration timeout = std::chrono::seconds(30);  // a peer silent this long is dead
  Duration stall_timeout = std::chrono::seconds(300);  // a live peer that doesn't come
  // The same at a call's first execution: compilation and autotuning differ between ranks.
  Duration first_stall_timeout = std::chrono::seconds(900);
  std::shared_ptr<Launches> launches;  // of the ranks in this process; null: not compared
  // Ranks that take no part, equal on all others: nothing is sent to them, and each of their messages is
  // taken to be here and empty.
  std::vector<uint32_t> absent;
  EngineConfig engine;
};

// What an exchange is; equal on all ranks, or both sides raise.
struct CallSite {
  Kind kind = Kind::kDispatch;
  uint64_t tag = 0;
  uint32_t tokens = 0;
  uint32_t hidden = 0;
  uint8_t format = 0;
  uint8_t top_k = 0;
  uint16_t local_experts = 0;
  std::string_view name;
};

struct PeerStats {
  std::string process;  // "host pid 123"
  uint64_t sent_bytes = 0, received_bytes = 0;
  // By this rank for this peer's messages, from when it began to wait: in all, and for one at most.
  Duration waited{0}, longest_wait{0};
  Duration recent_wait{0};  // mean an exchange, the latest counting most: each a 64th of what came before
};

struct GroupStats {
  uint64_t exchanges = 0;
  uint64_t waits_over_10s = 0;
  size_t region_bytes = 0, staging_bytes = 0;  // allocated
  size_t registrations = 0;                    // of memory, with the engine
  std::string fabric;
  std::vector<PeerStats> peers;
  EngineStats engine;
};

class Exchange;

class ExchangeGroup {
 public:
  // `place` is called once, here; empty: host memory of the group's own.
  explicit ExchangeGroup(GroupConfig config, const PlaceBuffers& place = {});
  ~ExchangeGroup();
  ExchangeGroup(const ExchangeGroup&) = delete;
  ExchangeGroup& operator=(const ExchangeGroup&) = delete;

  const GroupConfig& config() const noexcept { return config_; }
  // What the other ranks need to reach this one; pass all of them, in rank order, to connect().
  Bytes endpoint() const;
  // Once; the endpoints of absent ranks are not looked at. Throws kMismatch when ranks disagree on the
  // configuration, kFabric, kInvalidArgument, kPeer.
  void connect(const std::vector<Bytes>& endpoints);

  // Final: the first failure wins, is told to every peer, and every later exchange poisons at once.
  void fail(const Error& error, uint32_t culprit);
  // The failure, if any. `run` tells executions of a program apart.
  std::optional<Error> failure() const;
  // The rank held responsible for it; kNobody where there is none.
  uint32_t failure_culprit() const;
  // A data error never stops the protocol: it is kept until `take_data_error`.
  void report_data_error(const Error& error, uint32_t culprit, int64_t run);
  std::optional<Error> data_error() const;
  uint32_t data_error_culprit() const;
  std::optional<Error> take_data_error();

  // A recv half has seen the raise flag in `run`, whose sends it must not cut short: every rank returns
  // `error` from all exchanges of the next execution instead.
  void defer_raise(const Error& error, int64_t run);
  std::optional<Error> deferred_raise(int64_t run);
  // Throws kFabric in a fork of the process that made the group. Takes no lock.
  void require_own_process() const { mark_.require("the group"); }

  // True when an execution `run` must return the failure to XLA instead of poisoning: the failure happened
  // in an earlier execution (or outside any).
  bool raises_in(int64_t run) const;

  // Moves messages on, without waiting. An exchange's wait() does so itself.
  void progress();
  GroupStats stats() const;
  // Idempotent, bounded by two seconds, or half a one after a failure: tells the peers, drains local
  // completions, closes the engine.
  void close();
  bool closed() const noexcept { return closed_.load(); }

  static constexpr uint32_t kNobody = ~0U;

  // For who moves messages without packing or reading them here: a lane's regions are num_ranks of
  // region_bytes, its send buffer is staging_bytes. A GPU's addresses, where PlaceBuffers said so.
  std::span<std::byte> regions() const { return {buffers_.regions->data(), buffers_.regions->size()}; }
  std::span<std::byte> staging() const { return {buffers_.staging->data(), buffers_.staging->size()}; }
  std::string rank_name(uint32_t rank) const;
  // Exchanges that were sent without an Exchange; for the notice of the close.
  void count_sent(uint64_t exchanges);
  // A peer that closed the group before it had sent `exchange`.
  std::optional<uint32_t> gone_before(uint64_t exchange);
  // What peers say of their end: fails the group when one has failed. Done now and then without being asked.
  void read_notices();

 private:
  friend class Exchange;
  struct Peer;
  struct Lane;

  // An exchange between its send and its recv.
  struct Parked {
    Kind kind;
    uint64_t tag;
    uint32_t round;
    int64_t run;
    bool first_call, poisoned;
  };

  enum NoticeSlot : size_t { kFailedSlot = 0, kClosedSlot = 1 };

  struct Monitor {
    std::mutex mutex;
    std::condition_variable wake;
    std::thread thread;
  };

  // Takes the group for an exchange; `met`: had to wait for somebody. Then begin(), which fails the group
  // when another execution is not through yet.
  std::unique_lock<std::mutex> enter(bool& met);
  void begin(int64_t run, bool met);
  bool overlaps(int64_t run, bool met) const;
  void fail_overlap();
  // A line that names group, rank and exchange: where no other is known, the latest that has begun.
  template <typename... Parts>
  void note(LogLevel level, uint64_t exchange, const Parts&... parts) const {
    log(level, Field("group", config_.name), ' ', Field("rank", config_.rank), ' ',
        Field("exchange", exchange), ' ', parts...);
  }
  uint64_t latest_exchange() const { return std::max<uint64_t>(next_exchange_, 1) - 1; }

  void monitor();
  void beat();
  void check_ended();
  void check_refused_beats();
  std::string rank_names(const std::vector<uint32_t>& ranks) const;
  // None of this rank's NICs works any more: whom it cannot reach is not to blame.
  bool is_cut_off() const;
  void check_liveness(Clock::time_point now, Duration absent);
  // Records the failure unless there is one. Returns whether it is the first.
  bool record_failure(const Error& error, uint32_t culprit, bool heard);
  void broadcast(const AbortNotice& notice, NoticeSlot slot);
  // Messages that peers did not take, maybe of exchanges that are over here: fails the group. `lane` is that
  // of the exchange under way, which `where` describes.
  void read_refusals(uint32_t lane, const std::string& where);
  bool refused() const;
  std::byte* region(uint32_t lane, uint32_t source) const;
  // Of the message from `source`, where the CPU can read it.
  std::byte* header_from(uint32_t lane, uint32_t source) const;
  size_t header_at(uint32_t lane, uint32_t rank) const {
    return (size_t{lane} * config_.num_ranks + rank) * sizeof(RegionHeader);
  }
  size_t headers_bytes() const { return header_at(lanes_, 0); }

  const ProcessMark mark_;
  GroupConfig config_;
  uint32_t lanes_;
  uint32_t nonce_;
  std::unique_ptr<TransferEngine> engine_;
  GroupBuffers buffers_;
  // Where those are not readable: [lane][source] headers that come, then [lane][rank] of those that go.
  std::shared_ptr<Region> header_region_;
  std::shared_ptr<Region> notices_;  // [source][failed, closed] of AbortNotice, then two of our own to send
  std::vector<std::unique_ptr<Peer>> peers_;
  std::vector<std::unique_ptr<Lane>> lane_state_;
  std::unique_ptr<CompletionCounter> control_;  // heartbeats and notices
  std::atomic<uint64_t> control_posted_{0};

  std::mutex exchange_mutex_;  // one exchange at a time
  std::set<std::pair<Kind, uint64_t>> seen_calls_;
  std::map<uint64_t, Parked> parked_;  // by exchange number
  std::deque<int64_t> past_runs_;      // executions before the current one, the latest last
  std::vector<RegionHeader> headers_;  // [source] of this exchange, out of the peers' reach once checked
  std::atomic<uint64_t> next_exchange_{0};
  std::atomic<uint64_t> sent_exchanges_{0};  // to every peer, in full
  std::atomic<uint64_t> slow_waits_{0};

  mutable std::mutex status_mutex_;
  std::optional<Error> failure_;
  std::optional<int64_t> failure_run_;
  uint32_t failure_culprit_ = kNobody;
  bool failure_heard_ = false;  // from a peer
  std::optional<Error> data_error_;
  int64_t data_error_run_ = 0;
  struct DeferredRaise {
    Error error;
    int64_t seen;                    // the execution in which the flag came
    std::optional<int64_t> returns;  // the one that returns it
  };
  std::optional<DeferredRaise> deferred_raise_;
  uint32_t data_error_culprit_ = kNobody;
  std::atomic<bool> failed_{false};
  std::atomic<int64_t> current_run_{-1};

  std::atomic<bool> connected_{false};
  std::atomic<bool> closed_{false};
  std::unique_ptr<Monitor> monitor_;
};

// What Exchange::poll() remembers of a wait from one look to the next.
struct Patience {
  Clock::time_point since = Clock::now();
  Presence presence;
  unsigned looks = 0;
  bool warned = false;
};

// One exchange: pack and post a message to every rank, wait for everybody's, read them. Holds the group, but
// not between park() and the constructor that takes its ticket.
class Exchange {
 public:
  // Takes the next number. `run` tells executions apart. The group fails if the exchange `depth` before this
  // one, or an older one, is still parked.
  Exchange(ExchangeGroup& group, const CallSite& site, uint32_t round, int64_t run);
  // Takes up an exchange where park() left it. Throws kInvalidArgument when there is none of this ticket,
  // site and run: it was resumed before, or belongs to another program.
  Exchange(ExchangeGroup& group, const CallSite& site, uint64_t ticket, int64_t run, bool* poisoned);
  ~Exchange();
  Exchange(const Exchange&) = delete;
  Exchange& operator=(const Exchange&) = delete;

  // Room for a message of `bytes` (header included) to `peer`; the body starts after the RegionHeader.
  // nullptr once the group has failed. Only where the buffers are readable.
  std::byte* message(uint32_t peer, size_t bytes);
  // The same for a message that lies in the send buffer already, at peer * region_bytes. The caller knows
  // that the send buffer was free to be packed.
  std::byte* packed(uint32_t peer, size_t bytes);
  // Posts the message last asked for. `slots` goes into its header.
  void post(uint32_t slots, bool poisoned = false);
  // All is posted; returns the ticket, never 0. `poisoned` is kept for the constructor that resumes.
  uint64_t park(bool poisoned);

  // True when every rank's message is here and checked. False: the group has failed.
  bool wait();
  // For threads that must not wait: looks once whether all is here and has left, or the group has failed, so
  // that wait() returns at once. ExchangeGroup::progress() brings it about.
  bool poll(Patience& patience);
  const RegionHeader& header(uint32_t source) const;
  const std::byte* body(uint32_t source) const;  // where the regions are readable
  size_t body_bytes(uint32_t source) const;
  bool poisoned(uint32_t source) const { return (header(source).flags & kPoisoned) != 0; }
  // After wait(): an error to return to XLA on every rank, because one of them has an old data error. Of an
  // exchange that was parked it is kept for the next execution.
  std::optional<Error> raised();
  // The message of `source` breaks the protocol: fails the group.
  void reject(uint32_t source, const std::string& why);

 private:
  void finish_abandoned(int64_t run);
  // Drives progress until `ready()`; false when the deadline, or `most` after the start, has passed without
  // it.
  template <typename Ready>
  bool await(const Ready& ready, Duration most = Duration::max());
  void note_sent();
  void echo(RegionHeader& header) const;
  bool wait_for_arrivals(bool checked);
  bool here(uint32_t source) const;
  void read_news(const std::vector<uint32_t>& missing);
  void warn_of(uint32_t missing);
  void give_up(const std::vector<uint32_t>& missing);
  bool check(uint32_t source);
  // One write with the lane's immediate, of those that a message to message_peer_ consists of.
  void write(const Region& source, size_t offset, const RemoteRegion& target, size_t target_offset,
             size_t bytes);
  void write_message();
  Deadline deadline() const;
  std::string describe() const;

  ExchangeGroup& group_;
  bool met_ = false;  // another thread that was in an exchange; before the lock, which sets it
  std::unique_lock<std::mutex> lock_;
  CallSite site_;
  uint32_t round_;
  uint64_t number_ = 0;
  uint32_t lane_ = 0;
  bool first_call_ = false;
  bool resumed_ = false;
  bool unfinished_ = false;  // has a number that peers count on
  uint8_t raise_ = 0;        // kRaise, the same to every peer whatever happens meanwhile
  uint32_t raise_culprit_ = 0;
  Clock::time_point started_;
  size_t staged_ = 0;  // bytes of the send buffer in use
  uint32_t message_peer_ = 0;
  std::byte* message_ = nullptr;
  size_t message_bytes_ = 0;
};

}  // namespace pplx::moe
