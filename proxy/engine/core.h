// The engine behind TransferEngine. Everything marked "locked" is guarded by the progress lock: one thread at
// a time talks to the fabric. A thread that finds the lock taken leaves its operation in the submission
// queue, which the holder empties before and after it lets go.
#pragma once

#include <array>
#include <deque>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "proxy/bytes.h"
#include "proxy/engine/backoff.h"
#include "proxy/engine/cores.h"
#include "proxy/engine/engine.h"
#include "proxy/engine/imm_table.h"
#include "proxy/engine/op.h"
#include "proxy/engine/sinks.h"
#include "proxy/fabric/fabric.h"
#include "proxy/process.h"

namespace pplx {

class RegionImpl;
class GroupImpl;
struct RemoteRegionImpl;

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

  // memory.cc
  std::shared_ptr<Region> register_memory(void* data, size_t size, std::shared_ptr<void> keepalive);
  std::shared_ptr<Region> allocate(size_t size);
  void unregister(RegionImpl& region) noexcept;
  std::shared_ptr<RemoteRegion> open(const RegionDescriptor& descriptor);

  // transfer.cc
  void write(const WriteRequest& request, CompletionSink* sink);
  void scatter(const Region& source, std::span<const ScatterEntry> entries, std::optional<uint32_t> imm,
               CompletionSink* sink);
  void write_callback(const WriteRequest& request, CallbackThread::Callback done);

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
  struct Peer {
    std::string label;
    OpQueue pending;  // not yet taken by the fabric
    OpList posted;
    std::optional<Error> failed;  // set once, for good: an engine that restarts has a new address
    uint32_t next_rail = 0;
    bool listed = false;    // in pending_peers_
    uint32_t messages = 0;  // send buffers that it holds
  };
  struct Outgoing {
    uint32_t peer;
    Bytes bytes;
    CompletionSink* sink;
  };
  class Locked;  // holds the progress lock; may block for it

  void unlock();  // and sees to what was submitted meanwhile
  void kick();    // empties the submission queue if nobody holds the lock
  bool try_lock();
  size_t poll_locked();
  void run_worker();
  void maintain();  // locked; timeouts and dead peers
  void require_open() const;

  // Locked from here on.
  void drain();
  void submit(Op* op);
  void split(Op* op);
  void enqueue(Peer& peer, Op* op);
  bool post(Peer& peer, Op* op);
  void post_pending();
  void finish(Op* op, const Error* error);
  void notify(Op* op, const Error* error);
  void notify_split(Op* op, const Error* error);
  void recycle(Op* op);
  void abandon(Peer& peer, Op* op, const Error& error);
  void fail_peer(Peer& peer, const Error& error);
  Error explain(const Op& op, const Error& error) const;
  uint32_t connect(const Bytes& address);
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
  std::unique_ptr<Fabric> fabric_;
  FabricCaps caps_;
  std::string fabric_name_;
  Address address_;

  ProgressLock lock_;
  std::atomic<std::thread::id> holder_{};
  std::atomic<uint32_t> blocked_{0};  // threads waiting for the lock; pollers stand back for them
  SubmissionQueue submissions_;
  std::atomic<bool> closing_{false};
  std::atomic<bool> close_done_{false};
  bool fabric_closed_ = false;  // locked

  OpPool pool_;  // locked
  std::mutex shared_pool_mutex_;
  OpPool shared_pool_;
  std::deque<Peer> peers_;  // locked
  std::map<Bytes, uint32_t, BytesLess> peer_numbers_;
  std::vector<uint32_t> pending_peers_;
  std::atomic<uint64_t> outstanding_{0};  // with the fabric; written locked
  std::unordered_set<RegionImpl*> regions_;
  ImmTable immediates_;
  size_t user_values_ = 0;

  FabricMemory send_memory_;
  Bytes send_bytes_;
  std::vector<uint32_t> free_slots_;
  std::deque<Outgoing> outgoing_;
  std::mutex inbox_mutex_;
  std::deque<Message> inbox_;
  std::atomic<size_t> inbox_size_{0};
  using GroupKey = std::pair<uint64_t, uint32_t>;  // what the group is, and the how manieth of its kind
  std::map<uint64_t, uint32_t> group_generations_;
  std::map<GroupKey, std::weak_ptr<GroupImpl>> groups_;
  std::map<GroupKey, std::map<Bytes, uint64_t, BytesLess>> early_barriers_;  // of groups not yet made here

  struct Counters {
    std::atomic<uint64_t> writes{0}, write_bytes{0}, sends{0}, receives{0}, immediates{0},
        unknown_immediates{0}, errors{0}, polls{0}, backpressure{0};
  } counters_;
  std::atomic<uint32_t> tick_{0};           // milliseconds since the start, coarsely
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

class RegionImpl final : public Region {
 public:
  RegionImpl(std::shared_ptr<EngineCore> core, const FabricMemory& memory, RegionDescriptor descriptor,
             std::shared_ptr<void> keepalive)
      : core_(std::move(core)),
        memory_(memory),
        descriptor_(std::move(descriptor)),
        keepalive_(std::move(keepalive)) {}
  ~RegionImpl() override { core_->unregister(*this); }
  std::byte* data() const noexcept override { return memory_.data; }
  size_t size() const noexcept override { return memory_.size; }
  const RegionDescriptor& descriptor() const noexcept override { return descriptor_; }
  const FabricMemory& memory() const noexcept { return memory_; }
  const EngineCore* core() const noexcept { return core_.get(); }

 private:
  std::shared_ptr<EngineCore> core_;
  FabricMemory memory_;
  RegionDescriptor descriptor_;
  std::shared_ptr<void> keepalive_;
};

struct RemoteRegionImpl final : RemoteRegion {
  size_t size() const noexcept override { return length; }
  const EngineCore* core = nullptr;
  uint32_t peer = 0;
  uint64_t base = 0;
  uint64_t key = 0;
  size_t length = 0;
};

}  // namespace pplx
