#include "tests/sim/trial.h"

#include <algorithm>
#include <map>
#include <memory>
#include <optional>
#include <utility>

#include "proxy/fabric/sim.h"
#include "tests/sim/fabric.h"
#include "tests/sim/rank.h"
#include "xla_ffi/tests/rogue.h"
#include "xla_ffi/tests/support.h"

namespace pplx::sim {
namespace {

using moe::GroupConfig;
using moe::Kind;
using moe::Member;
using moe::testing::Endpoint;
using moe::testing::Problem;

constexpr Nanoseconds kLimit = 3600 * kSecond;

// How a rank has been through a generation.
struct Outcome {
  bool began = false, closed = false, left = false, finished = false;
  std::string failure;
  std::optional<Nanoseconds> failed_at;
  Nanoseconds close_began = 0, close_took = 0;
  uint64_t exchanges = 0, messages = 0;
  std::vector<PartResults> parts;
  std::vector<std::string> complaints;
};

struct Generation {
  std::vector<uint32_t> processes;  // by rank
  std::vector<Bytes> endpoints;
  std::vector<Outcome> outcomes;
  // Whoever arrives last lets all go; the dead are not waited for.
  size_t published = 0, connected = 0;
};

class Trial final : public Border {
 public:
  explicit Trial(const Scenario& scenario)
      : scenario_(scenario), scheduler_(scenario.seed), random_(scheduler_.random().fork()) {}

  Report run();

 private:
  class Role;
  struct Process {
    size_t call = 0, step = 0;
    Member* member = nullptr;  // of the group that it is in
    Bytes endpoint;
  };

  void step(uint32_t process) override;
  void note_steps(uint32_t process) {
    if (process == scenario_.fault.rank && processes_[process].call > 0 && generation_of_fault_) {
      report_.steps.push_back(processes_[process].step);
    }
  }
  bool due(size_t call, size_t step) const;
  void strike();
  void live(uint32_t process);
  void take_part(size_t generation, uint32_t rank);
  GroupConfig config(size_t generation, uint32_t rank) const;
  void gather(size_t& arrived, size_t wanted);
  void judge();
  void judge(size_t generation, uint32_t rank, const Outcome& outcome,
             const std::vector<std::vector<moe::testing::Outputs>>& wanted);
  bool names_the_culprit(uint32_t rank, const std::string& failure) const;
  void complain(const std::string& what) { report_.complaints.push_back(what); }

  const Scenario& scenario_;
  Scheduler scheduler_;
  Random random_;
  std::vector<Process> processes_;
  std::vector<Generation> generations_;
  bool armed_ = false;               // all are connected
  bool generation_of_fault_ = true;  // the rank of the fault has not left it
  std::optional<Nanoseconds> struck_at_, resumed_at_;
  Report report_;
};

// --- faults ----------------------------------------------------------------------------------------------

bool Trial::due(size_t call, size_t step) const {
  const Fault& fault = scenario_.fault;
  return armed_ && !struck_at_ && (call > fault.call || (call == fault.call && step >= fault.step));
}

void Trial::step(uint32_t process) {
  Process& at = processes_[process];
  ++at.step;
  if (process == scenario_.fault.rank && due(at.call, at.step)) strike();
  // Now and then somebody else gets the core.
  if (random_.one_in(8)) {
    scheduler_.sleep(random_.any_magnitude(random_.one_in(128) ? kMillisecond : 2 * kMicrosecond));
  }
}

// Of what happens to a rank, rather than by it.
void Trial::strike() {
  const Fault& fault = scenario_.fault;
  const uint32_t victim = fault.rank;
  const Process& process = processes_[victim];
  const std::string network = "generation 0";
  const auto address = [&] { return Endpoint::parse(process.endpoint).address(); };
  const Nanoseconds now = scheduler_.now();
  switch (fault.kind) {
    case FaultKind::kKill:
      struck_at_ = now;
      try {
        sim_drop_peer(network, address());
      } catch (const Error&) {
        // Its engine was closed already.
      }
      scheduler_.freeze(victim, kForever);
      break;
    case FaultKind::kFreeze:
      struck_at_ = now;
      scheduler_.freeze(victim, kForever);
      break;
    case FaultKind::kPause:
    case FaultKind::kStop:
      struck_at_ = now;
      resumed_at_ = now + fault.duration;
      scheduler_.freeze(victim, now + fault.duration);
      break;
    case FaultKind::kSuspend:
      struck_at_ = now;
      resumed_at_ = now + fault.duration;
      for (uint32_t one = 0; one < processes_.size(); ++one) {
        if (one != victim)
          scheduler_.freeze(one, now + fault.duration + random_.between(0, 5 * kMillisecond));
      }
      scheduler_.freeze(victim, now + fault.duration);
      break;
    case FaultKind::kNic:
      struck_at_ = now;
      try {
        sim_break_nic(network, address(), fault.nic % scenario_.nics[victim], fault.tells);
      } catch (const Error&) {
      }
      break;
    default:  // its own doing
      break;
  }
}

// --- ranks -----------------------------------------------------------------------------------------------

class Trial::Role final : public Conductor {
 public:
  Role(Trial& trial, uint32_t process, bool faulty) : trial_(trial), process_(process), faulty_(faulty) {}
  void call_begins(size_t call) override {
    trial_.note_steps(process_);
    trial_.processes_[process_].call = call;
    trial_.processes_[process_].step = 0;
  }
  bool my_turn(FaultKind, size_t call) override {
    return faulty_ && process_ == trial_.scenario_.fault.rank && trial_.due(call, SIZE_MAX);
  }
  void struck() override { trial_.struck_at_ = trial_.scheduler_.now(); }

