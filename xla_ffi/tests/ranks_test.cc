// One rank of a group whose ranks are processes, maybe on several hosts: steps over one fabric give the same
// bytes as over another, and those of the oracle.
#include <cstdio>
#include <cstdlib>

#include "proxy/tests/meeting.h"
#include "xla_ffi/tests/support.h"

namespace pplx::moe {
namespace {

using namespace pplx::moe::testing;
using pplx::testing::variable;

class RanksTest : public pplx::testing::RankTest {
 protected:
  // All outputs of a few steps.
  std::vector<Outputs> outcome(const Problem& problem, const std::string& fabric, int steps, uint64_t seed) {
    GroupConfig config = group_config(problem, rank_, engine(fabric));
    config.name = fabric;
    Member member(problem.shape(rank_), config);
    member.group.connect(meeting_->gather(member.group.endpoint()));
    std::vector<Outputs> outputs(static_cast<size_t>(steps));
    for (int step = 0; step < steps; ++step) {
      const auto inputs = random_step(problem, seed + static_cast<uint64_t>(step));
      const auto error =
          run_step(problem, member, inputs[static_cast<size_t>(rank_)], outputs[static_cast<size_t>(step)]);
      if (error) throw *error;
    }
    meeting_->gather({});  // nobody closes before all are through
    return outputs;
  }
};

TEST_F(RanksTest, EveryFabricGivesTheOraclesBytes) {
  const int steps = variable("STEPS").empty() ? 4 : std::stoi(variable("STEPS"));
  for (const Problem& problem :
       {Problem{.ranks = ranks_, .experts = 7, .top_k = 3, .hidden = 64, .max_tokens = 16, .chunk = 6},
        Problem{.ranks = ranks_,
        .experts = 2 * ranks_,
        .top_k = 2,
        .hidden = 256,
        .max_tokens = 24,
        .depth = 2,
        .dtype = DType::kBFloat16}}) {
    std::vector<std::vector<Outputs>> outcomes;
    for (const std::string& fabric : fabrics_) {
      const auto started = Clock::now();
      outcomes.push_back(outcome(problem, fabric, steps, 11));
      const std::chrono::duration<double> taken = Clock::now() - started;
      std::printf("rank %d: %d steps over %s in %.1f s\n", rank_, steps, fabric.c_str(), taken.count());
      for (int step = 0; step < steps; ++step) {
        const auto at = static_cast<size_t>(step);
        ASSERT_EQ(outcomes.back()[at].bytes(), outcomes.front()[at].bytes()) << fabric << ", step " << step;
        const auto wanted = oracle(problem, random_step(problem, 11 + static_cast<uint64_t>(step)));
        expect_equal(outcomes.back()[at], wanted[static_cast<size_t>(rank_)], fabric);
      }
    }
  }
}

}  // namespace
}  // namespace pplx::moe
