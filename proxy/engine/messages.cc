// Two-sided messages and what is built on them: send, recv, barriers.
#include <algorithm>
#include <cstring>

#include "proxy/bytes.h"
#include "proxy/engine/core.h"
#include "proxy/engine/doubts.h"
#include "proxy/engine/group.h"
#include "proxy/engine/pools.h"
#include "proxy/engine/watch.h"
#include "proxy/log.h"

namespace pplx {
namespace {

constexpr uint32_t kMessageMagic = 0x4d584c50;  // "PLXM"
constexpr size_t kMaxUnread = 4096;
constexpr size_t kMaxEarlyNotices = 65536;  // 2048 members of a group, and some groups
constexpr uint32_t kSlotsPerPeer = 16;
// A message is posted only while all numbers so far below its own are settled, so that whoever receives has
// to remember no more: what is twice as far behind never comes.
constexpr uint64_t kNumberWindow = 4096;
constexpr size_t kMaxSenders = 65536;
constexpr uint32_t kMoreAfter = 100;   // ms that a message waits for a buffer before there are more of them
constexpr uint32_t kMoreAgain = 1000;  // ms until that is tried again where it failed
constexpr size_t kNumberAt = sizeof kMessageMagic + sizeof(uint8_t);

// A peer that takes nothing must not keep all buffers from the others.
bool may_have_buffer(const Peer& peer) {
  const bool far =
      !peer.unanswered.empty() && peer.last_message + 1 - *peer.unanswered.begin() >= kNumberWindow;
  return peer.messages < kSlotsPerPeer && !far;
}

}  // namespace

// The sender's whole address: the receiver may not know it yet and may want to answer.
Bytes EngineCore::message_header(uint8_t type) const {
  ByteWriter out;
  out.put(kMessageMagic);
  out.put(type);
  out.put(uint64_t{0});  // its number, known when it is posted
  out.blob(address_.bytes());
  return out.take();
}

size_t EngineCore::max_message() const noexcept {
  return max_message_ - (kNumberAt + sizeof(uint64_t) + sizeof(uint16_t)) - address_.bytes().size();
}

std::future<void> EngineCore::send(const Address& to, std::span<const std::byte> payload) {
  require_open();
  if (payload.size() > max_message()) {
    throw Error(ErrorKind::kInvalidArgument,
                "a message of " + std::to_string(payload.size()) +
                    " bytes exceeds max_message() = " + std::to_string(max_message()));
  }
  decode_address(to.bytes());
  Bytes bytes = message_header(kUser);
  bytes.insert(bytes.end(), payload.begin(), payload.end());
  Locked locked(*this);
  if (fabric_closed_) require_open();
  uint32_t peer = connect(to.bytes());
  auto* sink = new FutureSink;  // deletes itself
  auto future = sink->future();
  bump(counters_.sends);
  queue_message(peer, std::move(bytes), sink);
  return future;
}

void EngineCore::queue_message(uint32_t peer, Bytes bytes, CompletionSink* sink) {
  outgoing_.push_back({peer, std::move(bytes), sink, tick_.load(std::memory_order_relaxed)});
  flush_messages();
}

void EngineCore::flush_messages() {
  if (fabric_closed_) {
    Error error(ErrorKind::kClosed, "the TransferEngine was closed before the message was sent");
    for (auto& message : outgoing_) message.sink->complete(&error);
    outgoing_.clear();
    return;
  }
  for (size_t i = 0; i < outgoing_.size() && !free_slots_.empty();) {
    Peer& peer = peers_[outgoing_[i].peer];
    if (!may_have_buffer(peer)) {
      ++i;
      continue;
    }
    Outgoing message = std::move(outgoing_[i]);
    outgoing_.erase(outgoing_.begin() + static_cast<ptrdiff_t>(i));
    ++peer.messages;
    Op* op = pool_.take();
    op->number = 0;
    if (peer.paths.size() > 1) {
      op->number = ++peer.last_message;
      peer.unanswered.insert(op->number);
      std::memcpy(message.bytes.data() + kNumberAt, &op->number, sizeof op->number);
    }
    op->slot = free_slots_.back();
    free_slots_.pop_back();
    std::byte* buffer = send_chunks_[op->slot / kSendSlots].data() + op->slot % kSendSlots * max_message_;
    std::memcpy(buffer, message.bytes.data(), message.bytes.size());
    op->source = buffer;
    op->length = message.bytes.size();
    op->local = nics_[0].send_memory[op->slot / kSendSlots].local;
    op->target = op->key = 0;
    op->to = message.peer;
    op->has_imm = false;
    op->kind = FabricOp::Kind::kMessage;
    op->sink = message.sink;
    op->id = 0;
    op->stamp = message.stamp;
    op->retries = 0;
    op->shared = op->abandoned = op->per_shard = false;
    op->region = nullptr;
    enqueue(peers_[op->to], op);
  }
}

void EngineCore::add_send_buffers() {
  Bytes chunk(kSendSlots * max_message_);
  std::array<FabricMemory, kMaxNics> memories{};
  try {
    for (size_t i = 0; i < nics_.size(); ++i) {
      if (!nics_[i].down) memories[i] = nics_[i].fabric->register_memory(chunk.data(), chunk.size());
    }
  } catch (...) {
    release(memories);
    throw;
  }
  for (size_t i = 0; i < nics_.size(); ++i) nics_[i].send_memory.push_back(memories[i]);
  const size_t first = send_chunks_.size() * kSendSlots;
  for (size_t slot = first; slot < first + kSendSlots; ++slot) {
    free_slots_.push_back(static_cast<uint32_t>(slot));
  }
  send_chunks_.push_back(std::move(chunk));
}

// Some peers that say nothing hold all buffers, until the fabric gives them up: the others get new ones.
void EngineCore::relieve_messages(uint32_t now) {
  if (!free_slots_.empty() || (no_chunk_ && now - *no_chunk_ < kMoreAgain)) return;
  const bool waits = std::any_of(outgoing_.begin(), outgoing_.end(), [&](const Outgoing& message) {
    return now - message.stamp > kMoreAfter && may_have_buffer(peers_[message.peer]);
  });
  if (!waits) return;
  try {
    add_send_buffers();
  } catch (const Error& error) {
    no_chunk_ = now;
    on_error(error);
    return;
  }
  flush_messages();
}

void EngineCore::fail_late_messages(uint32_t now, uint32_t limit) {
  std::vector<Outgoing> late;
  std::erase_if(outgoing_, [&](Outgoing& message) {
    if (!peers_[message.peer].failed && now - message.stamp <= limit) return false;
    late.push_back(std::move(message));
    return true;
  });
  for (const Outgoing& message : late) {
    const Peer& peer = peers_[message.peer];
    const Error error = peer.failed ? *peer.failed
                                    : Error(ErrorKind::kTimeout, "message to " + peer.label +
                                                                     ": no buffer to send it from within " +
                                                                     std::to_string(limit) + " ms");
    bump(counters_.errors);
    message.sink->complete(&error);
  }
}

// Of a message that its sender may have sent before, over a NIC that has failed since.
bool EngineCore::first_time(const Bytes& from, uint64_t number) {
  auto known = seen_.find(from);
  if (known == seen_.end()) {
    if (seen_.size() >= kMaxSenders) {
      throw Error(ErrorKind::kPeer, "messages of 65536 senders have come already; one more was dropped");
    }
    known = seen_.emplace(from, Seen{}).first;
  }
  Seen& seen = known->second;
  if (number <= seen.floor || !seen.above.insert(number).second) return false;
  // Numbers that are missing for so long are of messages that were given up.
  if (seen.above.size() > 2 * kNumberWindow) seen.floor = *seen.above.begin();
  while (!seen.above.empty() && *seen.above.begin() <= seen.floor + 1) {
    seen.floor = std::max(seen.floor, *seen.above.begin());
    seen.above.erase(seen.above.begin());
  }
  return true;
}

void EngineCore::on_message(std::span<const std::byte> bytes) {
  try {
    ByteReader in(bytes, "message");
    if (in.get<uint32_t>() != kMessageMagic) in.malformed("its magic number is wrong");
    auto type = in.get<uint8_t>();
    auto number = in.get<uint64_t>();
    auto sender = in.blob();
    Bytes from(sender.begin(), sender.end());
    if (!peer_numbers_.contains(from)) check_job(self_, decode_address(from));
    if (number != 0 && !first_time(from, number)) return;
    if (timeline_) [[unlikely]] {
      uint64_t now = nanoseconds_now();
      timeline_->add({.start = now,
                      .end = now,
                      .bytes = bytes.size(),
                      .peer = UINT32_MAX,
                      .nic = static_cast<uint16_t>(polling_),
                      .what = Timeline::What::kArrivedMessage});
    }
    if (type == kUser) {
      auto payload = in.rest();
      receive_user({Address(std::move(from)), Bytes(payload.begin(), payload.end())});
    } else if (type == kBarrier) {
      auto hash = in.get<uint64_t>();
      auto generation = in.get<uint32_t>();
      auto number = in.get<uint64_t>();
      in.finish();
      receive_barrier(from, hash, generation, number);
    } else if (type == kHello || type == kWelcome) {
      in.finish();
      if (greetings_.size() >= kMaxUnread) in.malformed("4096 greetings are not yet answered");
      greetings_.emplace_back(std::move(from), type);
    } else if ((type >= kPoolAnnounce && type <= kPoolRefused) || type == kPoolReturned) {
      pools_->arrived(static_cast<MessageType>(type), from, in.rest());
    } else if (type == kAsk || type == kVerdict) {
      doubts_->arrived(static_cast<MessageType>(type), from, in.rest());
    } else {
      in.malformed("its type is unknown");
    }
  } catch (const Error& error) {
    on_error(error);
  }
}

void EngineCore::receive_user(Message message) {
  {
    std::lock_guard lock(inbox_mutex_);
    if (inbox_.size() >= kMaxUnread) {
      throw Error(ErrorKind::kFabric, "4096 messages are unread; one more was dropped");
    }
    inbox_.push_back(std::move(message));
    inbox_size_.store(inbox_.size(), std::memory_order_release);
    bump(counters_.receives);
  }
  if (!message_waiters_.empty()) tell_message_waiters(nullptr);
}

void EngineCore::when_message(CompletionSink* sink, uint64_t id) {
  require_open();
  Locked locked(*this);
  if (fabric_closed_) require_open();
  if (inbox_size_.load(std::memory_order_acquire) > 0) {
    sink->complete(nullptr);
    return;
  }
  message_waiters_.push_back({sink, id});
  watching_.fetch_add(1, std::memory_order_relaxed);
}

void EngineCore::tell_message_waiters(const Error* error) {
  watching_.fetch_sub(message_waiters_.size(), std::memory_order_relaxed);
  for (auto& waiter : std::exchange(message_waiters_, {})) waiter.sink->complete(error);
}

Message EngineCore::recv(std::optional<Duration> timeout) {
  auto until = deadline(timeout);
  for (;;) {
    wait([&] { return inbox_size_.load(std::memory_order_acquire) > 0 || closed(); }, until);
    std::lock_guard lock(inbox_mutex_);
    if (!inbox_.empty()) {
      Message message = std::move(inbox_.front());
      inbox_.pop_front();
      inbox_size_.store(inbox_.size(), std::memory_order_release);
      return message;
    }
    require_open();
    if (Clock::now() >= until)
      throw Error(ErrorKind::kTimeout, "recv: no message arrived before the deadline");
  }
}

std::shared_ptr<PeerGroup> EngineCore::peer_group(const std::vector<Address>& members, uint32_t id) {
  auto group = std::make_shared<GroupImpl>(shared_from_this(), members, id, address_);
  require_open();
  Locked locked(*this);
  if (fabric_closed_) require_open();
  for (size_t rank = 0; rank < members.size(); ++rank) {
    bool self = rank == group->rank();
    group->peers.push_back(self ? UINT32_MAX : connect(members[rank].bytes()));
    group->labels.push_back("rank " + std::to_string(rank) + " " +
                            decode_address(members[rank].bytes()).label());
  }
  group->generation = group_generations_[group->hash]++;
  GroupKey key{group->hash, group->generation};
  if (auto early = early_barriers_.find(key); early != early_barriers_.end()) {
    for (const auto& [from, number] : early->second) group->arrive(from, number);
    early_notices_ -= early->second.size();
    early_barriers_.erase(early);
  }
  std::erase_if(groups_, [](const auto& entry) { return entry.second.expired(); });
  groups_[key] = group;
  return group;
}

void EngineCore::receive_barrier(const Bytes& from, uint64_t hash, uint32_t generation, uint64_t number) {
  GroupKey key{hash, generation};
  auto known = groups_.find(key);
  if (known != groups_.end()) {
    if (auto group = known->second.lock()) group->arrive(from, number);
    return;
  }
  auto made = group_generations_.find(hash);
  if (made != group_generations_.end() && generation < made->second) return;  // of a group that is gone
  decode_address(from);
  auto early = early_barriers_.find(key);
  if (early == early_barriers_.end() || !early->second.contains(from)) {
    if (early_notices_ >= kMaxEarlyNotices) {
      throw Error(ErrorKind::kPeer, "65536 barrier notices of groups unknown here; one more was dropped");
    }
    ++early_notices_;
  }
  auto& last = early_barriers_[key][from];
  last = std::max(last, number);
}

void EngineCore::barrier(PeerGroup& base, std::optional<Duration> timeout) {
  auto& group = static_cast<GroupImpl&>(base);
  if (group.core().get() != this)
    throw Error(ErrorKind::kInvalidArgument, "the group belongs to another engine");
  require_open();
  auto until = deadline(timeout);
  uint64_t number = group.entered.fetch_add(1) + 1;
  Bytes message = message_header(kBarrier);
  ByteWriter body;
  body.put(group.hash);
  body.put(group.generation);
  body.put(number);
  Bytes tail = body.take();
  message.insert(message.end(), tail.begin(), tail.end());
  {
    Locked locked(*this);
    if (fabric_closed_) require_open();
    for (size_t rank = 0; rank < group.size(); ++rank) {
      if (rank == group.rank()) continue;
      queue_message(group.peers[rank], message, new BarrierSink(group.shared_from_this()));
    }
  }
  bool passed = wait([&] { return group.passed(number) || group.failed.load() || closed(); }, until);
  if (passed && group.passed(number)) return;
  require_open();
  if (group.failed.load()) throw group.error();
  throw Error(ErrorKind::kTimeout, "barrier " + std::to_string(number) + " of group " +
                                       std::to_string(group.id) + ": still missing " + group.missing(number));
}

}  // namespace pplx
