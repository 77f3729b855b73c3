// One rank's way through a program, with the outcome of every call.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "tests/sim/scenario.h"
#include "xla_ffi/registry.h"
#include "xla_ffi/tests/oracle.h"

namespace pplx::sim {

// What is known of the outputs of a call.
enum class Result : uint8_t {
  kNone,    // not made, or not received
  kGood,    // must be the oracle's
  kEither,  // the group failed meanwhile: the oracle's, or poisoned as a whole
};

struct PartResults {
  moe::testing::Outputs outputs;
  Result of[moe::kKinds] = {};
};

// What a rank does at its calls, besides the program.
class Conductor {
 public:
  virtual ~Conductor() = default;
  virtual void call_begins(size_t call) = 0;
  // True: the rank has to do something about the fault itself.
  virtual bool my_turn(FaultKind kind, size_t call) = 0;
  virtual void struck() = 0;
};

class RankProgram {
 public:
  RankProgram(const Program& program, moe::Member& member, Conductor& conductor, const Fault& fault,
              uint64_t seed);

  // To the program's end, or the group's.
  void run();
  const std::vector<PartResults>& parts() const { return parts_; }
  const std::vector<std::string>& complaints() const { return complaints_; }
  size_t calls() const { return call_; }
  bool left() const { return left_; }
  bool finished() const { return finished_; }
  std::optional<Nanoseconds> failed_at() const { return failed_at_; }

 private:
  struct UnderWay {
    Entry entry;
    uint64_t ticket;
  };

  bool go_on(const Segment& segment);
  bool bad_segment(const Segment& segment);
  bool make(const Segment& segment, const Entry& entry);
  bool receive(const Segment& segment, size_t which);
  bool receive_for(const Segment& segment, const Entry& next);
  bool before_call();
  bool after_call(const std::optional<Error>& error, const Entry& entry, bool received);
  void check_that_failure_is_final(int64_t run);
  void complain(const std::string& what);
  bool faulty(FaultKind kind);

  const Program& program_;
  moe::Member& member_;
  Conductor& conductor_;
  const Fault& fault_;
  Random random_;
  const uint32_t rank_;
  std::vector<PartResults> parts_;
  std::vector<UnderWay> under_way_;
  uint64_t next_exchange_ = 0;  // where every call is one
  size_t call_ = 0;
  bool left_ = false, finished_ = false;
  std::optional<Nanoseconds> failed_at_;
  std::vector<std::string> complaints_;
};

// What is wrong with these outputs; empty: nothing.
std::string difference(moe::Kind kind, const moe::testing::Outputs& got, const moe::testing::Outputs& want);
// Whether they are what a failed exchange leaves.
bool poisoned(moe::Kind kind, const moe::testing::Outputs& got);

}  // namespace pplx::sim
