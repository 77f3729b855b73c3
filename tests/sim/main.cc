// pplx_sim: the exchange protocol's real code under simulated time, network and faults. Usage: see kUsage.
#include <getopt.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <charconv>
#include <chrono>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <sstream>
#include <utility>

#include "tests/sim/mutants.h"
#include "tests/sim/system.h"
#include "tests/sim/trial.h"

namespace pplx::sim {
namespace {

using RealClock = std::chrono::steady_clock;  // the parent never simulates

constexpr const char* kUsage = R"(usage: pplx_sim [options]

  --seed N          the first seed (default 1); a seed decides everything that is not wished for below
  --seeds N         how many seeds, one after the other (default 1)
  --total N         as many seeds as make N exchanges together
  --seconds S       stop beginning new seeds after S seconds
  --jobs N          seeds at a time, each in a process of its own (default 1)
  --ranks R         of 1..64
  --exchanges N     at least, of a seed's first group
  --faults A,B      one of these: none kill freeze pause stop suspend straggle nic leave give-up mismatch data
  --fault-rank R, --fault-call N, --fault-step N
                    where it strikes
  --every-step      one seed's program with each of --faults in every call of --fault-rank (0), at every post
                    and poll of it
  --stop-at N       begin no new seed after N have failed (default 5)
  --mutant NAME     switch on a bug of mutants.py (pplx_sim_mutants only)
  --twice           runs every seed twice and compares the histories
  --here            in this process, for debuggers; one seed
  --verbose         a line for every seed
)";

struct Options {
  Wishes wishes;
  uint64_t seeds = 1, total = 0, jobs = 1, stop_at = 5;
  double seconds = 0;
  bool every_step = false, twice = false, here = false, verbose = false;
};

// What a child tells its parent, followed by the complaints' text.
struct Result {
  uint64_t exchanges = 0, messages = 0, compared = 0, switches = 0, digest = 0;
  int64_t virtual_time = 0;
  uint32_t complaints = 0;
  bool struck = false, failed = false;
};

struct Task {
  Wishes wishes;
  bool again = false;  // for --twice
};

std::string command(const Wishes& wishes) {
  std::ostringstream out;
  out << "pplx_sim --seed " << wishes.seed;
  if (wishes.ranks) out << " --ranks " << *wishes.ranks;
  if (wishes.exchanges) out << " --exchanges " << *wishes.exchanges;
  for (size_t i = 0; i < wishes.faults.size(); ++i) {
    out << (i == 0 ? " --faults " : ",") << fault_name(wishes.faults[i]);
  }
  if (wishes.fault_rank) out << " --fault-rank " << *wishes.fault_rank;
  if (wishes.fault_call) out << " --fault-call " << *wishes.fault_call;
  if (wishes.fault_step) out << " --fault-step " << *wishes.fault_step;
  return out.str();
}

Result result_of(const Report& report) {
  return {.exchanges = report.exchanges,
          .messages = report.messages,
          .compared = report.compared,
          .switches = report.switches,
          .digest = report.digest,
          .virtual_time = report.virtual_time,
          .complaints = static_cast<uint32_t>(report.complaints.size()),
          .struck = report.struck,
          .failed = report.failed};
}

void write_all(int to, const void* data, size_t size) {
  for (const char* at = static_cast<const char*>(data); size > 0;) {
    const ssize_t written = write(to, at, size);
    if (written <= 0) _exit(3);
    at += written;
    size -= static_cast<size_t>(written);
  }
}

class Sweep {
 public:
  explicit Sweep(const Options& options) : options_(options) {}
  int run();

 private:
  struct Child {
    pid_t pid;
    Task task;
    std::string said;
    RealClock::time_point began;
  };

  void list_steps();
  std::optional<Task> next();
  void start(const Task& task);
  void collect();
  void ended(Child& child, int status);
  double elapsed() const { return std::chrono::duration<double>(RealClock::now() - began_).count(); }

