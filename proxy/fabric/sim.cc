#include "proxy/fabric/sim.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <optional>
#include <random>
#include <shared_mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "proxy/bytes.h"

namespace pplx {
namespace {

struct Completion {
  FabricOp* op;
  std::optional<Error> error;
  uint32_t delay = 0;
};

struct Port;

struct Arrival {
  FabricOp* op;  // gone once its port is closed
  std::shared_ptr<Port> from;
  size_t length;
  FabricOp::Kind kind;
};

// What other engines see of one. Targets copy straight out of the source's memory, so a source closes only
// while nobody copies (`life`).
struct Port {
  explicit Port(std::vector<std::byte> own_name) : name(std::move(own_name)) {}

  const std::vector<std::byte> name;
  std::mutex mutex;  // guards inbox and done
  std::vector<Arrival> inbox;
  std::vector<Completion> done;
  std::atomic<bool> has_inbox{false}, has_done{false};
  std::shared_mutex life;
  std::atomic<bool> closed{false};     // no longer there; operations of its own are gone
  std::atomic<bool> dropped{false};    // sim_drop_peer
  std::atomic<bool> broken{false};     // sim_break_nic
  std::atomic<bool> tells{false};      // whether its own engine hears of that
  std::atomic<bool> unplugged{false};  // sim_unplug_nic

  void complete(FabricOp* op, std::optional<Error> error) {
    std::lock_guard lock(mutex);
    done.push_back({op, std::move(error)});
    has_done.store(true, std::memory_order_release);
  }
};

using Name = std::vector<std::byte>;  // of an endpoint, here of a NIC

std::string text_of(const Name& name) { return {reinterpret_cast<const char*>(name.data()), name.size()}; }

class Network {
 public:
  static Network& get() {
    static auto* network = new Network;  // leaked: engines may close during exit
    return *network;
  }
  // Returns how many engines are there already, so that what the seed decides does not depend on history.
  uint64_t add(const std::string& network, const Name& id, std::shared_ptr<Port> port) {
    std::lock_guard lock(mutex_);
    auto present = std::count_if(ports_.begin(), ports_.end(),
                                 [&](const auto& entry) { return entry.first.first == network; });
    ports_[{network, text_of(id)}] = std::move(port);
    return static_cast<uint64_t>(present);
  }
  void remove(const std::string& network, const Name& id) {
    std::lock_guard lock(mutex_);
    ports_.erase({network, text_of(id)});
  }
  std::shared_ptr<Port> find(const std::string& network, const Name& id) {
    std::lock_guard lock(mutex_);
    auto found = ports_.find({network, text_of(id)});
    return found == ports_.end() ? nullptr : found->second;
  }

