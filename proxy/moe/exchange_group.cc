#include "proxy/moe/exchange_group.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <random>
#include <utility>

#include "proxy/bytes.h"
#include "proxy/log.h"
#include "proxy/moe/peer.h"

namespace pplx::moe {
namespace {

constexpr uint32_t kEndpointMagic = 0x50504d45;  // "EMPP"
constexpr auto kCloseLimit = std::chrono::seconds(2);
constexpr auto kFailedCloseLimit = std::chrono::milliseconds(500);
constexpr size_t kPastRuns = 64;

// Never zero, never repeated in a process until it wraps; starts at random, so that two processes that
// reuse each other's addresses rarely meet the same value.
uint32_t next_nonce() {
  static std::atomic<uint32_t> counter{std::random_device{}()};
  return counter.fetch_add(1) % kMaxNonce + 1;
}

void describe(const Error& error, uint32_t culprit, AbortNotice& notice) {
  notice.error_kind = static_cast<uint8_t>(error.kind());
  notice.culprit = culprit;
  std::strncpy(notice.text, error.what(), sizeof(notice.text) - 1);
}

// Of this one, "host pid 123".
std::string process_name() {
  std::array<char, 128> host{"?"};
  gethostname(host.data(), host.size() - 1);
  return std::string(host.data()) + " pid " + std::to_string(getpid());
}

Bytes to_bytes(std::span<const std::byte> bytes) { return {bytes.begin(), bytes.end()}; }

}  // namespace

ExchangeGroup::ExchangeGroup(GroupConfig config, const PlaceBuffers& place)
    : config_(std::move(config)),
      lanes_(2 * config_.depth),
      nonce_(next_nonce()),
      monitor_(std::make_unique<Monitor>()) {
  if (config_.num_ranks == 0 || config_.num_ranks > kMaxRanks || config_.rank >= config_.num_ranks) {
    throw Error(ErrorKind::kInvalidArgument,
                "group '" + config_.name + "': rank " + std::to_string(config_.rank) + " of " +
                    std::to_string(config_.num_ranks) + " (at most " + std::to_string(kMaxRanks) + " ranks)");
  }
  if (lanes_ == 0 || lanes_ > kMaxLanes) {
    throw Error(ErrorKind::kInvalidArgument, "group '" + config_.name + "': depth " +
                                                 std::to_string(config_.depth) + " is not in 1.." +
                                                 std::to_string(kMaxLanes / 2));
  }
  if (config_.region_bytes < sizeof(RegionHeader) || config_.staging_bytes < config_.region_bytes) {
    throw Error(ErrorKind::kInvalidArgument, "group '" + config_.name + "': region or staging too small");
  }
  if (config_.region_bytes > UINT32_MAX) {
    throw Error(ErrorKind::kInvalidArgument, "group '" + config_.name + "': a message of " +
                                                 std::to_string(config_.region_bytes) +
                                                 " bytes is longer than 4 GiB; set chunk= lower");
  }
  for (const uint32_t rank : config_.absent) {
    if (rank >= config_.num_ranks || rank == config_.rank) {
      throw Error(ErrorKind::kInvalidArgument,
                  "group '" + config_.name + "': rank " + std::to_string(config_.rank) + " of " +
                      std::to_string(config_.num_ranks) + " cannot do without rank " + std::to_string(rank));
    }
  }
  headers_.resize(config_.num_ranks);
  engine_ = std::make_unique<TransferEngine>(config_.engine);
  const size_t regions = lanes_ * config_.num_ranks * config_.region_bytes;
  const size_t staging = lanes_ * config_.staging_bytes;
  buffers_ = place
                 ? place(*engine_, regions, staging)
                 : GroupBuffers{.regions = engine_->allocate(regions), .staging = engine_->allocate(staging)};
  if (!buffers_.readable) header_region_ = engine_->allocate(2 * headers_bytes());
  notices_ = engine_->allocate((config_.num_ranks + 1) * 2 * sizeof(AbortNotice));
  control_ = std::make_unique<CompletionCounter>();
  for (uint32_t lane = 0; lane < lanes_; ++lane)
    lane_state_.push_back(std::make_unique<Lane>(config_.num_ranks));
  for (uint32_t source = 0; source < config_.num_ranks; ++source) {
    auto peer = std::make_unique<Peer>();
    peer->beats.control = control_.get();
    if (source != config_.rank) {
      for (uint32_t lane = 0; lane < lanes_; ++lane) {
        peer->arrivals.push_back(engine_->watch(immediate(nonce_, source, lane)));
      }
      peer->heartbeats = engine_->watch(immediate(nonce_, source, kHeartbeatLane));
      peer->closings = engine_->watch(immediate(nonce_, source, kClosedLane));
      peer->failures = engine_->watch(immediate(nonce_, source, kFailedLane));
    }
    peers_.push_back(std::move(peer));
  }
}

ExchangeGroup::~ExchangeGroup() {
  close();
  // A thread that is not there can be neither joined nor woken.
  if (mark_.forked()) static_cast<void>(monitor_.release());
}

Bytes ExchangeGroup::endpoint() const {
  ByteWriter out;
  out.put(kEndpointMagic);
  out.put(nonce_);
  out.put(config_.rank);
  out.put(static_cast<uint32_t>(engine_->shards()));  // of a message, each with an immediate
  out.put(config_.fingerprint);
  out.text(config_.fingerprint_text);
  out.text(process_name());
  const auto process = ProcessIdentity::own();
  out.text(process.space);
  out.put(process.pid);
  out.blob(buffers_.regions->descriptor().bytes());
  out.blob(header_region_ != nullptr ? header_region_->descriptor().bytes() : Bytes());
  out.blob(notices_->descriptor().bytes());
  out.checksum();
  return out.take();
}

void ExchangeGroup::connect(const std::vector<Bytes>& endpoints) {
  mark_.require("the group");
  if (connected_ || closed_) {
    throw Error(closed_ ? ErrorKind::kClosed : ErrorKind::kInvalidArgument,
                "group '" + config_.name + "' " + (closed_ ? "is closed" : "is connected already"));
  }
  if (endpoints.size() != config_.num_ranks) {
    throw Error(ErrorKind::kInvalidArgument,
                "group '" + config_.name + "': " + std::to_string(endpoints.size()) + " endpoints for " +
                    std::to_string(config_.num_ranks) + " ranks");
  }
  for (const uint32_t rank : config_.absent) {
    Peer& peer = *peers_[rank];
    peer.absent = true;
    peer.gone = true;  // never written to, never missed
    peer.last_words = UINT64_MAX;
  }
  for (uint32_t rank = 0; rank < config_.num_ranks; ++rank) {
    if (peers_[rank]->absent) continue;
    ByteReader in(checked(endpoints[rank], "group endpoint"), "group endpoint");
    if (in.get<uint32_t>() != kEndpointMagic) in.malformed("it has another magic number");
    Peer& peer = *peers_[rank];
    peer.nonce = in.get<uint32_t>();
    const uint32_t claimed = in.get<uint32_t>();
    peer.shards = in.get<uint32_t>();
    const uint64_t fingerprint = in.get<uint64_t>();
    const std::string text = in.text();
    peer.process = in.text();
    ProcessIdentity process{.space = in.text()};
    process.pid = in.get<int32_t>();
    const RegionDescriptor regions{to_bytes(in.blob())};
    const RegionDescriptor headers{to_bytes(in.blob())};
    const RegionDescriptor notices{to_bytes(in.blob())};
    in.finish();
    if (claimed != rank || peer.nonce == 0 || peer.nonce > kMaxNonce || peer.shards == 0 ||
        peer.shards > 256) {
      throw Error(ErrorKind::kPeer, "group '" + config_.name + "': " + rank_name(rank) +
                                        " published an endpoint that makes no sense");
    }
    if (fingerprint != config_.fingerprint) {
      throw Error(ErrorKind::kMismatch, "group '" + config_.name + "' is configured differently on " +
                                            rank_name(config_.rank) + " (" + config_.fingerprint_text +
                                            ") and on " + rank_name(rank) + " (" + text +
                                            "): give every rank the same arguments");
    }
    if (rank == config_.rank) continue;
    peer.regions = engine_->open(regions);
    peer.notice_region = engine_->open(notices);
    if (!headers.bytes().empty()) peer.headers = engine_->open(headers);
    peer.pieces = 1 + (buffers_.readable ? 0 : 1) + (peer.headers != nullptr ? 1 : 0);
    if (peer.regions->size() != lanes_ * config_.num_ranks * config_.region_bytes ||
        (peer.headers != nullptr && peer.headers->size() != 2 * headers_bytes()) ||
        peer.notice_region->size() != (config_.num_ranks + 1) * 2 * sizeof(AbortNotice)) {
      throw Error(ErrorKind::kMismatch, "group '" + config_.name + "': the regions of " + rank_name(rank) +
                                            " have another size than ours");
    }
    peer.watch = ProcessWatch(process);
    peer.last_sign = Clock::now();
  }
  connected_ = true;
  if (config_.num_ranks > 1) monitor_->thread = std::thread([this] { monitor(); });
  note(LogLevel::kInfo, 0, Field("event", "connected"), ' ', Field("ranks", config_.num_ranks), ' ',
       Field("fabric", engine_->fabric_name()));
}

// --- executions ------------------------------------------------------------------------------------------

// One thread launches one execution after the other, and a device runs them in that order, each to its end.
// So an exchange of one execution amid those of another says that two threads launch.
std::unique_lock<std::mutex> ExchangeGroup::enter(bool& met) {
  mark_.require("the group");
  std::unique_lock lock(exchange_mutex_, std::try_to_lock);
  met = !lock;  // somebody who was in an exchange, or close()
  if (met) lock.lock();
  return lock;
}

bool ExchangeGroup::overlaps(int64_t run, bool met) const {
  if (closed_ || failed_ || next_exchange_ == 0 || current_run_ == run) return false;
  return met || std::find(past_runs_.begin(), past_runs_.end(), run) != past_runs_.end();
}

void ExchangeGroup::begin(int64_t run, bool met) {
  const bool overlap = overlaps(run, met);
  const int64_t before = current_run_.exchange(run);
  if (before != run && next_exchange_ != 0) past_runs_.push_back(before);
  if (past_runs_.size() > kPastRuns) past_runs_.pop_front();
  if (overlap) fail_overlap();
}

void ExchangeGroup::fail_overlap() {
  fail(Error(ErrorKind::kMismatch,
             "group '" + config_.name + "': two executions of programs overlap on " +
                 rank_name(config_.rank) + " at exchange " + std::to_string(latest_exchange()) +
                 ": two threads launched at the same time. One thread drives a group: give each a group of "
                 "its own (name=), or a lock that is held until a step's results are ready"),
       config_.rank);
}

std::byte* ExchangeGroup::region(uint32_t lane, uint32_t source) const {
  return buffers_.regions->data() + (size_t{lane} * config_.num_ranks + source) * config_.region_bytes;
}

std::byte* ExchangeGroup::header_from(uint32_t lane, uint32_t source) const {
  return buffers_.readable ? region(lane, source) : header_region_->data() + header_at(lane, source);
}

std::string ExchangeGroup::rank_name(uint32_t rank) const {
  if (rank >= config_.num_ranks) return "an unknown rank";
  std::string name = "rank " + std::to_string(rank);
  const std::string& process = peers_[rank]->process;
  return process.empty() ? name : name + " (" + process + ")";
}

void ExchangeGroup::count_sent(uint64_t exchanges) {
  sent_exchanges_ = std::max<uint64_t>(sent_exchanges_, exchanges);
  next_exchange_ = std::max<uint64_t>(next_exchange_, exchanges);
}

std::optional<uint32_t> ExchangeGroup::gone_before(uint64_t exchange) {
  for (uint32_t rank = 0; rank < config_.num_ranks; ++rank) {
    if (peers_[rank]->gone && peers_[rank]->last_words <= exchange) return rank;
  }
  return std::nullopt;
}

// --- failure ---------------------------------------------------------------------------------------------

bool ExchangeGroup::record_failure(const Error& error, uint32_t culprit, bool heard) {
  {
    const std::lock_guard guard(status_mutex_);
    if (failure_) return false;
    failure_ = error;
    failure_culprit_ = culprit < config_.num_ranks ? culprit : kNobody;
    failure_heard_ = heard;
    failure_run_ = current_run_.load();
    failed_ = true;
  }
  note(LogLevel::kError, latest_exchange(), Field("event", "failed"), ' ',
       Field("error", std::string(error_name(error.kind()))), ' ', Field("message", error.what()));
  return true;
}

void ExchangeGroup::fail(const Error& error, uint32_t culprit) {
  if (!record_failure(error, culprit, false)) return;
  AbortNotice notice{};
  notice.exchange = latest_exchange();
  describe(error, culprit, notice);
  broadcast(notice, kFailedSlot);
}

std::optional<Error> ExchangeGroup::failure() const {
  const std::lock_guard guard(status_mutex_);
  return failure_;
}

uint32_t ExchangeGroup::failure_culprit() const {
  const std::lock_guard guard(status_mutex_);
  return failure_culprit_;
}

void ExchangeGroup::report_data_error(const Error& error, uint32_t culprit, int64_t run) {
  const std::lock_guard guard(status_mutex_);
  if (data_error_) return;
  data_error_ = error;
  data_error_culprit_ = culprit;
  data_error_run_ = run;
  note(LogLevel::kWarn, latest_exchange(), Field("event", "data_error"), ' ',
       Field("error", std::string(error_name(error.kind()))), ' ', Field("message", error.what()));
}

std::optional<Error> ExchangeGroup::data_error() const {
  const std::lock_guard guard(status_mutex_);
  return data_error_;
}

uint32_t ExchangeGroup::data_error_culprit() const {
  const std::lock_guard guard(status_mutex_);
  return data_error_culprit_;
}

std::optional<Error> ExchangeGroup::take_data_error() {
  const std::lock_guard guard(status_mutex_);
  return std::exchange(data_error_, std::nullopt);
}

void ExchangeGroup::defer_raise(const Error& error, int64_t run) {
  const std::lock_guard guard(status_mutex_);
  if (!deferred_raise_) deferred_raise_ = DeferredRaise{.error = error, .seen = run, .returns = std::nullopt};
}

std::optional<Error> ExchangeGroup::deferred_raise(int64_t run) {
  const std::lock_guard guard(status_mutex_);
  if (!deferred_raise_ || run == deferred_raise_->seen) return std::nullopt;
  if (!deferred_raise_->returns) deferred_raise_->returns = run;
  if (deferred_raise_->returns == run) return deferred_raise_->error;
  deferred_raise_.reset();
  return std::nullopt;
}

bool ExchangeGroup::raises_in(int64_t run) const {
  const std::lock_guard guard(status_mutex_);
  return failure_.has_value() && failure_run_ != run;
}

// --- close -----------------------------------------------------------------------------------------------

void ExchangeGroup::close() {
  if (closed_.exchange(true)) return;
  if (mark_.forked()) return;  // the parent's, with its threads and endpoints
  { const std::lock_guard guard(monitor_->mutex); }
  monitor_->wake.notify_all();
  if (monitor_->thread.joinable()) monitor_->thread.join();
  for (const auto& peer : peers_) peer->watch = {};
  {
    // An exchange under way sees closed_ and leaves; then nothing reads or packs a region any more.
    const std::lock_guard guard(exchange_mutex_);
  }
  if (connected_) {
    read_notices();  // whoever closed before is not written to any more
    AbortNotice notice{};
    notice.exchange = sent_exchanges_;
    {
      const std::lock_guard guard(status_mutex_);
      if (failure_) describe(*failure_, failure_culprit_, notice);
      notice.heard = failure_heard_ ? 1 : 0;
    }
    broadcast(notice, kClosedSlot);
    // What a peer still needs to finish its last exchange must leave before the endpoints close.
    const auto sent = [](const auto& lane) { return lane->local.done() >= lane->posted; };
    engine_->wait_until(
        [&] {
          return control_->done() >= control_posted_ &&
                 std::all_of(lane_state_.begin(), lane_state_.end(), sent);
        },
        // Of a failed group nobody waits for anything but the notice of that, which has long left; and whose
        // failure it is may never take what was posted to it.
        Clock::now() + (failed_ ? Duration(kFailedCloseLimit) : Duration(kCloseLimit)));
  }
  engine_->close();
  if (connected_) note(LogLevel::kInfo, latest_exchange(), Field("event", "closed"));
}

void ExchangeGroup::progress() {
  if (!closed_) engine_->progress();
}

GroupStats ExchangeGroup::stats() const {
  GroupStats stats;
  stats.exchanges = next_exchange_;
  stats.waits_over_10s = slow_waits_;
  stats.region_bytes = buffers_.regions->size();
  stats.staging_bytes = buffers_.staging->size();
  stats.registrations = engine_->details().registrations;
  stats.fabric = engine_->fabric_name();
  for (const auto& peer : peers_) {
    stats.peers.push_back(
        {.process = peer->process,
         .sent_bytes = peer->sent_bytes.load(),
         .received_bytes = peer->received_bytes.load(),
         .waited = Duration(peer->waited_ns.load()),
         .longest_wait = Duration(peer->longest_wait_ns.load()),
         .recent_wait = Duration(static_cast<int64_t>(peer->recent_wait(latest_exchange())))});
  }
  stats.engine = engine_->stats();
  return stats;
}

}  // namespace pplx::moe
