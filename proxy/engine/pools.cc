#include "proxy/engine/pools.h"

#include <algorithm>

#include "proxy/bytes.h"
#include "proxy/engine/regions.h"
#include "proxy/log.h"

namespace pplx {
namespace {

constexpr uint32_t kPoolMagic = 0x50584c50;  // "PLXP"
constexpr size_t kMaxBuffers = 1 << 20;

[[noreturn]] void invalid(const std::string& what) { throw Error(ErrorKind::kInvalidArgument, what); }

}  // namespace

// ---- the sender ----------------------------------------------------------------------------------------

class Pools::WriteSink final : public CompletionSink {
 public:
  WriteSink(Pools& pools, uint64_t request) : pools_(pools), request_(request) {}
  void complete(const Error* error) noexcept override {
    pools_.written(request_, error);
    delete this;
  }

 private:
  Pools& pools_;
  uint64_t request_;
};

void Pools::tell(const Bytes& to, MessageType type, std::initializer_list<uint64_t> words,
                 const std::string& text) {
  Bytes message = core_.message_header(type);
  ByteWriter body;
  for (uint64_t word : words) body.put(word);
  body.text(text.substr(0, 512));
  Bytes tail = body.take();
  message.insert(message.end(), tail.begin(), tail.end());
  // Not posted from here: this may be within a fabric's poll.
  const uint32_t tick = core_.tick_.load(std::memory_order_relaxed);
  core_.outgoing_.push_back({core_.connect(to), std::move(message), new IgnoringSink, tick});
}

void Pools::send(const RemotePoolImpl& pool, std::shared_ptr<const Region> source, size_t offset,
                 size_t length, CompletionSink* sink) {
  const uint64_t number = next_number_++;
  requests_[number] = {.peer = pool.peer,
                       .pool = pool.pool,
                       .buffers = pool.buffers,
                       .buffer_bytes = pool.bytes,
                       .region = pool.region,
                       .source = std::move(source),
                       .offset = offset,
                       .length = length,
                       .sink = sink,
                       .stamp = core_.tick_.load(std::memory_order_relaxed)};
  tell(core_.peers_[pool.peer].address, kPoolAnnounce, {pool.pool, number, length});
  core_.flush_messages();
}

void Pools::granted(uint64_t number, uint64_t buffer) {
  Request& request = requests_.at(number);
  if (buffer >= request.buffers) {
    throw Error(ErrorKind::kPeer, "a receive pool granted a buffer that makes no sense");
  }
  request.writing = true;
  core_.submit(core_.make_write({.source = request.source.get(),
                                 .source_offset = request.offset,
                                 .target = request.region.get(),
                                 .target_offset = static_cast<size_t>(buffer) * request.buffer_bytes,
                                 .length = request.length},
                                new WriteSink(*this, number)));
}

void Pools::written(uint64_t number, const Error* error) {
  auto found = requests_.find(number);
  if (found == requests_.end()) return;
  found->second.writing = false;
  if (error != nullptr) {
    finish(number, error);
    return;
  }
  tell(core_.peers_[found->second.peer].address, kPoolFilled, {found->second.pool, number});
}

void Pools::finish(uint64_t number, const Error* error) {
  auto found = requests_.find(number);
  if (found == requests_.end()) return;
  Request request = std::move(found->second);
  requests_.erase(found);
  if (request.sink != nullptr) request.sink->complete(error);
  // The source goes with `request`, under the lock, which its destructor may take again.
}

// ---- messages of both sides ----------------------------------------------------------------------------

void Pools::arrived(MessageType type, const Bytes& from, std::span<const std::byte> body) {
  arrivals_.push_back({type, from, Bytes(body.begin(), body.end())});
}

void Pools::answer() {
  for (const Arrival& arrival : std::exchange(arrivals_, {})) {
    try {
      take(arrival);
    } catch (const Error& error) {
      core_.on_error(error);
    }
  }
}

void Pools::take(const Arrival& arrival) {
  const auto& [type, from, body] = arrival;
  ByteReader in(body, "message about a receive pool");
  const bool to_pool = type == kPoolAnnounce || type == kPoolFilled;
  const uint64_t pool_number = to_pool ? in.get<uint64_t>() : 0;
  const uint64_t request = in.get<uint64_t>();
  const uint64_t argument = type == kPoolAnnounce || type == kPoolGrant ? in.get<uint64_t>() : 0;
  const std::string text = in.text();
  in.finish();
  if (to_pool) {
    auto found = pools_.find(pool_number);
    auto pool = found == pools_.end() ? nullptr : found->second.lock();
    if (pool == nullptr) {
      if (type == kPoolAnnounce)
        tell(from, kPoolRefused, {request}, "there is no such receive pool any more");
      return;
    }
    type == kPoolAnnounce ? pool->announced(from, request, argument) : pool->filled(from, request);
    return;
  }
  if (type == kPoolReturned) {
    for (const auto& pool : living()) pool->returned(from, request);
    return;
  }
  auto found = requests_.find(request);
  if (found == requests_.end()) {
    if (type == kPoolGrant) tell(from, kPoolReturned, {request});
    return;
  }
  if (core_.peers_[found->second.peer].address != from) {
    throw Error(ErrorKind::kPeer, "an answer about a receive pool came from somebody else");
  }
  if (found->second.writing) {
    throw Error(ErrorKind::kPeer, "a receive pool answered twice, and the first answer is being acted on");
  }
  if (type == kPoolGrant) {
    granted(request, argument);
  } else if (type == kPoolTaken) {
    finish(request, nullptr);
  } else {
    const Error error(ErrorKind::kFabric,
                      "the receive pool of " + core_.peers_[found->second.peer].label + " refused: " + text);
    finish(request, &error);
  }
}

// Their handles, so that none goes, and takes itself off the list, while somebody walks through it.
std::vector<std::shared_ptr<PoolImpl>> Pools::living() const {
  std::vector<std::shared_ptr<PoolImpl>> found;
  for (const auto& [number, weak] : pools_) {
    if (auto pool = weak.lock()) found.push_back(std::move(pool));
  }
  return found;
}

void Pools::maintain(uint32_t now, uint32_t limit) {
  std::vector<uint64_t> late;
  for (const auto& [number, request] : requests_) {
    const auto& failed = core_.peers_[request.peer].failed;
    if (!request.writing && (now - request.stamp > limit || failed)) late.push_back(number);
  }
  for (uint64_t number : late) {
    const Peer& peer = core_.peers_[requests_.at(number).peer];
    if (!peer.failed) tell(peer.address, kPoolReturned, {number});
    const Error error = peer.failed ? *peer.failed
                                    : Error(ErrorKind::kTimeout,
                                            "the receive pool of " + peer.label + " had no buffer in time");
    finish(number, &error);
  }
  for (const auto& pool : living()) pool->give_up_late(now, limit);
}

void Pools::close(const Error& error) {
  while (!requests_.empty()) finish(requests_.begin()->first, &error);
}

void Pools::add(const std::shared_ptr<PoolImpl>& pool) { pools_[pool->number_] = pool; }
void Pools::remove(uint64_t number) { pools_.erase(number); }

// ---- the receiver --------------------------------------------------------------------------------------

PoolImpl::PoolImpl(std::shared_ptr<EngineCore> core, uint64_t number, PoolConfig config)
    : core_(std::move(core)), number_(number), config_(std::move(config)) {
  const size_t count = config_.region->size() / config_.buffer_bytes;
  states_.assign(std::min(count, kMaxBuffers), State::kFree);
  for (size_t i = states_.size(); i > 0; --i) free_.push_back(i - 1);
  ByteWriter out;
  out.put(kPoolMagic);
  out.put(number_);
  out.put(static_cast<uint64_t>(config_.buffer_bytes));
  out.put(static_cast<uint64_t>(states_.size()));
  out.blob(config_.region->descriptor().bytes());
  out.checksum();
  descriptor_ = PoolDescriptor(out.take());
}

PoolImpl::~PoolImpl() {
  if (core_->forked()) return;
  EngineCore::Locked locked(*core_);
  core_->pools_->remove(number_);
  if (core_->fabric_closed_) return;
  for (const auto& announced : waiting_) {
    try {
      core_->pools_->tell(announced.from, kPoolRefused, {announced.request}, "it was closed");
    } catch (const Error& error) {
      core_->on_error(error);  // whoever cannot be reached learns it from its timeout
    }
  }
}

size_t PoolImpl::free_buffers() const noexcept {
  std::lock_guard lock(mutex_);
  return free_.size();
}
size_t PoolImpl::waiting() const noexcept {
  std::lock_guard lock(mutex_);
  return waiting_.size();
}
size_t PoolImpl::lost() const noexcept {
  std::lock_guard lock(mutex_);
  return lost_;
}

void PoolImpl::announced(const Bytes& from, uint64_t request, uint64_t length) {
  core_->connect(from);  // who cannot be answered takes no place
  std::string why;
  {
    std::lock_guard lock(mutex_);
    if (knows(from, request)) {
      throw Error(ErrorKind::kPeer, "a message for a receive pool was announced twice");
    }
    if (broken_) {
      why = all_lost();
    } else if (length > config_.buffer_bytes) {
      why =
          std::to_string(length) + " bytes are more than a buffer's " + std::to_string(config_.buffer_bytes);
    } else if (waiting_.size() >= config_.max_waiting) {
      why = std::to_string(waiting_.size()) + " messages wait for a buffer already";
    } else {
      waiting_.push_back({from, request, static_cast<size_t>(length)});
    }
  }
  if (why.empty()) {
    grant_waiting();
  } else {
    core_->pools_->tell(from, kPoolRefused, {request}, why);
  }
}

void PoolImpl::grant_waiting() {
  for (;;) {
    Announced next;
    size_t buffer = 0;
    {
      std::lock_guard lock(mutex_);
      if (waiting_.empty() || free_.empty()) return;
      next = std::move(waiting_.front());
      waiting_.pop_front();
      buffer = free_.back();
      free_.pop_back();
      states_[buffer] = State::kGranted;
      granted_[next.from][next.request] = {buffer, next.length, core_->tick_.load(std::memory_order_relaxed),
                                           false};
    }
    try {
      if (const auto& failed = core_->peers_[core_->connect(next.from)].failed) throw Error(*failed);
      core_->pools_->tell(next.from, kPoolGrant, {next.request, buffer});
    } catch (const Error& error) {
      core_->on_error(error);
      std::lock_guard lock(mutex_);
      take_granted(next.from, next.request);
      states_[buffer] = State::kFree;
      free_.push_back(buffer);
    }
  }
}

void PoolImpl::filled(const Bytes& from, uint64_t request) {
  {
    std::lock_guard lock(mutex_);
    const auto granted = take_granted(from, request);
    if (!granted) return;  // returned
    states_[granted->buffer] = State::kFull;
    full_.push_back({from, granted->buffer, granted->length});
    ready_.store(full_.size(), std::memory_order_release);
  }
  core_->pools_->tell(from, kPoolTaken, {request});
}

void PoolImpl::returned(const Bytes& from, uint64_t request) {
  {
    std::lock_guard lock(mutex_);
    std::erase_if(waiting_, [&](const auto& one) { return one.request == request && one.from == from; });
    const auto granted = take_granted(from, request);
    if (!granted) return;
    states_[granted->buffer] = State::kFree;
    free_.push_back(granted->buffer);
  }
  grant_waiting();
}

bool PoolImpl::knows(const Bytes& from, uint64_t request) const {
  const auto sender = granted_.find(from);
  return (sender != granted_.end() && sender->second.contains(request)) ||
         std::any_of(waiting_.begin(), waiting_.end(),
                     [&](const auto& one) { return one.request == request && one.from == from; });
}

std::optional<PoolImpl::Granted> PoolImpl::take_granted(const Bytes& from, uint64_t request) {
  const auto sender = granted_.find(from);
  if (sender == granted_.end()) return std::nullopt;
  const auto found = sender->second.find(request);
  if (found == sender->second.end()) return std::nullopt;
  const Granted granted = found->second;
  sender->second.erase(found);
  if (sender->second.empty()) granted_.erase(sender);
  if (granted.lost) set_lost(lost_ - 1);  // it lives after all
  return granted;
}

void PoolImpl::set_lost(size_t lost) {
  lost_ = lost;
  broken_.store(lost_ == states_.size(), std::memory_order_release);
}

std::string PoolImpl::all_lost() const {
  return "all of its " + std::to_string(states_.size()) +
         " buffers were given to senders that died or failed before they had filled them";
}

void PoolImpl::give_up_late(uint32_t now, uint32_t limit) {
  std::deque<Announced> refused;
  std::string why = "an earlier message of this sender was not filled in time";
  {
    std::lock_guard lock(mutex_);
    const size_t before = lost_;
    for (auto& [from, requests] : granted_) {
      for (auto& [number, granted] : requests) {
        // Twice the time after which the sender gives up, so that it is this side's clock that decides last.
        if (granted.lost || now - granted.stamp <= 2ull * limit) continue;
        granted.lost = true;
        states_[granted.buffer] = State::kLost;
        set_lost(lost_ + 1);
        log(LogLevel::kWarn, "a receive pool lost buffer ", granted.buffer, " of ", states_.size(),
            ": its sender, ", decode_address(from).label(), ", did not fill it in time");
      }
    }
    if (broken_) {
      refused.swap(waiting_);
      why = all_lost();
    } else if (lost_ != before) {
      // What else the dead wait for would be lost one after another.
      const auto lost_one = [&](const Announced& one) {
        const auto sender = granted_.find(one.from);
        return sender != granted_.end() && std::any_of(sender->second.begin(), sender->second.end(),
                                                       [](const auto& entry) { return entry.second.lost; });
      };
      std::deque<Announced> kept;
      for (auto& one : waiting_) (lost_one(one) ? refused : kept).push_back(std::move(one));
      waiting_.swap(kept);
    }
  }
  for (const auto& announced : refused) {
    try {
      core_->pools_->tell(announced.from, kPoolRefused, {announced.request}, why);
    } catch (const Error& error) {
      core_->on_error(error);
    }
  }
}

PoolMessage PoolImpl::recv(std::optional<Duration> timeout) {
  const auto until = core_->deadline(timeout);
  for (;;) {
    core_->wait(
        [&] {
          return ready_.load(std::memory_order_acquire) > 0 || broken_.load(std::memory_order_acquire) ||
                 core_->closed();
        },
        until);
    {
      std::lock_guard lock(mutex_);
      if (!full_.empty()) {
        Full full = std::move(full_.front());
        full_.pop_front();
        ready_.store(full_.size(), std::memory_order_release);
        states_[full.buffer] = State::kReading;
        std::byte* data = config_.region->data() + full.buffer * config_.buffer_bytes;
        return {Address(std::move(full.from)), full.buffer, {data, full.length}};
      }
      if (broken_) {
        throw Error(ErrorKind::kFabric, "receive pool: " + all_lost() + "; close it and make another");
      }
    }
    if (core_->closed()) throw Error(ErrorKind::kClosed, "the TransferEngine is closed");
    if (Clock::now() >= until) {
      throw Error(ErrorKind::kTimeout, "receive pool: no message arrived before the deadline");
    }
  }
}

void PoolImpl::release(size_t buffer) {
  {
    std::lock_guard lock(mutex_);
    if (buffer >= states_.size() || states_[buffer] != State::kReading) {
      invalid("buffer " + std::to_string(buffer) + " was not received, or was released before");
    }
    states_[buffer] = State::kFree;
    free_.push_back(buffer);
  }
  if (core_->closed()) return;
  EngineCore::Locked locked(*core_);
  if (core_->fabric_closed_) return;
  grant_waiting();
  core_->flush_messages();
}

// ---- the engine's part ---------------------------------------------------------------------------------

std::shared_ptr<ReceivePool> EngineCore::receive_pool(PoolConfig config) {
  if (config.buffer_bytes == 0) invalid("receive_pool: buffers have no bytes");
  if (config.region == nullptr) {
    if (config.buffers == 0 || config.buffers > kMaxBuffers ||
        config.buffer_bytes > SIZE_MAX / config.buffers)
      invalid("receive_pool: " + std::to_string(config.buffers) + " buffers make no pool");
    config.region = allocate(config.buffer_bytes * config.buffers);
  }
  if (static_cast<const RegionImpl&>(*config.region).core() != this) {
    invalid("receive_pool: the region was registered with another engine");
  }
  if (config.region->size() < config.buffer_bytes) invalid("receive_pool: no buffer fits the region");
  require_open();
  Locked locked(*this);
  if (fabric_closed_) require_open();
  auto pool = std::make_shared<PoolImpl>(shared_from_this(), pools_->next_number(), std::move(config));
  pools_->add(pool);
  return pool;
}

std::shared_ptr<RemotePool> EngineCore::open(const PoolDescriptor& descriptor) {
  if (!delivery_complete_) {
    throw Error(ErrorKind::kFabric,
                fabric_name_ + " cannot tell when a buffer is filled (no FI_DELIVERY_COMPLETE)");
  }
  ByteReader in(checked(descriptor.bytes(), "pool descriptor"), "pool descriptor");
  if (in.get<uint32_t>() != kPoolMagic) in.malformed("its magic number is wrong");
  auto remote = std::make_shared<RemotePoolImpl>();
  remote->pool = in.get<uint64_t>();
  const uint64_t bytes = in.get<uint64_t>();
  const uint64_t buffers = in.get<uint64_t>();
  auto region = in.blob();
  in.finish();
  remote->region = open(RegionDescriptor(Bytes(region.begin(), region.end())));
  if (bytes == 0 || buffers == 0 || buffers > kMaxBuffers || buffers > remote->region->size() / bytes) {
    in.malformed("its buffers do not fit its region");
  }
  remote->bytes = static_cast<size_t>(bytes);
  remote->buffers = static_cast<size_t>(buffers);
  remote->peer = static_cast<const RemoteRegionImpl&>(*remote->region).peer;
  return remote;
}

void EngineCore::send(const RemotePool& base, std::shared_ptr<const Region> source, size_t offset,
                      size_t length, CompletionSink* sink) {
  const auto& pool = static_cast<const RemotePoolImpl&>(base);
  if (length > pool.bytes) {
    invalid("send: " + std::to_string(length) + " bytes, a buffer of the pool takes " +
            std::to_string(pool.bytes));
  }
  check({.source = source, .source_offset = offset, .target = pool.region, .length = length});
  require_open();
  Locked locked(*this);
  if (fabric_closed_) require_open();
  pools_->send(pool, std::move(source), offset, length, sink);
}

}  // namespace pplx
