// Receive pools, on both ends. A message is announced; the receiver grants a buffer as soon as it has one;
// the sender writes into it and says so; the receiver says that it has taken it:
//
//   sender                           receiver
//   announce {pool, request, bytes} ->
//                                   <- grant {request, buffer}       or refused {request, why}
//   (write without immediate)       ->
//   filled {pool, request}          ->
//                                   <- taken {request}
//
// A sender that gives up, or gets a buffer for what it has given up, and that has not begun to write, says
//
//   returned {request}              ->
//
// None of this depends on the order of delivery: each step is sent only when the one before has arrived, and
// whoever returned a request answers whatever still comes for it by returning it again.
#pragma once

#include <atomic>
#include <deque>
#include <map>
#include <memory>
#include <mutex>

#include "proxy/engine/core.h"

namespace pplx {

class PoolImpl;

struct RemotePoolImpl final : RemotePool {
  size_t buffer_bytes() const noexcept override { return bytes; }
  uint32_t peer = 0;
  uint64_t pool = 0;
  size_t bytes = 0;
  size_t buffers = 0;
  std::shared_ptr<RemoteRegion> region;
};

// Everything but the constructor and PoolImpl's own members is guarded by the progress lock.
class Pools {
 public:
  explicit Pools(EngineCore& core) : core_(core) {}
  // Within a fabric's poll, which forbids to answer at once.
  void arrived(MessageType type, const Bytes& from, std::span<const std::byte> body);
  // Answers what has arrived.
  void work() {
    if (!arrivals_.empty()) [[unlikely]]
      answer();
  }
  void add(const std::shared_ptr<PoolImpl>& pool);
  void remove(uint64_t number);
  void send(const RemotePoolImpl& pool, std::shared_ptr<const Region> source, size_t offset, size_t length,
            CompletionSink* sink);
  void maintain(uint32_t now, uint32_t limit);
  void close(const Error& error);
  uint64_t next_number() { return next_number_++; }

  struct Request {
    uint32_t peer = 0;
    uint64_t pool = 0;
    size_t buffers = 0, buffer_bytes = 0;
    std::shared_ptr<RemoteRegion> region;
    std::shared_ptr<const Region> source;
    size_t offset = 0, length = 0;
    CompletionSink* sink = nullptr;
    uint32_t stamp = 0;    // tick of the announcement
    bool writing = false;  // the provider reads the source
  };

 private:
  class WriteSink;
  friend class PoolImpl;
  struct Arrival {
    MessageType type;
    Bytes from, body;
  };
  void answer();
  void take(const Arrival& arrival);
  std::vector<std::shared_ptr<PoolImpl>> living() const;
  void written(uint64_t request, const Error* error);
  void finish(uint64_t request, const Error* error);
  void granted(uint64_t request, uint64_t buffer);
  void tell(const Bytes& to, MessageType type, std::initializer_list<uint64_t> words,
            const std::string& text = "");

  EngineCore& core_;
  std::vector<Arrival> arrivals_;
  uint64_t next_number_ = 1;
  std::map<uint64_t, Request> requests_;  // of this side's sends
  std::map<uint64_t, std::weak_ptr<PoolImpl>> pools_;
};

class PoolImpl final : public ReceivePool {
 public:
  PoolImpl(std::shared_ptr<EngineCore> core, uint64_t number, PoolConfig config);
  ~PoolImpl() override;
  const PoolDescriptor& descriptor() const noexcept override { return descriptor_; }
  const std::shared_ptr<Region>& region() const noexcept override { return config_.region; }
  size_t buffers() const noexcept override { return states_.size(); }
  size_t free_buffers() const noexcept override;
  size_t waiting() const noexcept override;
  size_t lost() const noexcept override;
  PoolMessage recv(std::optional<Duration> timeout) override;
  void release(size_t buffer) override;

 private:
  friend class Pools;
  enum class State : uint8_t { kFree, kGranted, kFull, kReading, kLost };
  struct Announced {
    Bytes from;
    uint64_t request;
    size_t length;
  };
  struct Granted {
    size_t buffer, length;
    uint32_t stamp;  // tick of the grant
    bool lost;
  };
  struct Full {
    Bytes from;
    size_t buffer, length;
  };

  // Both with the progress lock and, within, this pool's.
  void announced(const Bytes& from, uint64_t request, uint64_t length);
  void filled(const Bytes& from, uint64_t request);
  void returned(const Bytes& from, uint64_t request);
  void grant_waiting();
  void give_up_late(uint32_t now, uint32_t limit);
  // With this pool's lock.
  bool knows(const Bytes& from, uint64_t request) const;
  std::optional<Granted> take_granted(const Bytes& from, uint64_t request);
  void set_lost(size_t lost);
  std::string all_lost() const;

  const std::shared_ptr<EngineCore> core_;
  const uint64_t number_;
  PoolConfig config_;
  PoolDescriptor descriptor_;
  mutable std::mutex mutex_;  // guards what follows; never held while the core is called
  std::vector<State> states_;
  std::vector<size_t> free_;
  std::deque<Announced> waiting_;
  std::map<Bytes, std::map<uint64_t, Granted>, BytesLess> granted_;  // by sender and request
  std::deque<Full> full_;
  size_t lost_ = 0;
  std::atomic<size_t> ready_{0};     // full_.size()
  std::atomic<bool> broken_{false};  // all buffers are lost
};

}  // namespace pplx
