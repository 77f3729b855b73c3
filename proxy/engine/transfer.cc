// Writes: from the caller to the fabric and back to whoever waits for the completion.
#include "proxy/engine/core.h"
#include "proxy/log.h"

namespace pplx {
namespace {

[[noreturn]] void invalid(const std::string& what) { throw Error(ErrorKind::kInvalidArgument, what); }

void check_range(size_t offset, size_t length, size_t size, const char* what) {
  if (offset <= size && length <= size - offset) [[likely]]
    return;
  invalid("write of " + std::to_string(length) + " bytes at offset " + std::to_string(offset) + " of a " +
          what + " of " + std::to_string(size) + " bytes");
}

void check_request(const EngineCore& core, const WriteRequest& request) {
  const auto* target = static_cast<const RemoteRegionImpl*>(request.target);
  if (target == nullptr) invalid("a write needs a target");
  if (target->core != &core) invalid("the target was opened by another engine");
  check_range(request.target_offset, request.length, target->length, "target region");
  const auto* source = static_cast<const RegionImpl*>(request.source);
  if (source == nullptr) {
    if (request.length != 0) invalid("a write of bytes needs a source");
  } else {
    if (source->core() != &core) invalid("the source was registered with another engine");
    check_range(request.source_offset, request.length, source->size(), "source region");
  }
  if (request.imm == kNoImmediate) invalid("immediate 0xFFFFFFFF is the engine's own");
}

void fill(Op& op, const WriteRequest& request, CompletionSink* sink, uint32_t tick, bool shared) {
  const auto& target = static_cast<const RemoteRegionImpl&>(*request.target);
  op.source = nullptr;
  op.local = nullptr;
  if (request.source != nullptr) {
    const auto& memory = static_cast<const RegionImpl&>(*request.source).memory();
    op.source = memory.data + request.source_offset;
    op.local = memory.local;
  }
  op.length = request.length;
  op.target = target.base + request.target_offset;
  op.key = target.key;
  op.peer = target.peer;
  op.imm = request.imm.value_or(0);
  op.has_imm = request.imm.has_value();
  op.kind = FabricOp::Kind::kWrite;
  op.sink = sink;
  op.split = nullptr;
  op.stamp = tick;
  op.shared = shared;
  op.abandoned = false;
}

}  // namespace

void EngineCore::write(const WriteRequest& request, CompletionSink* sink) {
  require_open();
  check_request(*this, request);
  uint32_t tick = tick_.load(std::memory_order_relaxed);
  if (try_lock()) {
    if (fabric_closed_) {
      unlock();
      require_open();
    }
    Op* op = pool_.take();
    fill(*op, request, sink, tick, false);
    submit(op);
    unlock();
    return;
  }
  Op* op;
  {
    std::lock_guard lock(shared_pool_mutex_);
    op = shared_pool_.take();
  }
  fill(*op, request, sink, tick, true);
  submissions_.push(op);
  kick();
}

void EngineCore::scatter(const Region& source, std::span<const ScatterEntry> entries,
                         std::optional<uint32_t> imm, CompletionSink* sink) {
  require_open();
  auto request = [&](const ScatterEntry& entry) {
    return WriteRequest{&source, entry.source_offset, entry.target.get(), entry.target_offset, entry.length,
                        imm};
  };
  // All or none: a bad entry must not leave the others half sent.
  for (const auto& entry : entries) check_request(*this, request(entry));
  Locked locked(*this);
  if (fabric_closed_) require_open();
  uint32_t tick = tick_.load(std::memory_order_relaxed);
  for (const auto& entry : entries) {
    Op* op = pool_.take();
    fill(*op, request(entry), sink, tick, false);
    submit(op);
  }
}

void EngineCore::write_callback(const WriteRequest& request, CallbackThread::Callback done) {
  callbacks_.start();
  auto sink = std::make_unique<CallbackSink>(callbacks_, std::move(done));
  write(request, sink.get());
  sink.release();
}

void EngineCore::drain() {
  if (submissions_.empty()) return;
  for (OpQueue queue = submissions_.take(); !queue.empty();) submit(queue.pop());
}

void EngineCore::submit(Op* op) {
  if (fabric_closed_) [[unlikely]] {
    Error error(ErrorKind::kClosed, "the TransferEngine was closed before the write was posted");
    finish(op, &error);
    return;
  }
  bump(counters_.writes);
  bump(counters_.write_bytes, op->length);
  if (op->length > caps_.max_write) [[unlikely]] {
    split(op);
  } else {
    enqueue(peers_[op->peer], op);
  }
}

void EngineCore::split(Op* op) {
  if (op->has_imm && !caps_.delivery_complete) {
    Error error = explain(*op, Error(ErrorKind::kFabric,
                                     "it is longer than the provider writes at once, and the provider cannot "
                                     "tell when the first part is visible (no FI_DELIVERY_COMPLETE)"));
    finish(op, &error);
    return;
  }
  Peer& peer = peers_[op->peer];
  size_t first_pieces = (op->length - 1) / caps_.max_write;
  auto* whole = new SplitWrite{op->sink, first_pieces, op, std::nullopt};
  Op next = *op;
  size_t done = first_pieces * caps_.max_write;
  op->source += done;
  op->target += done;
  op->length -= done;
  op->split = whole;
  // From here on `op` and `whole` may be gone as soon as the last of these is queued.
  next.length = caps_.max_write;
  next.has_imm = next.shared = false;
  next.split = whole;
  for (size_t i = 0; i < first_pieces; ++i) {
    Op* piece = pool_.take();
    *piece = next;
    next.source += caps_.max_write;
    next.target += caps_.max_write;
    enqueue(peer, piece);
  }
}

void EngineCore::enqueue(Peer& peer, Op* op) {
  if (peer.failed) [[unlikely]] {
    Error error = explain(*op, *peer.failed);
    finish(op, &error);
    return;
  }
  op->rail = 0;
  if (caps_.rails > 1 && op->kind == FabricOp::Kind::kWrite) op->rail = peer.next_rail++ % caps_.rails;
  if (peer.pending.empty() && post(peer, op)) [[likely]]
    return;
  bump(counters_.backpressure);
  peer.pending.push(op);
  if (!peer.listed) {
    peer.listed = true;
    pending_peers_.push_back(op->peer);
  }
}

// False when the fabric is full. An operation that can never be posted is finished with the error.
bool EngineCore::post(Peer& peer, Op* op) {
  if (outstanding_.load(std::memory_order_relaxed) >= caps_.queue_depth) return false;
  try {
    Post result = op->kind == FabricOp::Kind::kWrite ? fabric_->try_write(*op) : fabric_->try_send(*op);
    if (result == Post::kFull) return false;
  } catch (const Error& cause) {
    Error error = explain(*op, cause);
    finish(op, &error);
    if (cause.kind() == ErrorKind::kPeer) fail_peer(peer, cause);
    return true;
  }
  peer.posted.push(op);
  bump(outstanding_);
  return true;
}

void EngineCore::post_pending() {
  // One peer that takes nothing, dead or slow, does not hold up the others.
  for (size_t i = 0; i < pending_peers_.size();) {
    Peer& peer = peers_[pending_peers_[i]];
    while (!peer.pending.empty()) {
      Op* op = peer.pending.pop();
      if (post(peer, op)) continue;
      // The next try goes over another rail: this one's connection may be the one that is broken.
      if (op->kind == FabricOp::Kind::kWrite) op->rail = peer.next_rail++ % caps_.rails;
      peer.pending.push_front(op);
      break;
    }
    if (peer.pending.empty()) {
      peer.listed = false;
      pending_peers_[i] = pending_peers_.back();
      pending_peers_.pop_back();
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
  if (op->split != nullptr) [[unlikely]] {
    notify_split(op, error);
  } else if (op->sink != nullptr) {
    op->sink->complete(error);
  }
}

void EngineCore::notify_split(Op* op, const Error* error) {
  SplitWrite* whole = op->split;
  if (error != nullptr && !whole->error) whole->error = *error;
  if (op != whole->last && --whole->outstanding > 0) return;
  Op* last = whole->last;
  if (op != last && !whole->error) {
    enqueue(peers_[last->peer], last);
    return;
  }
  if (whole->sink != nullptr) whole->sink->complete(whole->error ? &*whole->error : nullptr);
  if (op != last) recycle(last);
  delete whole;
}

void EngineCore::recycle(Op* op) {
  if (op->kind == FabricOp::Kind::kMessage) {
    free_slots_.push_back(op->slot);
    --peers_[op->peer].messages;
  }
  if (op->shared) {
    std::lock_guard lock(shared_pool_mutex_);
    shared_pool_.put(op);
  } else {
    pool_.put(op);
  }
}

// Tells the caller that it failed, while the provider still holds the operation.
void EngineCore::abandon(Peer& peer, Op* op, const Error& error) {
  peer.posted.erase(op);
  outstanding_.store(outstanding_.load(std::memory_order_relaxed) - 1, std::memory_order_relaxed);
  op->abandoned = true;
  notify(op, &error);
}

void EngineCore::fail_peer(Peer& peer, const Error& error) {
  if (!peer.failed) {
    peer.failed = error;
    if (error.kind() != ErrorKind::kClosed)
      log(LogLevel::kWarn, "peer ", peer.label, " failed: ", error.what());
  }
  while (Op* op = peer.posted.front()) abandon(peer, op, explain(*op, error));
  while (!peer.pending.empty()) {
    Op* op = peer.pending.pop();
    Error failure = explain(*op, error);
    finish(op, &failure);
  }
}

Error EngineCore::explain(const Op& op, const Error& error) const {
  std::string what = op.kind == FabricOp::Kind::kWrite ? "write" : "message";
  if (op.has_imm) what += " with immediate " + std::to_string(op.imm);
  return Error(error.kind(), what + " of " + std::to_string(op.length) + " bytes to " +
                                 peers_[op.peer].label + ": " + error.what());
}

void EngineCore::on_complete(FabricOp& fabric_op, const Error* error) {
  Op* op = static_cast<Op*>(&fabric_op);
  if (op->abandoned) [[unlikely]] {
    recycle(op);
    return;
  }
  Peer& peer = peers_[op->peer];
  peer.posted.erase(op);
  outstanding_.store(outstanding_.load(std::memory_order_relaxed) - 1, std::memory_order_relaxed);
  if (error == nullptr) [[likely]] {
    finish(op, nullptr);
    return;
  }
  Error failure = explain(*op, *error);
  finish(op, &failure);
  if (error->kind() == ErrorKind::kPeer) fail_peer(peer, *error);
}

void EngineCore::on_down(const Error& error) { on_error(error); }

void EngineCore::on_error(const Error& error) {
  bump(counters_.errors);
  log(LogLevel::kWarn, fabric_name_, ": ", error.what());
}

}  // namespace pplx
