// What the engine asks of a transport. One thread at a time calls a Fabric (the engine's progress lock), so
// implementations hold no locks of their own for that.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "proxy/engine/engine.h"
#include "proxy/error.h"
#include "proxy/fabric/address.h"

namespace pplx {

// Means "no immediate" where a provider has to send one with every write; nobody may use or watch it.
inline constexpr uint32_t kNoImmediate = 0xFFFF'FFFFU;

// Everything in which providers differ, as far as the engine has to know. A Fabric drives one NIC; the engine
// has one for each of its NICs and spreads traffic over them.
struct FabricCaps {
  size_t max_write = SIZE_MAX;    // longer writes and reads are split by the engine
  size_t max_message = 0;         // bytes of a message, all headers included
  size_t queue_depth = 0;         // operations that may be outstanding
  uint32_t rails = 1;             // endpoints of this NIC that writes may be spread over
  bool delivery_complete = true;  // a completion means that the bytes are visible at the target
  bool reads = true;              // try_read works
  bool device_memory = false;     // register_device_memory may work
  // The target must have connected to the initiator, too, before it takes a write or serves a read. The
  // engine then exchanges messages first, which need no more than connect() on the sender's side.
  bool mutual = false;
  // Immediates of writes on one channel are reported in the order of their serials, or not at all, and
  // fence() tells how far they came: so writes of unknown fate may be repeated over another NIC.
  bool fences = false;
};

// Registered memory as the fabric sees it.
struct FabricMemory {
  std::byte* data = nullptr;
  size_t size = 0;
  uint64_t base = 0;  // the address by which peers reach the first byte
  uint64_t key = 0;
  void* local = nullptr;  // the provider's descriptor for use as a source
  void* handle = nullptr;
};

struct FabricOp {
  enum class Kind : uint8_t { kWrite, kRead, kMessage, kReceive };

  std::array<void*, 8> scratch;  // the provider's while the operation is outstanding (fi_context2)
  const std::byte* source;       // of a read: where the bytes go
  size_t length;
  void* local;
  uint64_t target;  // the remote address; valid for operations without bytes as well
  uint64_t key;
  uint32_t peer;
  uint32_t rail;
  uint32_t imm;
  bool has_imm;
  Kind kind;
  // Set by the fabric before on_complete reports an error, where it is certain that neither bytes nor
  // immediate of a write have reached the target nor ever will: only then may a write with an immediate be
  // repeated.
  bool undelivered;
  // Set by a fabric that fences when it takes a write with an immediate: the connection, and the how manieth
  // on it, counting from 1.
  uint32_t channel;
  uint64_t serial;
};

// Where poll() reports. None of these may call the fabric, but for on_complete, which may post.
class FabricEvents {
 public:
  // An error of kind kPeer says that this NIC's path to that peer is broken, kClosed that the peer's engine
  // was closed, any other that the operation was refused and would be again.
  virtual void on_complete(FabricOp& op, const Error* error) = 0;
  virtual void on_immediate(uint32_t imm) = 0;
  virtual void on_message(std::span<const std::byte> message) = 0;
  virtual void on_error(const Error& error) = 0;  // one that belongs to no operation of ours
  // The NIC is gone for good. The engine closes the fabric after this poll() and decides about what is still
  // outstanding.
  virtual void on_down(const Error& error) = 0;

 protected:
  ~FabricEvents() = default;
};

enum class Post { kPosted, kFull };

// How many immediates have been reported that came on a channel of a peer's NIC.
struct Arrived {
  uint32_t channel = 0;
  uint64_t immediates = 0;
};
struct Fence {
  enum class State : uint8_t { kWait, kSettled, kUnknown };
  State state = State::kUnknown;
  std::vector<Arrived> arrived{};  // where it is settled; of a channel that is not here none has come
};

// connect() to a peer that was removed, of which the fabric still holds something: it passes within
// milliseconds.
struct StillLeaving : Error {
  explicit StillLeaving(const std::string& what) : Error(ErrorKind::kPeer, what) {}
};

class Fabric {
 public:
  virtual ~Fabric() = default;
  virtual const FabricCaps& caps() const = 0;
  virtual std::string name() const = 0;
  virtual const PeerAddress& address() const = 0;  // of this NIC

  virtual FabricMemory register_memory(void* data, size_t size) = 0;  // throws kFabric
  // The same for GPU memory. Throws kFabric where the NIC cannot reach it.
  virtual FabricMemory register_device_memory(const DeviceMemory& memory) {
    throw Error(ErrorKind::kFabric, name() + " cannot register GPU memory (" + std::to_string(memory.size) +
                                        " bytes on device " + std::to_string(memory.device) +
                                        "): go through pinned host memory");
  }
  virtual void unregister_memory(const FabricMemory& memory) = 0;
  // A new number, counting from 0, for the NIC of a peer whose endpoints these are. One peer may have
  // several.
  virtual uint32_t connect(const PeerAddress& peer) = 0;
  // What connect() made is not used any more, and the fabric holds no operation of it.
  virtual void disconnect(uint32_t /*peer*/) {}

  // The operation stays with the fabric until on_complete. kFull: try again after poll(). Throws Error when
  // the operation can never be posted, in which case nothing of it has left.
  virtual Post try_write(FabricOp& op) = 0;
  virtual Post try_read(FabricOp& op) = 0;
  virtual Post try_send(FabricOp& op) = 0;
  virtual size_t poll(FabricEvents& events) = 0;

  // From the first call on nothing that this NIC of a peer has posted arrives here any more; what had come
  // until then is reported before it is settled. kWait: ask again after poll(). kUnknown: this fabric cannot
  // tell, or can no longer. Also after close().
  virtual Fence fence(const PeerAddress& /*peer*/) { return {}; }

  // Before close(): reports what has arrived, which its senders hold for delivered; nothing comes after it.
  virtual void drain(FabricEvents& events) {
    for (int polls = 0; polls < 64 && poll(events) != 0;) ++polls;
  }

  // False when the peer's process is known to be gone, for transports that do not report that themselves.
  virtual bool alive(uint32_t /*peer*/) { return true; }

  // Outstanding operations are dropped without an event, and the NIC touches their memory no more. Memory is
  // unregistered.
  virtual void close() = 0;
};

// The fabric of one NIC: EngineConfig.nic and .bind_address. The engine makes one for each of
// EngineConfig.nics.
std::unique_ptr<Fabric> make_fabric(const EngineConfig& config);

}  // namespace pplx
