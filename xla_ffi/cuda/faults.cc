#include "xla_ffi/cuda/faults.h"

#include <atomic>
#include <chrono>
#include <cstring>

namespace pplx::moe::cuda {
namespace {

std::string number(int64_t value) { return std::to_string(value); }

std::string site_text(uint32_t kind, const std::string& name, uint32_t tokens, int32_t top_k,
                      int32_t hidden) {
  return std::string(kind_name(static_cast<Kind>(kind))) + " '" + name + "' (T=" + number(tokens) +
         ", K=" + number(top_k) + ", H=" + number(hidden) + ")";
}

// The call in which the fault was found.
std::string own_site(const FaultContext& context, const FaultRecord& record) {
  const Site* site = context.sites.at(record.site);
  return site_text(record.kind, site != nullptr ? site->name : "?", record.tokens, context.shape.top_k,
                   context.shape.hidden);
}

std::string peer(const FaultContext& context, const FaultRecord& record) {
  return context.group.rank_name(record.culprit);
}

std::string malformed(const FaultRecord& record) {
  switch (static_cast<Malformed>(record.detail[0])) {
    case Malformed::kHeader:
      return "its message's header makes no sense (other version of pplx-jax?)";
    case Malformed::kSlots:
      return "its message announces more rows than a region holds";
    case Malformed::kCounts:
      return "its announced counts do not fit the group";
    case Malformed::kEntry:
      return "a row's list of experts makes no sense";
  }
  return "its message makes no sense";
}

std::string mismatch(const FaultContext& context, const FaultRecord& record) {
  const RegionHeader& theirs = record.theirs;
  std::string name(theirs.site, strnlen(theirs.site, sizeof(theirs.site)));
  if (name.empty() && theirs.kind < kKinds) {
    const auto kind = static_cast<Kind>(theirs.kind);
    auto site = context.site_of_peer ? context.site_of_peer(record.culprit, kind, theirs.tag) : std::nullopt;
    if (!site) site = context.sites.find(kind, theirs.tag);  // if it is a call of all ranks
    name = site ? site->name : "?";
  }
  return context.group.rank_name(context.group.config().rank) + " is at " + own_site(context, record) + ", " +
         peer(context, record) + " at " +
         site_text(theirs.kind, name, theirs.tokens, theirs.top_k, static_cast<int32_t>(theirs.hidden)) +
         " of exchange " + std::to_string(theirs.exchange) +
         ": all ranks must run the same exchanges in the same order (order independent ones with after=)";
}

// Said as cpu_dispatch.cc says it.
std::string choice(const FaultContext& context, const FaultRecord& record) {
  return "rank " + number(context.shape.rank) + ": indices[" + number(record.detail[0]) + ", " +
         number(record.detail[1]) + "] is " + number(record.detail[2]);
}

Error failure(const FaultContext& context, const FaultRecord& record) {
  const GroupConfig& config = context.group.config();
  const std::string start = "group '" + config.name + "', exchange " + std::to_string(record.exchange) + ", ";
  const std::string where = start + own_site(context, record) + ": ";
  switch (record.fault) {
    case Fault::kTimeout:
      return {ErrorKind::kTimeout,
              where + peer(context, record) + " did not come within its time (stall_timeout=" +
                  number(std::chrono::duration_cast<std::chrono::seconds>(config.stall_timeout).count()) +
                  " s; more at a call's first execution): it is at other work, or runs another program"};
    case Fault::kMismatch:
      return {ErrorKind::kMismatch, start.substr(0, start.size() - 2) + ": " + mismatch(context, record)};
    case Fault::kMalformed:
      return {ErrorKind::kPeer, where + peer(context, record) + " broke the protocol: " + malformed(record)};
    case Fault::kNotice: {
      const std::string told = context.group.rank_name(static_cast<uint32_t>(record.detail[0]));
      return {ErrorKind::kPeer, where + told + " has failed because of " + peer(context, record) +
                                    "; that rank's own error says why"};
    }
    case Fault::kWindow:
      return {ErrorKind::kMismatch, where + "sent while exchange " + number(record.detail[0]) +
                                        " has not been received; at most depth=" + number(config.depth) +
                                        " may be under way, counted from the oldest (order the send after "
                                        "that recv with after=, or raise depth)"};
    case Fault::kTicket:
      return {ErrorKind::kInvalidArgument,
              where +
                  "what it receives from is not under way: each send is received exactly once, in the "
                  "same execution, and its ticket must reach the recv unchanged"};
    default:
      return {ErrorKind::kPeer, where + "the exchange was given up"};
  }
}

}  // namespace

std::optional<FaultRecord> read_fault(FaultRecord& record) {
  if (std::atomic_ref(record.complete).load(std::memory_order_acquire) == 0) return std::nullopt;
  return record;
}

Error fault_error(const FaultContext& context, const FaultRecord& record) {
  const MoeShape& shape = context.shape;
  const std::string where =
      "group '" + context.group.config().name + "', " + own_site(context, record) + ": ";
  switch (record.fault) {
    case Fault::kNumTokens:
      return {ErrorKind::kRouting, where + "rank " + number(shape.rank) + ": num_tokens is " +
                                       number(record.detail[0]) + ", allowed are 0.." +
                                       number(record.tokens)};
    case Fault::kBadExpert:
      return {ErrorKind::kRouting,
              where + choice(context, record) + ", allowed are -1 and 0.." + number(shape.num_experts - 1)};
    case Fault::kDuplicate:
      return {ErrorKind::kRouting,
              where + choice(context, record) + " a second time: a token's experts must be distinct"};
    case Fault::kHomeless:
      return {ErrorKind::kRouting,
              where + choice(context, record) + ", an expert that expert_map places nowhere"};
    case Fault::kOverflow: {
      const std::string rows = number(record.detail[0]), room = number(record.detail[1]);
      return {ErrorKind::kRouting,
              where + "rank " + number(shape.rank) +
                  (shape.padded ? " receives " + rows + " rows for one expert, room is for " + room
                                : " receives " + rows + " rows, rows=" + room) +
                  ": raise rows=, or drop what exceeds it with on_overflow=\"drop\""};
    }
    case Fault::kForeignRoute:
      return {ErrorKind::kRouting, where + "the route's arrays are not those that dispatch returned for T=" +
                                       number(record.tokens)};
    case Fault::kFailedRoute:
      return {ErrorKind::kRouting, where + "the route is of a dispatch that failed"};
    case Fault::kPoisoned:
      return {ErrorKind::kRouting,
              where + peer(context, record) +
                  " has a data error (expert ids, row limit or route); tokens that it handles are NaN"};
    default:
      return failure(context, record);
  }
}

}  // namespace pplx::moe::cuda