 private:
  Trial& trial_;
  uint32_t process_;
  bool faulty_;
};

void Trial::live(uint32_t process) {
  for (size_t generation = 0; generation < generations_.size(); ++generation) {
    const auto& processes = generations_[generation].processes;
    const auto found = std::find(processes.begin(), processes.end(), process);
    if (found == processes.end()) return;
    take_part(generation, static_cast<uint32_t>(found - processes.begin()));
  }
}

GroupConfig Trial::config(size_t generation, uint32_t rank) const {
  const Problem& problem = scenario_.programs[generation].problem;
  EngineConfig engine = scenario_.engine;
  engine.sim.network = "generation " + std::to_string(generation);
  engine.nics.resize(scenario_.nics[generations_[generation].processes[rank]]);
  GroupConfig config = moe::testing::group_config(problem, static_cast<int>(rank), engine);
  config.name = "sim";
  config.timeout = scenario_.timeout;
  config.stall_timeout = config.first_stall_timeout = scenario_.stall_timeout;
  return config;
}

void Trial::gather(size_t& arrived, size_t wanted) {
  if (++arrived == wanted) {
    scheduler_.wake_all(&arrived);
  } else {
    while (arrived < wanted) scheduler_.wait(&arrived);
  }
}

void Trial::take_part(size_t generation, uint32_t rank) {
  Generation& group = generations_[generation];
  const Program& program = scenario_.programs[generation];
  Outcome& outcome = group.outcomes[rank];
  Process& process = processes_[group.processes[rank]];
  outcome.began = true;
  auto member =
      std::make_unique<Member>(program.problem.shape(static_cast<int>(rank)), config(generation, rank));
  group.endpoints[rank] = process.endpoint = member->group.endpoint();
  gather(group.published, group.processes.size());
  member->group.connect(group.endpoints);
  gather(group.connected, group.processes.size());
  process.member = member.get();
  const bool faulty = generation == 0 && scenario_.fault.kind != FaultKind::kNone;
  if (faulty) armed_ = true;

  Role role(*this, group.processes[rank], faulty);
  RankProgram mine(program, *member, role, scenario_.fault, random_());
  mine.run();
  const auto keep = [&] {
    outcome.parts = mine.parts();
    outcome.complaints = mine.complaints();
    outcome.left = mine.left();
    outcome.finished = mine.finished();
    outcome.failed_at = mine.failed_at();
    if (const auto failure = member->group.failure()) outcome.failure = failure->what();
    const moe::GroupStats stats = member->group.stats();
    outcome.exchanges = stats.exchanges;
    outcome.messages = stats.engine.writes;
  };
  keep();
  role.call_begins(mine.calls() + 1);
  outcome.close_began = scheduler_.now();
  member->group.close();
  outcome.close_took = scheduler_.now() - outcome.close_began;
  if (group.processes[rank] == scenario_.fault.rank && generation == 0) {
    note_steps(group.processes[rank]);
    generation_of_fault_ = false;
    if (faulty && !struck_at_) strike();  // at its end at the latest
  }
  process.member = nullptr;
  member.reset();
  outcome.closed = true;
}

// --- what must hold --------------------------------------------------------------------------------------

bool Trial::names_the_culprit(uint32_t rank, const std::string& failure) const {
  const Fault& fault = scenario_.fault;
  switch (fault.kind) {
    case FaultKind::kStop:
      if (rank == fault.rank) return true;  // it is told who gave it up, or that they have gone
      break;
    case FaultKind::kNic:
      // Cut off, it hears of nobody; the others may find either side of a path at fault.
      return rank == fault.rank || failure.find("no message to rank ") != std::string::npos ||
             failure.find("rank " + std::to_string(fault.rank)) != std::string::npos;
    case FaultKind::kMismatch:
      return failure.find("all ranks must run the same exchanges") != std::string::npos ||
             failure.find("another call") != std::string::npos;
    default:
      break;
  }
  const std::string name = "rank " + std::to_string(fault.rank);
  for (size_t at = failure.find(name); at != std::string::npos; at = failure.find(name, at + 1)) {
    const char next = failure.c_str()[at + name.size()];
    if (next < '0' || next > '9') return true;
  }
  return false;
}

void Trial::judge(size_t generation, uint32_t rank, const Outcome& outcome,
                  const std::vector<std::vector<moe::testing::Outputs>>& wanted) {
  const Program& program = scenario_.programs[generation];
  const Fault& fault = scenario_.fault;
  const bool victim = generation == 0 && rank == fault.rank;
  const bool dead = victim && (fault.kind == FaultKind::kKill || fault.kind == FaultKind::kFreeze);
  const std::string who = "generation " + std::to_string(generation) + " rank " + std::to_string(rank) + ": ";
  for (const std::string& what : outcome.complaints) complain(who + what);
  for (size_t part = 0; part < outcome.parts.size(); ++part) {
    for (size_t kind = 0; kind < moe::kKinds; ++kind) {
      const Result result = outcome.parts[part].of[kind];
      if (result == Result::kNone) continue;
      const auto& got = outcome.parts[part].outputs;
      const std::string wrong = difference(static_cast<Kind>(kind), got, wanted[part][rank]);
      ++report_.compared;
      if (wrong.empty()) continue;
      if (result == Result::kEither && poisoned(static_cast<Kind>(kind), got)) continue;
      complain(who + "part " + std::to_string(part) + ", " + moe::kind_name(static_cast<Kind>(kind)) +
               " differs from the oracle in " + wrong);
    }
  }
  if (dead) return;
  if (!outcome.began || !outcome.closed) {
    complain(who + "never came to an end");
    return;
  }

  const Nanoseconds timeout{scenario_.timeout.count()};
  // A heartbeat may be under way when its sender dies, and the monitor looks once an interval (timeout / 8).
  const Nanoseconds patience = timeout + timeout / 2;
  const Nanoseconds asleep =
      fault.kind == FaultKind::kSuspend || fault.kind == FaultKind::kPause || fault.kind == FaultKind::kStop
          ? fault.duration
          : 0;
  if (outcome.close_took > 2 * kSecond + timeout / 4 + asleep) {
    complain(who + "close() took " + std::to_string(outcome.close_took / kMillisecond) + " ms");
  }
  const bool must_hold = generation > 0 || fault.kind == FaultKind::kNone ||
                         fault.kind == FaultKind::kPause || fault.kind == FaultKind::kSuspend ||
                         fault.kind == FaultKind::kStraggle || fault.kind == FaultKind::kData;
  if (must_hold) {
    if (!outcome.failure.empty()) complain(who + "failed: " + outcome.failure);
    if (!outcome.finished) complain(who + "did not come to the end of its program");
    if (outcome.exchanges < program.exchanges && fault.kind != FaultKind::kData) {
      complain(who + std::to_string(outcome.exchanges) + " exchanges instead of " +
               std::to_string(program.exchanges));
    }
    return;
  }
  if (outcome.finished || outcome.left) return;
  report_.failed = true;
  if (outcome.failure.empty()) {
    complain(who + "stopped without a failure");
    return;
  }
  if (!struck_at_) {
    complain(who + "failed before the fault: " + outcome.failure);
    return;
  }
  const bool of_mismatch = outcome.failure.find("all ranks must run") != std::string::npos ||
                           outcome.failure.find("broke the protocol") != std::string::npos;
  if (!names_the_culprit(rank, outcome.failure) || (of_mismatch && fault.kind != FaultKind::kMismatch)) {
    complain(who + "names another culprit: " + outcome.failure);
  }
  const Nanoseconds since = victim && resumed_at_ ? *resumed_at_ : *struck_at_;
  if (outcome.failed_at && *outcome.failed_at - since > patience) {
    complain(who + "failed " + std::to_string((*outcome.failed_at - since) / kMillisecond) +
             " ms after the fault: " + outcome.failure);
  }
}

void Trial::judge() {
  for (size_t generation = 0; generation < generations_.size(); ++generation) {
    const Program& program = scenario_.programs[generation];
    std::vector<std::vector<moe::testing::Outputs>> wanted(program.parts.size());
    std::vector<bool> used(program.parts.size(), false);
    uint64_t fewest = UINT64_MAX;
    for (const Outcome& outcome : generations_[generation].outcomes) {
      report_.messages += outcome.messages;
      if (!outcome.closed) continue;
      fewest = std::min(fewest, outcome.exchanges);
      for (size_t part = 0; part < outcome.parts.size(); ++part) {
        for (const Result result : outcome.parts[part].of) used[part] = used[part] || result != Result::kNone;
      }
    }
    if (fewest != UINT64_MAX) report_.exchanges += fewest;
    for (size_t part = 0; part < wanted.size(); ++part) {
      if (used[part]) wanted[part] = moe::testing::oracle(program.problem, program.parts[part]);
    }
    for (uint32_t rank = 0; rank < generations_[generation].processes.size(); ++rank) {
      judge(generation, rank, generations_[generation].outcomes[rank], wanted);
    }
  }
}

Report Trial::run() {
  const Fault& fault = scenario_.fault;
  const bool dies = fault.kind == FaultKind::kKill || fault.kind == FaultKind::kFreeze;
  const auto ranks = static_cast<uint32_t>(scenario_.programs[0].problem.ranks);
  processes_.resize(ranks);
  for (size_t generation = 0; generation < scenario_.programs.size(); ++generation) {
    Generation group;
    for (uint32_t process = 0; process < ranks; ++process) {
      if (generation == 0 || !dies || process != fault.rank) group.processes.push_back(process);
    }
    group.endpoints.resize(group.processes.size());
    group.outcomes.resize(group.processes.size());
    generations_.push_back(std::move(group));
  }
  set_border(this);
  for (uint32_t process = 0; process < ranks; ++process) {
    scheduler_.spawn(process, [this, process] { live(process); });
  }
  try {
    scheduler_.run(kLimit);
  } catch (const std::exception& error) {
    complain(error.what());
  }
  set_border(nullptr);
  judge();
  if (fault.kind == FaultKind::kMismatch && struck_at_ && !report_.failed)
    complain("nobody saw the mismatch");
  report_.struck = struck_at_.has_value();
  report_.switches = scheduler_.switches();
  report_.virtual_time = scheduler_.now();
  for (const std::string& what : report_.complaints) {
    for (const char c : what) scheduler_.add_to_digest(static_cast<uint64_t>(c));
  }
  report_.digest = scheduler_.digest();
  return report_;
}

}  // namespace

// The trial is leaked: the fibers of dead ranks still point into it.
Report run_trial(const Scenario& scenario) { return (new Trial(scenario))->run(); }

}  // namespace pplx::sim
