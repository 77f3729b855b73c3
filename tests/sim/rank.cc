#include "tests/sim/rank.h"

#include <algorithm>
#include <cstring>

#include "xla_ffi/tests/support.h"

namespace pplx::sim {
namespace {

using moe::Kind;
using moe::Ticket;
using moe::testing::all_nan;
using moe::testing::Arguments;
using moe::testing::Inputs;
using moe::testing::make_call;
using moe::testing::Outputs;
using moe::testing::Site;

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof a[0]) == 0);
}

// Between calls a program computes, some ranks longer than others.
void compute(Random& random) {
  Scheduler& scheduler = *Scheduler::current();
  scheduler.sleep(random.any_magnitude(random.one_in(40) ? 20 * kMillisecond : 100 * kMicrosecond));
}

}  // namespace

std::string difference(Kind kind, const Outputs& got, const Outputs& want) {
  std::string wrong;
  const auto expect = [&](bool equal, const char* what) {
    if (!equal) wrong += std::string(wrong.empty() ? "" : ", ") + what;
  };
  switch (kind) {
    case Kind::kDispatch:
      expect(got.ok == want.ok, "ok");
      expect(got.num_rows == want.num_rows, "num_rows");
      expect(got.num_dropped == want.num_dropped, "num_dropped");
      expect(got.group_sizes == want.group_sizes, "group_sizes");
      expect(got.quantized == want.quantized, "quantised tokens");
      expect(got.tokens == want.tokens, "tokens");
      expect(same(got.row_weights, want.row_weights), "row_weights");
      break;
    case Kind::kCombine:
      expect(got.out == want.out, "out");
      break;
    case Kind::kCombineTranspose:
      expect(got.d_y == want.d_y, "d_y");
      expect(same(got.d_row_weights, want.d_row_weights), "d_row_weights");
      break;
    case Kind::kDispatchTranspose:
      expect(got.d_x == want.d_x, "d_x");
      expect(same(got.d_weights, want.d_weights), "d_weights");
      break;
  }
  return wrong;
}

bool poisoned(Kind kind, const Outputs& got) {
  switch (kind) {
    case Kind::kDispatch:
      return got.ok == 0 && got.num_rows == 0 && got.num_dropped == 0 && all_nan(got.row_weights) &&
             (!got.quantized.values.empty() || all_nan(got.tokens));
    case Kind::kCombine:
      return all_nan(got.out);
    case Kind::kCombineTranspose:
      return all_nan(got.d_y) && all_nan(got.d_row_weights);
    case Kind::kDispatchTranspose:
      return all_nan(got.d_x) && all_nan(got.d_weights);
  }
  return false;
}

RankProgram::RankProgram(const Program& program, moe::Member& member, Conductor& conductor,
                         const Fault& fault, uint64_t seed)
    : program_(program),
      member_(member),
      conductor_(conductor),
      fault_(fault),
      random_(seed),
      rank_(static_cast<uint32_t>(member.shape.rank)),
      parts_(program.parts.size()) {}

void RankProgram::complain(const std::string& what) {
  complaints_.push_back("call " + std::to_string(call_) + ": " + what);
}

bool RankProgram::faulty(FaultKind kind) { return fault_.kind == kind && conductor_.my_turn(kind, call_); }

// False: the rank makes no further call.
bool RankProgram::before_call() {
  ++call_;
  conductor_.call_begins(call_);
  if (faulty(FaultKind::kLeave)) {
    conductor_.struck();
    left_ = true;
    return false;
  }
  if (faulty(FaultKind::kGiveUp)) {
    conductor_.struck();
    member_.group.fail(Error(ErrorKind::kRouting, "rank " + std::to_string(rank_) + " gave up"), rank_);
  }
  if (faulty(FaultKind::kStraggle)) {
    conductor_.struck();
    Scheduler::current()->sleep(fault_.duration);
  }
  compute(random_);
  return true;
}

// False: the program ends here. `received`: outputs were written.
bool RankProgram::after_call(const std::optional<Error>& error, const Entry& entry, bool received) {
  const bool failed = member_.group.failure().has_value();
  if (error && !failed) complain(std::string("an error without a failure: ") + error->what());
  if (received)
    parts_[entry.part].of[static_cast<size_t>(entry.kind)] = failed ? Result::kEither : Result::kGood;
  if (error) parts_[entry.part].of[static_cast<size_t>(entry.kind)] = Result::kNone;
  if (failed && !failed_at_) failed_at_ = Scheduler::current()->now();
  return !failed && !error;
}