  const Options& options_;
  const RealClock::time_point began_ = RealClock::now();
  std::map<int, Child> children_;  // by the pipe's end
  std::map<std::string, uint64_t> digests_;
  std::map<std::string, uint64_t> faults_;
  uint64_t started_ = 0, done_ = 0, wrong_ = 0, repeated_ = 0;
  Result sum_;
  std::deque<Wishes> listed_;  // --every-step
  std::optional<Task> again_;
};

std::optional<Task> Sweep::next() {
  if (again_) return std::exchange(again_, std::nullopt);
  if (options_.seconds > 0 && elapsed() >= options_.seconds) return std::nullopt;
  if (wrong_ >= options_.stop_at) return std::nullopt;
  if (options_.every_step) {
    if (listed_.empty()) return std::nullopt;
    ++started_;
    Task task{.wishes = std::move(listed_.front())};
    listed_.pop_front();
    return task;
  }
  if (options_.total > 0 ? sum_.exchanges >= options_.total : started_ >= options_.seeds) return std::nullopt;
  Task task{.wishes = options_.wishes};
  task.wishes.seed += started_++;
  if (options_.twice) {
    again_ = task;
    again_->again = true;
  }
  return task;
}

void Sweep::start(const Task& task) {
  std::array<int, 2> ends{};
  if (pipe(ends.data()) != 0) throw std::runtime_error("no pipe");
  std::fflush(nullptr);
  const pid_t pid = fork();
  if (pid < 0) throw std::runtime_error("no process");
  if (pid == 0) {
    close(ends[0]);
    prctl(PR_SET_PDEATHSIG, SIGKILL, 0UL, 0UL, 0UL);
    alarm(600);  // real seconds: whatever hangs without the simulation noticing
    const Report report = run_trial(draw(task.wishes));
    const Result result = result_of(report);
    write_all(ends[1], &result, sizeof result);
    for (size_t i = 0; i < report.complaints.size() && i < 20; ++i) {
      const std::string line = "  " + report.complaints[i] + "\n";
      write_all(ends[1], line.data(), line.size());
    }
    _exit(0);
  }
  close(ends[1]);
  children_.emplace(ends[0], Child{.pid = pid, .task = task, .said = {}, .began = RealClock::now()});
}

void Sweep::collect() {
  std::vector<pollfd> polled;
  for (const auto& [end, child] : children_) polled.push_back({.fd = end, .events = POLLIN, .revents = 0});
  poll(polled.data(), polled.size(), 1000);
  for (const pollfd& one : polled) {
    if (one.revents == 0) continue;
    std::array<char, 65536> buffer{};
    const ssize_t got = read(one.fd, buffer.data(), buffer.size());
    Child& child = children_.at(one.fd);
    if (got > 0) {
      child.said.append(buffer.data(), static_cast<size_t>(got));
      continue;
    }
    int status = 0;
    waitpid(child.pid, &status, 0);
    close(one.fd);
    ended(child, status);
    children_.erase(one.fd);
  }
}

void Sweep::ended(Child& child, int status) {
  ++done_;
  const std::string how = command(child.task.wishes);
  Result result;
  std::string text;
  if (child.said.size() >= sizeof result) {
    std::memcpy(&result, child.said.data(), sizeof result);
    text = child.said.substr(sizeof result);
  }
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
    text += "  the process ended with " +
            (WIFSIGNALED(status) ? std::string("signal ") + strsignal(WTERMSIG(status))
                                 : "status " + std::to_string(WEXITSTATUS(status))) +
            "\n";
  }
  if (options_.twice && text.empty()) {
    const auto [known, first] = digests_.emplace(how, result.digest);
    if (!first) {
      ++repeated_;
      if (known->second != result.digest) text += "  another history than at the first time\n";
    }
  }
  const Scenario scenario = draw(child.task.wishes);
  if (!text.empty()) {
    ++wrong_;
    std::printf("FAILED seed %" PRIu64 ": %s\n%s  again: %s\n", child.task.wishes.seed,
                scenario.text().c_str(), text.c_str(), how.c_str());
  } else if (options_.verbose) {
    std::printf("seed %" PRIu64 ": %" PRIu64 " exchanges, %" PRIu64
                " messages, %.3f virtual s, %.2f s, %016" PRIx64 "%s%s; %s\n",
                child.task.wishes.seed, result.exchanges, result.messages,
                static_cast<double>(result.virtual_time) * 1e-9,
                std::chrono::duration<double>(RealClock::now() - child.began).count(), result.digest,
                result.struck ? ", struck" : "", result.failed ? ", failed" : "", scenario.text().c_str());
  }
  std::fflush(stdout);
  if (child.task.again) return;
  const std::string fault = fault_name(scenario.fault.kind);
  ++faults_[result.struck || fault == "none" ? fault : fault + " (never struck)"];
  sum_.exchanges += result.exchanges;
  sum_.messages += result.messages;
  sum_.compared += result.compared;
  sum_.switches += result.switches;
  sum_.virtual_time += result.virtual_time;
}

