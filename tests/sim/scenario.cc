#include "tests/sim/scenario.h"

#include <algorithm>
#include <array>
#include <sstream>

#include "xla_ffi/tests/inputs.h"

namespace pplx::sim {
namespace {

using moe::DType;
using moe::Kind;
using moe::Quant;
using moe::testing::Inputs;
using moe::testing::Problem;

constexpr std::array<const char*, kFaultKinds> kNames = {"none",  "kill",    "freeze",   "pause",
                                                         "stop",  "suspend", "straggle", "nic",
                                                         "leave", "give-up", "mismatch", "data"};

int draw_ranks(Random& random) {
  const uint64_t dice = random.below(100);
  if (dice < 75) return static_cast<int>(random.between(2, 8));
  if (dice < 97) return static_cast<int>(random.between(9, 16));
  return static_cast<int>(random.between(17, 64));
}

Problem draw_problem(Random& random, int ranks) {
  Problem problem;
  problem.ranks = ranks;
  problem.experts = static_cast<int>(random.between(1, ranks + random.between(0, 8)));
  problem.top_k = static_cast<int>(random.between(1, 4));
  problem.hidden = static_cast<int>(random.between(1, 20));
  const int largest = ranks <= 8 ? 8 : ranks <= 16 ? 4 : 2;
  problem.max_tokens = static_cast<int>(random.between(1, largest));
  if (random.one_in(3)) problem.chunk = static_cast<int>(random.between(1, problem.max_tokens));
  if (random.one_in(3)) problem.alignment = static_cast<int>(random.between(2, 4));
  problem.depth = random.one_in(2) ? 1 : static_cast<int>(random.between(2, 6));
  problem.dtype = random.pick(std::vector{DType::kFloat32, DType::kBFloat16, DType::kFloat16});
  if (random.one_in(4)) problem.home_dtype = DType::kFloat32;
  if (random.one_in(6)) problem.quant = random.one_in(2) ? Quant::kFp8 : Quant::kFp8Ue8m0;
  if (random.one_in(6)) problem.padded = true;
  if (random.one_in(6) && ranks <= 8) {  // replicas, and places without an expert
    problem.experts = std::max(1, ranks);
    problem.slots_per_rank = 2;
    for (int place = 0; place < 2 * ranks; ++place) {
      const bool first = place < problem.experts;
      problem.expert_map.push_back(first              ? place
                                   : random.one_in(3) ? -1
                                                      : static_cast<int32_t>(random.below(problem.experts)));
    }
    random.shuffle(problem.expert_map);
  }
  if (random.one_in(6)) {
    problem.drop = true;
    problem.rows = problem.experts_per_rank() * random.between(problem.alignment, 8);
  }
  return problem;
}

// The sends of these parts in an order that a program may have: each exchange after what it needs.
std::vector<Entry> draw_sends(Random& random, size_t first, size_t count, bool shuffled) {
  constexpr std::array kOrder = {Kind::kDispatch, Kind::kCombine, Kind::kCombineTranspose,
                                 Kind::kDispatchTranspose};
  std::vector<Entry> sends;
  std::vector<size_t> turn(count, 0);
  std::vector<size_t> open;
  for (size_t i = 0; i < count; ++i) open.push_back(i);
  while (!open.empty()) {
    const size_t at = shuffled ? random.below(open.size()) : 0;
    const size_t part = open[at];
    sends.push_back({first + part, kOrder[turn[part]]});
    // Some stop half way: a route may be used any number of times, or never.
    if (++turn[part] == kOrder.size() || (shuffled && random.one_in(12))) {
      open.erase(open.begin() + static_cast<ptrdiff_t>(at));
    }
  }
  return sends;
}

Program draw_program(Random& random, const Problem& problem, uint64_t exchanges) {
  Program program;
  program.problem = problem;
  const moe::MoeShape shape = problem.shape(0);
  const bool one_round = shape.rounds(problem.max_tokens) == 1;
  int64_t run = 1;
  while (program.exchanges < exchanges) {
    Segment segment;
    segment.run = run++;
    const size_t first = program.parts.size();
    const size_t count = random.below(5) < 3 ? 1 : static_cast<size_t>(random.between(2, 4));
    for (size_t part = 0; part < count; ++part) {
      program.parts.push_back(moe::testing::random_step(problem, random() >> 1));
    }
    segment.sends = draw_sends(random, first, count, random.one_in(2));
    segment.halves = one_round && random.one_in(2);
    segment.abandons = segment.halves && random.one_in(6);
    for (const Entry& entry : segment.sends) {
      program.exchanges += shape.rounds(program.parts[entry.part][0].tokens);
    }
    program.calls += segment.sends.size() * (segment.halves ? 2 : 1);
    program.segments.push_back(std::move(segment));
  }
  program.segments.back().abandons = false;  // what nobody receives any more is not closed after
  return program;
}

SimConfig draw_network(Random& random, uint64_t seed) {
  SimConfig sim;
  sim.seed = seed;
  sim.reorder = !random.one_in(8);
  sim.max_delay = static_cast<uint32_t>(random.one_in(4) ? 0 : random.any_magnitude(12));
  sim.max_pieces = static_cast<uint32_t>(random.one_in(3) ? 1 : random.between(2, 6));
  if (random.one_in(3)) {
    sim.stall_every = static_cast<uint32_t>(random.between(20, 200));
    sim.stall_polls = static_cast<uint32_t>(random.between(4, 40));
  }
  if (random.one_in(4)) sim.queue_depth = static_cast<uint32_t>(random.between(1, 8));
  if (random.one_in(4)) sim.max_write = static_cast<uint64_t>(random.any_magnitude(1024)) + 63;
  sim.mutual = random.one_in(6);
  sim.fences = random.one_in(2);
  return sim;
}

Fault draw_fault(Random& random, const Wishes& wishes, const Scenario& scenario) {
  const Program& program = scenario.programs[0];
  const auto timeout = Nanoseconds{scenario.timeout.count()};
  Fault fault;
  if (wishes.faults.empty()) {
    // A third of all seeds are without.
    fault.kind =
        random.one_in(3) ? FaultKind::kNone : static_cast<FaultKind>(random.between(1, kFaultKinds - 1));
  } else {
    fault.kind = random.pick(wishes.faults);
  }
  fault.rank = static_cast<uint32_t>(random.below(program.problem.ranks));
  // What a rank does itself it does at a call, of which it makes at least one a send.
  size_t sends = 0;
  for (const Segment& segment : program.segments) sends += segment.sends.size();
  const bool own = fault.kind >= FaultKind::kLeave || fault.kind == FaultKind::kStraggle;
  fault.call = 1 + random.below(own ? sends : program.calls + 1);
  // While nobody closes: a close waits two seconds by the clock, and what leaves later is lost.
  if (fault.kind == FaultKind::kSuspend) fault.call = 1 + fault.call % (sends / 2 + 1);
  fault.step = random.below(4 * static_cast<uint64_t>(program.problem.ranks) + 8);
  fault.nic = static_cast<uint32_t>(random.below(8));
  fault.tells = random.one_in(2);
  switch (fault.kind) {
    case FaultKind::kPause:
      fault.duration = random.between(timeout / 100, timeout * 6 / 10);
      break;
    case FaultKind::kStop:
      fault.duration = random.between(timeout * 3 / 2, timeout * 4);
      break;
    case FaultKind::kSuspend:
      fault.duration = random.between(timeout * 3 / 2, timeout * 3);
      break;
    case FaultKind::kStraggle:
      fault.duration = random.between(timeout * 3 / 2, timeout * 4);
      break;
    default:
      break;
  }
  if (wishes.fault_rank) fault.rank = *wishes.fault_rank % program.problem.ranks;
  if (wishes.fault_call) fault.call = *wishes.fault_call;
  if (wishes.fault_step) fault.step = *wishes.fault_step;
  return fault;
}

// An expert that there is not, or a number of tokens that cannot be.
void damage(Random& random, Inputs& in) {
  if (in.tokens > 0 && !random.one_in(3)) {
    in.num_tokens = in.tokens;
    in.indices[random.below(in.indices.size())] = 1'000'000;
  } else {
    in.num_tokens = random.one_in(2) ? in.tokens + 1 : -1;
  }
}

}  // namespace

const char* fault_name(FaultKind kind) { return kNames[static_cast<size_t>(kind)]; }

std::optional<FaultKind> fault_named(const std::string& name) {
  const auto found = std::find(kNames.begin(), kNames.end(), name);
  if (found == kNames.end()) return std::nullopt;
  return static_cast<FaultKind>(found - kNames.begin());
}

Scenario draw(const Wishes& wishes) {
  Random random(wishes.seed);
  // Each from a generator of its own, so that a wish for one leaves the others alone.
  Random for_ranks = random.fork(), for_problem = random.fork(), for_program = random.fork(),
         for_network = random.fork(), for_fault = random.fork(), for_next = random.fork();
  Scenario scenario;
  scenario.seed = wishes.seed;
  scenario.timeout = std::chrono::seconds(2);
  scenario.stall_timeout = std::chrono::seconds(30);
  const int ranks = wishes.ranks.value_or(draw_ranks(for_ranks));
  const uint64_t exchanges = wishes.exchanges.value_or(ranks <= 16 ? 200 : 40);
  const Problem problem = draw_problem(for_problem, ranks);
  scenario.programs.push_back(draw_program(for_program, problem, exchanges));

  scenario.engine.fabric = "sim";
  scenario.engine.cpu = EngineConfig::kAnyCore;
  scenario.engine.timeout = scenario.timeout;
  scenario.engine.sim = draw_network(for_network, wishes.seed);
  if (for_network.one_in(4)) scenario.engine.endpoints = 4;
  const bool many = for_network.one_in(3);
  for (int rank = 0; rank < ranks; ++rank) {
    scenario.nics.push_back(many ? static_cast<size_t>(for_network.between(1, 3)) : 1);
  }

  scenario.fault = draw_fault(for_fault, wishes, scenario);
  const Fault& fault = scenario.fault;
  // Who takes nothing keeps what was posted to it in the queues of its peers' NICs; full queues would silence
  // those, too. Real queues are longer than that.
  if (fault.kind == FaultKind::kFreeze || fault.kind == FaultKind::kStop) {
    scenario.engine.sim.queue_depth = SimConfig().queue_depth;
  }
  if (fault.kind == FaultKind::kData) {
    Program& program = scenario.programs[0];
    Segment& segment = program.segments[for_fault.below(program.segments.size())];
    segment.bad = true;
    segment.halves = segment.abandons = false;
    segment.sends = draw_sends(for_fault, segment.sends.front().part, 1, false);
    damage(for_fault, program.parts[segment.sends.front().part][fault.rank]);
  }
  // A new group of whoever is left.
  const bool dies = fault.kind == FaultKind::kKill || fault.kind == FaultKind::kFreeze;
  if (fault.kind != FaultKind::kNone) {
    scenario.programs.push_back(
        draw_program(for_next, draw_problem(for_next, dies ? ranks - 1 : ranks), ranks <= 16 ? 24 : 8));
  }
  return scenario;
}

std::string Scenario::text() const {
  std::ostringstream out;
  const Problem& p = programs[0].problem;
  out << p.ranks << " ranks, " << p.experts << " experts, K=" << p.top_k << ", H=" << p.hidden
      << ", T<=" << p.max_tokens << ", chunk " << p.chunk << ", depth " << p.depth << ", "
      << programs[0].exchanges << " exchanges";
  const SimConfig& sim = engine.sim;
  out << "; delay " << sim.max_delay << ", pieces " << sim.max_pieces << ", stalls " << sim.stall_every
      << ", queue " << sim.queue_depth << ", longest write " << sim.max_write;
  if (sim.mutual) out << ", mutual";
  if (sim.fences) out << ", fences";
  out << ", endpoints " << engine.endpoints << ", NICs";
  for (const size_t n : nics) out << ' ' << n;
  out << "; fault " << fault_name(fault.kind);
  if (fault.kind != FaultKind::kNone) {
    out << " of rank " << fault.rank << " in call " << fault.call << " step " << fault.step;
    if (fault.duration != 0) out << " for " << fault.duration / kMillisecond << " ms";
    if (fault.kind == FaultKind::kNic) out << ", NIC " << fault.nic << (fault.tells ? " (told)" : "");
  }
  return out.str();
}

}  // namespace pplx::sim
