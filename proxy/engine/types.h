// What TransferEngine takes and hands out: configuration, addresses, requests, handles, statistics.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "proxy/error.h"
#include "proxy/fabric/verbs_config.h"

namespace pplx {

struct CudaDriver;

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
  // Connections: immediates of one sender are reported in the order of its writes, and once one is lost, so
  // are all that follow. Then their fate can be found out when a NIC has failed.
  bool fences = false;
  uint32_t message_bytes = 16384;  // longest message
  uint32_t lose_messages = 0;      // so many of the first messages vanish on their way, unnoticed
  uint32_t leave_polls = 0;        // a peer that was removed is met again only up to this many polls later
  // How bytes get from one address to another, where one or both are a GPU's; with it GPU memory can be
  // registered. Null: it cannot, and bytes are copied by the CPU.
  std::function<void(void* to, const void* from, size_t bytes)> copy{};
};

// One of an engine's NICs.
struct NicConfig {
  std::string name;          // as EngineConfig.nic
  std::string bind_address;  // as EngineConfig.bind_address
};

struct EngineConfig {
  // "local" (in process, memcpy), "sim" (in process, disordered by `sim`), "tcp", "shm", or any libfabric
  // provider name with RDM endpoints and RMA ("tcp;ofi_rxm", "efa", ...).
  std::string fabric = "local";
  int endpoints = 1;         // endpoints a peer; > 1 sprays writes, so that immediates arrive out of order
  std::string bind_address;  // IP address the socket providers listen on; empty: loopback only
  std::string nic;           // name of the libfabric domain to open; empty: the first that fits
  // Up to 8 NICs that share the traffic; empty: one, of `nic` and `bind_address`.
  std::vector<NicConfig> nics;
  static constexpr int kOwnCore = -1;  // one of its own where there are cores for it: see cores.h
  static constexpr int kAnyCore = -2;  // not pinned
  int cpu = kOwnCore;                  // core to pin the worker to
  std::string near;  // with kOwnCore: the GPU (PCI bus id) or NIC to be near to; empty: the first NIC
  Duration timeout = std::chrono::seconds(30);  // default of every wait below
  // Engines with different tokens refuse each other. That keeps jobs apart; it is no secret to whoever
  // listens.
  std::string job;
  // How writes of NICs into GPU memory are made visible; null: the system's CUDA driver.
  std::shared_ptr<const CudaDriver> cuda;
  SimConfig sim;
  VerbsConfig verbs;
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
// must neither block nor call the engine. `error` is null on success. A sink outlives every operation that it
// was given to, also where an exception keeps its owner from waiting for them: the last end with close().
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

// GPU memory, as CUDA has it.
struct DeviceMemory {
  void* data = nullptr;
  size_t size = 0;
  int device = 0;      // CUDA's number
  int dmabuf_fd = -1;  // of an export that covers it, which stays the caller's; -1: the provider finds a way
  uint64_t dmabuf_offset = 0;
};

struct WriteRequest {
  const Region* source = nullptr;  // may be null when length is 0
  size_t source_offset = 0;
  const RemoteRegion* target = nullptr;
  size_t target_offset = 0;
  size_t length = 0;
  std::optional<uint32_t> imm{};  // delivered once, after all bytes are visible
  // The write goes in TransferEngine::shards() parts, empty ones included, and each delivers the immediate
  // once its own bytes are visible. A receiver that counts to the sender's shards() waits no round trip more.
  bool imm_per_shard = false;
  uint64_t id = 0;  // for cancel(); 0: cannot be taken back
};

struct ReadRequest {
  const Region* target = nullptr;  // here
  size_t target_offset = 0;
  const RemoteRegion* source = nullptr;
  size_t source_offset = 0;
  size_t length = 0;
  uint64_t id = 0;
};

// Page i begins at offset + pages[i] * stride, or at offset + i * stride without a list.
struct PageList {
  size_t offset = 0;
  size_t stride = 0;  // 0: the length of a page
  std::span<const uint64_t> pages;
};

struct PagedWriteRequest {
  const Region* source = nullptr;
  PageList source_pages{};
  const RemoteRegion* target = nullptr;
  PageList target_pages{};
  size_t count = 0;       // of pages
  size_t page_bytes = 0;  // of each
  // Delivered once for every `group` pages in the order of the lists (the last group may be shorter), after
  // all bytes of those pages are visible. 0: once for all of them. No pages are one empty group.
  std::optional<uint32_t> imm{};
  size_t group = 0;
  uint64_t id = 0;
};

struct ScatterEntry {
  size_t source_offset = 0;
  std::shared_ptr<const RemoteRegion> target;
  size_t target_offset = 0;
  size_t length = 0;
};

// One member's part of a scatter to a group.
struct GroupEntry {
  size_t rank = 0;
  size_t source_offset = 0;
  size_t target_offset = 0;
  size_t length = 0;
};

struct Message {
  Address from;
  Bytes payload;
};

struct EngineStats {
  uint64_t writes = 0, write_bytes = 0, sends = 0, receives = 0;
  uint64_t immediates = 0;  // arrived and counted
  // Arrived for a reserved value nobody watches, or for one user value too many; dropped.
  uint64_t unknown_immediates = 0;
  uint64_t errors = 0, polls = 0, backpressure = 0;
  int worker_core = -1;  // that the worker is pinned to; -1: none
  uint64_t reads = 0, read_bytes = 0;
  uint64_t retries = 0;    // operations that went over another NIC after one had failed
  uint64_t cancelled = 0;  // operations, or parts of them, that were taken back
};

// Times from posting to completion, in powers of two: bucket b counts those below 2^b ns and not below half
// of that. One operation in 64 is timed, all of them while a timeline is recorded.
struct LatencyHistogram {
  std::array<uint64_t, 40> buckets{};
  void add(uint64_t nanoseconds);
  uint64_t count() const;
  uint64_t quantile(double q) const;  // an upper bound in ns; 0 without samples
};

// Operations are counted as they are posted: the parts of a split one each.
struct Traffic {
  uint64_t writes = 0, write_bytes = 0, reads = 0, read_bytes = 0, messages = 0;
  uint64_t errors = 0;                   // completions with an error
  uint64_t outstanding = 0, queued = 0;  // with the provider; waiting for it to take them
};

struct NicStats {
  std::string name;                       // the fabric's
  std::string error;                      // why it was taken out; empty: it works
  uint64_t queue_depth = 0, deepest = 0;  // outstanding operations: allowed, and at most so far
  Traffic traffic;
  LatencyHistogram latency;
};

struct PeerTraffic {
  std::string peer;
  std::string error;  // why it is given up; empty: it is not
  size_t paths = 0;   // pairs of NICs that work
  Traffic traffic;
};

struct EngineDetails {
  std::vector<NicStats> nics;
  std::vector<PeerTraffic> peers;
  size_t registrations = 0;  // regions that are registered
};

// A write that a watch word posts. Sources must not change while posted() != completed().
struct PreparedWrite {
  std::shared_ptr<const Region> source;
  size_t source_offset = 0;
  std::shared_ptr<const RemoteRegion> target;
  size_t target_offset = 0;
  size_t length = 0;
  std::optional<uint32_t> imm{};
};

struct WatchConfig {
  // 8 bytes aligned, in memory that the CPU can read: a GPU's writer needs pinned, mapped memory. Null: the
  // engine allocates one. The word only grows.
  uint64_t* word = nullptr;
  std::shared_ptr<void> keepalive{};  // of the word
  std::vector<PreparedWrite> writes;  // posted once for every increment, by whoever makes progress
  // Called on the callback thread with the word's value; increments that come fast are told together.
  std::function<void(uint64_t)> changed;
};

// A word that somebody outside the engine increments: a CPU or, with pinned memory, a GPU, which writes all
// data first and then the word with release at system scope. Watched until the handle goes.
class WatchWord {
 public:
  virtual ~WatchWord() = default;
  virtual uint64_t* word() const noexcept = 0;
  virtual uint64_t seen() const noexcept = 0;       // the value last acted on
  virtual uint64_t posted() const noexcept = 0;     // prepared writes so far
  virtual uint64_t completed() const noexcept = 0;  // of them, well or not
  virtual std::optional<Error> error() const = 0;   // the first of a write, or of the word itself
};

// Where a receive pool is, for those who send to it: opaque bytes.
class PoolDescriptor {
 public:
  PoolDescriptor() = default;
  explicit PoolDescriptor(Bytes bytes) : bytes_(std::move(bytes)) {}
  const Bytes& bytes() const noexcept { return bytes_; }
  bool operator==(const PoolDescriptor&) const = default;

