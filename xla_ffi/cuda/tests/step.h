// A step of the exchanges on the GPU: operands and results of one rank, and steps of a whole cluster.
#pragma once

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "xla_ffi/cuda/tests/cluster.h"
#include "xla_ffi/tests/compare.h"
#include "xla_ffi/tests/inputs.h"

namespace pplx::moe::cuda::testing {

class DeviceStep {
 public:
  DeviceStep(const Problem& problem, const MoeShape& shape, const Inputs& in)
      : problem_(problem), shape_(shape), tokens_(in.tokens), rows_(problem.row_count(in.tokens)) {
    const size_t n = in.tokens, m = rows_, k = shape.top_k;
    const size_t slots = n * shape.num_ranks;
    x = memory.add(n * std::max(shape.row_bytes(), shape.token_bytes()));
    scales = memory.add(n * shape.scale_bytes());
    indices = memory.add(4 * n * k);
    weights = memory.add(4 * n * k);
    num_tokens = memory.add(4);
    map = memory.add(4 * shape.physical_experts());
    d_out = memory.add(n * shape.row_bytes());
    accumulate = memory.add(n * shape.row_bytes());
    home = memory.add(4 * n * k);
    tokens = memory.add(m * shape.token_bytes());
    token_scales = memory.add(m * shape.scale_bytes());
    row_weights = memory.add(4 * m);
    group_sizes = memory.add(4 * shape.experts_per_rank);
    num_rows = memory.add(4);
    num_dropped = memory.add(4);
    source_slots = memory.add(4 * int64_t{shape.rounds(in.tokens)} * shape.num_ranks);
    slot_start = memory.add(4 * (slots + 1));
    slot_rows = memory.add(4 * slots * shape.entries());
    ok = memory.add(4);
    y = memory.add(m * shape.row_bytes());
    out = memory.add(n * shape.row_bytes());
    d_y = memory.add(m * shape.row_bytes());
    d_row_weights = memory.add(4 * m);
    d_tokens = memory.add(m * shape.row_bytes());
    given_d_row_weights = memory.add(4 * m);
    d_x = memory.add(n * shape.row_bytes());
    d_weights = memory.add(4 * n * k);
    for (Part& ticket : tickets) ticket = memory.add(16);
    memory.allocate();
    set_inputs(in);
  }

  // The same sizes, other values.
  void set_inputs(const Inputs& in) {
    weighted_ = in.weighted;
    accumulates_ = in.accumulates;
    given_ = in.given;
    if (in.given) {
      const QuantizedRows rows = quantize(problem_, in.x);
      std::memcpy(memory.host<std::byte>(x).data(), rows.values.data(), rows.values.size());
      memory.set(scales, rows.scales.data());
    } else {
      std::memcpy(memory.host<std::byte>(x).data(), in.x.data(), in.x.bytes().size());
    }
    memory.set(indices, in.indices.data());
    memory.set(weights, in.weights.data());
    memory.set(num_tokens, &in.num_tokens);
    memory.set(map, problem_.map().data());
    memory.set(d_out, in.d_out.data());
    memory.set(accumulate, in.accumulate.data());
  }

  DispatchSend dispatch_send() const {
    return {.x = at(x),
            .scales = given_ ? at(scales) : nullptr,
            .indices = memory.device<int32_t>(indices),
            .weights = memory.device<float>(weights),
            .num_tokens = memory.device<int32_t>(num_tokens),
            .expert_map = memory.device<int32_t>(map),
            .home = memory.device<int32_t>(home)};
  }
  DispatchRecv dispatch_recv() const {
    return {.tokens = at(tokens),
            .scales = at(token_scales),
            .row_weights = memory.device<float>(row_weights),
            .group_sizes = memory.device<int32_t>(group_sizes),
            .num_rows = memory.device<int32_t>(num_rows),
            .num_dropped = memory.device<int32_t>(num_dropped),
            .route = route()};
  }
  CombineSend combine_send() const {
    return {
        .y = at(y), .row_weights = weighted_ ? memory.device<float>(row_weights) : nullptr, .route = route()};
  }
  CombineRecv combine_recv() const {
    return {.home = memory.device<int32_t>(home),
            .accumulate = accumulates_ ? at(accumulate) : nullptr,
            .out = at(out)};
  }
  CombineTransposeSend combine_transpose_send() const { return {.d_out = at(d_out), .route = route()}; }
  CombineTransposeRecv combine_transpose_recv() const {
    return {.y = weighted_ ? at(y) : nullptr,
            .row_weights = weighted_ ? memory.device<float>(row_weights) : nullptr,
            .route = route(),
            .group_sizes = memory.device<int32_t>(group_sizes),
            .d_y = at(d_y),
            .d_row_weights = memory.device<float>(d_row_weights)};
  }
  // Carries given_d_row_weights home, so that what it returns can be compared bit for bit.
  DispatchTransposeSend dispatch_transpose_send() const {
    return {.d_tokens = at(d_tokens),
            .d_row_weights = memory.device<float>(given_d_row_weights),
            .route = route()};
  }
  DispatchTransposeRecv dispatch_transpose_recv() const {
    return {
        .home = memory.device<int32_t>(home), .d_x = at(d_x), .d_weights = memory.device<float>(d_weights)};
  }
  float* ticket(Kind kind) const { return memory.device<float>(tickets[static_cast<size_t>(kind)]); }

