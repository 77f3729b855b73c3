// TransferEngine: one-sided writes with counted immediates over any fabric, never relying on order.
//
// One engine drives one domain group: the NICs (endpoints) of one accelerator. A worker thread makes
// progress when nobody else does; a thread that waits drives progress itself, so that a wait costs no
// hand-over between threads and a machine with fewer cores than threads still makes headway.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <future>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "proxy/engine/types.h"

namespace pplx {

class TransferEngine {
 public:
  explicit TransferEngine(const EngineConfig& config);
  ~TransferEngine();  // close()
  TransferEngine(const TransferEngine&) = delete;
  TransferEngine& operator=(const TransferEngine&) = delete;

  const EngineConfig& config() const noexcept;
  std::string fabric_name() const;  // e.g. "libfabric:tcp 1.17"
  const Address& address() const noexcept;

  std::shared_ptr<Region> register_memory(void* data, size_t size, std::shared_ptr<void> keepalive = nullptr);
  // GPU memory, where the NICs reach it (GPUDirect RDMA); otherwise kFabric. Not readable through data().
  std::shared_ptr<Region> register_memory(const DeviceMemory& memory,
                                          std::shared_ptr<void> keepalive = nullptr);
  // Whether it is worth trying: the providers of all NICs know of GPU memory.
  bool takes_device_memory() const noexcept;
  std::shared_ptr<Region> allocate(size_t size);  // zeroed, page-aligned, registered

  // Connects to the owner (if new) and resolves the descriptor. Malformed bytes: kInvalidArgument.
  std::shared_ptr<RemoteRegion> open(const RegionDescriptor& descriptor);

  // Posts; never blocks on the network: what the NIC does not take at once is queued and posted by
  // progress. Ranges are checked (kInvalidArgument). `sink` must outlive the completion; may be null.
  void write(const WriteRequest& request, CompletionSink* sink = nullptr);
  std::future<void> write_future(const WriteRequest& request);
  // `done` runs on the callback thread, never on the worker, with null on success. Exceptions are logged.
  void write_callback(const WriteRequest& request, std::function<void(const Error*)> done);

  // Reads a peer's bytes into a region of ours. kFabric where the provider cannot read.
  void read(const ReadRequest& request, CompletionSink* sink = nullptr);
  std::future<void> read_future(const ReadRequest& request);

  // Pages from one region into pages of another; one completion in all. Pages that follow each other on both
  // sides go together.
  void paged_write(const PagedWriteRequest& request, CompletionSink* sink = nullptr);

  // One source, many targets; the same immediate to each. One completion an entry.
  void scatter(const Region& source, std::span<const ScatterEntry> entries, std::optional<uint32_t> imm,
               CompletionSink* sink = nullptr);

  // The same to members of a group, whose regions are resolved already.
  std::shared_ptr<GroupRegions> open(PeerGroup& group, std::span<const RegionDescriptor> descriptors);
  void scatter(const Region& source, const GroupRegions& targets, std::span<const GroupEntry> entries,
               std::optional<uint32_t> imm, CompletionSink* sink = nullptr);

  // A new id for WriteRequest.id and the like.
  uint64_t new_id() noexcept;
  // Takes back whatever of the operations with this id the provider does not have yet, and waits for their
  // parts that it has: their completions say kCancelled. Returns how many parts were taken back; 0: all had
  // begun, and they end as usual. Waits that when() registered end as well.
  size_t cancel(uint64_t id);

  // The parts of a write with imm_per_shard: the NICs that the engine began with.
  size_t shards() const noexcept;
  // Takes a NIC out, as if it had failed; throws kInvalidArgument for the last one that works.
  void remove_nic(size_t index);
  // Ends what is under way to a peer that has gone, with kPeer, and forgets it; it is not told. False:
  // nothing was known of it. Remote regions and groups of it stay failed; opening a new descriptor meets it
  // anew.
  bool remove_peer(const Address& address);

  // `sink` is told once, when `counter` has reached `n` (maybe at once), or with kClosed or kCancelled.
  void when(const ImmCounter& counter, uint64_t n, CompletionSink* sink, uint64_t id = 0);
  // The same when a message waits for recv().
  void when_message(CompletionSink* sink, uint64_t id = 0);

  // Throws kInvalidArgument.
  std::shared_ptr<WatchWord> watch_word(WatchConfig config);

  std::shared_ptr<ReceivePool> receive_pool(PoolConfig config);
  std::shared_ptr<RemotePool> open(const PoolDescriptor& descriptor);
  // Completes when the bytes are in one of the pool's buffers. kFabric: refused there, as too many wait.
  void send(const RemotePool& pool, std::shared_ptr<const Region> source, size_t offset, size_t length,
            CompletionSink* sink);

  // Two-sided messages for control traffic, at most max_message() bytes, queued at the receiver in arrival
  // order (at most 4096 unread; more are an error at the receiver and counted).
  size_t max_message() const noexcept;
  std::future<void> send(const Address& to, std::span<const std::byte> payload);
  Message recv(std::optional<Duration> timeout = std::nullopt);

  ImmCounter imm_counter(uint32_t imm);  // a user value (top bit clear)
  // Frees the place of a user value that is done: waits for it end with kClosed, handles keep their count,
  // and what arrives later counts from 0 again (and takes a place again). Nothing happens if there is none.
  void release_immediate(uint32_t imm);
  ImmCounter watch(uint32_t imm);  // a reserved value; counts from 0
  void unwatch(uint32_t imm);

  std::shared_ptr<PeerGroup> peer_group(const std::vector<Address>& members, uint32_t id);
  void barrier(PeerGroup& group, std::optional<Duration> timeout = std::nullopt);

  // Polls once if no other thread is at it; returns the number of events handled.
  size_t progress();
  // Drives progress until `ready()` or the deadline; spins, then yields, then sleeps. Returns ready().
  template <typename Ready>
  bool wait_until(Ready&& ready, Deadline deadline) {
    for (unsigned idle = 0; !ready();) {
      if (progress() != 0) {
        idle = 0;
        continue;
      }
      if (ready()) return true;
      if (Clock::now() >= deadline) return false;
      relax(idle++);
    }
    return true;
  }

  EngineStats stats() const;
  EngineDetails details() const;  // takes the engine's lock

  // Records what the engine does, the latest `events` of it, until stop_timeline(). Off by default.
  void start_timeline(size_t events);
  void stop_timeline();
  // What was recorded as Chrome-trace JSON, which opens in Perfetto; "{...}" without events if nothing was.
  std::string timeline() const;
  // Idempotent. Fails outstanding operations and waits with kClosed, stops the threads, closes the
  // endpoints. Memory of live Region handles stays valid but is no longer registered.
  void close();
  bool closed() const noexcept;
  // In a forked child everything above throws kFabric, and closing does nothing.
  bool forked() const noexcept;
  void require_own_process() const;

 private:
  static void relax(unsigned idle);  // the back-off of wait_until; yields early where cores are scarce
  std::shared_ptr<EngineCore> core_;
};

}  // namespace pplx
