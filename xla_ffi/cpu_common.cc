#include "xla_ffi/cpu_common.h"

namespace pplx::moe {

std::optional<Error> refusal(const Call& call) {
  call.group.require_own_process();
  if (call.group.closed()) {
    return Error(ErrorKind::kClosed, "group '" + call.group.config().name +
                                         "' was closed; open it again with the same "
                                         "arguments (no recompilation is needed) before running " +
                                         std::string(call.site.name));
  }
  if (call.group.raises_in(call.run)) return call.group.failure();
  const bool transpose =
      call.site.kind == Kind::kDispatchTranspose || call.site.kind == Kind::kCombineTranspose;
  if (transpose && !call.group.config().absent.empty()) {
    return Error(ErrorKind::kInvalidArgument,
                 "group '" + call.group.config().name + "' has masked ranks, without which " +
                     std::string(call.site.name) +
                     " has no derivative: to train on, restart the job without them");
  }
  if (auto error = call.group.deferred_raise(call.run)) return error;
  return std::nullopt;
}

bool sound_home(const Call& call, const int32_t* home) {
  return std::all_of(home, home + int64_t{call.tokens()} * call.shape.top_k, [&](int32_t expert) {
    return expert >= kPastEnd && expert < call.shape.physical_experts();
  });
}

void report_foreign_route(const Call& call) {
  call.group.report_data_error(
      Error(ErrorKind::kRouting, "group '" + call.group.config().name + "', '" + std::string(call.site.name) +
                                     "': the route's arrays are not those that dispatch returned for T=" +
                                     std::to_string(call.site.tokens)),
      call.group.config().rank, call.run);
}

ReceivedSlots::ReceivedSlots(const Call& call, const Route& route) : shape_(call.shape), route_(route) {
  if (*route.ok != 1) {
    sound_ = false;
    if (!call.group.failure()) {
      call.group.report_data_error(
          Error(ErrorKind::kRouting, "group '" + call.group.config().name + "', '" +
                                         std::string(call.site.name) +
                                         "': the route is of a dispatch that failed"),
          call.group.config().rank, call.run);
    }
    return;
  }
  sound_ = check(call);
  if (!sound_) report_foreign_route(call);
}

bool ReceivedSlots::check(const Call& call) {
  const int64_t messages = int64_t{call.rounds()} * shape_.num_ranks;
  const int64_t most_slots = int64_t{shape_.num_ranks} * call.tokens();
  if (!sound_home(call, route_.home)) return false;
  int64_t slots = 0;
  for (int64_t i = 0; i < messages; ++i) {
    first_.push_back(slots);
    if (route_.source_slots[i] < 0 || route_.source_slots[i] > shape_.chunk) return false;
    slots += route_.source_slots[i];
  }
  if (slots > most_slots || route_.slot_start[0] != 0) return false;
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int32_t entries = route_.slot_start[slot + 1] - route_.slot_start[slot];
    if (entries < 0 || entries > shape_.entries()) return false;
  }
  const int32_t* rows = route_.slot_rows;
  return std::all_of(rows, rows + route_.slot_start[slots],
                     [&](int32_t row) { return row >= -1 && row < route_.rows; });
}

void note_poison(const Call& call, const Exchange& exchange, uint32_t source) {
  if (source == call.group.config().rank) return;  // it has its own, better report
  const uint32_t culprit = exchange.header(source).culprit;
  call.group.report_data_error(
      Error(ErrorKind::kRouting,
            "group '" + call.group.config().name + "', '" + std::string(call.site.name) + "': rank " +
                std::to_string(source) +
                " has a data error (expert ids, row limit or route); tokens that it handles are NaN"),
      culprit, call.run);
}

}  // namespace pplx::moe
