// Inputs of a step, drawn from a seed, and garbage for its outputs. Knows of no rank's code.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <random>
#include <set>
#include <vector>

#include "xla_ffi/tests/oracle.h"

namespace pplx::moe::testing {

enum class Routing { kUniform, kAllToOne, kZipf, kSparse, kNobody, kOneRank };

inline std::vector<int32_t> draw_experts(const Problem& problem, Routing routing, std::mt19937_64& rng) {
  std::vector<int32_t> chosen;
  std::set<int32_t> taken;
  std::uniform_real_distribution<double> uniform;
  for (int k = 0; k < problem.top_k; ++k) {
    int32_t expert = static_cast<int32_t>(rng() % problem.experts);
    if (routing == Routing::kZipf) expert = static_cast<int32_t>(std::pow(problem.experts, uniform(rng))) - 1;
    if (routing == Routing::kAllToOne && k == 0) expert = problem.experts - 1;
    if (routing == Routing::kOneRank) expert = static_cast<int32_t>(rng() % problem.experts_per_rank());
    const bool none = routing == Routing::kNobody || (routing == Routing::kSparse && rng() % 3 != 0) ||
                      (routing == Routing::kAllToOne && k != 0);
    chosen.push_back(none || expert >= problem.experts || !taken.insert(expert).second ? -1 : expert);
  }
  return chosen;
}

inline Tensor random_rows(const Problem& problem, int64_t rows, std::mt19937_64& rng) {
  Tensor tensor(problem.dtype, rows * problem.hidden);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < tensor.count(); ++i) tensor.set(i, normal(rng));
  return tensor;
}

inline Inputs random_inputs(const Problem& problem, int tokens, int num_tokens, Routing routing,
                            uint64_t seed) {
  std::mt19937_64 rng(seed * 7919 + 17);
  Inputs in;
  in.tokens = tokens;
  in.num_tokens = num_tokens;
  in.x = random_rows(problem, tokens, rng);
  in.d_out = random_rows(problem, tokens, rng);
  in.accumulate = random_rows(problem, tokens, rng);
  std::normal_distribution<float> normal;
  for (int t = 0; t < tokens; ++t) {
    for (const int32_t expert : draw_experts(problem, routing, rng)) in.indices.push_back(expert);
    for (int k = 0; k < problem.top_k; ++k) in.weights.push_back(normal(rng));
  }
  return in;
}

// A step whose size, routing, num_tokens and options all follow from `seed`.
inline std::vector<Inputs> random_step(const Problem& problem, uint64_t seed,
                                       std::optional<int> size = std::nullopt) {
  std::mt19937_64 rng(seed);
  const int tokens = size ? *size : static_cast<int>(rng() % (problem.max_tokens + 1));
  const auto routing = static_cast<Routing>(rng() % 6);
  const bool weighted = rng() % 4 != 0, accumulates = rng() % 3 == 0;
  std::vector<Inputs> inputs;
  for (int rank = 0; rank < problem.ranks; ++rank) {
    const int num_tokens = rng() % 2 == 0 ? tokens : static_cast<int>(rng() % (tokens + 1));
    inputs.push_back(random_inputs(problem, tokens, num_tokens, routing, rng()));
    inputs.back().weighted = weighted;
    inputs.back().accumulates = accumulates;
    inputs.back().given = problem.quant != Quant::kNone && seed % 2 == 1;
  }
  return inputs;
}

// Every output starts as garbage: whatever a call leaves unwritten shows.
inline Tensor garbage(DType dtype, int64_t count) {
  Tensor tensor(dtype, count);
  if (count != 0) std::memset(tensor.data(), 0x5a, tensor.bytes().size());
  return tensor;
}

inline bool all_nan(const Tensor& tensor) {
  for (int64_t i = 0; i < tensor.count(); ++i) {
    if (!std::isnan(tensor.get(i))) return false;
  }
  return true;
}
inline bool all_nan(const std::vector<float>& values) {
  return std::all_of(values.begin(), values.end(), [](float value) { return std::isnan(value); });
}

}  // namespace pplx::moe::testing