  // As a failed exchange leaves its results. Of what download() has brought.
  bool poisoned(Kind kind) const {
    const Outputs got = outputs();
    switch (kind) {
      case Kind::kDispatch: {
        const auto zero = [](int32_t n) { return n == 0; };
        return got.ok == 0 && got.num_rows == 0 && got.num_dropped == 0 && all_nan(got.tokens) &&
               all_nan(got.row_weights) && std::ranges::all_of(got.group_sizes, zero);
      }
      case Kind::kCombine:
        return all_nan(got.out);
      case Kind::kCombineTranspose:
        return all_nan(got.d_y) && all_nan(got.d_row_weights);
      case Kind::kDispatchTranspose:
        return all_nan(got.d_x) && all_nan(got.d_weights);
    }
    return false;
  }

  // The experts' work, on the host: `to` gets `from` times each row's factor. Of what download() has brought.
  void apply(const Part& from, const Part& to) const {
    const auto sizes = memory.host<int32_t>(group_sizes);
    Tensor result;
    const Tensor rows = from.offset == tokens.offset ? token_values() : tensor(from, rows_);
    apply_experts(problem_, shape_.rank, {sizes.begin(), sizes.end()}, rows, result);
    memory.set(to, result.data());
  }

  // Of what download() has brought.
  Outputs outputs() const {
    Outputs all;
    if (problem_.quant != Quant::kNone) all.quantized = quantized();
    all.tokens = token_values();
    all.y = tensor(y, rows_);
    all.out = tensor(out, tokens_);
    all.d_y = tensor(d_y, rows_);
    all.d_tokens = tensor(d_tokens, rows_);
    all.d_x = tensor(d_x, tokens_);
    all.row_weights = vector<float>(row_weights);
    all.d_row_weights = vector<float>(d_row_weights);
    all.d_weights = vector<float>(d_weights);
    all.group_sizes = vector<int32_t>(group_sizes);
    all.num_rows = memory.host<int32_t>(num_rows)[0];
    all.num_dropped = memory.host<int32_t>(num_dropped)[0];
    all.ok = memory.host<int32_t>(ok)[0];
    all.home = vector<int32_t>(home);
    return all;
  }
  bool wrote_past_an_end() const {
    return !std::ranges::all_of(outputs_, [&](const Part* part) { return memory.intact_after(*part); });
  }

  int tokens_of_rank() const { return tokens_; }
  int64_t rows() const { return rows_; }

  Mirror memory;
  Part x, scales, indices, weights, num_tokens, map, d_out, accumulate;
  Part home, tokens, token_scales, row_weights, group_sizes, num_rows, num_dropped;
  Part source_slots, slot_start, slot_rows, ok;
  Part y, out, d_y, d_row_weights, d_tokens, given_d_row_weights, d_x, d_weights;
  std::array<Part, kKinds> tickets;

