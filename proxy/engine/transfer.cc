// Operations: from the submission to the fabric and back to whoever waits for the completion.
#include <algorithm>

#include "proxy/engine/core.h"
#include "proxy/engine/doubts.h"
#include "proxy/engine/regions.h"
#include "proxy/engine/whole.h"
#include "proxy/log.h"

namespace pplx {
namespace {

// Shorter parts are not worth an operation of their own.
constexpr size_t kShortestPart = 32 << 10;
constexpr size_t kShortestShard = 4 << 10;
constexpr size_t kPartAlignment = 256;

size_t rounded_up(size_t bytes, size_t alignment) { return (bytes + alignment - 1) / alignment * alignment; }

Op copy_of(const Op& op) {
  Op copy = op;
  copy.shared = false;
  return copy;
}

}  // namespace

Whole::Whole(EngineCore& core, CompletionSink* sink, uint64_t id) : core_(core), sink_(sink), id_(id) {
  if (id_ != 0) core_.wholes_.emplace(id_, this);
}

Whole::~Whole() {
  if (id_ == 0) return;
  auto [begin, end] = core_.wholes_.equal_range(id_);
  for (auto it = begin; it != end; ++it) {
    if (it->second != this) continue;
    core_.wholes_.erase(it);
    return;
  }
}

bool Whole::refuse(const Error& error) {
  if (held_ == nullptr || error_) return false;
  error_ = error;
  return true;
}

void Whole::complete(const Error* error) noexcept {
  if (error != nullptr && !error_) error_ = *error;
  if (--left_ > 0) return;
  if (Op* held = std::exchange(held_, nullptr); held != nullptr) {
    if (!error_) {
      left_ = 1;
      core_.place(held);
      return;  // this may be gone
    }
    core_.recycle(held);
  }
  if (sink_ != nullptr) sink_->complete(error_ ? &*error_ : nullptr);
  delete this;
}

void EngineCore::drain() {
  if (submissions_.empty()) return;
  for (OpQueue queue = submissions_.take(); !queue.empty();) submit(queue.pop());
}

void EngineCore::submit(Op* op) {
  if (fabric_closed_) [[unlikely]] {
    Error error(ErrorKind::kClosed, "the TransferEngine was closed before the operation was posted");
    finish(op, &error);
    return;
  }
  if (op->kind == FabricOp::Kind::kWrite) [[likely]] {
    bump(counters_.writes);
    bump(counters_.write_bytes, op->length);
  } else {
    bump(counters_.reads);
    bump(counters_.read_bytes, op->length);
  }
  place(op);
}

void EngineCore::place(Op* op) {
  if (op->length > split_above_ || op->per_shard) [[unlikely]] {
    op->per_shard ? split_over_shards(op) : split_by_bytes(op);
  } else {
    enqueue(peers_[op->to], op);
  }
}

// As many parts as this engine has NICs, whatever has become of them: the target counts on their number.
void EngineCore::split_over_shards(Op* op) {
  op->per_shard = false;
  size_t share = rounded_up((op->length + nics_.size() - 1) / nics_.size(), kPartAlignment);
  share = std::max(share, kShortestShard);
  auto* whole = new Whole(*this, op->sink, op->id);
  const Op model = copy_of(*op);
  recycle(op);
  for (size_t shard = 0; shard < nics_.size(); ++shard) {
    size_t begin = std::min(shard * share, model.length);
    Op* part = pool_.take();
    *part = model;
    part->source += begin;
    part->target += begin;
    part->length = std::min(share, model.length - begin);
    part->sink = whole;
    whole->add();
    if (part->length > max_write_) {
      split_by_bytes(part);
    } else {
      enqueue(peers_[part->to], part);
    }
  }
  whole->complete(nullptr);
}

// Over all paths where there are several, and by what the provider takes at once.
void EngineCore::split_by_bytes(Op* op) {
  Peer& peer = peers_[op->to];
  const bool too_long = op->length > max_write_;
  if (op->has_imm && !delivery_complete_) {
    if (!too_long) {
      enqueue(peer, op);
      return;
    }
    Error error = explain(*op, Error(ErrorKind::kFabric,
                                     "it is longer than the provider writes at once, and the provider cannot "
                                     "tell when the first part is visible (no FI_DELIVERY_COMPLETE)"));
    finish(op, &error);
    return;
  }
  const size_t ways = std::max<size_t>(1, std::min(peer.active.size(), op->length / kShortestPart));
  if (ways == 1 && !too_long) {
    enqueue(peer, op);
    return;
  }
  const size_t part_bytes = std::min(rounded_up((op->length + ways - 1) / ways, kPartAlignment), max_write_);
  auto* whole = new Whole(*this, op->sink, op->id);
  const Op model = copy_of(*op);
  const bool shared = op->shared;
  for (size_t begin = 0; begin < model.length; begin += part_bytes) {
    const bool last = model.length - begin <= part_bytes;
    Op* part = last ? op : pool_.take();
    *part = model;
    part->shared = last && shared;
    part->source += begin;
    part->target += begin;
    part->length = std::min(part_bytes, model.length - begin);
    part->sink = whole;
    part->has_imm = last && model.has_imm;
    if (part->has_imm) {
      whole->hold(part);
    } else {
      whole->add();
      enqueue(peer, part);
    }
  }
  whole->complete(nullptr);
}

void EngineCore::enqueue(Peer& peer, Op* op) {
  if (peer.failed) [[unlikely]] {
    op->undelivered = true;
    Error error = explain(*op, *peer.failed);
    finish(op, &error);
    return;
  }
  if (!peer.ready && op->kind != FabricOp::Kind::kMessage) [[unlikely]] {
    peer.waiting.push(op);
    return;
  }
  route(*op, peer);
  Path& path = peer.paths[op->path];
  if (path.pending.empty() && post(peer, op)) [[likely]]
    return;
  bump(counters_.backpressure);
  if (timeline_) [[unlikely]] {
    uint64_t now = nanoseconds_now();
    timeline_->add({.start = now,
                    .end = now,
                    .bytes = op->length,
                    .imm = op->imm,
                    .peer = op->to,
                    .outstanding = static_cast<uint32_t>(nics_[path.nic].outstanding),
                    .nic = static_cast<uint16_t>(path.nic),
                    .what = Timeline::What::kBackpressure,
                    .has_imm = op->has_imm});
  }
  path.pending.push(op);
  if (!path.listed) {
    path.listed = true;
    pending_paths_.emplace_back(op->to, op->path);
  }
}

// False when the fabric is full. An operation that can never be posted is finished with the error.
bool EngineCore::post(Peer& peer, Op* op) {
  Path& path = peer.paths[op->path];
  Nic& nic = nics_[path.nic];
  if (nic.outstanding >= nic.caps.queue_depth) return false;
  op->undelivered = false;
  // A clock read costs as much as the rest of a write.
  op->posted_at = (++nic.sampled & 63U) == 0 || timeline_ != nullptr ? nanoseconds_now() : 0;
  try {
    Post result = Post::kFull;
    switch (op->kind) {
      [[likely]] case FabricOp::Kind::kWrite : result = nic.fabric->try_write(*op);
      break;
      case FabricOp::Kind::kRead:
        result = nic.fabric->try_read(*op);
        break;
      default:
        result = nic.fabric->try_send(*op);
    }
    if (result == Post::kFull) return false;
  } catch (const Error& cause) {
    op->undelivered = true;
    if (cause.kind() == ErrorKind::kClosed) {
      end_with_peer(peer, op, cause);
      return true;
    }
    Error error = explain(*op, cause);
    if (cause.kind() == ErrorKind::kPeer) {
      lose_path(peer, op->path, cause);
      if (retry(op)) return true;
    }
    finish(op, &error);
    return true;
  }
  count(path.traffic, *op);
  path.posted.push(op);
  nic.deepest = std::max(nic.deepest, ++nic.outstanding);
  bump(outstanding_);
  return true;
}

void EngineCore::post_pending() {
  // One path that takes nothing, be its peer dead or its NIC full, does not hold up the others.
  for (size_t i = 0; i < pending_paths_.size();) {
    auto [number, index] = pending_paths_[i];
    Peer& peer = peers_[number];
    Path& path = peer.paths[index];
    while (!path.pending.empty()) {
      Op* op = path.pending.pop();
      if (post(peer, op)) continue;
      // The next try goes over another rail: this one's connection may be the one that is broken.
      if (op->kind != FabricOp::Kind::kMessage) op->rail = path.next_rail++ % nics_[path.nic].caps.rails;
      path.pending.push_front(op);
      break;
    }
    if (path.pending.empty()) {
      path.listed = false;
      pending_paths_[i] = pending_paths_.back();
      pending_paths_.pop_back();
    } else {
      ++i;
    }
  }
}

void EngineCore::finish(Op* op, const Error* error) {
  notify(op, error);
  recycle(op);
}

void EngineCore::notify(Op* op, const Error* error) {
  if (error != nullptr) [[unlikely]]
    bump(counters_.errors);
  if (op->sink != nullptr) op->sink->complete(error);
}

void EngineCore::recycle(Op* op) {
  if (op->kind == FabricOp::Kind::kMessage) {
    free_slots_.push_back(op->slot);
    --peers_[op->to].messages;
    peers_[op->to].unanswered.erase(op->number);
  }
  if (op->keys != nullptr) op->keys.reset();
  if (op->shared) {
    std::lock_guard lock(shared_pool_mutex_);
    shared_pool_.put(op);
  } else {
    pool_.put(op);
  }
}

void EngineCore::taken_back_by_fabric(Peer& peer, Op* op) {
  Path& path = peer.paths[op->path];
  path.posted.erase(op);
  --nics_[path.nic].outstanding;
  outstanding_.store(outstanding_.load(std::memory_order_relaxed) - 1, std::memory_order_relaxed);
}

// Tells the caller that it failed, while the provider still holds the operation.
void EngineCore::abandon(Peer& peer, Op* op, const Error& error) {
  taken_back_by_fabric(peer, op);
  op->abandoned = true;
  ++peer.abandoned;
  if (op->region != nullptr) op->held = op->region->weak_from_this().lock();
  nics_[peer.paths[op->path].nic].abandoned.push(op);
  notify(op, &error);
}

// The provider has no more to do with an operation that was abandoned.
void EngineCore::give_back(Op* op) {
  Peer& peer = peers_[op->to];
  --peer.abandoned;
  nics_[peer.paths[op->path].nic].abandoned.erase(op);
  // Not dropped here: what the last handle of a region takes with it is its owner's and not for this lock.
  if (op->held != nullptr) given_back_.push_back(std::move(op->held));
  op->held.reset();
  recycle(op);
}

Error EngineCore::explain(const Op& op, const Error& error) const {
  std::string what = op.kind == FabricOp::Kind::kWrite  ? "write"
                     : op.kind == FabricOp::Kind::kRead ? "read"
                                                        : "message";
  if (op.has_imm) what += " with immediate " + std::to_string(op.imm);
  what += " of " + std::to_string(op.length) + " bytes ";
  what += op.kind == FabricOp::Kind::kRead ? "from " : "to ";
  what += peers_[op.to].label + ": " + error.what();
  if (error.kind() == ErrorKind::kPeer && op.has_imm && !op.undelivered) {
    what += " (it may have arrived and been counted, or not)";
  }
  return Error(error.kind(), what);
}

void EngineCore::on_complete(FabricOp& fabric_op, const Error* error) {
  Op* op = static_cast<Op*>(&fabric_op);
  Peer& peer = peers_[op->to];
  if (error == nullptr && peer.paths.size() > 1) [[unlikely]] {
    Path& path = peer.paths[op->path];
    path.completed = tick_.load(std::memory_order_relaxed);
    if (op->kind == FabricOp::Kind::kMessage) path.messaged = path.completed;
    path.silent.reset();
  }
  if (op->abandoned) [[unlikely]] {
    give_back(op);
    return;
  }
  taken_back_by_fabric(peer, op);
  if (op->posted_at != 0) [[unlikely]]
    record(*op, error != nullptr);
  if (error == nullptr) [[likely]] {
    if (op->kind == FabricOp::Kind::kRead && gpu_writes_.needed()) [[unlikely]] {
      try {
        gpu_writes_.flush();
      } catch (const Error& flush_error) {
        finish(op, &flush_error);
        return;
      }
    }
    finish(op, nullptr);
    return;
  }
  ++peer.paths[op->path].traffic.errors;
  if (error->kind() == ErrorKind::kClosed) {
    end_with_peer(peer, op, *error);
    return;
  }
  Error failure = explain(*op, *error);
  if (error->kind() == ErrorKind::kPeer) {
    lose_path(peer, op->path, *error);
    if (retry(op) || (!op->undelivered && doubts_->take(op, *error))) return;
  }
  finish(op, &failure);
}

// Its engine was closed, with all of its NICs.
void EngineCore::end_with_peer(Peer& peer, Op* op, const Error& error) {
  const Error gone(ErrorKind::kPeer, error.what());
  fail_peer(peer, gone);
  const Error failure = explain(*op, gone);
  finish(op, &failure);
}

void EngineCore::record(const Op& op, bool failed) {
  const Path& path = peers_[op.to].paths[op.path];
  Nic& nic = nics_[path.nic];
  uint64_t now = nanoseconds_now();
  nic.latency.add(now - op.posted_at);
  if (!timeline_) return;
  auto what = failed                              ? Timeline::What::kError
              : op.kind == FabricOp::Kind::kWrite ? Timeline::What::kWrite
              : op.kind == FabricOp::Kind::kRead  ? Timeline::What::kRead
                                                  : Timeline::What::kMessage;
  timeline_->add({.start = op.posted_at,
                  .end = std::max(now, op.posted_at + 1),
                  .bytes = op.length,
                  .imm = op.imm,
                  .peer = op.to,
                  .outstanding = static_cast<uint32_t>(nic.outstanding),
                  .nic = static_cast<uint16_t>(path.nic),
                  .what = what,
                  .has_imm = op.has_imm});
}

void EngineCore::on_error(const Error& error) {
  bump(counters_.errors);
  log(LogLevel::kWarn, fabric_name_, ": ", error.what());
}

}  // namespace pplx
