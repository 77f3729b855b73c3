// What the group's thread does: heartbeats, and who has failed, closed or fallen silent; and notices of
// failure, both ways.
#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "proxy/log.h"
#include "proxy/moe/exchange_group.h"
#include "proxy/moe/peer.h"

namespace pplx::moe {
namespace {

// For what a process that has ended sent last, and what waits here to be read.
constexpr auto kLastWords = std::chrono::milliseconds(100);

}  // namespace

void ExchangeGroup::broadcast(const AbortNotice& notice, NoticeSlot slot) {
  if (!connected_ || engine_->closed()) return;
  // All peers get the same bytes: the notice names its sender, the immediate carries the peer's nonce.
  const size_t ours = (config_.num_ranks * size_t{2} + slot) * sizeof(AbortNotice);
  AbortNotice out = notice;
  out.magic = kMagic;
  out.version = kWireVersion;
  out.closed = slot == kClosedSlot;
  out.nonce = nonce_;
  out.source = config_.rank;
  std::memcpy(notices_->data() + ours, &out, sizeof(out));
  for (uint32_t rank = 0; rank < config_.num_ranks; ++rank) {
    if (rank == config_.rank) continue;
    const Peer& peer = *peers_[rank];
    if (peer.gone) continue;
    try {
      engine_->write(
          {.source = notices_.get(),
           .source_offset = ours,
           .target = peer.notice_region.get(),
           .target_offset = (config_.rank * size_t{2} + slot) * sizeof(AbortNotice),
           .length = sizeof(AbortNotice),
           .imm = immediate(peer.nonce, config_.rank, slot == kClosedSlot ? kClosedLane : kFailedLane)},
          control_.get());
      ++control_posted_;
    } catch (const Error& error) {
      note(LogLevel::kDebug, latest_exchange(), Field("event", "no_notice"), ' ', Field("peer", rank), ' ',
           Field("message", error.what()));
    }
  }
}

void ExchangeGroup::read_notices() {
  const auto read = [&](uint32_t rank, NoticeSlot slot, AbortNotice& notice) {
    std::memcpy(&notice, notices_->data() + (rank * size_t{2} + slot) * sizeof(AbortNotice), sizeof(notice));
    notice.text[sizeof(notice.text) - 1] = '\0';
    return notice.magic == kMagic && notice.version == kWireVersion && notice.source == rank &&
           notice.nonce == peers_[rank]->nonce && notice.closed == (slot == kClosedSlot ? 1 : 0);
  };
  for (uint32_t rank = 0; rank < config_.num_ranks; ++rank) {
    if (rank == config_.rank) continue;
    Peer& peer = *peers_[rank];
    AbortNotice notice;
    const auto believe = [&](const std::string& what) {
      const auto kind = notice.error_kind <= static_cast<uint8_t>(ErrorKind::kRouting)
                            ? static_cast<ErrorKind>(notice.error_kind)
                            : ErrorKind::kPeer;
      record_failure(Error(kind, what + notice.text), notice.culprit, true);
    };
    // Not passed on at once: whoever failed has told every peer itself, if it could.
    if (peer.failures.value() != 0 && !peer.failure_read.exchange(true) && read(rank, kFailedSlot, notice)) {
      believe(rank_name(rank) + " failed in exchange " + std::to_string(notice.exchange) + ": ");
    }
    if (!peer.gone && peer.closings.value() != 0 && read(rank, kClosedSlot, notice)) {
      peer.last_words = notice.exchange;
      peer.gone = true;
      // What the closer has only heard goes on in the words of whose failure it is: they say who, and a chain
      // of ranks that close must not push that out of the notice.
      if (notice.text[0] != '\0') {
        believe(notice.heard != 0 ? "" : rank_name(rank) + " closed the group after a failure: ");
      }
    }
  }
}

bool ExchangeGroup::refused() const {
  return std::any_of(lane_state_.begin(), lane_state_.end(),
                     [](const auto& lane) { return lane->local.failed() != 0; });
}

void ExchangeGroup::read_refusals(uint32_t lane, const std::string& where) {
  read_notices();  // whoever closes or fails ends its connections after having said so
  for (uint32_t one = 0; one < lanes_; ++one) {
    if (lane_state_[one]->local.failed() == 0) continue;
    for (uint32_t rank = 0; rank < config_.num_ranks; ++rank) {
      const Lane::Sent& sent = lane_state_[one]->sent[rank];
      // Who has closed needs nothing any more, and may not have acknowledged the last that it got.
      if (!sent.refused || peers_[rank]->gone) continue;
      fail(Error(sent.error->kind(), (one == lane ? where : "group '" + config_.name + "'") +
                                         ": no message to " + rank_name(rank) + ": " + sent.error->what()),
           is_cut_off() ? config_.rank : rank);
    }
  }
}

void ExchangeGroup::beat() {
  for (uint32_t rank = 0; rank < config_.num_ranks; ++rank) {
    Peer& peer = *peers_[rank];
    if (rank == config_.rank || peer.gone) continue;
    try {
      engine_->write(
          {.target = peer.notice_region.get(), .imm = immediate(peer.nonce, config_.rank, kHeartbeatLane)},
          &peer.beats);
      ++control_posted_;
    } catch (const Error& error) {
      note(LogLevel::kDebug, latest_exchange(), Field("event", "no_heartbeat"), ' ', Field("peer", rank), ' ',
           Field("message", error.what()));
    }
  }
}

std::string ExchangeGroup::rank_names(const std::vector<uint32_t>& ranks) const {
  std::string names;
  for (const uint32_t rank : ranks) names += (names.empty() ? "" : ", ") + rank_name(rank);
  return names;
}

bool ExchangeGroup::is_cut_off() const {
  const auto nics = engine_->details().nics;
  return std::all_of(nics.begin(), nics.end(), [](const NicStats& nic) { return !nic.error.empty(); });
}

void ExchangeGroup::check_refused_beats() {
  constexpr uint32_t kMany = 3;
  std::vector<uint32_t> lost;
  for (uint32_t rank = 0; rank < config_.num_ranks; ++rank) {
    if (rank == config_.rank || peers_[rank]->gone) continue;
    if (peers_[rank]->beats.refused_rounds() >= kMany) lost.push_back(rank);
  }
  if (lost.empty()) return;
  // Whoever closes breaks the connection too, but its notice came before that.
  read_notices();
  std::erase_if(lost, [&](uint32_t rank) { return peers_[rank]->gone.load(); });
  if (lost.empty() || failed_) return;
  const std::string names = rank_names(lost);
  fail(Error(ErrorKind::kPeer, "group '" + config_.name + "': " + names + " cannot be reached any more: " +
                                   peers_[lost.front()]->beats.error->what()),
       is_cut_off() ? config_.rank : lost.front());
}

// Where nothing else tells (shm), and before the network does.
void ExchangeGroup::check_ended() {
  for (uint32_t rank = 0; rank < config_.num_ranks; ++rank) {
    Peer& peer = *peers_[rank];
    if (rank == config_.rank || peer.gone || !peer.watch.ended() || ++peer.ended < 2) continue;
    const auto told = [&] {
      read_notices();
      return peer.gone || failed_;
    };
    engine_->wait_until(told, Clock::now() + kLastWords);
    if (failed_) return;
    if (peer.gone) continue;
    return fail(Error(ErrorKind::kPeer,
                      "group '" + config_.name + "': " + rank_name(rank) + " died: its process has ended"),
                rank);
  }
}

// `absent`: how long this process itself did not run; that time is no peer's silence.
void ExchangeGroup::check_liveness(Clock::time_point now, Duration absent) {
  std::vector<uint32_t> silent;
  Duration longest{0};
  for (uint32_t rank = 0; rank < config_.num_ranks; ++rank) {
    Peer& peer = *peers_[rank];
    if (rank == config_.rank || peer.gone) continue;
    peer.last_sign += absent;
    uint64_t signs = peer.heartbeats.value();
    for (const ImmCounter& arrivals : peer.arrivals) signs += arrivals.value();
    if (signs != peer.signs) {
      peer.signs = signs;
      peer.last_sign = now;
    }
    longest = std::max(longest, now - peer.last_sign);
    if (now - peer.last_sign > config_.timeout * 3 / 4) silent.push_back(rank);
  }
  if (longest <= config_.timeout) return;
  const std::string names = rank_names(silent);
  const auto seconds = std::chrono::duration<double>(config_.timeout).count();
  fail(Error(ErrorKind::kPeer, "group '" + config_.name + "': " + names + " gave no sign of life for " +
                                   std::to_string(seconds) +
                                   " s (timeout=): it died, is stopped or unreachable"),
       silent.front());
}

void ExchangeGroup::monitor() {
  const Duration interval =
      std::clamp<Duration>(config_.timeout / 8, std::chrono::milliseconds(20), std::chrono::seconds(2));
  std::unique_lock lock(monitor_->mutex);
  auto before = Clock::now();
  while (!closed_) {
    beat();
    monitor_->wake.wait_for(lock, interval, [this] { return closed_.load(); });
    if (closed_) break;
    read_notices();
    if (!failed_ && refused()) read_refusals(lanes_, "");
    if (!failed_) check_ended();
    if (!failed_) check_refused_beats();
    const auto now = Clock::now();
    // Beyond twice the interval this process was stopped (SIGSTOP, a suspended machine) or got no core.
    if (!failed_) check_liveness(now, std::max<Duration>(now - before - 2 * interval, Duration(0)));
    before = now;
  }
}

}  // namespace pplx::moe
