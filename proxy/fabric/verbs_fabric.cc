#include "proxy/fabric/verbs_fabric.h"

#include <signal.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "proxy/log.h"

namespace pplx {
namespace {

constexpr int kPatience = 3;  // times the time for connecting, until a silent peer is asked
constexpr size_t kMaxForgotten = 4096;

const char* network_of(const VerbsDevice& device) { return device.ethernet() ? "roce" : "infiniband"; }

void check(const VerbsConfig& config) {
  const auto in_range = [](const char* what, int value, int least, int most) {
    if (value >= least && value <= most) return;
    throw Error(ErrorKind::kInvalidArgument, std::string("VerbsConfig.") + what + " is " +
                                                 std::to_string(value) + ", not in " + std::to_string(least) +
                                                 ".." + std::to_string(most));
  };
  in_range("gid_index", config.gid_index, -1, 255);
  in_range("traffic_class", config.traffic_class, 0, 255);
  in_range("service_level", config.service_level, 0, 15);
  in_range("ack_timeout", config.ack_timeout, 1, 31);
  in_range("retries", config.retries, 0, 7);
}

}  // namespace

VerbsFabric::VerbsFabric(const EngineConfig& config) : connect_timeout_(config.verbs.connect_timeout) {
  check(config.verbs);
  device_ = std::make_unique<VerbsDevice>(config);
  address_ = make_address("verbs", network_of(*device_));
  device_->set_id(address_.engine);
  address_.endpoints.push_back(encode(device_->address()));
  self_ = {address_.engine, address_.label() + " on " + device_->name(), job_hash(config.job)};
  caps_.max_write = device_->max_write();
  caps_.max_message = kVerbsMessageBytes;
  caps_.queue_depth = device_->send_budget();
  caps_.rails = static_cast<uint32_t>(config.endpoints);
  caps_.delivery_complete = true;
  caps_.fences = true;
  caps_.device_memory = true;  // by dma-buf or nvidia_peermem, which registering shows
}

VerbsFabric::~VerbsFabric() { close(); }

std::string VerbsFabric::name() const {
  std::string text = "verbs:" + (device_ ? device_->description() : std::string("closed"));
  if (caps_.rails > 1) text += " x" + std::to_string(caps_.rails);
  return text;
}

FabricMemory VerbsFabric::register_memory(void* data, size_t size) {
  return device_->register_memory(data, size);
}

FabricMemory VerbsFabric::register_device_memory(const DeviceMemory& memory) {
  return device_->register_device_memory(memory);
}

// The engine unregisters memory under operations that it has given up. What is not posted yet must not be
// posted any more: it would read what is no longer there.
void VerbsFabric::unregister_memory(const FabricMemory& memory) {
  if (!device_) return;
  for (VerbsLink* link : std::exchange(chained_, {})) flush(*link);
  const Error gone(ErrorKind::kFabric,
                   "verbs " + device_->name() + ": its memory was unregistered before it was posted");
  for (auto& peer : peers_) {
    if (!peer) continue;
    for (auto& [number, link] : peer->links) {
      for (FabricOp*& op : link->held) {
        if (op->local != memory.handle || op->length == 0) continue;
        fail(op, gone, true);
        op = nullptr;
      }
      std::erase(link->held, nullptr);
      std::erase_if(link->doubtful, [&](const VerbsLink::Returned& returned) {
        const FabricOp& op = *returned.op;
        if (op.local != memory.handle || op.length == 0) return false;
        fail(returned.op, gone, false);
        return true;
      });
    }
  }
  device_->unregister_memory(memory);
}

uint32_t VerbsFabric::connect(const PeerAddress& peer) {
  if (peer.fabric != "verbs" || peer.provider != address_.provider) {
    throw Error(ErrorKind::kInvalidArgument, "the peer " + peer.label() + " uses " + peer.fabric + ":" +
                                                 peer.provider + ", this engine verbs:" + address_.provider);
  }
  Peer& entry = known(decode_nic_address(peer.endpoints[0]), peer.label());
  if (peer.pid_namespace != 0 && peer.pid_namespace == address_.pid_namespace && peer.host == address_.host) {
    entry.pid = peer.pid;
  }
  if (entry.failed) {
    throw StillLeaving("verbs " + device_->name() + ": the connection to " + entry.label +
                       " is still being taken down: try again");
  }
  entry.numbered = true;
  numbers_.push_back(entry.index);
  return static_cast<uint32_t>(numbers_.size() - 1);
}

// Without goodbye: it may write to us as before, and finds a new queue pair when it does.
void VerbsFabric::disconnect(uint32_t number) {
  Peer& peer = *peers_[numbers_[number]];
  peer.numbered = false;
  fail_peer(peer, Error(ErrorKind::kPeer, peer.label + " was removed here"));
}

VerbsFabric::Peer& VerbsFabric::known(const NicAddress& nic, const std::string& label) {
  Peer*& entry = peers_by_id_[nic.id];
  if (entry != nullptr) return *entry;
  auto made = std::make_unique<Peer>();
  // The place of one that has been forgotten, if there is one.
  const auto place = std::find(peers_.begin(), peers_.end(), nullptr);
  made->index = static_cast<uint32_t>(place - peers_.begin());
  made->nic = nic;
  made->label = label;
  made->self = nic == device_->address();
  made->liveness = Liveness(kPatience * connect_timeout_);
  made->heard = true;
  if (const auto past = std::find_if(forgotten_.rbegin(), forgotten_.rend(),
                                     [&](const auto& gone) { return gone.first == nic; });
      past != forgotten_.rend()) {
    made->arrived = past->second;
  }
  entry = made.get();
  if (place == peers_.end()) {
    peers_.push_back(std::move(made));
  } else {
    *place = std::move(made);
  }
  return *entry;
}

VerbsLink& VerbsFabric::link_of(Peer& peer, uint8_t number) {
  auto& link = peer.links[number];
  if (!link) link = std::make_unique<VerbsLink>(*device_, number, peer.index);
  return *link;
}

Post VerbsFabric::post(FabricOp& op, uint8_t number) {
  Peer& peer = *peers_[numbers_[op.peer]];
  if (peer.failed) throw Error(*peer.failed);
  VerbsLink& link = link_of(peer, number);
  if (!link.wanted) {
    link.wanted = true;
    // The peer may have begun, and given up: nobody says hello any more.
    const bool waits = std::find(handshaking_.begin(), handshaking_.end(), &link) != handshaking_.end();
    if (link.is_open() && !link.pairing.confirmed() && !waits && !link.broken()) {
      // The peer may have been connected, and written.
      link.pairing.remote() != 0 ? break_off(link) : start(link);
    }
  }
  if (!link.is_open()) start(link);
  if (!link.pairing.confirmed() || link.broken() || link.full() || !link.held.empty() ||
      outstanding_ >= device_->send_budget()) {
    return Post::kFull;
  }
  post_on(link, op);
  return Post::kPosted;
}

void VerbsFabric::post_on(VerbsLink& link, FabricOp& op) {
  const bool listed = link.has_chain();
  ++outstanding_;
  if (link.add(op)) {
    flush(link);
  } else if (!listed) {
    chained_.push_back(&link);
  }
}

void VerbsFabric::flush(VerbsLink& link) {
  const size_t held = link.held.size();
  link.flush();
  outstanding_ -= static_cast<uint32_t>(link.held.size() - held);
  if (link.post_error()) break_off(link);
}

bool VerbsFabric::alive(uint32_t number) {
  const Peer& peer = *peers_[numbers_[number]];
  return peer.pid == 0 || kill(static_cast<pid_t>(peer.pid), 0) == 0 || errno != ESRCH;
}

void VerbsFabric::forget(const Peer& peer) {
  forgotten_.emplace_back(peer.nic, peer.arrived);
  if (forgotten_.size() <= kMaxForgotten) return;
  forgotten_.pop_front();
  forgot_ = true;
}

Fence VerbsFabric::fence(const PeerAddress& address) {
  const NicAddress nic = decode_nic_address(address.endpoints[0]);
  const auto settled = [](const std::map<uint32_t, uint64_t>& arrived) {
    Fence fence{Fence::State::kSettled, {}};
    for (const auto& [channel, immediates] : arrived) fence.arrived.push_back({channel, immediates});
    return fence;
  };
  const auto found = peers_by_id_.find(nic.id);
  if (found == peers_by_id_.end()) {
    const auto past = std::find_if(forgotten_.rbegin(), forgotten_.rend(),
                                   [&](const auto& entry) { return entry.first == nic; });
    return past == forgotten_.rend() ? Fence{} : settled(past->second);
  }
  Peer& peer = *found->second;
  if (!(peer.nic == nic) || peer.self) return {};
  if (forgot_ && peer.arrived.empty()) return {};
  fail_peer(peer, Error(ErrorKind::kPeer, peer.label + " has given the way up from its NIC to this one"));
  for (const auto& [number, link] : peer.links) {
    if (link->is_open()) return {Fence::State::kWait, {}};
  }
  return settled(peer.arrived);
}

void VerbsFabric::close() {
  if (!device_) return;
  if (!down_) say_bye();
  for (const auto& peer : peers_) {
    if (peer) forget(*peer);
  }
  links_by_qp_.clear();
  peers_.clear();  // queue pairs first: from then on the NIC touches nothing of theirs
  peers_by_id_.clear();
  numbers_.clear();
  queues_.clear();
  for (auto& path : strangers_) path.reset();
  device_.reset();
}

std::unique_ptr<Fabric> make_verbs(const EngineConfig& config) {
  return std::make_unique<VerbsFabric>(config);
}

}  // namespace pplx
