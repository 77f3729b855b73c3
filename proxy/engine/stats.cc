// What an engine says of itself.
#include <algorithm>
#include <bit>

#include "proxy/engine/core.h"
#include "proxy/engine/doubts.h"

namespace pplx {

namespace {

void add(const Traffic& part, Traffic& sum) {
  sum.writes += part.writes;
  sum.write_bytes += part.write_bytes;
  sum.reads += part.reads;
  sum.read_bytes += part.read_bytes;
  sum.messages += part.messages;
  sum.errors += part.errors;
}

}  // namespace

void LatencyHistogram::add(uint64_t nanoseconds) {
  ++buckets[std::min<size_t>(static_cast<size_t>(std::bit_width(nanoseconds)), buckets.size() - 1)];
}

uint64_t LatencyHistogram::count() const {
  uint64_t sum = 0;
  for (uint64_t bucket : buckets) sum += bucket;
  return sum;
}

uint64_t LatencyHistogram::quantile(double q) const {
  const uint64_t samples = count();
  if (samples == 0) return 0;
  const double wanted = q * static_cast<double>(samples);
  uint64_t seen = 0;
  for (size_t i = 0; i < buckets.size(); ++i) {
    seen += buckets[i];
    if (buckets[i] != 0 && static_cast<double>(seen) >= wanted) return uint64_t{1} << i;
  }
  return uint64_t{1} << (buckets.size() - 1);
}

EngineStats EngineCore::stats() const {
  const auto& c = counters_;
  return {.writes = c.writes,
          .write_bytes = c.write_bytes,
          .sends = c.sends,
          .receives = c.receives,
          .immediates = c.immediates,
          .unknown_immediates = c.unknown_immediates,
          .errors = c.errors,
          .polls = c.polls,
          .backpressure = c.backpressure,
          .worker_core = std::max(worker_core_.load(), -1),
          .reads = c.reads,
          .read_bytes = c.read_bytes,
          .retries = c.retries,
          .cancelled = c.cancelled};
}

EngineDetails EngineCore::details() {
  require_own_process();
  Locked locked(*this);
  EngineDetails details;
  details.registrations = regions_.size();
  for (const Nic& nic : nics_) {
    NicStats stats{.name = nic.fabric->name(),
                   .error = nic.down ? nic.down->what() : "",
                   .queue_depth = nic.caps.queue_depth,
                   .deepest = nic.deepest,
                   .traffic = {},
                   .latency = nic.latency};
    stats.traffic.outstanding = nic.outstanding;
    details.nics.push_back(std::move(stats));
  }
  for (size_t number = 0; number < peers_.size(); ++number) {
    const Peer& peer = peers_[number];
    PeerTraffic stats{.peer = peer.label,
                      .error = peer.failed ? peer.failed->what() : "",
                      .paths = peer.failed ? 0 : peer.active.size(),
                      .traffic = {}};
    stats.traffic.queued = peer.waiting.size() + doubts_->count(static_cast<uint32_t>(number));
    for (const Path& path : peer.paths) {
      add(path.traffic, stats.traffic);
      add(path.traffic, details.nics[path.nic].traffic);
      stats.traffic.outstanding += path.posted.size();
      stats.traffic.queued += path.pending.size();
      details.nics[path.nic].traffic.queued += path.pending.size();
    }
    if (!peer.removed) details.peers.push_back(std::move(stats));
  }
  return details;
}

void EngineCore::start_timeline(size_t events) {
  if (events == 0 || events > (size_t{1} << 26)) {
    throw Error(ErrorKind::kInvalidArgument,
                "a timeline of " + std::to_string(events) + " events; 1 to 2^26 are possible");
  }
  require_open();
  auto timeline = std::make_unique<Timeline>(events);
  Locked locked(*this);
  timeline_ = std::move(timeline);
  recorded_.reset();
}

void EngineCore::stop_timeline() {
  require_own_process();
  Locked locked(*this);
  if (timeline_ != nullptr) recorded_ = std::move(timeline_);
}

std::string EngineCore::timeline() {
  require_own_process();
  std::vector<std::string> peers, nics;
  std::optional<Timeline> copy;
  {
    Locked locked(*this);
    for (const Peer& peer : peers_) peers.push_back(peer.label);
    for (const Nic& nic : nics_) nics.push_back(nic.fabric->name());
    if (const Timeline* timeline = timeline_ ? timeline_.get() : recorded_.get()) copy = *timeline;
  }
  return copy.value_or(Timeline(1)).json(peers, nics);
}

}  // namespace pplx
