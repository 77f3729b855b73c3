// Captured once, replayed with other data: numbers of exchanges live on the device, so every replay is new.
#include <gtest/gtest.h>

#include "xla_ffi/cuda/tests/proxy.h"
#include "xla_ffi/cuda/tests/step.h"

namespace pplx::moe::cuda::testing {
namespace {

// The experts' work as a node of a graph: rows to the host, through the experts, back.
struct HostNode {
  DeviceStep* step;
  Part DeviceStep::*from;
  Part DeviceStep::*to;

  void record(cudaStream_t stream) {
    step->memory.download(step->*from, stream);
    step->memory.download(step->token_scales, stream);
    step->memory.download(step->group_sizes, stream);
    PPLX_MUST(cudaLaunchHostFunc(
        stream,
        [](void* self) {
          const auto* node = static_cast<HostNode*>(self);
          node->step->apply(node->step->*node->from, node->step->*node->to);
        },
        this));
    step->memory.upload(step->*to, stream);
  }
};

void record_step(Cluster& cluster, Steps& steps, int rank, std::array<HostNode, 2>& experts) {
  const cudaStream_t stream = cluster[rank].stream();
  experts = {HostNode{&steps[rank], &DeviceStep::tokens, &DeviceStep::y},
             HostNode{&steps[rank], &DeviceStep::d_y, &DeviceStep::d_tokens}};
  steps.launch(rank, Kind::kDispatch);
  experts[0].record(stream);
  steps.launch(rank, Kind::kCombine);
  steps.launch(rank, Kind::kCombineTranspose);
  experts[1].record(stream);
  steps.launch(rank, Kind::kDispatchTranspose);
}

struct Replayed {
  std::string name;
  Problem problem;
  bool proxied = false;
};
void PrintTo(const Replayed& c, std::ostream* out) { *out << c.name; }

class GpuGraphTest : public ::testing::TestWithParam<Replayed> {};

TEST_P(GpuGraphTest, ReplaysWithNewDataEqualTheOracle) {
  const Problem& problem = GetParam().problem;
  ClusterOptions options;
  if (GetParam().proxied) options.direct = [](int, int) { return false; };
  Cluster cluster(problem, options);
  const auto proxy = GetParam().proxied ? std::make_unique<Proxy>(cluster) : nullptr;

  // What a capture fixes: sizes, and which operands there are.
  const auto draw = [&](uint64_t seed) {
    std::vector<Inputs> inputs = random_step(problem, seed, problem.max_tokens);
    for (Inputs& in : inputs) {
      in.weighted = in.accumulates = true;
      in.given = false;
    }
    return inputs;
  };
  Steps steps(cluster, draw(0));
  std::vector<std::array<HostNode, 2>> experts(problem.ranks);
  std::vector<Graph> graphs;
  cluster.each([&](int rank) {
    graphs.emplace_back(cluster[rank].stream(), [&] { record_step(cluster, steps, rank, experts[rank]); });
  });
  for (int replay = 0; replay < 200 && !HasFailure(); ++replay) {
    steps.renew(draw(replay));
    for (int i = 0; i <= replay % 3; ++i) {
      cluster.each([&](int rank) { graphs[rank].launch(cluster[rank].stream()); });
    }
    steps.finish();
    steps.expect_oracle("replay " + std::to_string(replay));
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, GpuGraphTest,
    ::testing::Values(
        Replayed{"one_rank", {.ranks = 1, .hidden = 64, .max_tokens = 7, .dtype = DType::kBFloat16}},
        Replayed{"two_ranks", {.ranks = 2, .hidden = 64, .max_tokens = 7, .dtype = DType::kBFloat16}},
        Replayed{"rounds", {.ranks = 3, .hidden = 32, .max_tokens = 12, .chunk = 5, .depth = 2}},
        Replayed{"quantised", {.ranks = 2, .hidden = 144, .max_tokens = 6, .quant = Quant::kFp8}},
        Replayed{"by_proxy", {.ranks = 3, .hidden = 32, .max_tokens = 8, .depth = 2}, true}),
    [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace pplx::moe::cuda::testing
