// Problems that every implementation of the exchanges is run on.
#pragma once

#include <ostream>
#include <string>
#include <vector>

#include "xla_ffi/tests/oracle.h"

namespace pplx::moe::testing {

struct Case {
  std::string name;
  Problem problem;
  int steps = 30;
};

inline void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

inline std::vector<Case> cases() {
  std::vector<Case> all;
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    const std::string suffix = dtype == DType::kFloat32    ? "_f32"
                               : dtype == DType::kBFloat16 ? "_bf16"
                                                           : "_f16";
    const auto add = [&](const std::string& name, Problem problem, int steps = 30) {
      problem.dtype = dtype;
      all.push_back({name + suffix, problem, steps});
    };
    for (int ranks = 1; ranks <= 8; ++ranks) {
      add("ranks" + std::to_string(ranks), {.ranks = ranks, .experts = 16, .top_k = 4}, 12);
      add("uneven" + std::to_string(ranks), {.ranks = ranks, .experts = 9, .top_k = 3}, 12);
    }
    for (const int top_k : {1, 2, 5, 8, 15, 16}) {
      add("top" + std::to_string(top_k), {.ranks = 3, .experts = 20, .top_k = top_k});
    }
    add("more_choices_than_experts", {.ranks = 2, .experts = 3, .top_k = 8});
    add("ranks_without_experts", {.ranks = 5, .experts = 3, .top_k = 2});
    add("one_expert", {.ranks = 3, .experts = 1, .top_k = 1});
    add("hidden1", {.hidden = 1});
    add("hidden_odd", {.hidden = 77, .max_tokens = 5});
    add("hidden_wide", {.experts = 4, .hidden = 1030, .max_tokens = 4}, 5);
    add("one_token", {.max_tokens = 1});
    add("many_tokens", {.hidden = 8, .max_tokens = 300}, 8);
    add("chunk1", {.max_tokens = 6, .chunk = 1});
    add("chunk5", {.max_tokens = 23, .chunk = 5});
    add("chunk_divides", {.max_tokens = 24, .chunk = 8});
    add("alignment4", {.alignment = 4});
    add("alignment_odd", {.max_tokens = 20, .chunk = 7, .alignment = 3});
    add("depth2", {.depth = 2});
    add("depth6", {.max_tokens = 5, .chunk = 2, .depth = 6});
    add("drop", {.rows = 9, .drop = true});
    add("drop_aligned", {.max_tokens = 20, .chunk = 6, .rows = 21, .alignment = 4, .drop = true});
    add("drop_nearly_all", {.rows = 1, .drop = true});
    add("drop_all", {.rows = 0, .drop = true});
    add("bounded_enough", {.ranks = 2, .rows = 200, .drop = true});
    add("padded", {.padded = true});
    add("padded_chunks", {.max_tokens = 20, .chunk = 6, .depth = 2, .padded = true});
    add("padded_drop", {.rows = 3 * 5, .drop = true, .padded = true});
    add("padded_drop_all", {.rows = 0, .drop = true, .padded = true});
    add("wide_home", {.hidden = 77, .home_dtype = DType::kFloat32});
    for (const Quant quant : {Quant::kFp8, Quant::kFp8Ue8m0}) {
      const std::string kind = quant == Quant::kFp8 ? "fp8" : "fp8_ue8m0";
      add(kind, {.hidden = 128, .quant = quant});
      add(kind + "_wide", {.experts = 4, .hidden = 1030, .max_tokens = 4, .quant = quant}, 5);
      add(kind + "_odd", {.hidden = 77, .max_tokens = 20, .chunk = 7, .alignment = 4, .quant = quant});
      add(kind + "_drop", {.hidden = 260, .rows = 9, .drop = true, .quant = quant}, 10);
      add(kind + "_padded", {.hidden = 136, .padded = true, .home_dtype = DType::kFloat32, .quant = quant},
          10);
    }
    add("replicas", {.ranks = 3,
                     .experts = 4,
                     .top_k = 3,
                     .expert_map = {3, 0, 1, 2, 0, -1, 0, 2, 1},
                     .slots_per_rank = 3});
  }
  return all;
}

}  // namespace pplx::moe::testing