 private:
  Bytes bytes_;
};

struct PoolConfig {
  std::shared_ptr<Region> region{};  // the buffers, one after another; null: allocated
  size_t buffer_bytes = 0;
  size_t buffers = 0;         // ignored with a region: as many as fit
  size_t max_waiting = 1024;  // senders' messages that may wait for a buffer; one more is refused
};

struct PoolMessage {
  Address from;
  size_t buffer = 0;  // number; data is at region + buffer * buffer_bytes
  std::span<std::byte> bytes;
};

// Buffers that peers' messages go into, of any length up to a buffer's. A message without a free buffer waits
// at its sender, and takes no memory here but its announcement. A buffer is this side's from recv() to
// release().
class ReceivePool {
 public:
  virtual ~ReceivePool() = default;
  virtual const PoolDescriptor& descriptor() const noexcept = 0;
  virtual const std::shared_ptr<Region>& region() const noexcept = 0;
  virtual size_t buffers() const noexcept = 0;
  virtual size_t free_buffers() const noexcept = 0;
  virtual size_t waiting() const noexcept = 0;  // announced messages without a buffer
  // Buffers promised to senders that have neither filled them nor given them back within twice the engine's
  // timeout: dead ones, and ones whose write failed. They may still be written at any time, so they are used
  // no more unless the sender is heard of again. When all are lost the pool refuses senders.
  virtual size_t lost() const noexcept = 0;
  // Throws kTimeout, kClosed; kFabric when all buffers are lost, so that nothing can come any more.
  virtual PoolMessage recv(std::optional<Duration> timeout = std::nullopt) = 0;
  virtual void release(size_t buffer) = 0;
};

// A peer's pool, opened.
class RemotePool {
 public:
  virtual ~RemotePool() = default;
  virtual size_t buffer_bytes() const noexcept = 0;
};

// The members' regions in the order of their ranks, opened once. See TransferEngine::open(PeerGroup&, ...).
class GroupRegions {
 public:
  virtual ~GroupRegions() = default;
  virtual size_t size() const noexcept = 0;
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
// the first arrival on, whether or not anybody asked yet, until they are released; at most 65536 of them at a
// time. 0xFFFFFFFF is the engine's own and refused.
inline constexpr uint32_t kReservedImmediate = 0x8000'0000U;

}  // namespace pplx