void RankProgram::run() {
  for (const Segment& segment : program_.segments) {
    if (segment.bad ? !bad_segment(segment) : !go_on(segment)) {
      if (!left_ && member_.group.failure()) check_that_failure_is_final(segment.run);
      return;
    }
  }
  finished_ = true;
}

bool RankProgram::go_on(const Segment& segment) {
  for (const Entry& entry : segment.sends) {
    if (!receive_for(segment, entry) || !make(segment, entry)) return false;
  }
  if (segment.abandons && random_.one_in(2)) {
    under_way_.clear();
    return true;
  }
  while (!under_way_.empty()) {
    if (!receive(segment, random_.below(under_way_.size()))) return false;
  }
  return true;
}

// Receives what the next send needs: the exchange before it of its part, and the window.
bool RankProgram::receive_for(const Segment& segment, const Entry& next) {
  const auto needed = [&](const UnderWay& one) {
    return one.entry.part == next.part || one.ticket - 1 + program_.problem.depth <= next_exchange_;
  };
  for (;;) {
    const auto found = std::find_if(under_way_.begin(), under_way_.end(), needed);
    if (found != under_way_.end()) {
      if (!receive(segment, static_cast<size_t>(found - under_way_.begin()))) return false;
    } else if (!under_way_.empty() && random_.one_in(3)) {
      if (!receive(segment, random_.below(under_way_.size()))) return false;
    } else {
      return true;
    }
  }
}

bool RankProgram::make(const Segment& segment, const Entry& entry) {
  if (!before_call()) return false;
  const Inputs& in = program_.parts[entry.part][rank_];
  Outputs& out = parts_[entry.part].outputs;
  Arguments args(program_.problem, member_, in, out);
  Site site{.name = "layer" + std::to_string(entry.part % 3), .run = segment.run};
  const bool mismatch = faulty(FaultKind::kMismatch);
  if (mismatch) {
    conductor_.struck();
    site.name = "another call";
  }
  const moe::Call call = make_call(member_, entry.kind, in.tokens, site);
  std::optional<Error> error;
  if (!segment.halves || mismatch || random_.one_in(2)) {
    switch (entry.kind) {
      case Kind::kDispatch:
        error = dispatch(call, args.dispatch_send(), args.dispatch_recv());
        args.dequantize_tokens();
        if (out.ok == 1)
          apply_experts(program_.problem, static_cast<int>(rank_), out.group_sizes, out.tokens, out.y);
        break;
      case Kind::kCombine:
        error = combine(call, args.combine_send(), args.combine_recv());
        break;
      case Kind::kCombineTranspose:
        error = combine_transpose(call, args.combine_transpose_send(), args.combine_transpose_recv());
        apply_experts(program_.problem, static_cast<int>(rank_), out.group_sizes, out.d_y, out.d_tokens);
        break;
      case Kind::kDispatchTranspose:
        error = dispatch_transpose(call, args.dispatch_transpose_send(), args.dispatch_transpose_recv());
        break;
    }
    ++next_exchange_;
    return after_call(error, entry, true);
  }
  Ticket ticket = 0;
  switch (entry.kind) {
    case Kind::kDispatch:
      error = dispatch_send(call, args.dispatch_send(), ticket);
      break;
    case Kind::kCombine:
      error = combine_send(call, args.combine_send(), ticket);
      break;
    case Kind::kCombineTranspose:
      error = combine_transpose_send(call, args.combine_transpose_send(), ticket);
      break;
    case Kind::kDispatchTranspose:
      error = dispatch_transpose_send(call, args.dispatch_transpose_send(), ticket);
      break;
  }
  if (!after_call(error, entry, false)) return false;
  if (ticket != ++next_exchange_) {
    complain("ticket " + std::to_string(ticket) + " for exchange " + std::to_string(next_exchange_ - 1));
  }
  under_way_.push_back({entry, ticket});
  return true;
}