// Every post and poll of the victim, counted in a run without a fault. That run has to go well: with fewer
// steps than there are, or none, the sweep would pass without having tried anything.
void Sweep::list_steps() {
  Wishes wishes = options_.wishes;
  wishes.fault_rank = wishes.fault_rank.value_or(0);
  const auto kinds = std::exchange(wishes.faults, {FaultKind::kNone});
  std::array<int, 2> ends{};
  if (pipe(ends.data()) != 0) throw std::runtime_error("no pipe");
  std::fflush(nullptr);
  const pid_t pid = fork();
  if (pid < 0) throw std::runtime_error("no process");
  if (pid == 0) {
    close(ends[0]);
    prctl(PR_SET_PDEATHSIG, SIGKILL, 0UL, 0UL, 0UL);
    alarm(600);
    const Report report = run_trial(draw(wishes));
    const uint64_t count = report.steps.size();
    write_all(ends[1], &count, sizeof count);
    write_all(ends[1], report.steps.data(), count * sizeof report.steps[0]);
    for (const std::string& what : report.complaints) write_all(ends[1], what.data(), what.size());
    _exit(report.complaints.empty() ? 0 : 1);
  }
  close(ends[1]);
  std::string said;
  std::array<char, 4096> buffer{};
  for (ssize_t got = 0; (got = read(ends[0], buffer.data(), buffer.size())) > 0;) {
    said.append(buffer.data(), static_cast<size_t>(got));
  }
  close(ends[0]);
  int status = 0;
  waitpid(pid, &status, 0);
  uint64_t count = 0;
  if (said.size() >= sizeof count) std::memcpy(&count, said.data(), sizeof count);
  const size_t told = sizeof count + count * sizeof count;
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0 || count == 0 || said.size() != told) {
    throw std::runtime_error("--every-step: the run without a fault, whose steps it takes, " +
                             (count == 0           ? std::string("has none")
                              : said.size() > told ? "went wrong: " + said.substr(told)
                              : WIFSIGNALED(status)
                                  ? std::string("ended with signal ") + strsignal(WTERMSIG(status))
                                  : "ended with status " + std::to_string(WEXITSTATUS(status))) +
                             "\n  again: " + command(wishes));
  }
  std::vector<uint64_t> steps(count);
  std::memcpy(steps.data(), said.data() + sizeof count, count * sizeof count);
  for (const FaultKind kind : kinds) {
    for (size_t call = 1; call <= steps.size(); ++call) {
      for (uint64_t step = 1; step <= steps[call - 1]; ++step) {
        Wishes one = wishes;
        one.faults = {kind};
        one.fault_call = call;
        one.fault_step = step;
        listed_.push_back(std::move(one));
      }
    }
  }
  if (listed_.empty()) throw std::runtime_error("--every-step: no steps; give --faults");
  std::printf("%zu steps of rank %u in %zu calls\n", listed_.size() / kinds.size(), *wishes.fault_rank,
              steps.size());
}

int Sweep::run() {
  if (options_.every_step) list_steps();
  for (;;) {
    while (children_.size() < options_.jobs) {
      const auto task = next();
      if (!task) break;
      start(*task);
    }
    if (children_.empty()) break;
    collect();
  }
  std::string faults;
  for (const auto& [name, count] : faults_) {
    faults += (faults.empty() ? "" : ", ") + name + " " + std::to_string(count);
  }
  const double seconds = elapsed();
  std::printf(
      "%" PRIu64 " runs from seed %" PRIu64 " (%s): %" PRIu64 " exchanges, %" PRIu64 " messages, %" PRIu64
      " calls compared with the oracle, %.0f virtual s, in %.1f s: %.0f exchanges/s\n",
      started_, options_.wishes.seed, faults.c_str(), sum_.exchanges, sum_.messages, sum_.compared,
      static_cast<double>(sum_.virtual_time) * 1e-9, seconds, static_cast<double>(sum_.exchanges) / seconds);
  for (const FaultKind kind : options_.every_step ? options_.wishes.faults : std::vector<FaultKind>{}) {
    if (kind == FaultKind::kNone || faults_.contains(fault_name(kind))) continue;
    ++wrong_;
    std::printf("FAILED --every-step: %s struck at no step\n", fault_name(kind));
  }
  if (repeated_ > 0) std::printf("%" PRIu64 " run twice, with equal histories\n", repeated_);
  if (wrong_ > 0) std::printf("%" PRIu64 " FAILED\n", wrong_);
  return wrong_ > 0 ? 1 : 0;
}

int run_here(const Options& options) {
  const Scenario scenario = draw(options.wishes);
  std::printf("%s\n", scenario.text().c_str());
  const Report report = run_trial(scenario);
  for (const std::string& what : report.complaints) std::printf("  %s\n", what.c_str());
  std::printf("%" PRIu64 " exchanges, %" PRIu64 " messages, %" PRIu64
              " switches, %.6f virtual s, digest %016" PRIx64 "%s%s\n",
              report.exchanges, report.messages, report.switches,
              static_cast<double>(report.virtual_time) * 1e-9, report.digest, report.struck ? ", struck" : "",
              report.failed ? ", failed" : "");
  std::fflush(stdout);
  _exit(report.complaints.empty() ? 0 : 1);
}