 private:
  void* at(const Part& part) const { return memory.device<std::byte>(part); }
  Route route() const {
    return {.home = memory.device<int32_t>(home),
            .source_slots = memory.device<int32_t>(source_slots),
            .slot_start = memory.device<int32_t>(slot_start),
            .slot_rows = memory.device<int32_t>(slot_rows),
            .ok = memory.device<int32_t>(ok),
            .rows = rows_};
  }
  template <typename T>
  std::vector<T> vector(const Part& part) const {
    const auto values = memory.host<T>(part);
    return {values.begin(), values.end()};
  }
  Tensor tensor(const Part& part, int64_t rows) const {
    Tensor result(problem_.dtype, rows * problem_.hidden);
    if (part.bytes != 0) std::memcpy(result.data(), memory.host<std::byte>(part).data(), part.bytes);
    return result;
  }
  QuantizedRows quantized() const { return {vector<uint8_t>(tokens), vector<std::byte>(token_scales)}; }
  Tensor token_values() const {
    return problem_.quant == Quant::kNone ? tensor(tokens, rows_) : dequantize(problem_, quantized());
  }

  const Problem& problem_;
  const MoeShape& shape_;
  int tokens_;
  int64_t rows_;
  bool weighted_ = true, accumulates_ = false, given_ = false;
  std::vector<const Part*> outputs_ = {&home,      &tokens,      &token_scales, &row_weights,   &group_sizes,
                                       &num_rows,  &num_dropped, &source_slots, &slot_start,    &slot_rows,
                                       &ok,        &out,         &d_y,          &d_row_weights, &d_x,
                                       &d_weights, &tickets[0],  &tickets[1],   &tickets[2],    &tickets[3]};
};

enum class Half { kBoth, kSend, kRecv };

// Enqueues an exchange of one rank.
inline void launch(const KernelCall& call, const DeviceStep& step, Half half = Half::kBoth) {
  float* ticket = step.ticket(call.kind);
  const auto run = [&](auto both, auto send, auto recv, const auto& sent, const auto& received) {
    if (half == Half::kBoth) PPLX_MUST(both(call, sent, received));
    if (half == Half::kSend) PPLX_MUST(send(call, sent, ticket));
    if (half == Half::kRecv) PPLX_MUST(recv(call, received, ticket));
  };
  switch (call.kind) {
    case Kind::kDispatch:
      return run(dispatch, dispatch_send, dispatch_recv, step.dispatch_send(), step.dispatch_recv());
    case Kind::kCombine:
      return run(combine, combine_send, combine_recv, step.combine_send(), step.combine_recv());
    case Kind::kCombineTranspose:
      return run(combine_transpose, combine_transpose_send, combine_transpose_recv,
                 step.combine_transpose_send(), step.combine_transpose_recv());
    case Kind::kDispatchTranspose:
      return run(dispatch_transpose, dispatch_transpose_send, dispatch_transpose_recv,
                 step.dispatch_transpose_send(), step.dispatch_transpose_recv());
  }
}

// The dot products are summed in another order than the oracle's: close ones count as equal.
inline void forgive_rounding(Outputs& got, const Outputs& want, const Problem& problem, bool weighted) {
  if (!weighted || got.d_row_weights.size() != want.d_row_weights.size()) return;
  for (size_t row = 0; row < want.d_row_weights.size(); ++row) {
    double sum = 0;  // of |d_out * y|; d_y is d_out times the row's weight
    for (int h = 0; h < problem.hidden; ++h) {
      const auto at = static_cast<int64_t>(row) * problem.hidden + h;
      sum += std::fabs(double{want.d_y.get(at)} * want.y.get(at));
    }
    const double weight = std::fabs(double{want.row_weights[row]});
    const double most = weight == 0 ? 0 : 1e-5 * sum / weight;
    if (std::fabs(double{got.d_row_weights[row]} - want.d_row_weights[row]) <= most) {
      got.d_row_weights[row] = want.d_row_weights[row];
    }
  }
}

// Steps of all ranks of a cluster, which may be a Cluster or a MemberCluster.
template <typename AnyCluster>
class StepsOf {
 public:
  StepsOf(AnyCluster& cluster, const std::vector<Inputs>& inputs) : cluster_(cluster), inputs_(inputs) {
    cluster.each([&](int rank) {
      steps_.push_back(std::make_unique<DeviceStep>(cluster.problem(), cluster[rank].shape(), inputs[rank]));
    });
    upload();
  }

  // Other inputs of the same sizes, in the same places.
  void renew(const std::vector<Inputs>& inputs) {
    inputs_ = inputs;
    wanted_.clear();
    for (int rank = 0; rank < cluster_.size(); ++rank) {
      DeviceStep& step = *steps_[rank];
      step.memory.fill_garbage();
      step.set_inputs(inputs_[rank]);
      step.memory.set(step.given_d_row_weights, wanted()[rank].d_row_weights.data());
    }
    upload();
  }

