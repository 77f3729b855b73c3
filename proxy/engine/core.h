// The engine behind TransferEngine. Everything marked "locked" is guarded by the progress lock: one thread at
// a time talks to the fabric. A thread that finds the lock taken leaves its operation in the submission
// queue, which the holder empties before and after it lets go.
#pragma once

#include <array>
#include <deque>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "proxy/bytes.h"
#include "proxy/engine/backoff.h"
#include "proxy/engine/cores.h"
#include "proxy/engine/engine.h"
#include "proxy/engine/gpu_writes.h"
#include "proxy/engine/imm_table.h"
#include "proxy/engine/nic.h"
#include "proxy/engine/op.h"
#include "proxy/engine/sinks.h"
#include "proxy/engine/timeline.h"
#include "proxy/process.h"

namespace pplx {

class Doubts;
class GroupImpl;
class PoolImpl;
class Pools;
class RegionImpl;
class WatchImpl;
class Whole;

// Of the messages between engines.
enum MessageType : uint8_t {
  kUser = 1,
  kBarrier = 2,
  kHello = 3,
  kWelcome = 4,
  kPoolAnnounce = 5,
  kPoolGrant = 6,
  kPoolFilled = 7,
  kPoolTaken = 8,
  kPoolRefused = 9,
  kAsk = 10,
  kVerdict = 11,
  kPoolReturned = 12,
};

// A lock that costs one atomic exchange each way: it is taken and released at every write and every poll.
class ProgressLock {
 public:
  bool try_lock() {
    return !held_.load(std::memory_order_relaxed) && !held_.exchange(true, std::memory_order_acquire);
  }
  void lock() {
    for (unsigned idle = 0; !try_lock();) back_off(idle++);
  }
  // Ordered before whatever the holder looks at next, the submission queue above all.
  void unlock() { held_.exchange(false, std::memory_order_seq_cst); }

 private:
  std::atomic<bool> held_{false};
};

class EngineCore final : public FabricEvents, public std::enable_shared_from_this<EngineCore> {
 public:
  explicit EngineCore(const EngineConfig& config);
  ~EngineCore();
  void start();
  void close();
  bool closed() const noexcept { return closing_.load(std::memory_order_acquire); }
  void require_own_process() const { mark_.require("the TransferEngine"); }
  bool forked() const noexcept { return mark_.forked(); }

  const EngineConfig& config() const noexcept { return config_; }
  const Address& address() const noexcept { return address_; }
  const std::string& fabric_name() const noexcept { return fabric_name_; }
  EngineStats stats() const;

  EngineDetails details();
  void start_timeline(size_t events);
  void stop_timeline();
  std::string timeline();

  // memory.cc
  using Register = std::function<FabricMemory(Fabric&)>;  // with one NIC
  std::shared_ptr<Region> register_memory(void* data, size_t size, const Register& with_nic,
                                          std::shared_ptr<void> keepalive);
  std::shared_ptr<Region> register_memory(const DeviceMemory& memory, std::shared_ptr<void> keepalive);
  std::shared_ptr<Region> allocate(size_t size);
  void unregister(RegionImpl& region) noexcept;
  void release(const std::array<FabricMemory, kMaxNics>& memories) noexcept;  // locked
  std::shared_ptr<RemoteRegion> open(const RegionDescriptor& descriptor);
  std::shared_ptr<GroupRegions> open(PeerGroup& group, std::span<const RegionDescriptor> descriptors);

  // requests.cc
  void write(const WriteRequest& request, CompletionSink* sink);
  void read(const ReadRequest& request, CompletionSink* sink);
  void paged_write(const PagedWriteRequest& request, CompletionSink* sink);
  void scatter(const Region& source, std::span<const ScatterEntry> entries, std::optional<uint32_t> imm,
               CompletionSink* sink);
  void scatter(const Region& source, const GroupRegions& targets, std::span<const GroupEntry> entries,
               std::optional<uint32_t> imm, CompletionSink* sink);
  void write_callback(const WriteRequest& request, CallbackThread::Callback done);
  uint64_t new_id() noexcept { return next_id_.fetch_add(1, std::memory_order_relaxed); }
  size_t cancel(uint64_t id);
  void check(const PreparedWrite& write) const;

  // nics.cc
  size_t shards() const noexcept { return nics_.size(); }
  bool takes_device_memory() const noexcept { return device_memory_; }
  void remove_nic(size_t index);
  bool remove_peer(const Address& address);

  // watch.cc
  std::shared_ptr<WatchWord> watch_word(WatchConfig config);
  void unwatch(WatchImpl& word) noexcept;

  // pools.cc
  std::shared_ptr<ReceivePool> receive_pool(PoolConfig config);
  std::shared_ptr<RemotePool> open(const PoolDescriptor& descriptor);
  void send(const RemotePool& pool, std::shared_ptr<const Region> source, size_t offset, size_t length,
            CompletionSink* sink);