 private:
  std::mutex mutex_;
  std::map<std::pair<std::string, std::string>, std::shared_ptr<Port>> ports_;
};

// A write under way: the pieces that have not landed yet.
struct Pending {
  Arrival arrival;
  uint32_t pieces_left;
  bool cut = false;  // a piece of it was lost
};

struct Piece {
  size_t offset, length;
  uint32_t delay;
  std::shared_ptr<Pending> write;
};

class SimFabric final : public Fabric {
 public:
  explicit SimFabric(const EngineConfig& config)
      : config_(config.sim),
        disorder_(config.fabric == "sim"),
        name_(config.fabric),
        address_(make_address("sim", config.sim.network)),
        port_(std::make_shared<Port>(Name(address_.engine.begin(), address_.engine.end()))) {
    caps_.max_write = config_.max_write != 0 ? config_.max_write : SIZE_MAX;
    caps_.max_message = config_.message_bytes;
    caps_.fences = config_.fences;
    caps_.queue_depth = SIZE_MAX;  // ours, so that try_write is what pushes back
    caps_.rails = static_cast<uint32_t>(config.endpoints);
    caps_.mutual = config_.mutual;
    caps_.device_memory = config_.copy != nullptr;
    address_.endpoints.push_back(port_->name);
    uint64_t index = Network::get().add(config_.network, address_.endpoints[0], port_);
    rng_.seed((config_.seed + 1) * 0x9E3779B97F4A7C15ULL + index);
    // Ranges of keys that other engines do not use, so that a write to the wrong one is refused.
    next_key_ = (rng_() & 0xFFFF'FFFFU) << 20;
  }
  ~SimFabric() override { close(); }

  const FabricCaps& caps() const override { return caps_; }
  const PeerAddress& address() const override { return address_; }
  std::string name() const override {
    return disorder_ ? "sim (seed " + std::to_string(config_.seed) + ")" : name_;
  }

  FabricMemory register_memory(void* data, size_t size) override {
    uint64_t key = next_key_++;
    FabricMemory memory{
        static_cast<std::byte*>(data), size, reinterpret_cast<uint64_t>(data), key, nullptr, nullptr};
    memory_[key] = memory;
    return memory;
  }
  FabricMemory register_device_memory(const DeviceMemory& memory) override {
    if (!config_.copy) return Fabric::register_device_memory(memory);
    return register_memory(memory.data, memory.size);
  }
  void unregister_memory(const FabricMemory& memory) override { memory_.erase(memory.key); }

  uint32_t connect(const PeerAddress& peer) override {
    if (peer.fabric != "sim" || peer.provider != config_.network) {
      throw Error(ErrorKind::kInvalidArgument, "the peer " + peer.label() + " uses " + peer.fabric + ":" +
                                                   peer.provider + ", this engine sim:" + config_.network);
    }
    auto port = Network::get().find(config_.network, peer.endpoints[0]);
    if (!port) {
      throw Error(ErrorKind::kPeer, "no engine " + peer.label() + " is alive in this process on network '" +
                                        config_.network + "'");
    }
    if (leaving_.contains(peer.endpoints[0])) {
      throw StillLeaving("sim: the connection to " + peer.label() + " is still being taken down");
    }
    peers_.push_back(std::move(port));
    return static_cast<uint32_t>(peers_.size() - 1);
  }

  void disconnect(uint32_t peer) override {
    if (config_.leave_polls != 0) leaving_[peers_[peer]->name] = rng_() % config_.leave_polls;
    peers_[peer].reset();
  }

  Post try_write(FabricOp& op) override { return post(op); }
  Post try_read(FabricOp& op) override { return post(op); }
  Post try_send(FabricOp& op) override { return post(op); }

  // All that is here is cut off, so that it is settled at once.
  Fence fence(const PeerAddress& peer) override {
    if (!config_.fences) return {};
    Source& source = sources_[peer.endpoints[0]];
    source.cut = true;
    refuse_rest(source);
    return {Fence::State::kSettled, {{0, source.reported}}};
  }

  size_t poll(FabricEvents& events) override {
    for (auto entry = leaving_.begin(); entry != leaving_.end();) {
      entry = entry->second-- == 0 ? leaving_.erase(entry) : std::next(entry);
    }
    if (port_->unplugged.load(std::memory_order_relaxed)) [[unlikely]] {
      accept_arrivals();
      pieces_.clear();
      return 0;
    }
    if (port_->broken.load(std::memory_order_relaxed)) [[unlikely]] {
      accept_arrivals();
      refuse_all("sim: the peer's NIC is broken");
      if (port_->tells.exchange(false)) events.on_down(Error(ErrorKind::kFabric, "sim: the NIC is broken"));
      return report_completions(events);
    }
    if (port_->dropped.load(std::memory_order_relaxed)) {
      accept_arrivals();
      refuse_all("sim: the peer is dead");
      return 0;
    }
    size_t count = report_completions(events);
    accept_arrivals();
    if (!disorder_) return count + deliver_in_order(events);
    if (stalled()) return count;
    return count + deliver_due(events);
  }

  void close() override {
    if (port_->closed.load()) return;
    Network::get().remove(config_.network, address_.endpoints[0]);
    {
      // Whoever copies out of our memory finishes first; nobody starts later.
      std::unique_lock life(port_->life);
      std::lock_guard lock(port_->mutex);
      port_->closed = true;
    }
    accept_arrivals();
    refuse_all("the peer closed its engine");
    memory_.clear();
    peers_.clear();
  }

 private:
  bool roll(uint32_t one_in) { return one_in != 0 && rng_() % one_in == 0; }
  uint32_t delay() {
    return config_.max_delay == 0 ? 0 : static_cast<uint32_t>(rng_() % (config_.max_delay + 1));
  }

  void copy(std::byte* to, const std::byte* from, size_t bytes) const {
    if (config_.copy) {
      config_.copy(to, from, bytes);
    } else {
      std::memcpy(to, from, bytes);
    }
  }

  Post post(FabricOp& op) {
    if (outstanding_ >= static_cast<size_t>(config_.queue_depth) * caps_.rails) return Post::kFull;
    if (port_->dropped.load(std::memory_order_relaxed)) {
      ++outstanding_;
      return Post::kPosted;  // and never heard of again
    }
    op.undelivered = false;
    if (port_->broken.load(std::memory_order_relaxed)) {
      throw Error(ErrorKind::kPeer, "sim: the NIC is broken");
    }
    if (op.kind == FabricOp::Kind::kMessage && config_.lose_messages > lost_messages_) {
      ++lost_messages_;
      ++outstanding_;
      port_->complete(&op, std::nullopt);
      return Post::kPosted;
    }
    Port& to = *peers_[op.peer];
    if (port_->unplugged.load() || to.unplugged.load()) {
      ++outstanding_;
      return Post::kPosted;  // the same
    }
    std::lock_guard lock(to.mutex);
    if (to.broken.load()) throw Error(ErrorKind::kPeer, "sim: the peer's NIC is broken");
    if (to.closed.load() || to.dropped.load()) {
      throw Error(ErrorKind::kPeer,
                  to.dropped.load() ? "sim: the peer is dead" : "sim: the peer closed its engine");
    }
    if (caps_.fences && op.kind == FabricOp::Kind::kWrite && op.has_imm) op.serial = ++serials_[to.name];
    op.channel = 0;
    to.inbox.push_back({&op, port_, op.length, op.kind});
    to.has_inbox.store(true, std::memory_order_release);
    ++outstanding_;
    return Post::kPosted;
  }

  size_t report_completions(FabricEvents& events) {
    if (port_->has_done.load(std::memory_order_acquire)) {
      std::lock_guard lock(port_->mutex);
      for (auto& completion : port_->done) {
        // Much later than delivery now and then, so that whoever reuses a source buffer early is caught.
        if (disorder_) completion.delay = delay() * (roll(8) ? 16 : 1);
        if (port_->broken.load(std::memory_order_relaxed) && !completion.error && roll(2)) {
          completion.error = Error(ErrorKind::kPeer, "sim: the NIC broke before the acknowledgement came");
        }
        completions_.push_back(std::move(completion));
      }
      port_->done.clear();
      port_->has_done.store(false, std::memory_order_relaxed);
    }
    size_t count = 0;
    // on_complete may post and so complete again, but never into completions_.
    for (size_t i = 0, n = completions_.size(); i < n; ++i) {
      Completion completion = std::move(completions_.front());
      completions_.pop_front();
      if (completion.delay > 0) {
        --completion.delay;
        completions_.push_back(std::move(completion));
        continue;
      }
      --outstanding_;
      ++count;
      events.on_complete(*completion.op, completion.error ? &*completion.error : nullptr);
    }
    return count;
  }

  void accept_arrivals() {
    if (!port_->has_inbox.load(std::memory_order_acquire)) return;
    std::vector<Arrival> arrivals;
    {
      std::lock_guard lock(port_->mutex);
      arrivals.swap(port_->inbox);
      port_->has_inbox.store(false, std::memory_order_relaxed);
    }
    for (auto& arrival : arrivals) {
      size_t length = arrival.length;
      size_t pieces = 1;
      if (disorder_ && arrival.kind != FabricOp::Kind::kMessage) {
        pieces =
            std::clamp<size_t>(1 + rng_() % std::max(1U, config_.max_pieces), 1, std::max<size_t>(1, length));
      }
      auto write = std::make_shared<Pending>(Pending{std::move(arrival), static_cast<uint32_t>(pieces)});
      for (size_t i = 0; i < pieces; ++i) {
        size_t begin = length / pieces * i;
        size_t end = i + 1 == pieces ? length : length / pieces * (i + 1);
        pieces_.push_back({begin, end - begin, disorder_ ? delay() : 0, write});
      }
    }
  }

  bool stalled() {
    if (stall_left_ > 0) return --stall_left_, true;
    if (!roll(config_.stall_every)) return false;
    stall_left_ = config_.stall_polls;
    return true;
  }

  size_t deliver_in_order(FabricEvents& events) {
    size_t count = 0;
    for (size_t n = pieces_.size(); n > 0; --n, ++count) {
      Piece piece = std::move(pieces_.front());
      pieces_.pop_front();
      land(piece, events);
    }
    return count;
  }

  size_t deliver_due(FabricEvents& events) {
    if (pieces_.empty()) return 0;
    if (config_.reorder) std::shuffle(pieces_.begin(), pieces_.end(), rng_);
    size_t count = 0;
    for (size_t n = pieces_.size(); n > 0; --n) {
      Piece piece = std::move(pieces_.front());
      pieces_.pop_front();
      if (piece.delay > 0) {
        --piece.delay;
        pieces_.push_back(std::move(piece));
        continue;
      }
      land(piece, events);
      ++count;
    }
    return count;
  }

  void land(Piece& piece, FabricEvents& events) {
    Pending& write = *piece.write;
    Port& from = *write.arrival.from;
    std::shared_lock life(from.life);
    if (from.closed.load() || from.dropped.load()) return;
    FabricOp& op = *write.arrival.op;
    bool last = --write.pieces_left == 0;
    Source* source = nullptr;
    if (caps_.fences && op.kind == FabricOp::Kind::kWrite) source = &sources_[from.name];
    if (from.broken.load() || (source != nullptr && source->cut)) {
      // What has begun to land lands no further, and the source cannot know how far it came.
      write.cut = true;
      if (last) {
        op.undelivered = false;
        from.complete(&op, Error(ErrorKind::kPeer, "sim: the NIC is broken"));
      }
      if (source != nullptr) cut(*source, from);
      return;
    }
    if (op.kind == FabricOp::Kind::kMessage) {
      events.on_message({op.source, op.length});
      from.complete(&op, std::nullopt);
      return;
    }
    // Keys are never reused, so a late write to memory that is gone finds nothing.
    auto memory = memory_.find(op.key);
    bool known =
        !config_.mutual || std::find(peers_.begin(), peers_.end(), write.arrival.from) != peers_.end();
    bool allowed = known && memory != memory_.end() && op.target >= memory->second.base &&
                   op.target - memory->second.base <= memory->second.size &&
                   op.length <= memory->second.size - (op.target - memory->second.base);
    if (allowed && piece.length > 0) {
      std::byte* here = memory->second.data + (op.target - memory->second.base) + piece.offset;
      if (op.kind == FabricOp::Kind::kRead) {
        copy(const_cast<std::byte*>(op.source) + piece.offset, here, piece.length);
      } else {
        copy(here, op.source + piece.offset, piece.length);
      }
    }
    if (!last) return;
    if (source != nullptr && (!allowed || write.cut)) cut(*source, from);
    if (!allowed) {
      from.complete(&op,
                    Error(ErrorKind::kFabric, !known ? "sim: the target does not know who writes to it"
                                                     : "sim: the target refused access: no such memory"));
      return;
    }
    if (write.cut) {
      from.complete(&op, Error(ErrorKind::kPeer, "sim: the NIC was broken on the way"));
      return;
    }
    if (source != nullptr && op.has_imm) {
      source->ready.emplace(op.serial, std::move(write.arrival));
      report_in_order(*source, events);
      return;
    }
    if (op.has_imm) events.on_immediate(op.imm);
    // The acknowledgement may be lost with the NIC: then the immediate was counted and the source can't know.
    from.complete(&op, std::nullopt);
  }

  // With `fences`: what has come from a NIC of a peer.
  struct Source {
    uint64_t reported = 0;              // immediates
    bool cut = false;                   // nothing comes any more
    std::map<uint64_t, Arrival> ready;  // landed, behind others that have not; by serial
  };

  // With the source's `life` held, which is that of all of these.
  static void report_in_order(Source& source, FabricEvents& events) {
    for (auto next = source.ready.begin(); next != source.ready.end() && next->first == source.reported + 1;
         next = source.ready.erase(next)) {
      FabricOp& op = *next->second.op;
      ++source.reported;
      events.on_immediate(op.imm);
      next->second.from->complete(&op, std::nullopt);
    }
  }

  static void cut(Source& source, const Port& from) {
    source.cut = true;
    if (from.closed.load()) return;
    for (auto& [serial, arrival] : std::exchange(source.ready, {})) {
      arrival.from->complete(arrival.op, Error(ErrorKind::kPeer, "sim: the connection broke"));
    }
  }

  static void refuse_rest(Source& source) {
    if (source.ready.empty()) return;
    const auto from = source.ready.begin()->second.from;
    const std::shared_lock life(from->life);
    cut(source, *from);
  }

  void refuse_all(const char* why) {
    for (auto& piece : pieces_) {
      if (--piece.write->pieces_left != 0) continue;
      Port& from = *piece.write->arrival.from;
      std::shared_lock life(from.life);
      if (!from.closed.load()) from.complete(piece.write->arrival.op, Error(ErrorKind::kPeer, why));
    }
    pieces_.clear();
    for (auto& [name, source] : sources_) refuse_rest(source);
  }

  SimConfig config_;
  bool disorder_;
  std::string name_;
  std::mt19937_64 rng_;
  FabricCaps caps_;
  PeerAddress address_;
  std::shared_ptr<Port> port_;
  std::vector<std::shared_ptr<Port>> peers_;
  std::map<Name, uint64_t, BytesLess> serials_;  // of the latest write with an immediate, by NIC of a peer
  std::map<Name, Source, BytesLess> sources_;    // by NIC of a peer
  std::map<Name, uint64_t, BytesLess> leaving_;  // polls left, by NIC of a peer
  uint32_t lost_messages_ = 0;
  std::unordered_map<uint64_t, FabricMemory> memory_;
  uint64_t next_key_ = 0;
  std::deque<Piece> pieces_;
  std::deque<Completion> completions_;
  size_t outstanding_ = 0;
  uint32_t stall_left_ = 0;
};

}  // namespace

std::unique_ptr<Fabric> make_sim(const EngineConfig& config) { return std::make_unique<SimFabric>(config); }

SimConfig efa_limits(uint64_t seed) {
  SimConfig config;
  config.seed = seed;
  config.reorder = true;
  config.max_delay = 6;
  config.max_pieces = 5;
  config.stall_every = 50;
  config.queue_depth = 16;
  config.max_write = 1 << 20;
  config.message_bytes = 8192;
  config.mutual = true;
  return config;
}

namespace {

std::shared_ptr<Port> port_of(const std::string& network, const PeerAddress& nic, const char* who) {
  auto port = Network::get().find(network, nic.endpoints[0]);
  if (!port) {
    throw Error(ErrorKind::kInvalidArgument, std::string(who) + ": no such engine on '" + network + "'");
  }
  return port;
}

}  // namespace

void sim_drop_peer(const std::string& network, const Address& address) {
  PeerAddress parsed = decode_address(address.bytes());
  for (size_t nic = 0; nic < parsed.nics(); ++nic) {
    auto port = port_of(network, parsed.nic(nic), "sim_drop_peer");
    std::vector<Arrival> lost;
    {
      std::lock_guard lock(port->mutex);
      port->dropped = true;
      lost.swap(port->inbox);
    }
    for (auto& arrival : lost) {
      std::shared_lock life(arrival.from->life);
      if (!arrival.from->closed.load())
        arrival.from->complete(arrival.op, Error(ErrorKind::kPeer, "sim: the peer is dead"));
    }
  }
}

void sim_unplug_nic(const std::string& network, const Address& address, size_t nic) {
  port_of(network, decode_address(address.bytes()).nic(nic), "sim_unplug_nic")->unplugged = true;
}

void sim_break_nic(const std::string& network, const Address& address, size_t nic, bool tells) {
  PeerAddress parsed = decode_address(address.bytes());
  auto port = port_of(network, parsed.nic(nic), "sim_break_nic");
  std::lock_guard lock(port->mutex);
  port->tells = tells;
  port->broken = true;
}

}  // namespace pplx