[[noreturn]] void usage(const std::string& wrong) {
  std::fprintf(stderr, "pplx_sim: %s\n%s", wrong.c_str(), kUsage);
  std::exit(2);
}

uint64_t number(const char* option, const char* text, uint64_t most = UINT64_MAX) {
  uint64_t value = 0;
  const char* end = text + std::strlen(text);
  const auto [stop, error] = std::from_chars(text, end, value);
  if (error != std::errc() || stop != end || value > most) {
    usage(std::string("--") + option + " takes a number, not '" + text + "'");
  }
  return value;
}

Options parse(int argc, char** argv) {
  Options options;
  options.wishes.seed = 1;
  enum {
    kSeed = 1,
    kSeeds,
    kTotal,
    kSeconds,
    kJobs,
    kRanks,
    kExchanges,
    kFaults,
    kRank,
    kCall,
    kStep,
    kStopAt,
    kMutant
  };
  enum { kEveryStep = 100, kTwice, kHere, kVerbose, kHelp };
  const std::array<option, 19> known = {{{"seed", required_argument, nullptr, kSeed},
                                         {"seeds", required_argument, nullptr, kSeeds},
                                         {"total", required_argument, nullptr, kTotal},
                                         {"seconds", required_argument, nullptr, kSeconds},
                                         {"jobs", required_argument, nullptr, kJobs},
                                         {"ranks", required_argument, nullptr, kRanks},
                                         {"exchanges", required_argument, nullptr, kExchanges},
                                         {"faults", required_argument, nullptr, kFaults},
                                         {"fault-rank", required_argument, nullptr, kRank},
                                         {"fault-call", required_argument, nullptr, kCall},
                                         {"fault-step", required_argument, nullptr, kStep},
                                         {"stop-at", required_argument, nullptr, kStopAt},
                                         {"mutant", required_argument, nullptr, kMutant},
                                         {"every-step", no_argument, nullptr, kEveryStep},
                                         {"twice", no_argument, nullptr, kTwice},
                                         {"here", no_argument, nullptr, kHere},
                                         {"verbose", no_argument, nullptr, kVerbose},
                                         {"help", no_argument, nullptr, kHelp},
                                         {nullptr, 0, nullptr, 0}}};
  int index = 0;
  for (int chosen; (chosen = getopt_long(argc, argv, "", known.data(), &index)) != -1;) {
    const auto value = [&](uint64_t most = UINT64_MAX) { return number(known[index].name, optarg, most); };
    switch (chosen) {
      case kSeed:
        options.wishes.seed = value();
        break;
      case kSeeds:
        options.seeds = value();
        break;
      case kTotal:
        options.total = value();
        break;
      case kSeconds:
        options.seconds = static_cast<double>(value(1'000'000));
        break;
      case kJobs:
        options.jobs = std::max<uint64_t>(1, value(64));
        break;
      case kRanks:
        options.wishes.ranks = static_cast<int>(value(64));
        break;
      case kExchanges:
        options.wishes.exchanges = value(1'000'000);
        break;
      case kRank:
        options.wishes.fault_rank = static_cast<uint32_t>(value(63));
        break;
      case kCall:
        options.wishes.fault_call = value();
        break;
      case kStep:
        options.wishes.fault_step = value();
        break;
      case kFaults: {
        std::istringstream names(optarg);
        for (std::string name; std::getline(names, name, ',');) {
          const auto kind = fault_named(name);
          if (!kind) usage("no fault '" + name + "'");
          options.wishes.faults.push_back(*kind);
        }
        break;
      }
      case kStopAt:
        options.stop_at = value();
        break;
      case kMutant:
        switch_on(optarg);
        break;
      case kEveryStep:
        options.every_step = true;
        break;
      case kTwice:
        options.twice = true;
        break;
      case kHere:
        options.here = true;
        break;
      case kVerbose:
        options.verbose = true;
        break;
      case kHelp:
        std::fputs(kUsage, stdout);
        std::exit(0);
      default:
        usage("see above");
    }
  }
  if (optind != argc) usage(std::string("what is '") + argv[optind] + "'?");
  if (options.wishes.ranks && *options.wishes.ranks < 2) usage("--ranks takes 2..64");
  return options;
}

}  // namespace
}  // namespace pplx::sim

int main(int argc, char** argv) {
  const auto options = pplx::sim::parse(argc, argv);
  // What the code under test says about faults is expected here.
  setenv("PPLX_LOG_LEVEL", "off", 0);
  try {
    pplx::sim::check_system();
    return options.here ? pplx::sim::run_here(options) : pplx::sim::Sweep(options).run();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "pplx_sim: %s\n", error.what());
    return 2;
  }
}