  // messages.cc
  size_t max_message() const noexcept;
  std::future<void> send(const Address& to, std::span<const std::byte> payload);
  Message recv(std::optional<Duration> timeout);
  std::shared_ptr<PeerGroup> peer_group(const std::vector<Address>& members, uint32_t id);
  void barrier(PeerGroup& group, std::optional<Duration> timeout);

  // immediates.cc
  ImmCounter imm_counter(uint32_t imm);
  ImmCounter watch(uint32_t imm);
  void unwatch(uint32_t imm);
  void release_immediate(uint32_t imm);
  void when(const ImmCounter& counter, uint64_t n, CompletionSink* sink, uint64_t id);
  void when_message(CompletionSink* sink, uint64_t id);

  size_t progress();
  template <typename Ready>
  bool wait(Ready&& ready, Deadline deadline) {
    for (unsigned idle = 0; !ready();) {
      if (progress() != 0) {
        idle = 0;
        continue;
      }
      if (ready()) return true;
      if (Clock::now() >= deadline) return false;
      back_off(idle++);
    }
    return true;
  }
  Deadline deadline(std::optional<Duration> timeout) const;

 private:
  friend class Doubts;
  friend class PoolImpl;
  friend class Pools;
  friend class WatchImpl;
  friend class Whole;
  struct Outgoing {
    uint32_t peer;
    Bytes bytes;
    CompletionSink* sink;
    uint32_t stamp;  // the engine's tick
  };
  class Locked;  // holds the progress lock; may block for it

  void unlock();  // and sees to what was submitted meanwhile
  void kick();    // empties the submission queue if nobody holds the lock
  bool try_lock();
  size_t poll_locked();
  void run_worker();
  void maintain();  // locked; timeouts and dead peers
  void require_open() const;

  // An operation straight to the fabric if nobody holds the lock, otherwise through the submission queue.
  template <typename Fill>
  void post_or_queue(Fill&& fill) {
    uint32_t tick = tick_.load(std::memory_order_relaxed);
    if (try_lock()) {
      if (fabric_closed_) {
        unlock();
        require_open();
      }
      Op* op = pool_.take();
      fill(*op, tick);
      submit(op);
      unlock();
      return;
    }
    Op* op;
    {
      std::lock_guard lock(shared_pool_mutex_);
      op = shared_pool_.take();
    }
    fill(*op, tick);
    op->shared = true;
    submissions_.push(op);
    kick();
  }

  // Locked from here on; transfer.cc.
  void drain();
  Op* make_write(const WriteRequest& request, CompletionSink* sink);
  void submit(Op* op);
  void place(Op* op);
  void split_over_shards(Op* op);
  void split_by_bytes(Op* op);
  void enqueue(Peer& peer, Op* op);
  bool post(Peer& peer, Op* op);
  void post_pending();
  void finish(Op* op, const Error* error);
  void notify(Op* op, const Error* error);
  void recycle(Op* op);
  void taken_back_by_fabric(Peer& peer, Op* op);
  void abandon(Peer& peer, Op* op, const Error& error);
  void give_back(Op* op);
  void end_with_peer(Peer& peer, Op* op, const Error& error);
  void record(const Op& op, bool failed);
  Error explain(const Op& op, const Error& error) const;

  // nics.cc
  void add_nics();
  uint32_t connect(const Bytes& address);
  void route(Op& op, Peer& peer);
  void refresh(Peer& peer);
  bool retry(Op* op);
  static bool is_stuck(const Peer& peer, Path& path, const Op* oldest, uint32_t now, uint32_t limit);
  void lose_path(Peer& peer, uint16_t path, const Error& error);
  void lose_nic(size_t index, const Error& error);
  void lose_failing_nics();
  void fail_peer(Peer& peer, const Error& error);
  void disconnect_removed();
  void greet(uint32_t peer, uint8_t type);
  void answer_greetings();

  size_t look_at_words();
  void tell_message_waiters(const Error* error);
  template <typename Wanted>
  size_t wake(ImmState& state, const Error* error, Wanted&& wanted);
  bool forget(uint32_t imm);
  size_t cancel_waiters(uint64_t id, const Error& error);
  void close_waiters(const Error& error);

  void fail_late_messages(uint32_t now, uint32_t limit);
  void add_send_buffers();
  void relieve_messages(uint32_t now);
  bool first_time(const Bytes& from, uint64_t number);
  void flush_messages();
  void queue_message(uint32_t peer, Bytes bytes, CompletionSink* sink);
  Bytes message_header(uint8_t type) const;
  void receive_user(Message message);
  void receive_barrier(const Bytes& from, uint64_t hash, uint32_t generation, uint64_t number);

  void on_complete(FabricOp& op, const Error* error) override;
  void on_immediate(uint32_t imm) override;
  void on_message(std::span<const std::byte> message) override;
  void on_error(const Error& error) override;
  void on_down(const Error& error) override;

  const ProcessMark mark_;
  const EngineConfig config_;
  std::vector<Nic> nics_;
  size_t polling_ = 0;  // the NIC whose fabric reports
  size_t max_message_ = 0, max_write_ = 0, split_above_ = 0;
  bool delivery_complete_ = true, reads_ = true, device_memory_ = true, mutual_ = false;  // of all NICs
  bool failing_ = false;                                                                  // one of nics_ is
  std::string fabric_name_;
  PeerAddress self_;
  Address address_;

