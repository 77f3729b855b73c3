// Completions: what arrived, what was sent, what failed; and queue pairs that broke.
#include <arpa/inet.h>

#include <algorithm>
#include <array>
#include <utility>

#include "proxy/fabric/verbs_fabric.h"
#include "proxy/log.h"

namespace pplx {
namespace {

constexpr int kPollBatch = 32;
constexpr auto kEventInterval = std::chrono::milliseconds(20);
constexpr auto kDrainLimit = std::chrono::seconds(1);

// Doing it twice is doing it once.
bool may_repeat(const FabricOp& op) {
  return op.kind == FabricOp::Kind::kRead || (op.kind == FabricOp::Kind::kWrite && !op.has_imm);
}

bool remove(std::vector<VerbsLink*>& links, VerbsLink* link) { return std::erase(links, link) != 0; }

}  // namespace

size_t VerbsFabric::poll(FabricEvents& events) {
  if (down_) return 0;
  for (VerbsLink* link : std::exchange(chained_, {})) flush(*link);
  const auto began = broken_.empty() ? Clock::time_point() : Clock::now();
  std::array<ibv_wc, kPollBatch> work;
  const int count = ibv_poll_cq(device_->cq(), kPollBatch, work.data());
  if (count < 0) {
    down_ = true;
    events.on_down(Error(ErrorKind::kFabric, device_->error_text("polling the completion queue", -count)));
    return 0;
  }
  if (count < kPollBatch) emptied_ = began;
  for (int i = 0; i < count; ++i) on_work(work[static_cast<size_t>(i)], events);
  device_->replenish();
  // By index: a completion's owner may post, and so break another link.
  for (size_t i = 0; i < resuming_.size(); ++i) resume(*resuming_[i]);
  std::erase_if(resuming_, [](const VerbsLink* link) { return link->held.empty() || !link->is_open(); });
  if (++polls_ % 16 == 0 || count == 0) keep_house(events);
  return static_cast<size_t>(count) + report_failures(events);
}

// Of a completion with an error only status and wr_id may be read.
void VerbsFabric::on_work(const ibv_wc& work, FabricEvents& events) {
  const WorkId id = WorkId::unpack(work.wr_id);
  const bool good = work.status == IBV_WC_SUCCESS;
  switch (id.kind) {
    case WorkId::Kind::kSend:
      on_sent(id, work.status, events);
      return;
    case WorkId::Kind::kImmediate:
      device_->immediate_consumed();
      if (good && work.opcode == IBV_WC_RECV_RDMA_WITH_IMM) {
        if (const auto link = links_by_qp_.find(work.qp_num); link != links_by_qp_.end()) {
          if (link->second->arrived != nullptr) ++*link->second->arrived;
          peer_of(*link->second).heard = true;
        }
        events.on_immediate(ntohl(work.imm_data));
      }
      break;
    case WorkId::Kind::kMessage:
      if (good && work.opcode == IBV_WC_RECV) events.on_message(device_->message(id.index, work.byte_len));
      device_->repost_message(id.index);
      break;
    case WorkId::Kind::kDatagram:
      if (good) on_datagram(device_->datagram(id.index, work.byte_len));
      device_->repost_datagram(id.index);
      break;
    case WorkId::Kind::kDatagramSend:
      device_->datagram_sent(id.index);
      break;
  }
  if (!good) {
    events.on_error(Error(ErrorKind::kFabric, "verbs " + device_->name() + ": a receive or datagram: " +
                                                  to_text(device_->lib(), work.status)));
  }
}

void VerbsFabric::on_sent(const WorkId& id, ibv_wc_status status, FabricEvents& events) {
  VerbsLink* link = by_queue(id.queue);
  if (link == nullptr) return;  // of a queue pair that is gone
  returned_.clear();
  link->complete(id.index, status, returned_);
  if (status != IBV_WC_SUCCESS) break_off(*link);
  for (size_t i = 0; i < returned_.size(); ++i) settle(*link, returned_[i], events);
}

void VerbsFabric::settle(VerbsLink& link, const VerbsLink::Returned& returned, FabricEvents& events) {
  --outstanding_;
  FabricOp* op = returned.op;
  const Peer& peer = peer_of(link);
  switch (returned.fate) {
    case VerbsLink::Fate::kDone:
      events.on_complete(*op, nullptr);
      return;
    case VerbsLink::Fate::kRefused:
      fail(op,
           Error(ErrorKind::kFabric, "verbs " + device_->name() + ": the target or its NIC refused it: " +
                                         to_text(device_->lib(), returned.status)),
           false);
      return;
    case VerbsLink::Fate::kUndelivered:
      if (peer.failed) {
        fail(op, *peer.failed, true);
      } else {
        link.held.push_back(op);
      }
      return;
    case VerbsLink::Fate::kDoubtful:
      if (peer.failed) {
        fail(op, *peer.failed, false);
      } else if (may_repeat(*op)) {
        link.held.push_back(op);
      } else {
        link.doubtful.push_back(returned);
      }
  }
}

size_t VerbsFabric::report_failures(FabricEvents& events) {
  size_t count = 0;
  // Owners may post, and so fail more.
  for (size_t i = 0; i < failures_.size(); ++i, ++count) {
    const Failure failure = failures_[i];
    failure.op->undelivered = failure.undelivered;
    events.on_complete(*failure.op, &failure.error);
  }
  failures_.clear();
  for (size_t i = 0; i < arrived_.size(); ++i, ++count) events.on_complete(*arrived_[i], nullptr);
  arrived_.clear();
  return count;
}

void VerbsFabric::break_off(VerbsLink& link) {
  if (!link.is_open() || link.broken()) return;
  const auto status = link.first_error();
  std::string why = "on purpose";
  if (status) why = to_text(device_->lib(), *status);
  if (link.post_error()) why = device_->error_text("posting", *link.post_error());
  log(LogLevel::kInfo, "verbs ", device_->name(), ": the queue pair to ", peer_of(link).label,
      " stopped: ", why);
  const size_t held = link.held.size();
  link.break_off();
  outstanding_ -= static_cast<uint32_t>(link.held.size() - held);
  link.drain.stop(Clock::now(), Clock::now() + kDrainLimit);
  remove(chained_, &link);
  remove(handshaking_, &link);
  broken_.push_back(&link);
}

// It holds nothing more, or has had its time to give it back.
void VerbsFabric::finish_broken(VerbsLink& link) {
  Peer& peer = peer_of(link);
  queues_[link.pairing.local()] = nullptr;
  links_by_qp_.erase(link.queue_pair());
  if (link.pairing.remote() != 0) link.last = link.pairing.remote();
  link.arrived = nullptr;
  link.close();
  while (FabricOp* op = link.take_back()) {
    --outstanding_;
    if (peer.failed) {
      fail(op, *peer.failed, false);
    } else {
      link.doubtful.push_back({op, VerbsLink::Fate::kDoubtful, IBV_WC_WR_FLUSH_ERR});
    }
  }
  link.pairing.renewed(0);
  if (peer.failed || !link.wanted) return;
  try {
    start(link);
  } catch (const Error& error) {
    fail_peer(peer, Error(ErrorKind::kPeer, error.what()));
  }
}

Error VerbsFabric::broken_error(const VerbsLink& link, ibv_wc_status status) const {
  return Error(ErrorKind::kFabric,
               "verbs " + device_->name() + ": the connection to " + peers_[link.peer]->label + " broke (" +
                   to_text(device_->lib(), status) +
                   ") while it was under way, and is up again: it may have arrived or not");
}

// Posts again what the broken queue pair gave back.
void VerbsFabric::resume(VerbsLink& link) {
  if (!link.is_open() || link.broken() || !link.pairing.confirmed()) return;
  size_t posted = 0;
  std::vector<FabricOp*> held = std::exchange(link.held, {});
  while (posted < held.size() && !link.full() && outstanding_ < device_->send_budget() && !link.broken()) {
    post_on(link, *held[posted++]);
  }
  link.held.insert(link.held.end(), held.begin() + static_cast<ptrdiff_t>(posted), held.end());
}

void VerbsFabric::fail_peer(Peer& peer, const Error& error) {
  if (peer.failed) return;
  peer.failed = error;
  for (auto& [number, link] : peer.links) {
    for (FabricOp* op : std::exchange(link->held, {})) fail(op, error, true);
    for (const auto& returned : std::exchange(link->doubtful, {})) fail(returned.op, error, false);
    break_off(*link);
    // What could not be posted on the way.
    for (FabricOp* op : std::exchange(link->held, {})) fail(op, error, true);
    remove(handshaking_, link.get());
    remove(resuming_, link.get());
  }
}

// Peers come and go while an engine runs. One that has failed needs no queue pairs, and one that the engine
// has no number for nothing at all.
void VerbsFabric::forget_failed() {
  for (auto& peer : peers_) {
    if (!peer || !peer->failed) continue;
    const bool closed = std::none_of(peer->links.begin(), peer->links.end(),
                                     [](const auto& entry) { return entry.second->is_open(); });
    if (!closed) continue;
    peer->links.clear();
    if (peer->numbered) continue;
    forget(*peer);
    peers_by_id_.erase(peer->nic.id);
    peer.reset();
  }
}

// What has arrived here its senders hold for delivered.
void VerbsFabric::drain(FabricEvents& events) {
  if (!device_) return;
  const auto until = Clock::now() + kDrainLimit;
  const auto wait = [&](auto&& ready) {
    while (!ready() && !down_ && Clock::now() < until) poll(events);
  };
  const Error gone(ErrorKind::kPeer, "verbs " + device_->name() + ": the NIC is taken out");
  for (size_t i = 0; i < peers_.size(); ++i) {  // by number: polls may add some
    wait([&] { return device_->may_send_datagram(); });
    if (!peers_[i] || peers_[i]->failed) continue;
    if (!peers_[i]->self && device_->may_send_datagram()) say_bye(*peers_[i], true);
    fail_peer(*peers_[i], gone);
  }
  wait([&] { return broken_.empty() && device_->datagrams_sent(); });
}

// A peer that was killed says no goodbye, and a queue pair on which we send nothing never fails.
void VerbsFabric::look_after(Peer& peer, Clock::time_point now) {
  if (std::exchange(peer.heard, false)) peer.liveness.heard(now);
  if (peer.self || peer.failed) return;
  const auto link = std::find_if(peer.links.begin(), peer.links.end(), [](const auto& entry) {
    return entry.second->is_open() && !entry.second->broken();
  });
  if (link == peer.links.end() && peer.numbered) return;  // the next operation makes one
  if (peer.liveness.gone(now)) {
    const auto silence = std::chrono::duration_cast<std::chrono::milliseconds>(2 * peer.liveness.patience());
    fail_peer(peer, Error(ErrorKind::kPeer, "verbs " + device_->name() + ": " + peer.label +
                                                " has given no sign of life for " +
                                                std::to_string(silence.count()) + " ms"));
  } else if (link != peer.links.end() && peer.liveness.ask(now)) {
    send_hello(*link->second, true);
  }
}

void VerbsFabric::keep_house(FabricEvents& events) {
  const auto now = Clock::now();
  if (const auto absent = presence_.absent(now); absent > Duration::zero()) {
    for (const auto& peer : peers_) {
      if (peer) peer->liveness.excuse(absent);
    }
    for (VerbsLink* link : handshaking_) link->deadline += absent;
  }
  for (size_t i = 0; i < broken_.size();) {
    VerbsLink* link = broken_[i];
    if (!link->drain.done(emptied_, link->outstanding() > 0, now)) {
      ++i;
      continue;
    }
    broken_[i] = broken_.back();
    broken_.pop_back();
    finish_broken(*link);
  }
  if (!handshaking_.empty()) repeat_hellos(now);
  if (now < next_events_) return;
  next_events_ = now + kEventInterval;
  for (const auto& peer : peers_) {
    if (peer) look_after(*peer, now);
  }
  forget_failed();
  std::optional<Error> last;
  const bool usable = device_->read_events([&](const Error& error) {
    last = error;
    events.on_error(error);
  });
  if (!usable) {
    down_ = true;
    events.on_down(*last);
  }
}

}  // namespace pplx
