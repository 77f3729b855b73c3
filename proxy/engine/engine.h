// TransferEngine: one-sided writes with counted immediates over any fabric, never relying on order.
//
// One engine drives one domain group: the NICs (endpoints) of one accelerator. A worker thread makes
// progress when nobody else does; a thread that waits drives progress itself, so that a wait costs no
// hand-over between threads and a machine with fewer cores than threads still makes headway.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <future>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "proxy/error.h"

namespace pplx {

using Bytes = std::vector<std::byte>;
using Clock = std::chrono::steady_clock;
using Duration = std::chrono::nanoseconds;
using Deadline = Clock::time_point;

// What the simulated fabric does to traffic. Everything follows from `seed`; all off is plain memcpy
// delivery.
struct SimConfig {
  uint64_t seed = 0;
  std::string network = "default";  // engines of one process meet when their network names are equal
  bool reorder = false;             // deliver pending writes, and the pieces of one write, in any order
  uint32_t max_delay = 0;           // a piece waits up to this many polls of its target before it lands
  uint32_t max_pieces = 1;          // a write's bytes land in up to this many pieces
  uint32_t stall_every = 0;         // about one poll in this many delivers nothing for `stall_polls` polls
  uint32_t stall_polls = 64;
  uint32_t queue_depth = 4096;  // outstanding operations an endpoint accepts before it pushes back
  uint64_t max_write = 0;       // longest write taken in one operation, longer ones are split; 0: any
  bool mutual = false;          // writes and reads of whoever the target has not connected to are refused
};

struct EngineConfig {
  // "local" (in process, memcpy), "sim" (in process, disordered by `sim`), "tcp", "shm", or any libfabric
  // provider name with RDM endpoints and RMA ("tcp;ofi_rxm", "efa", ...).
  std::string fabric = "local";
  int endpoints = 1;         // endpoints a peer; > 1 sprays writes, so that immediates arrive out of order
  std::string bind_address;  // IP address the socket providers listen on; empty: loopback only
  std::string nic;           // name of the libfabric domain to open; empty: the first that fits
  static constexpr int kOwnCore = -1;           // one of its own where there are cores for it: see cores.h
  static constexpr int kAnyCore = -2;           // not pinned
  int cpu = kOwnCore;                           // core to pin the worker to
  Duration timeout = std::chrono::seconds(30);  // default of every wait below
  SimConfig sim;
};

// Where a peer can be reached: opaque bytes, equal and hashable by value. Parsing checks every length.
class Address {
 public:
  Address() = default;
  explicit Address(Bytes bytes) : bytes_(std::move(bytes)) {}
  const Bytes& bytes() const noexcept { return bytes_; }
  bool operator==(const Address&) const = default;

 private:
  Bytes bytes_;
};

// A remote region as its owner describes it (address, base, length, one key a domain): opaque bytes.
class RegionDescriptor {
 public:
  RegionDescriptor() = default;
  explicit RegionDescriptor(Bytes bytes) : bytes_(std::move(bytes)) {}
  const Bytes& bytes() const noexcept { return bytes_; }
  bool operator==(const RegionDescriptor&) const = default;

 private:
  Bytes bytes_;
};

// Where completions go. `complete` runs on whichever thread makes progress, under the engine's lock: it
// must neither block nor call the engine. `error` is null on success.
class CompletionSink {
 public:
  virtual void complete(const Error* error) noexcept = 0;

 protected:
  ~CompletionSink() = default;
};

// Counts completions; cumulative, never reset. The first error is kept.
class CompletionCounter final : public CompletionSink {
 public:
  CompletionCounter();
  ~CompletionCounter();
  void complete(const Error* error) noexcept override;
  uint64_t done() const noexcept;  // successes and failures together
  uint64_t failed() const noexcept;
  std::optional<Error> error() const;  // the first failure

