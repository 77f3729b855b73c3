// The handshake's datagrams: sent until they are answered, checked when they arrive.
#include <algorithm>
#include <array>
#include <utility>

#include "proxy/fabric/verbs_fabric.h"
#include "proxy/log.h"

namespace pplx {
namespace {

constexpr auto kFirstInterval = std::chrono::milliseconds(10);
constexpr auto kLongestInterval = std::chrono::milliseconds(500);
constexpr auto kRefusalInterval = std::chrono::milliseconds(20);  // a stranger's flood gets few answers
constexpr auto kByeLimit = std::chrono::milliseconds(50);
constexpr size_t kMaxPeers = 65536;

std::string seconds_text(Duration duration) {
  return std::to_string(std::chrono::duration_cast<std::chrono::milliseconds>(duration).count()) + " ms";
}

}  // namespace

Handshake VerbsFabric::handshake(Handshake::Type type, const EngineId& to) const {
  Handshake made;
  made.type = type;
  made.job = self_.job;
  made.to = to;
  made.nic = device_->address();
  made.label = self_.label;
  return made;
}

// Gives the link a queue pair and tells the peer until it answers.
void VerbsFabric::start(VerbsLink& link) {
  Peer& peer = peer_of(link);
  renew(link);
  if (peer.self) {
    // A queue pair may be its own peer.
    link.connect(peer.nic, link.queue_pair(), link.psn());
    link.pairing.paired(link.pairing.local(), link.pairing.local());
    link.arrived = &peer.arrived[link.pairing.remote()];
    confirmed(link);
    return;
  }
  send_hello(link);
}

void VerbsFabric::renew(VerbsLink& link) {
  if (link.is_open()) {  // and never connected: what was is broken off first
    queues_[link.pairing.local()] = nullptr;
    links_by_qp_.erase(link.queue_pair());
    link.close();
  }
  if (queues_.size() >= 1U << 24) {
    throw Error(ErrorKind::kFabric,
                "verbs " + device_->name() + ": too many reconnections; open a new engine");
  }
  const auto number = static_cast<uint32_t>(queues_.size());
  link.open(number);
  links_by_qp_[link.queue_pair()] = &link;
  queues_.push_back(&link);
  link.pairing.renewed(number);
  link.hellos = 0;
  link.interval = kFirstInterval;
  link.deadline = Clock::now() + connect_timeout_;
  if (!peer_of(link).self &&
      std::find(handshaking_.begin(), handshaking_.end(), &link) == handshaking_.end()) {
    handshaking_.push_back(&link);
  }
}

bool VerbsFabric::ensure_path(Peer& peer) {
  if (peer.path) return true;
  try {
    peer.path = device_->make_path(peer.nic);
  } catch (const Error& error) {
    peer.trouble = error.what();
  }
  return peer.path != nullptr;
}

// `ask`: for an answer from somebody who has said all that is needed.
void VerbsFabric::send_hello(VerbsLink& link, bool ask) {
  Peer& peer = peer_of(link);
  link.next_hello = Clock::now() + link.interval;
  link.interval = std::min<Duration>(link.interval * 2, kLongestInterval);
  ++link.hellos;
  if (!ensure_path(peer)) return;
  Handshake hello = handshake(Handshake::Type::kHello, peer.nic.id);
  hello.wants_reply = ask || !link.pairing.confirmed();
  hello.link = link.number;
  hello.number = link.pairing.local();
  hello.ack = link.pairing.remote();
  hello.qp = link.queue_pair();
  hello.psn = link.psn();
  if (const auto last = peer.arrived.find(link.last); last != peer.arrived.end()) {
    hello.last = last->first;
    hello.arrived = last->second;
  }
  device_->send_datagram(peer.path.get(), peer.nic.datagram_qp, hello);
}

void VerbsFabric::repeat_hellos(Clock::time_point now) {
  for (size_t i = 0; i < handshaking_.size();) {
    VerbsLink& link = *handshaking_[i];
    if (now >= link.deadline) {
      handshaking_[i] = handshaking_.back();
      handshaking_.pop_back();
      if (!link.wanted) continue;  // who wanted it has given up
      Peer& peer = peer_of(link);
      std::string text = "verbs " + device_->name() + ": no answer from " + peer.label + " at " +
                         to_text(peer.nic.gid) + " within " + seconds_text(connect_timeout_) + " (" +
                         std::to_string(link.hellos) + " attempts)";
      if (!peer.trouble.empty()) text += "; " + peer.trouble;
      fail_peer(peer, Error(ErrorKind::kPeer, text));
      continue;
    }
    if (now >= link.next_hello) send_hello(link);
    ++i;
  }
}

void VerbsFabric::on_datagram(std::span<const std::byte> bytes) {
  try {
    const Handshake received = decode_handshake(bytes);
    switch (received.type) {
      case Handshake::Type::kHello:
        on_hello(received);
        break;
      case Handshake::Type::kRefuse:
        on_refusal(received);
        break;
      case Handshake::Type::kBye:
        on_bye(received);
        break;
    }
  } catch (const Error& error) {
    log(LogLevel::kWarn, "verbs ", device_->name(), ": a datagram was dropped: ", error.what());
  }
}

void VerbsFabric::on_hello(const Handshake& hello) {
  if (const auto why = refusal(hello, self_)) {
    refuse(hello, *why);
    return;
  }
  if (peers_by_id_.size() >= kMaxPeers && !peers_by_id_.contains(hello.nic.id)) {
    refuse(hello, self_.label + " has 65536 peers already");
    return;
  }
  Peer& peer = known(hello.nic, hello.label);
  if (peer.self) return;
  if (!(peer.nic == hello.nic)) {
    refuse(hello, self_.label + " knows " + hello.label + " under another NIC's address");
    return;
  }
  if (peer.failed && !peer.numbered) return;  // it is being forgotten, and the sender repeats itself
  if (peer.failed) {
    refuse(hello, self_.label + " has given " + hello.label + " up: " + peer.failed->what());
    return;
  }
  peer.heard = true;
  VerbsLink& link = link_of(peer, hello.link);
  link.told_last = hello.last;
  link.told_arrived = hello.arrived;
  const bool open = link.is_open() && !link.broken();
  const auto step = link.pairing.on_hello(hello.number, hello.ack, hello.wants_reply);
  if (step.renew && link.is_open() && (link.broken() || link.pairing.remote() != 0)) {
    // The peer's queue pair is a new one, so that what ours holds will never be answered. It comes back
    // first, and what came on it is counted; the peer repeats itself meanwhile.
    if (open) break_off(link);
    return;
  }
  if (link.broken()) return;
  if (step.renew) renew(link);
  bool now_confirmed = step.confirmed;
  if (step.pair) {
    try {
      link.connect(hello.nic, hello.qp, hello.psn);
    } catch (const Error& error) {
      // What is half connected is of no use. The peer repeats itself, and finds a new one.
      peer.trouble = error.what();
      renew(link);
      throw;
    }
    now_confirmed = link.pairing.paired(hello.number, hello.ack);
    link.arrived = &peer.arrived[hello.number];
  }
  if (step.reply) send_hello(link);
  if (now_confirmed) confirmed(link);
}

// Both ends are connected.
void VerbsFabric::confirmed(VerbsLink& link) {
  std::erase(handshaking_, &link);
  for (const auto& returned : std::exchange(link.doubtful, {})) {
    FabricOp* op = returned.op;
    const bool told = op->kind == FabricOp::Kind::kWrite && op->has_imm && link.told_last == op->channel;
    if (!told) {
      fail(op, broken_error(link, returned.status), false);
    } else if (op->serial <= link.told_arrived) {
      arrived_.push_back(op);
    } else {
      link.held.push_back(op);
    }
  }
  if (!link.held.empty() && std::find(resuming_.begin(), resuming_.end(), &link) == resuming_.end()) {
    resuming_.push_back(&link);
  }
}

void VerbsFabric::refuse(const Handshake& hello, const std::string& why) {
  log(LogLevel::kWarn, "verbs ", device_->name(), ": a connection was refused: ", why);
  const auto now = Clock::now();
  if (now < next_refusal_) return;
  next_refusal_ = now + kRefusalInterval;
  Handshake answer = handshake(Handshake::Type::kRefuse, hello.nic.id);
  answer.link = hello.link;
  answer.ack = hello.number;
  answer.text = why;
  auto& path = strangers_[next_stranger_++ % strangers_.size()];
  try {
    path = device_->make_path(hello.nic);
    device_->send_datagram(path.get(), hello.nic.datagram_qp, answer);
  } catch (const Error& error) {
    log(LogLevel::kWarn, error.what());
  }
}

void VerbsFabric::on_refusal(const Handshake& received) {
  if (received.to != self_.id) return;
  if (received.version != kHandshakeVersion) {
    const auto why = *refusal(received, self_);
    const auto found = peers_by_id_.find(received.nic.id);
    if (found != peers_by_id_.end() && found->second->nic == received.nic) {
      fail_peer(*found->second, Error(ErrorKind::kPeer, "the connection was refused: " + why));
    }
    return;
  }
  VerbsLink* link = by_queue(received.ack);
  if (link == nullptr || link->pairing.confirmed() || !(peer_of(*link).nic == received.nic)) return;
  fail_peer(peer_of(*link), Error(ErrorKind::kPeer, "the connection was refused: " + received.text));
}

void VerbsFabric::on_bye(const Handshake& bye) {
  if (bye.to != self_.id || bye.job != self_.job || bye.version != kHandshakeVersion) return;
  const auto found = peers_by_id_.find(bye.nic.id);
  if (found == peers_by_id_.end() || !(found->second->nic == bye.nic)) return;
  Peer& peer = *found->second;
  if (bye.number == 0) {
    fail_peer(peer, Error(ErrorKind::kClosed, peer.label + " closed its engine"));
  } else {
    fail_peer(peer, Error(ErrorKind::kPeer, peer.label + " took that NIC out"));
  }
}

void VerbsFabric::say_bye(const Peer& peer, bool nic_only) {
  if (!peer.path) return;
  Handshake bye = handshake(Handshake::Type::kBye, peer.nic.id);
  bye.number = nic_only ? 1 : 0;
  device_->send_datagram(peer.path.get(), peer.nic.datagram_qp, bye);
}

// Peers would find out, but only after their NIC's last attempt.
void VerbsFabric::say_bye() {
  const auto limit = Clock::now() + kByeLimit;
  const auto sent = [&] {
    std::array<ibv_wc, 16> work;
    const int count = ibv_poll_cq(device_->cq(), static_cast<int>(work.size()), work.data());
    for (int i = 0; i < count; ++i) {
      const WorkId id = WorkId::unpack(work[static_cast<size_t>(i)].wr_id);
      if (id.kind == WorkId::Kind::kDatagramSend) device_->datagram_sent(id.index);
    }
  };
  for (auto& peer : peers_) {
    if (!peer || peer->self || peer->failed || !peer->path) continue;
    while (!device_->may_send_datagram() && Clock::now() < limit) sent();
    say_bye(*peer, false);
  }
  while (!device_->datagrams_sent() && Clock::now() < limit) sent();
}

}  // namespace pplx
