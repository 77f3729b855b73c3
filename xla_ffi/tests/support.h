// Ranks as threads of one process: their groups, their inputs, a step of all four exchanges.
#pragma once

#include <gtest/gtest.h>

#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "proxy/fabric/sim.h"
#include "xla_ffi/cpu_exchange.h"
#include "xla_ffi/registry.h"
#include "xla_ffi/tests/compare.h"
#include "xla_ffi/tests/inputs.h"

namespace pplx::moe::testing {

using namespace std::chrono_literals;

inline EngineConfig local() { return {}; }

inline EngineConfig sim(uint64_t seed) {
  EngineConfig config;
  config.fabric = "sim";
  config.sim.seed = seed;
  config.sim.reorder = true;
  config.sim.max_delay = seed % 7;
  config.sim.max_pieces = 1 + seed % 5;
  config.sim.stall_every = seed % 3 == 0 ? 40 : 0;
  config.sim.stall_polls = 16;
  if (seed % 4 == 0) config.sim.max_write = 512;
  if (seed % 5 == 0) config.sim.queue_depth = 2;
  return config;
}

inline EngineConfig provider(const std::string& name, int endpoints = 1) {
  EngineConfig config;
  config.fabric = name;
  config.endpoints = endpoints;
  return config;
}

inline EngineConfig efa_like(uint64_t seed) {
  EngineConfig config = sim(seed);
  config.endpoints = 4;
  const SimConfig plain = config.sim;
  config.sim = efa_limits(seed);
  config.sim.network = plain.network;
  config.sim.stall_every = plain.stall_every;  // more often every exchange would take long
  config.sim.stall_polls = plain.stall_polls;
  return config;
}

// Every rank has another number of NICs; group_config() sees to it.
inline constexpr const char* kUnevenNics = "uneven nics";

inline EngineConfig uneven(EngineConfig config) {
  config.sim.network = kUnevenNics;
  return config;
}

inline GroupConfig group_config(const Problem& problem, int rank, const EngineConfig& engine) {
  const BufferSizes sizes = buffer_sizes(problem.shape(rank));
  GroupConfig config;
  config.name = "test";
  config.rank = rank;
  config.num_ranks = problem.ranks;
  config.depth = problem.depth;
  config.region_bytes = sizes.region_bytes;
  config.staging_bytes = sizes.staging_bytes;
  config.fingerprint = 1;
  config.stall_timeout = config.first_stall_timeout = 60s;
  config.engine = engine;
  if (engine.sim.network == kUnevenNics) config.engine.nics.resize(1 + rank % 3);
  return config;
}

// Runs `body(rank)` on a thread each and waits for all; the first exception is thrown on.
inline void on_ranks(int ranks, const std::function<void(int)>& body) {
  std::vector<std::exception_ptr> errors(ranks);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < ranks; ++rank) {
    threads.emplace_back([&, rank] {
      try {
        body(rank);
      } catch (...) {
        errors[rank] = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

inline bool eventually(const std::function<bool()>& ready, Duration limit = 20s) {
  const auto deadline = Clock::now() + limit;
  while (!ready() && Clock::now() < deadline) std::this_thread::sleep_for(2ms);
  return ready();
}

inline void expect_error(const std::optional<Error>& error, ErrorKind kind, const std::string& text) {
  ASSERT_TRUE(error);
  EXPECT_EQ(error->kind(), kind) << error->what();
  EXPECT_NE(std::string(error->what()).find(text), std::string::npos) << error->what();
}

// A connected group.
class Cluster {
 public:
  using Adjust = std::function<void(GroupConfig&)>;
  explicit Cluster(const Problem& problem, const EngineConfig& engine = local(), const Adjust& adjust = {})
      : problem_(problem) {
    std::vector<Bytes> endpoints;
    for (int rank = 0; rank < problem.ranks; ++rank) {
      GroupConfig config = group_config(problem, rank, engine);
      if (adjust) adjust(config);
      members_.push_back(std::make_unique<Member>(problem.shape(rank), config));
      endpoints.push_back(members_.back()->group.endpoint());
    }
    for (auto& member : members_) member->group.connect(endpoints);
  }
  Member& operator[](int rank) { return *members_[rank]; }
  const Problem& problem() const { return problem_; }
  void each(const std::function<void(int)>& body) { on_ranks(problem_.ranks, body); }

 private:
  Problem problem_;
  std::vector<std::unique_ptr<Member>> members_;
};

// --- calls -----------------------------------------------------------------------------------------------

struct Site {
  std::string name = "layer";
  int64_t run = 1;
  bool split = false;  // send and recv apart
};
// A Call refers to its site's name: this one outlives all.
inline const Site kSite;

inline Call make_call(Member& member, Kind kind, int tokens, const Site& site) {
  const MoeShape& shape = member.shape;
  return {.group = member.group,
          .shape = shape,
          .site = {.kind = kind,
                   .tag = std::hash<std::string>{}(site.name) + static_cast<uint64_t>(kind),
                   .tokens = static_cast<uint32_t>(tokens),
                   .hidden = static_cast<uint32_t>(shape.hidden),
                   .format = shape.format(),
                   .top_k = static_cast<uint8_t>(shape.top_k),
                   .local_experts = static_cast<uint16_t>(shape.experts_per_rank),
                   .name = site.name},
          .run = site.run};
}

inline Route route_of(Outputs& out, int64_t rows) {
  return {.home = out.home.data(),
          .source_slots = out.source_slots.data(),
          .slot_start = out.slot_start.data(),
          .slot_rows = out.slot_rows.data(),
          .ok = &out.ok,
          .rows = rows};
}

// Arguments of a step's exchanges. Keep it until they have run.
class Arguments {
 public:
  Arguments(const Problem& problem, Member& member, const Inputs& in, Outputs& out)
      : problem_(problem), shape_(member.shape), in_(in), out_(out), map_(problem.map()) {
    if (in.given) given_ = quantize(problem, in.x);
  }

  DispatchSend dispatch_send() {
    out_.home.assign(int64_t{in_.tokens} * shape_.top_k, 99);
    return {.x = in_.given ? given_.values.data() : in_.x.data(),
            .scales = in_.given ? given_.scales.data() : nullptr,
            .indices = in_.indices.data(),
            .weights = in_.weights.data(),
            .num_tokens = &in_.num_tokens,
            .expert_map = map_.data(),
            .home = out_.home.data()};
  }
  DispatchRecv dispatch_recv() {
    const int64_t slots = int64_t{problem_.ranks} * in_.tokens;
    const bool quantized = problem_.quant != Quant::kNone;
    out_.tokens = garbage(problem_.dtype, rows() * problem_.hidden);
    out_.quantized.values.assign(quantized ? rows() * problem_.hidden : 0, 0x5a);
    out_.quantized.scales.assign(rows() * shape_.scale_bytes(), std::byte{0x5a});
    out_.row_weights.assign(rows(), 99.0F);
    out_.group_sizes.assign(shape_.experts_per_rank, 99);
    out_.source_slots.assign(int64_t{shape_.rounds(in_.tokens)} * shape_.num_ranks, 99);
    out_.slot_start.assign(slots + 1, 99);
    out_.slot_rows.assign(slots * shape_.entries(), 99);
    return {.tokens = quantized ? out_.quantized.values.data() : out_.tokens.data(),
            .scales = out_.quantized.scales.data(),
            .row_weights = out_.row_weights.data(),
            .group_sizes = out_.group_sizes.data(),
            .num_rows = &out_.num_rows,
            .num_dropped = &out_.num_dropped,
            .route = route()};
  }
  // Of quantised tokens, after the dispatch.
  void dequantize_tokens() {
    if (problem_.quant != Quant::kNone && out_.ok == 1) out_.tokens = dequantize(problem_, out_.quantized);
  }

  CombineSend combine_send() {
    return {.y = out_.y.data(),
            .row_weights = in_.weighted ? out_.row_weights.data() : nullptr,
            .route = route()};
  }
  CombineRecv combine_recv() {
    out_.out = garbage(problem_.dtype, int64_t{in_.tokens} * problem_.hidden);
    return {.home = out_.home.data(),
            .accumulate = in_.accumulates ? in_.accumulate.data() : nullptr,
            .out = out_.out.data()};
  }

  CombineTransposeSend combine_transpose_send() { return {.d_out = in_.d_out.data(), .route = route()}; }
  CombineTransposeRecv combine_transpose_recv() {
    out_.d_y = garbage(problem_.dtype, rows() * problem_.hidden);
    out_.d_row_weights.assign(rows(), 99.0F);
    return {.y = in_.weighted ? out_.y.data() : nullptr,
            .row_weights = in_.weighted ? out_.row_weights.data() : nullptr,
            .route = route(),
            .group_sizes = out_.group_sizes.data(),
            .d_y = out_.d_y.data(),
            .d_row_weights = out_.d_row_weights.data()};
  }

  DispatchTransposeSend dispatch_transpose_send() {
    return {.d_tokens = out_.d_tokens.data(), .d_row_weights = out_.d_row_weights.data(), .route = route()};
  }
  DispatchTransposeRecv dispatch_transpose_recv() {
    out_.d_x = garbage(problem_.dtype, int64_t{in_.tokens} * problem_.hidden);
    out_.d_weights.assign(int64_t{in_.tokens} * problem_.top_k, 99.0F);
    return {.home = out_.home.data(), .d_x = out_.d_x.data(), .d_weights = out_.d_weights.data()};
  }

 private:
  int64_t rows() const { return problem_.row_count(in_.tokens); }
  Route route() { return route_of(out_, rows()); }

  const Problem& problem_;
  const MoeShape& shape_;
  const Inputs& in_;
  Outputs& out_;
  std::vector<int32_t> map_;
  QuantizedRows given_;
};

// Both halves in one call, or one after the other.
template <typename Both, typename Send, typename Recv, typename Sent, typename Received>
std::optional<Error> run_halves(const Call& call, const Site& site, Both both, Send send, Recv recv,
                                const Sent& to_send, const Received& to_receive) {
  if (!site.split) return both(call, to_send, to_receive);
  Ticket ticket = 0;
  if (auto error = send(call, to_send, ticket)) return error;
  return recv(call, to_receive, ticket);
}

inline std::optional<Error> run_dispatch(const Problem& problem, Member& member, const Inputs& in,
                                         Outputs& out, const Site& site = {}) {
  Arguments args(problem, member, in, out);
  auto error = run_halves(make_call(member, Kind::kDispatch, in.tokens, site), site, dispatch, dispatch_send,
                          dispatch_recv, args.dispatch_send(), args.dispatch_recv());
  args.dequantize_tokens();
  return error;
}

inline std::optional<Error> run_combine(const Problem& problem, Member& member, const Inputs& in,
                                        Outputs& out, const Site& site = {}) {
  Arguments args(problem, member, in, out);
  return run_halves(make_call(member, Kind::kCombine, in.tokens, site), site, combine, combine_send,
                    combine_recv, args.combine_send(), args.combine_recv());
}

inline std::optional<Error> run_combine_transpose(const Problem& problem, Member& member, const Inputs& in,
                                                  Outputs& out, const Site& site = {}) {
  Arguments args(problem, member, in, out);
  return run_halves(make_call(member, Kind::kCombineTranspose, in.tokens, site), site, combine_transpose,
                    combine_transpose_send, combine_transpose_recv, args.combine_transpose_send(),
                    args.combine_transpose_recv());
}

inline std::optional<Error> run_dispatch_transpose(const Problem& problem, Member& member, const Inputs& in,
                                                   Outputs& out, const Site& site = {}) {
  Arguments args(problem, member, in, out);
  return run_halves(make_call(member, Kind::kDispatchTranspose, in.tokens, site), site, dispatch_transpose,
                    dispatch_transpose_send, dispatch_transpose_recv, args.dispatch_transpose_send(),
                    args.dispatch_transpose_recv());
}

// dispatch, experts, combine and the way back. Stops at an error.
inline std::optional<Error> run_step(const Problem& problem, Member& member, const Inputs& in, Outputs& out,
                                     const Site& site = {}) {
  const int rank = member.shape.rank;
  if (auto error = run_dispatch(problem, member, in, out, site)) return error;
  apply_experts(problem, rank, out.group_sizes, out.tokens, out.y);
  if (auto error = run_combine(problem, member, in, out, site)) return error;
  if (auto error = run_combine_transpose(problem, member, in, out, site)) return error;
  apply_experts(problem, rank, out.group_sizes, out.d_y, out.d_tokens);
  return run_dispatch_transpose(problem, member, in, out, site);
}

// `steps` random steps on a cluster, each against the oracle.
inline void check_steps(Cluster& cluster, int steps, uint64_t seed, const Site& site = {}) {
  const Problem& problem = cluster.problem();
  std::vector<std::vector<Inputs>> inputs;
  std::vector<std::vector<Outputs>> outputs(steps, std::vector<Outputs>(problem.ranks));
  for (int step = 0; step < steps; ++step) inputs.push_back(random_step(problem, seed + step));
  cluster.each([&](int rank) {
    for (int step = 0; step < steps; ++step) {
      const auto error = run_step(problem, cluster[rank], inputs[step][rank], outputs[step][rank], site);
      ASSERT_FALSE(error) << error->what();
    }
  });
  for (int step = 0; step < steps; ++step) {
    const std::vector<Outputs> wanted = oracle(problem, inputs[step]);
    for (int rank = 0; rank < problem.ranks; ++rank) {
      expect_equal(outputs[step][rank], wanted[rank],
                   "step " + std::to_string(step) + " rank " + std::to_string(rank));
      if (::testing::Test::HasFailure()) return;
    }
  }
}

}  // namespace pplx::moe::testing