  DeviceStep& operator[](int rank) { return *steps_[rank]; }
  KernelCall call(int rank, Kind kind, uint32_t place = 0) const {
    return cluster_[rank].call(kind, inputs_[rank].tokens, place);
  }
  void launch(int rank, Kind kind, Half half = Half::kBoth, uint32_t place = 0) const {
    testing::launch(call(rank, kind, place), *steps_[rank], half);
  }
  void launch_all(Kind kind, Half half = Half::kBoth, uint32_t place = 0) const {
    cluster_.each([&](int rank) { launch(rank, kind, half, place); });
  }
  void exchange(Kind kind, bool split, uint32_t place = 0) const {
    if (!split) return launch_all(kind, Half::kBoth, place);
    launch_all(kind, Half::kSend, place);
    launch_all(kind, Half::kRecv, place);
  }

  void upload() const {
    move([](Mirror& memory, cudaStream_t stream) { memory.upload(stream); });
  }
  void download() const {
    move([](Mirror& memory, cudaStream_t stream) { memory.download(stream); });
  }
  void finish() const {
    cluster_.sync();
    download();
  }
  // After finish(): the experts, forward or on the way back.
  void apply(Part DeviceStep::*from, Part DeviceStep::*to) const {
    cluster_.each([&](int rank) {
      DeviceStep& step = *steps_[rank];
      step.apply(step.*from, step.*to);
      step.memory.upload(step.*to, cluster_[rank].stream());
    });
    cluster_.sync();
  }

  // All four exchanges.
  void run(bool split = false) {
    exchange(Kind::kDispatch, split);
    finish();
    apply(&DeviceStep::tokens, &DeviceStep::y);
    exchange(Kind::kCombine, split);
    exchange(Kind::kCombineTranspose, split);
    finish();
    apply(&DeviceStep::d_y, &DeviceStep::d_tokens);
    give_row_gradients();
    exchange(Kind::kDispatchTranspose, split);
    finish();
  }

  // The oracle's row gradients are what goes home.
  void give_row_gradients() {
    cluster_.each([&](int rank) {
      DeviceStep& step = *steps_[rank];
      step.memory.set(step.given_d_row_weights, wanted()[rank].d_row_weights.data());
      step.memory.upload(step.given_d_row_weights, cluster_[rank].stream());
    });
    cluster_.sync();
  }

  const std::vector<Outputs>& wanted() {
    if (wanted_.empty()) wanted_ = oracle(cluster_.problem(), inputs_);
    return wanted_;
  }
  Outputs outputs(int rank) const { return steps_[rank]->outputs(); }

  // After run().
  void expect_oracle(const std::string& where) {
    for (int rank = 0; rank < cluster_.size(); ++rank) {
      const std::string text = where + " rank " + std::to_string(rank);
      Outputs got = outputs(rank);
      forgive_rounding(got, wanted()[rank], cluster_.problem(), inputs_[rank].weighted);
      expect_equal(got, wanted()[rank], text);
      EXPECT_FALSE(steps_[rank]->wrote_past_an_end()) << text;
      EXPECT_EQ(cluster_[rank].trouble(), "") << text;
      if (::testing::Test::HasFailure()) return;
    }
  }

 private:
  void move(const std::function<void(Mirror&, cudaStream_t)>& how) const {
    cluster_.each([&](int rank) { how(steps_[rank]->memory, cluster_[rank].stream()); });
    cluster_.sync();
  }

  AnyCluster& cluster_;
  std::vector<Inputs> inputs_;
  std::vector<std::unique_ptr<DeviceStep>> steps_;
  std::vector<Outputs> wanted_;
};
using Steps = StepsOf<Cluster>;

// `count` random steps, each against the oracle.
template <typename AnyCluster>
void check_steps(AnyCluster& cluster, int count, uint64_t seed, bool split = false) {
  for (int i = 0; i < count && !::testing::Test::HasFailure(); ++i) {
    StepsOf<AnyCluster> steps(cluster, random_step(cluster.problem(), seed + i));
    steps.run(split);
    steps.expect_oracle("step " + std::to_string(i));
  }
}

}  // namespace pplx::moe::cuda::testing
