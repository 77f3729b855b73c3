// What the engine asks of a transport. One thread at a time calls a Fabric (the engine's progress lock), so
// implementations hold no locks of their own for that.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "proxy/engine/engine.h"
#include "proxy/error.h"
#include "proxy/fabric/address.h"

namespace pplx {

// Means "no immediate" where a provider has to send one with every write; nobody may use or watch it.
inline constexpr uint32_t kNoImmediate = 0xFFFF'FFFFU;

struct FabricCaps {
  size_t max_write = SIZE_MAX;    // longer writes are split by the engine
  size_t max_message = 0;         // bytes of a message, all headers included
  size_t queue_depth = 0;         // operations that may be outstanding
  uint32_t rails = 1;             // endpoints that writes may be spread over
  bool delivery_complete = true;  // a completion means that the bytes are visible at the target
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
  enum class Kind : uint8_t { kWrite, kMessage, kReceive };

  std::array<void*, 8> scratch;  // the provider's while the operation is outstanding (fi_context2)
  const std::byte* source;
  size_t length;
  void* local;
  uint64_t target;
  uint64_t key;
  uint32_t peer;
  uint32_t rail;
  uint32_t imm;
  bool has_imm;
  Kind kind;
};

// Where poll() reports. None of these may call the fabric, but for on_complete, which may post.
class FabricEvents {
 public:
  virtual void on_complete(FabricOp& op, const Error* error) = 0;
  virtual void on_immediate(uint32_t imm) = 0;
  virtual void on_message(std::span<const std::byte> message) = 0;
  virtual void on_error(const Error& error) = 0;  // one that belongs to no operation of ours

 protected:
  ~FabricEvents() = default;
};

enum class Post { kPosted, kFull };

class Fabric {
 public:
  virtual ~Fabric() = default;
  virtual const FabricCaps& caps() const = 0;
  virtual std::string name() const = 0;
  virtual const PeerAddress& address() const = 0;

  virtual FabricMemory register_memory(void* data, size_t size) = 0;  // throws kFabric
  virtual void unregister_memory(const FabricMemory& memory) = 0;
  virtual uint32_t connect(const PeerAddress& peer) = 0;  // a new peer number, counting from 0

  // The operation stays with the fabric until on_complete. kFull: try again after poll(). Throws Error when
  // the operation can never be posted.
  virtual Post try_write(FabricOp& op) = 0;
  virtual Post try_send(FabricOp& op) = 0;
  virtual size_t poll(FabricEvents& events) = 0;

  // False when the peer is known to be gone, for transports that do not report that themselves.
  virtual bool alive(uint32_t /*peer*/) { return true; }

  // Outstanding operations are dropped without an event. Memory is unregistered.
  virtual void close() = 0;
};

std::unique_ptr<Fabric> make_fabric(const EngineConfig& config);

}  // namespace pplx
