#include <cstring>

#include "proxy/moe/exchange_group.h"
#include "proxy/moe/peer.h"

namespace pplx::moe {
namespace {

constexpr auto kWarnAfter = std::chrono::seconds(10);

std::string seconds(Duration duration) {
  return std::to_string(std::chrono::duration_cast<std::chrono::milliseconds>(duration).count() / 1000.0)
             .substr(0, 6) +
         " s";
}

std::string site_text(const char* kind, std::string_view name, uint32_t tokens, uint32_t top_k,
                      uint32_t hidden) {
  return std::string(kind) + " '" + std::string(name) + "' (T=" + std::to_string(tokens) +
         ", K=" + std::to_string(top_k) + ", H=" + std::to_string(hidden) + ")";
}

}  // namespace

Exchange::Exchange(ExchangeGroup& group, const CallSite& site, uint32_t round, int64_t run)
    : group_(group), lock_(group.enter(met_)), site_(site), round_(round), started_(Clock::now()) {
  group.begin(run, met_);
  finish_abandoned(run);
  started_ = Clock::now();
  number_ = group.next_exchange_++;
  unfinished_ = true;
  const auto& launches = group.config_.launches;
  if (launches != nullptr && !group.failed_ && !group.closed_ && !launches->agree(number_, run)) {
    group.fail_overlap();
  }
  lane_ = static_cast<uint32_t>(number_ % group.lanes_);
  first_call_ = group.seen_calls_.emplace(site.kind, site.tag).second;
  const std::lock_guard guard(group.status_mutex_);
  if (group.data_error_ && group.data_error_run_ != run) {
    raise_ = kRaise;
    raise_culprit_ = group.data_error_culprit_;
  }
}

Exchange::Exchange(ExchangeGroup& group, const CallSite& site, uint64_t ticket, int64_t run, bool* poisoned)
    : group_(group), lock_(group.enter(met_)), site_(site), round_(0), started_(Clock::now()) {
  const auto parked = ticket == 0 ? group.parked_.end() : group.parked_.find(ticket - 1);
  if (parked == group.parked_.end() || parked->second.kind != site.kind || parked->second.tag != site.tag ||
      parked->second.run != run) {
    // Another execution may have thrown it away.
    if (group.overlaps(run, met_)) group.fail_overlap();
    if (const auto failure = group.failure()) throw Error(*failure);
    throw Error(ErrorKind::kInvalidArgument,
                "group '" + group.config_.name +
                    "': " + site_text(kind_name(site.kind), site.name, site.tokens, site.top_k, site.hidden) +
                    " is received, but what it received from is not under way: each send is received "
                    "exactly once, in the same execution");
  }
  group.begin(run, met_);
  number_ = parked->first;
  lane_ = static_cast<uint32_t>(number_ % group.lanes_);
  round_ = parked->second.round;
  first_call_ = parked->second.first_call;
  *poisoned = parked->second.poisoned;
  resumed_ = unfinished_ = true;
  group.parked_.erase(parked);
}

uint64_t Exchange::park(bool poisoned) {
  group_.parked_.emplace(number_, ExchangeGroup::Parked{.kind = site_.kind,
                                                        .tag = site_.tag,
                                                        .round = round_,
                                                        .run = group_.current_run_,
                                                        .first_call = first_call_,
                                                        .poisoned = poisoned});
  unfinished_ = false;
  note_sent();
  return number_ + 1;
}

// A lane is free for exchange q + 2 * depth once q + depth has come from everybody, provided that nobody
// sends m before it has received all up to m - depth. What an execution that ended early left behind is
// received here and thrown away.
void Exchange::finish_abandoned(int64_t run) {
  auto& parked = group_.parked_;
  while (!parked.empty() && !group_.failed_ && !group_.closed_) {
    const auto oldest = parked.begin();
    if (oldest->second.run == run) {
      number_ = group_.next_exchange_;
      if (oldest->first + group_.config_.depth > number_) return;
      group_.fail(
          Error(ErrorKind::kMismatch,
                describe() + ": sent while exchange " + std::to_string(oldest->first) +
                    " has not been received; at most depth=" + std::to_string(group_.config_.depth) +
                    " may be under way, counted from the oldest (order the send after that recv with after=, "
                    "or raise depth)"),
          group_.config_.rank);
      return;
    }
    number_ = oldest->first;
    lane_ = static_cast<uint32_t>(number_ % group_.lanes_);
    first_call_ = oldest->second.first_call;
    parked.erase(oldest);
    started_ = Clock::now();
    wait_for_arrivals(false);
  }
}

Exchange::~Exchange() {
  // An exception came between; peers must not wait for the rest.
  if (unfinished_ && !group_.failed_ && !group_.closed_) {
    group_.fail(Error(ErrorKind::kPeer, describe() + ": given up by an exception"), group_.config_.rank);
  }
}

std::string Exchange::describe() const {
  return "group '" + group_.config_.name + "', exchange " + std::to_string(number_) + ", " +
         site_text(kind_name(site_.kind), site_.name, site_.tokens, site_.top_k, site_.hidden);
}

Deadline Exchange::deadline() const {
  return started_ + (first_call_ ? group_.config_.first_stall_timeout : group_.config_.stall_timeout);
}

template <typename Ready>
bool Exchange::await(const Ready& ready, Duration most) {
  Presence presence;
  const auto look = [&] {
    if (ready()) return true;
    started_ += presence.absent(Clock::now());
    return false;
  };
  const auto until = [&] { return started_ + std::min<Duration>(deadline() - started_, most); };
  do {
    if (group_.engine_->wait_until(look, until()) || look()) return true;
  } while (Clock::now() < until());
  return false;
}

std::byte* Exchange::message(uint32_t peer, size_t bytes) {
  message_ = nullptr;
  message_peer_ = peer;
  message_bytes_ = bytes;
  if (group_.failed_ || group_.closed_) return nullptr;
  if (bytes > group_.config_.region_bytes) {
    throw Error(ErrorKind::kInvalidArgument, describe() + ": a message of " + std::to_string(bytes) +
                                                 " bytes does not fit a region of " +
                                                 std::to_string(group_.config_.region_bytes));
  }
  if (!group_.buffers_.readable) {
    throw Error(ErrorKind::kInvalidArgument, describe() + ": messages in a GPU's memory are packed there");
  }
  if (peer == group_.config_.rank || group_.peers_[peer]->absent) {
    message_ = group_.region(lane_, peer);  // nobody else reads or writes it
    return message_;
  }
  // A send buffer is packed again only after the NIC has read its last content: at the lane's first message,
  // and whenever this exchange has filled it.
  if (staged_ == 0 || staged_ + bytes > group_.config_.staging_bytes) {
    ExchangeGroup::Lane& lane = *group_.lane_state_[lane_];
    const bool drained =
        await([&] { return lane.local.done() >= lane.posted || group_.failed_ || group_.closed_; });
    if (!drained) {
      group_.fail(Error(ErrorKind::kTimeout, describe() +
                                                 ": the network did not take what was posted before within " +
                                                 seconds(deadline() - started_)),
                  ExchangeGroup::kNobody);
    }
    if (group_.failed_ || group_.closed_) return nullptr;
    staged_ = 0;
  }
  message_ = group_.buffers_.staging->data() + lane_ * group_.config_.staging_bytes + staged_;
  return message_;
}

std::byte* Exchange::packed(uint32_t peer, size_t bytes) {
  const GroupConfig& config = group_.config_;
  message_ = nullptr;
  message_peer_ = peer;
  message_bytes_ = bytes;
  if (group_.failed_ || group_.closed_) return nullptr;
  if (peer == config.rank) return message_ = group_.header_from(lane_, peer);
  staged_ = peer * config.region_bytes;
  if (bytes > config.region_bytes || staged_ + bytes > config.staging_bytes) {
    throw Error(ErrorKind::kInvalidArgument, describe() + ": a message of " + std::to_string(bytes) +
                                                 " bytes does not lie where it should");
  }
  if (!group_.buffers_.readable) {
    return message_ = group_.header_region_->data() + group_.headers_bytes() + group_.header_at(lane_, peer);
  }
  return message_ = group_.buffers_.staging->data() + lane_ * config.staging_bytes + staged_;
}

void Exchange::post(uint32_t slots, bool poisoned) {
  if (message_ == nullptr) return;
  const GroupConfig& config = group_.config_;
  ExchangeGroup::Peer& peer = *group_.peers_[message_peer_];
  RegionHeader header{};
  header.magic = kMagic;
  header.version = kWireVersion;
  header.kind = static_cast<uint8_t>(site_.kind);
  const bool stays = message_peer_ == config.rank || peer.absent;
  header.nonce = stays ? group_.nonce_ : peer.nonce;
  header.source = peer.absent ? message_peer_ : config.rank;
  header.exchange = number_;
  header.tag = site_.tag;
  header.tokens = site_.tokens;
  header.round = round_;
  header.hidden = site_.hidden;
  header.slots = slots;
  header.culprit = ExchangeGroup::kNobody;
  header.bytes = static_cast<uint32_t>(message_bytes_);
  header.format = site_.format;
  header.top_k = site_.top_k;
  header.local_experts = site_.local_experts;
  std::strncpy(header.site, site_.name.data(), std::min(site_.name.size(), sizeof(header.site) - 1));
  if (poisoned) {
    header.flags |= kPoisoned;
    header.culprit = config.rank;
  }
  if (raise_ != 0) {
    header.flags |= raise_;
    header.culprit = raise_culprit_;
  }
  if (peer.absent) echo(header);
  std::memcpy(message_, &header, sizeof(header));
  if (stays) return;

  try {
    write_message();
  } catch (const Error& error) {
    group_.fail(Error(error.kind(), describe() + ": no message to " + group_.rank_name(message_peer_) + ": " +
                                        error.what()),
                message_peer_);
    return;
  }
  peer.sent_bytes += message_bytes_;
  staged_ += (message_bytes_ + 63) / 64 * 64;
}

// The bytes of the message go to the peer's region. A CPU that cannot read there gets the header where it
// can, and one that cannot pack here has the header apart from the body. Each write is announced; the order
// in which they land does not matter.
void Exchange::write_message() {
  const GroupConfig& config = group_.config_;
  const ExchangeGroup::Peer& peer = *group_.peers_[message_peer_];
  const size_t region = (size_t{lane_} * config.num_ranks + config.rank) * config.region_bytes;
  const Region& staging = *group_.buffers_.staging;
  const size_t packed = lane_ * config.staging_bytes + staged_;
  const Region* header = &staging;
  size_t header_offset = packed, body = 0;
  if (!group_.buffers_.readable) {
    header = group_.header_region_.get();
    header_offset = group_.headers_bytes() + group_.header_at(lane_, message_peer_);
    body = sizeof(RegionHeader);
    write(*header, header_offset, *peer.regions, region, sizeof(RegionHeader));
  }
  write(staging, packed + body, *peer.regions, region + body, message_bytes_ - body);
  if (peer.headers == nullptr) return;
  write(*header, header_offset, *peer.headers, group_.header_at(lane_, config.rank), sizeof(RegionHeader));
}

void Exchange::write(const Region& source, size_t offset, const RemoteRegion& target, size_t target_offset,
                     size_t bytes) {
  const ExchangeGroup::Peer& peer = *group_.peers_[message_peer_];
  ExchangeGroup::Lane& lane = *group_.lane_state_[lane_];
  ++lane.posted;
  try {
    group_.engine_->write({.source = &source,
                           .source_offset = offset,
                           .target = &target,
                           .target_offset = target_offset,
                           .length = bytes,
                           .imm = immediate(peer.nonce, group_.config_.rank, lane_),
                           .imm_per_shard = true},
                          &lane.sent[message_peer_]);
  } catch (...) {
    --lane.posted;
    throw;
  }
}

// What has nothing in it for an absent rank is what that rank would have sent: the same header, no rows. Rows
// for it, of a route from before it was absent, are the caller's mistake, as they will never come home.
void Exchange::echo(RegionHeader& header) const {
  if ((header.flags & kPoisoned) != 0) header.flags &= static_cast<uint8_t>(~kPoisoned);
  if (header.slots == 0) return;
  header.slots = 0;
  header.bytes = sizeof(header);
  header.flags |= kPoisoned;
  header.culprit = header.source;
}

void Exchange::note_sent() {
  if (group_.failed_ || group_.closed_) return;
  group_.sent_exchanges_ = std::max<uint64_t>(group_.sent_exchanges_, number_ + 1);
}

bool Exchange::wait() {
  unfinished_ = false;
  if (group_.failed_ || group_.closed_) return false;
  note_sent();
  return check(group_.config_.rank) && wait_for_arrivals(true);
}

bool Exchange::wait_for_arrivals(bool checked) {
  const GroupConfig& config = group_.config_;
  std::vector<uint32_t> missing;
  missing.reserve(config.num_ranks);
  for (uint32_t offset = 1; offset < config.num_ranks; ++offset) {
    const uint32_t source = (config.rank + offset) % config.num_ranks;
    if (group_.peers_[source]->absent) {
      if (checked && !check(source)) return false;
      continue;
    }
    missing.push_back(source);
  }
  const auto began = Clock::now();
  unsigned checks = 0;
  uint64_t looks = 0;
  bool sound = true;
  const auto arrived = [&] {
    const size_t before = missing.size();
    std::erase_if(missing, [&](uint32_t source) {
      if (!here(source)) return false;
      sound = sound && (!checked || check(source));
      // What was here before anybody looked was not waited for: the slowest rank waits for nobody.
      if (looks > 0) group_.peers_[source]->note_wait(number_, Duration(Clock::now() - began).count());
      return true;
    });
    ++looks;
    if (missing.empty() || !sound || group_.closed_) return true;
    // Rare news are looked at rarely: reading every peer's counters each time would cost more than the wait.
    if (missing.size() == before && ++checks % 64 == 0) read_news(missing);
    return group_.failed_.load();
  };

  bool done = await(arrived, kWarnAfter);
  if (!done && Clock::now() < deadline()) {
    warn_of(missing.front());
    done = await(arrived);
  }
  if (!done) give_up(missing);
  return sound && done && !group_.failed_ && !group_.closed_;
}

bool Exchange::here(uint32_t source) const {
  const ExchangeGroup::Peer& peer = *group_.peers_[source];
  if (peer.absent) return true;
  const uint64_t uses = number_ / group_.lanes_ + 1;  // of the lane, this exchange included
  return peer.arrivals[lane_].value() >= uses * peer.shards * peer.pieces;
}

// What ends a wait early: failures and closes of peers, messages that were refused.
void Exchange::read_news(const std::vector<uint32_t>& missing) {
  group_.read_notices();
  if (group_.refused()) group_.read_refusals(lane_, describe());
  for (const uint32_t source : missing) {
    const ExchangeGroup::Peer& peer = *group_.peers_[source];
    if (!peer.gone) continue;
    // Its notice may have overtaken its last messages; those are waited for, but not for ever.
    if (number_ < peer.last_words && Clock::now() - started_ < group_.config_.timeout) continue;
    group_.fail(Error(ErrorKind::kPeer, describe() + ": " + group_.rank_name(source) +
                                            " has closed the group and will not come"),
                source);
  }
}

void Exchange::warn_of(uint32_t missing) {
  ++group_.slow_waits_;
  group_.note(LogLevel::kWarn, number_, Field("event", "waiting"), ' ', Field("call", kind_name(site_.kind)),
              ' ', Field("site", std::string(site_.name)), ' ', Field("peer", missing), ' ',
              Field("process", group_.peers_[missing]->process), ' ', Field("seconds", kWarnAfter.count()));
}

void Exchange::give_up(const std::vector<uint32_t>& missing) {
  std::string names = group_.rank_names(missing);
  if (missing.empty()) names = "completions of its own messages";
  group_.fail(Error(ErrorKind::kTimeout, describe() + ": " + names + " did not come within " +
                                             seconds(deadline() - started_) +
                                             " (stall_timeout=; more at a call's first execution)"),
              missing.empty() ? ExchangeGroup::kNobody : missing.front());
}

bool Exchange::poll(Patience& patience) {
  patience.since += patience.presence.absent(Clock::now());
  started_ = patience.since;
  std::vector<uint32_t> missing;
  for (uint32_t source = 0; source < group_.config_.num_ranks; ++source) {
    if (source != group_.config_.rank && !here(source)) missing.push_back(source);
  }
  const ExchangeGroup::Lane& lane = *group_.lane_state_[lane_];
  if (missing.empty() && lane.local.done() >= lane.posted) {
    if (lane.local.failed() != 0) read_news(missing);
    return true;
  }
  if (++patience.looks % 64 == 0) read_news(missing);
  if (Clock::now() >= deadline()) give_up(missing);
  if (!patience.warned && !missing.empty() && Clock::now() - started_ > kWarnAfter) {
    warn_of(missing.front());
    patience.warned = true;
  }
  return group_.failed_ || group_.closed_;
}

bool Exchange::check(uint32_t source) {
  const GroupConfig& config = group_.config_;
  // Copied before it is looked at: a peer could change it between the check and the use.
  RegionHeader& theirs = group_.headers_[source];
  std::memcpy(&theirs, group_.header_from(lane_, source), sizeof(theirs));
  if (theirs.magic != kMagic || theirs.version != kWireVersion || theirs.nonce != group_.nonce_ ||
      theirs.source != source || theirs.bytes < sizeof(RegionHeader) || theirs.bytes > config.region_bytes ||
      theirs.kind >= kKinds) {
    reject(source, "its message's header makes no sense (other version of pplx-jax?)");
    return false;
  }
  if (theirs.exchange != number_ || theirs.kind != static_cast<uint8_t>(site_.kind) ||
      theirs.tag != site_.tag || theirs.tokens != site_.tokens || theirs.round != round_ ||
      theirs.hidden != site_.hidden || theirs.format != site_.format || theirs.top_k != site_.top_k ||
      theirs.local_experts != site_.local_experts) {
    const std::string name(theirs.site, strnlen(theirs.site, sizeof(theirs.site)));
    const auto kind = static_cast<Kind>(theirs.kind);
    group_.fail(
        Error(ErrorKind::kMismatch,
              "group '" + config.name + "', exchange " + std::to_string(number_) + ": " +
                  group_.rank_name(config.rank) + " is at " +
                  site_text(kind_name(site_.kind), site_.name, site_.tokens, site_.top_k, site_.hidden) +
                  ", " + group_.rank_name(source) + " at " +
                  site_text(kind_name(kind), name, theirs.tokens, theirs.top_k, theirs.hidden) +
                  ": all ranks must run the same exchanges in the same order (order independent ones with "
                  "after=)"),
        source);
    return false;
  }
  if (source != config.rank && !group_.peers_[source]->absent) {
    group_.peers_[source]->received_bytes += theirs.bytes;
  }
  return true;
}

void Exchange::reject(uint32_t source, const std::string& why) {
  group_.fail(
      Error(ErrorKind::kPeer, describe() + ": " + group_.rank_name(source) + " broke the protocol: " + why),
      source);
}

const RegionHeader& Exchange::header(uint32_t source) const { return group_.headers_[source]; }

const std::byte* Exchange::body(uint32_t source) const {
  return group_.region(lane_, source) + sizeof(RegionHeader);
}

size_t Exchange::body_bytes(uint32_t source) const { return header(source).bytes - sizeof(RegionHeader); }

std::optional<Error> Exchange::raised() {
  for (uint32_t source = 0; source < group_.config_.num_ranks; ++source) {
    const RegionHeader& theirs = header(source);
    if ((theirs.flags & kRaise) == 0) continue;
    Error error(ErrorKind::kRouting, describe() + ": an earlier step had a data error on " +
                                         group_.rank_name(theirs.culprit) +
                                         "; that rank's check() tells which");
    if (const auto own = group_.data_error()) error = *own;
    if (!resumed_) return error;
    group_.defer_raise(error, group_.current_run_);
    return std::nullopt;
  }
  return std::nullopt;
}

}  // namespace pplx::moe