 private:
  struct State;
  std::unique_ptr<State> state_;
};

class EngineCore;
struct ImmState;

// Counts arrived immediates of one value: 64 bits, cumulative, never reset. Counted only after the bytes
// of the write that carried it are visible. Handles to one value share one count.
class ImmCounter {
 public:
  uint64_t value() const noexcept;
  // Blocks until the count is at least `n`, driving progress meanwhile. Throws kTimeout (naming value and
  // count), kClosed.
  void wait(uint64_t n, std::optional<Duration> timeout = std::nullopt) const;

 private:
  friend class EngineCore;
  std::shared_ptr<ImmState> state_;
};

// Registered memory. Unregistered when the last handle goes; `keepalive` lives as long. Keep the handle of a
// source until its writes have completed.
class Region {
 public:
  virtual ~Region() = default;
  virtual std::byte* data() const noexcept = 0;
  virtual size_t size() const noexcept = 0;
  virtual const RegionDescriptor& descriptor() const noexcept = 0;
};

// A descriptor resolved once: what the hot path writes to.
class RemoteRegion {
 public:
  virtual ~RemoteRegion() = default;
  virtual size_t size() const noexcept = 0;
};

struct WriteRequest {
  const Region* source = nullptr;  // may be null when length is 0
  size_t source_offset = 0;
  const RemoteRegion* target = nullptr;
  size_t target_offset = 0;
  size_t length = 0;
  std::optional<uint32_t> imm;  // delivered once, after all bytes are visible
};

struct ScatterEntry {
  size_t source_offset = 0;
  std::shared_ptr<const RemoteRegion> target;
  size_t target_offset = 0;
  size_t length = 0;
};

struct Message {
  Address from;
  Bytes payload;
};

struct EngineStats {
  uint64_t writes = 0, write_bytes = 0, sends = 0, receives = 0;
  uint64_t immediates = 0;          // arrived and counted
  uint64_t unknown_immediates = 0;  // arrived for a reserved value nobody watches; dropped
  uint64_t errors = 0, polls = 0, backpressure = 0;
  int worker_core = -1;  // that the worker is pinned to; -1: none
};

// A set of peers with a common barrier. Every member creates it with the same addresses in the same order
// and the same id; ids are never reused while a member lives.
class PeerGroup {
 public:
  virtual ~PeerGroup() = default;
  virtual size_t size() const noexcept = 0;
  virtual size_t rank() const noexcept = 0;
};

// Immediate values with the top bit set belong to exchange groups: they count only while watched
// (`watch`), so a late write of a closed group is dropped. All other values are the user's: they count from
// the first arrival on, whether or not anybody asked yet (at most 65536 different values). 0xFFFFFFFF is the
// engine's own and refused.
inline constexpr uint32_t kReservedImmediate = 0x8000'0000U;

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
  std::shared_ptr<Region> allocate(size_t size);  // zeroed, page-aligned, registered

  // Connects to the owner (if new) and resolves the descriptor. Malformed bytes: kInvalidArgument.
  std::shared_ptr<RemoteRegion> open(const RegionDescriptor& descriptor);

  // Posts; never blocks on the network: what the NIC does not take at once is queued and posted by
  // progress. Ranges are checked (kInvalidArgument). `sink` must outlive the completion; may be null.
  void write(const WriteRequest& request, CompletionSink* sink = nullptr);
  std::future<void> write_future(const WriteRequest& request);
  // `done` runs on the callback thread, never on the worker, with null on success. Exceptions are logged.
  void write_callback(const WriteRequest& request, std::function<void(const Error*)> done);

  // One source, many targets; the same immediate to each. One completion an entry.
  void scatter(const Region& source, std::span<const ScatterEntry> entries, std::optional<uint32_t> imm,
               CompletionSink* sink = nullptr);

  // Two-sided messages for control traffic, at most max_message() bytes, queued at the receiver in arrival
  // order (at most 4096 unread; more are an error at the receiver and counted).
  size_t max_message() const noexcept;
  std::future<void> send(const Address& to, std::span<const std::byte> payload);
  Message recv(std::optional<Duration> timeout = std::nullopt);

  ImmCounter imm_counter(uint32_t imm);  // a user value (top bit clear)
  ImmCounter watch(uint32_t imm);        // a reserved value; counts from 0
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