bool RankProgram::receive(const Segment& segment, size_t which) {
  const UnderWay one = under_way_[which];
  under_way_.erase(under_way_.begin() + static_cast<ptrdiff_t>(which));
  if (!before_call()) return false;
  const Inputs& in = program_.parts[one.entry.part][rank_];
  Outputs& out = parts_[one.entry.part].outputs;
  Arguments args(program_.problem, member_, in, out);
  const Site site{.name = "layer" + std::to_string(one.entry.part % 3), .run = segment.run};
  const moe::Call call = make_call(member_, one.entry.kind, in.tokens, site);
  std::optional<Error> error;
  try {
    switch (one.entry.kind) {
      case Kind::kDispatch:
        error = dispatch_recv(call, args.dispatch_recv(), one.ticket);
        args.dequantize_tokens();
        if (out.ok == 1)
          apply_experts(program_.problem, static_cast<int>(rank_), out.group_sizes, out.tokens, out.y);
        break;
      case Kind::kCombine:
        error = combine_recv(call, args.combine_recv(), one.ticket);
        break;
      case Kind::kCombineTranspose:
        error = combine_transpose_recv(call, args.combine_transpose_recv(), one.ticket);
        apply_experts(program_.problem, static_cast<int>(rank_), out.group_sizes, out.d_y, out.d_tokens);
        break;
      case Kind::kDispatchTranspose:
        error = dispatch_transpose_recv(call, args.dispatch_transpose_recv(), one.ticket);
        break;
    }
  } catch (const Error& thrown) {
    if (!member_.group.failure()) complain(std::string("thrown without a failure: ") + thrown.what());
    error = thrown;
  }
  return after_call(error, one.entry, true);
}

// One rank's routing is wrong: its outputs are poisoned, nothing stops, and every rank raises in the first
// exchange of the next execution, until all have taken their errors.
bool RankProgram::bad_segment(const Segment& segment) {
  const size_t part = segment.sends.front().part;
  const Inputs& in = program_.parts[part][rank_];
  Outputs out;
  if (!before_call()) return false;
  if (rank_ == fault_.rank) conductor_.struck();
  const Site bad{.run = segment.run * 1000};
  if (const auto error = run_step(program_.problem, member_, in, out, bad)) {
    complain(std::string("an error in the execution of a data error: ") + error->what());
  }
  if (member_.group.failure()) {
    complain(std::string("a data error failed the group: ") + member_.group.failure()->what());
    return false;
  }
  next_exchange_ += 4;
  if ((out.ok == 0) != (rank_ == fault_.rank)) complain("ok is " + std::to_string(out.ok));
  if (rank_ == fault_.rank && !(poisoned(Kind::kDispatch, out) && poisoned(Kind::kCombine, out) &&
                                poisoned(Kind::kDispatchTranspose, out))) {
    complain("outputs of the rank with the data error are not poisoned");
  }
  if (!before_call()) return false;
  Inputs good = in;
  good.num_tokens = 0;
  std::fill(good.indices.begin(), good.indices.end(), -1);
  const auto raised = run_dispatch(program_.problem, member_, good, out, {.run = segment.run * 1000 + 1});
  ++next_exchange_;
  if (!raised || raised->kind() != ErrorKind::kRouting) {
    complain(std::string("the data error was not raised: ") + (raised ? raised->what() : "no error"));
  }
  if (!member_.group.take_data_error()) complain("no data error to take");
  return true;
}

// No later call exchanges anything: in another execution it returns the error.
void RankProgram::check_that_failure_is_final(int64_t run) {
  const Nanoseconds began = Scheduler::current()->now();
  Inputs none = program_.parts[0][rank_];
  none.num_tokens = 0;
  Outputs out;
  for (const int64_t of : {run, run + 1'000'000}) {
    try {
      const auto error = run_dispatch(program_.problem, member_, none, out, {.name = "after", .run = of});
      if (of != run && !error) complain("a call after the failure returned no error");
      if (!error && !poisoned(Kind::kDispatch, out)) complain("a call after the failure has outputs");
    } catch (const Error& thrown) {
      complain(std::string("a call after the failure threw ") + thrown.what());
    }
  }
  if (Scheduler::current()->now() - began > 10 * kMillisecond) complain("a call after the failure waited");
}

}  // namespace pplx::sim
