// An engine's NICs and its ways to each peer: which one an operation takes, and what happens when one fails.
#include <algorithm>

#include "proxy/engine/core.h"
#include "proxy/engine/doubts.h"
#include "proxy/engine/regions.h"
#include "proxy/log.h"

namespace pplx {
namespace {

// Below this a write takes one of several paths, in turn, rather than all of them.
constexpr size_t kSplitAbove = 64 << 10;
constexpr uint8_t kMaxRetries = 64;  // one for each path that a peer may have

}  // namespace

void EngineCore::add_nics() {
  if (config_.nics.size() > kMaxNics) {
    throw Error(ErrorKind::kInvalidArgument, "EngineConfig.nics names " +
                                                 std::to_string(config_.nics.size()) + " NICs, at most " +
                                                 std::to_string(kMaxNics) + " are used together");
  }
  const size_t wanted = std::max<size_t>(1, config_.nics.size());
  if (wanted > 1 && config_.fabric == "shm") {
    throw Error(ErrorKind::kInvalidArgument, "the fabric shm has no NICs to choose from: leave nics out");
  }
  for (size_t i = 0; i < wanted; ++i) {
    EngineConfig one = config_;
    one.nics.clear();
    if (!config_.nics.empty()) {
      one.nic = config_.nics[i].name;
      one.bind_address = config_.nics[i].bind_address;
    }
    Nic nic;
    nic.fabric = make_fabric(one);
    nic.caps = nic.fabric->caps();
    nics_.push_back(std::move(nic));
  }
  max_message_ = max_write_ = SIZE_MAX;
  self_ = nics_[0].fabric->address();
  self_.job = job_hash(config_.job);
  for (size_t i = 0; i < nics_.size(); ++i) {
    const FabricCaps& caps = nics_[i].caps;
    max_message_ = std::min(max_message_, caps.max_message);
    max_write_ = std::min(max_write_, caps.max_write);
    delivery_complete_ &= caps.delivery_complete;
    reads_ &= caps.reads;
    device_memory_ &= caps.device_memory;
    mutual_ |= caps.mutual;
    if (i > 0) self_.further.push_back(nics_[i].fabric->address().endpoints);
  }
  // Also of an engine with one NIC: its peers may have several.
  split_above_ = std::min(max_write_, kSplitAbove);
  address_ = Address(encode(self_));
  // Every message begins with it.
  constexpr size_t kRoom = 1024;
  if (address_.bytes().size() + kRoom > max_message_) {
    throw Error(ErrorKind::kInvalidArgument,
                "the address of this engine's " + std::to_string(nics_.size()) + " NICs has " +
                    std::to_string(address_.bytes().size()) + " bytes, too many for messages of " +
                    std::to_string(max_message_) + ": use fewer NICs or endpoints");
  }
  fabric_name_ = nics_[0].fabric->name();
  if (wanted > 1) fabric_name_ += " on " + std::to_string(wanted) + " NICs";
}

uint32_t EngineCore::connect(const Bytes& address) {
  const auto known = peer_numbers_.find(address);
  const Peer* before = known == peer_numbers_.end() ? nullptr : &peers_[known->second];
  if (before != nullptr && !before->removed) return known->second;
  PeerAddress parsed = decode_address(address);
  check_job(self_, parsed);
  const size_t ours = nics_.size(), theirs = parsed.nics();
  Peer peer;
  std::optional<Error> refused;
  for (size_t nic = 0; nic < ours; ++nic) {
    for (size_t remote = 0; remote < theirs; ++remote) {
      Path path;
      path.nic = static_cast<uint32_t>(nic);
      path.remote = static_cast<uint32_t>(remote);
      // Every NIC of the side that has more takes part once; pairs are the same seen from either side.
      path.primary = ours >= theirs ? remote == nic % theirs : nic == remote % ours;
      path.dead = nics_[nic].down.has_value();
      try {
        if (!path.dead) path.number = nics_[nic].fabric->connect(parsed.nic(remote));
      } catch (const StillLeaving& error) {
        if (before != nullptr || ours * theirs == 1) throw;  // the path would be lost for good
        refused = error;
        path.dead = true;
      } catch (const Error& error) {
        if (ours * theirs == 1 || error.kind() == ErrorKind::kInvalidArgument) throw;
        refused = error;
        path.dead = true;
      }
      peer.paths.push_back(path);
    }
  }
  const auto number = static_cast<uint32_t>(peers_.size());
  peer.label = parsed.label();
  peer.address = address;
  peer.next_path = number;  // so that writes to many peers begin on different NICs
  if (before != nullptr) peer.last_message = before->last_message;  // it knows those up to here
  refresh(peer);
  if (peer.active.empty()) {
    throw refused.value_or(Error(ErrorKind::kFabric, "no NIC of this engine works any more"));
  }
  peers_.push_back(std::move(peer));
  peer_numbers_[address] = number;
  if (mutual_) {
    peers_[number].ready = false;
    greet(number, kHello);
  }
  return number;
}

void EngineCore::refresh(Peer& peer) {
  peer.active.clear();
  for (bool primary : {true, false}) {
    for (size_t i = 0; i < peer.paths.size(); ++i) {
      const Path& path = peer.paths[i];
      if (!path.dead && path.primary == primary) peer.active.push_back(static_cast<uint16_t>(i));
    }
    if (!peer.active.empty()) return;
  }
}

// Chooses the path, and with it the NIC's own view of the memory on both sides.
void EngineCore::route(Op& op, Peer& peer) {
  const size_t ways = peer.active.size();
  op.path = ways == 1 ? peer.active[0] : peer.active[peer.next_path++ % ways];
  Path& path = peer.paths[op.path];
  op.peer = path.number;
  const uint32_t rails = nics_[path.nic].caps.rails;
  op.rail = rails > 1 && op.kind != FabricOp::Kind::kMessage ? path.next_rail++ % rails : 0;
  if (peer.paths.size() == 1) [[likely]]
    return;
  op.routed = tick_.load(std::memory_order_relaxed);
  if (op.kind == FabricOp::Kind::kMessage) {
    op.local = nics_[path.nic].send_memory[op.slot / kSendSlots].local;
    return;
  }
  if (op.region != nullptr) op.local = op.region->memory(path.nic).local;
  op.key = op.keys->keys[path.remote];
}

// An operation whose path has failed goes over another one, if that can do no harm: bytes may be written
// twice, immediates may not arrive twice, and messages are known by their number. docs/protocol.md, "Many
// NICs".
bool EngineCore::retry(Op* op) {
  Peer& peer = peers_[op->to];
  const bool harmless = op->undelivered || (op->kind == FabricOp::Kind::kWrite && !op->has_imm) ||
                        op->kind == FabricOp::Kind::kRead ||
                        (op->kind == FabricOp::Kind::kMessage && op->number != 0);
  if (!harmless || peer.failed || peer.paths.size() == 1 || op->retries >= kMaxRetries) return false;
  ++op->retries;
  bump(counters_.retries);
  enqueue(peer, op);
  return true;
}

void EngineCore::lose_path(Peer& peer, uint16_t index, const Error& error) {
  Path& path = peer.paths[index];
  if (path.dead || peer.failed) return;
  if (peer.paths.size() == 1) {
    fail_peer(peer, error);
    return;
  }
  path.dead = true;
  refresh(peer);
  log(LogLevel::kWarn, "the path from NIC ", path.nic, " to NIC ", path.remote, " of ", peer.label,
      " failed, ", peer.active.size(), " are left: ", error.what());
  if (peer.active.empty()) {
    fail_peer(peer, error);
    return;
  }
  for (OpQueue moved = std::exchange(path.pending, {}); !moved.empty();) {
    bump(counters_.retries);
    enqueue(peer, moved.pop());
  }
}

// Its operations end with nothing, while another path to the same peer has brought some to their end. A NIC
// whose cable is pulled looks like that, for as long as the kernel tries again (a quarter of an hour of TCP).
// And so does for a moment a peer that stops in the middle of what has been sent to it: what counts comes
// well after that, if need be of later operations. Of messages only messages tell: they need the peer's
// process, writes its NIC alone.
bool EngineCore::is_stuck(const Peer& peer, Path& path, const Op* oldest, uint32_t now, uint32_t limit) {
  if (path.dead || peer.paths.size() == 1) return false;
  const auto is_message = [](const Op* op) { return op->kind == FabricOp::Kind::kMessage; };
  const auto late = [&](const Op* op) { return now - op->routed > limit; };
  const auto after = [](uint32_t one, uint32_t other) { return static_cast<int32_t>(one - other) > 0; };
  if (is_message(oldest)) {
    const Op* other = path.posted.front();
    while (other != nullptr && is_message(other)) other = other->after;
    if (other != nullptr && late(other)) oldest = other;
  }
  if (!late(oldest)) return false;
  if (!path.silent) {
    if (after(path.completed, oldest->routed)) return false;
    path.silent = oldest->routed;
  }
  const uint32_t since = *path.silent + limit / 2;
  return std::any_of(peer.paths.begin(), peer.paths.end(), [&](const Path& one) {
    return !one.dead && after(is_message(oldest) ? one.messaged : one.completed, since);
  });
}

// Not within the fabric's poll.
void EngineCore::lose_nic(size_t index, const Error& error) {
  Nic& nic = nics_[index];
  if (nic.down) return;
  nic.down = error;
  log(LogLevel::kWarn, "NIC ", index, " (", nic.fabric->name(), ") is taken out: ", error.what());
  polling_ = index;
  nic.fabric->drain(*this);
  polling_ = 0;
  nic.fabric->close();  // from here on it touches no memory, and its operations are ours again
  while (Op* op = nic.abandoned.front()) give_back(op);
  const Error lost(ErrorKind::kPeer,
                   "this engine's NIC " + std::to_string(index) + " failed: " + error.what());
  for (size_t number = 0; number < peers_.size(); ++number) {
    Peer& peer = peers_[number];
    OpQueue unfinished;
    for (size_t i = 0; i < peer.paths.size(); ++i) {
      Path& path = peer.paths[i];
      if (path.nic != index || peer.failed) continue;
      while (Op* op = path.posted.front()) {
        taken_back_by_fabric(peer, op);
        op->undelivered = false;
        unfinished.push(op);
      }
      lose_path(peer, static_cast<uint16_t>(i), lost);
    }
    while (!unfinished.empty()) {
      Op* op = unfinished.pop();
      if (retry(op) || doubts_->take(op, lost)) continue;
      Error failure = explain(*op, lost);
      finish(op, &failure);
    }
  }
  // With the peer's last path those of its operations are given up that an earlier lost path still held.
  while (Op* op = nic.abandoned.front()) give_back(op);
}

void EngineCore::lose_failing_nics() {
  failing_ = false;
  for (size_t i = 0; i < nics_.size(); ++i) {
    if (auto error = std::exchange(nics_[i].failing, std::nullopt)) lose_nic(i, *error);
  }
}

void EngineCore::on_down(const Error& error) {
  on_error(error);
  nics_[polling_].failing = error;
  failing_ = true;
}

void EngineCore::remove_nic(size_t index) {
  require_open();
  Locked locked(*this);
  if (fabric_closed_) require_open();
  auto working = std::count_if(nics_.begin(), nics_.end(), [](const Nic& nic) { return !nic.down; });
  if (index >= nics_.size() || (working == 1 && !nics_[index].down)) {
    throw Error(ErrorKind::kInvalidArgument, "NIC " + std::to_string(index) + " of " +
                                                 std::to_string(nics_.size()) + ", of which " +
                                                 std::to_string(working) + " work, cannot be taken out");
  }
  lose_nic(index, Error(ErrorKind::kFabric, "it was removed"));
}

void EngineCore::fail_peer(Peer& peer, const Error& error) {
  if (!peer.failed) {
    peer.failed = error;
    if (error.kind() != ErrorKind::kClosed)
      log(LogLevel::kWarn, "peer ", peer.label, " failed: ", error.what());
  }
  auto fail_all = [&](OpQueue& queue) {
    while (!queue.empty()) {
      Op* op = queue.pop();
      op->undelivered = true;
      Error failure = explain(*op, error);
      finish(op, &failure);
    }
  };
  for (Path& path : peer.paths) {
    while (Op* op = path.posted.front()) abandon(peer, op, explain(*op, error));
    fail_all(path.pending);
  }
  fail_all(peer.waiting);
  if (auto known = peer_numbers_.find(peer.address); known != peer_numbers_.end()) {
    doubts_->fail(known->second, error);
  }
}

bool EngineCore::remove_peer(const Address& address) {
  require_open();
  decode_address(address.bytes());
  Locked locked(*this);
  if (fabric_closed_) require_open();
  const bool heard = seen_.erase(address.bytes()) != 0;
  const auto known = peer_numbers_.find(address.bytes());
  if (known == peer_numbers_.end() || peers_[known->second].removed) return heard;
  Peer& peer = peers_[known->second];
  removed_.push_back(known->second);
  peer.removed = true;
  fail_peer(peer, Error(ErrorKind::kPeer, "it was removed"));
  return true;
}

// Fabrics forget a peer once they hold nothing for it.
void EngineCore::disconnect_removed() {
  // A fabric may know all that were met at one address by the same number.
  std::set<Bytes, BytesLess> busy;
  for (const uint32_t number : removed_) {
    if (peers_[number].abandoned != 0) busy.insert(peers_[number].address);
  }
  std::erase_if(removed_, [&](uint32_t number) {
    const Peer& peer = peers_[number];
    if (busy.contains(peer.address)) return false;
    if (peer_numbers_.at(peer.address) != number) return true;
    for (const Path& path : peer.paths) {
      if (path.number != Path::kNone && !nics_[path.nic].down)
        nics_[path.nic].fabric->disconnect(path.number);
    }
    return true;
  });
}

// Where targets take nothing from strangers, peers exchange messages before the first write: who gets a hello
// knows the sender from then on, and so does who gets the answer.
void EngineCore::greet(uint32_t peer, uint8_t type) {
  peers_[peer].greeted = tick_.load(std::memory_order_relaxed);
  queue_message(peer, message_header(type), new IgnoringSink);
}

void EngineCore::answer_greetings() {
  for (const auto& [from, type] : std::exchange(greetings_, {})) {
    try {
      const uint32_t number = connect(from);
      Peer& peer = peers_[number];
      if (type == kHello) greet(number, kWelcome);
      peer.ready = true;
      for (OpQueue waiting = std::exchange(peer.waiting, {}); !waiting.empty();) enqueue(peer, waiting.pop());
    } catch (const Error& error) {
      on_error(error);
    }
  }
}

}  // namespace pplx