  ProgressLock lock_;
  std::atomic<std::thread::id> holder_{};
  std::atomic<uint32_t> blocked_{0};  // threads waiting for the lock; pollers stand back for them
  SubmissionQueue submissions_;
  std::atomic<bool> closing_{false};
  std::atomic<bool> close_done_{false};
  bool fabric_closed_ = false;  // locked

  GpuWrites gpu_writes_;  // locked

  OpPool pool_;  // locked
  std::mutex shared_pool_mutex_;
  OpPool shared_pool_;
  std::deque<Peer> peers_;  // locked
  std::map<Bytes, uint32_t, BytesLess> peer_numbers_;
  std::vector<uint32_t> removed_;                             // peers that fabrics have not forgotten yet
  std::vector<std::shared_ptr<const Region>> given_back_;     // to be dropped without the lock
  std::vector<std::pair<uint32_t, uint16_t>> pending_paths_;  // of which peer, which path
  std::vector<std::pair<Bytes, uint8_t>> greetings_;          // that came and are not yet answered
  std::atomic<uint64_t> outstanding_{0};                      // with the fabrics; written locked
  std::atomic<uint64_t> next_id_{1};
  std::unordered_multimap<uint64_t, Whole*> wholes_;  // of those with an id, what waits for its other parts
  std::unordered_set<RegionImpl*> regions_;
  ImmTable immediates_;
  size_t user_values_ = 0;

  std::vector<Bytes> send_chunks_;  // kSendSlots buffers each
  std::vector<uint32_t> free_slots_;
  std::optional<uint32_t> no_chunk_;  // tick at which adding one failed last
  std::deque<Outgoing> outgoing_;
  std::mutex inbox_mutex_;
  std::deque<Message> inbox_;
  std::atomic<size_t> inbox_size_{0};
  using GroupKey = std::pair<uint64_t, uint32_t>;  // what the group is, and the how manieth of its kind
  std::map<uint64_t, uint32_t> group_generations_;
  std::map<GroupKey, std::weak_ptr<GroupImpl>> groups_;
  std::map<GroupKey, std::map<Bytes, uint64_t, BytesLess>> early_barriers_;  // of groups not yet made here
  size_t early_notices_ = 0;                                                 // in all of them
  // Numbers of messages that have come from a sender that may repeat some: all up to `floor`, and `above`.
  struct Seen {
    uint64_t floor = 0;
    std::set<uint64_t> above;
  };
  std::map<Bytes, Seen, BytesLess> seen_;

  struct MessageWaiter {
    CompletionSink* sink;
    uint64_t id;
  };
  std::vector<MessageWaiter> message_waiters_;
  std::vector<std::shared_ptr<ImmState>> waited_for_;  // with waits by when()
  std::vector<std::shared_ptr<WatchImpl>> words_;
  std::atomic<bool> spin_for_words_{false};
  std::atomic<size_t> watching_{0};  // words, and waits that nobody's thread drives
  std::unique_ptr<Pools> pools_;
  std::unique_ptr<Doubts> doubts_;
  std::unique_ptr<Timeline> timeline_;  // being recorded
  std::unique_ptr<Timeline> recorded_;  // the last one

  struct Counters {
    std::atomic<uint64_t> writes{0}, write_bytes{0}, sends{0}, receives{0}, immediates{0},
        unknown_immediates{0}, errors{0}, polls{0}, backpressure{0}, reads{0}, read_bytes{0}, retries{0},
        cancelled{0};
  } counters_;
  std::atomic<uint32_t> tick_{0};           // milliseconds that this process ran since the start, coarsely
  std::atomic<uint64_t> foreign_polls_{0};  // by threads other than the worker
  const Deadline started_ = Clock::now();

  CallbackThread callbacks_;
  std::optional<CoreClaim> core_claim_;
  std::atomic<int> worker_core_{EngineConfig::kAnyCore};
  std::thread worker_;
};

class EngineCore::Locked {
 public:
  explicit Locked(EngineCore& core) : core_(core) {
    // A completion sink that drops the last handle of a region comes here with the lock held.
    nested_ = core.holder_.load(std::memory_order_relaxed) == std::this_thread::get_id();
    if (nested_) return;
    core.blocked_.fetch_add(1);
    core.lock_.lock();
    core.blocked_.fetch_sub(1);
    core.holder_.store(std::this_thread::get_id(), std::memory_order_relaxed);
  }
  ~Locked() {
    if (!nested_) core_.unlock();
  }
  Locked(const Locked&) = delete;
  Locked& operator=(const Locked&) = delete;

 private:
  EngineCore& core_;
  bool nested_;
};

// Adds to a counter that only the holder of the progress lock writes.
inline void bump(std::atomic<uint64_t>& counter, uint64_t by = 1) {
  counter.store(counter.load(std::memory_order_relaxed) + by, std::memory_order_relaxed);
}

}  // namespace pplx
