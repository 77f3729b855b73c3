// What an exchange must give, computed densely in one place from every rank's inputs. Written from
// docs/protocol.md alone; shares no arithmetic with the code under test.
#pragma once

#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "xla_ffi/layout.h"

namespace pplx::moe::testing {

uint16_t round_to_bfloat16(float value);  // of anything but a NaN
uint16_t round_to_float16(float value);   // likewise
double decode_float16(uint16_t half);
uint8_t round_to_e4m3(float value);  // likewise; saturates
double decode_e4m3(uint8_t byte);
float reference_dot(const std::vector<float>& a, const std::vector<float>& b);

// A flat array of a problem's element type, seen as float32. set() rounds.
class Tensor {
 public:
  Tensor() = default;
  Tensor(DType dtype, int64_t count) : dtype_(dtype), bytes_(count * item_size(dtype)) {}

  int64_t count() const { return static_cast<int64_t>(bytes_.size() / item_size(dtype_)); }
  float get(int64_t at) const;
  void set(int64_t at, float value);
  void* data() { return bytes_.data(); }
  const void* data() const { return bytes_.data(); }
  const std::vector<std::byte>& bytes() const { return bytes_; }
  bool operator==(const Tensor&) const = default;

 private:
  DType dtype_ = DType::kFloat32;
  std::vector<std::byte> bytes_;
};

struct Problem {
  int ranks = 3;
  int experts = 7;
  int top_k = 3;
  int hidden = 20;
  int max_tokens = 12;
  int chunk = 0;      // 0: max_tokens
  int64_t rows = -1;  // -1: enough for anything
  int alignment = 1;
  int depth = 1;
  DType dtype = DType::kFloat32;
  bool drop = false;
  bool padded = false;                   // rows is then a multiple of experts_per_rank
  std::optional<DType> home_dtype = {};  // default: dtype
  Quant quant = Quant::kNone;
  std::vector<int32_t> expert_map = {};  // empty: contiguous blocks
  int slots_per_rank = 0;                // of experts, with expert_map

  int experts_per_rank() const {
    return slots_per_rank != 0 ? slots_per_rank : (experts + ranks - 1) / ranks;
  }
  int64_t row_count(int tokens) const;
  int64_t scale_count() const { return quant == Quant::kNone ? 0 : (hidden + 127) / 128; }
  std::vector<int32_t> map() const;
  MoeShape shape(int rank) const;
};

// One rank's part of a step.
struct Inputs {
  int tokens = 0;
  int num_tokens = 0;
  Tensor x, d_out, accumulate;
  std::vector<int32_t> indices;
  std::vector<float> weights;
  bool weighted = true;
  bool accumulates = false;
  bool given = false;  // x is quantised by the caller
};

// Rows as a quantised dispatch moves them.
struct QuantizedRows {
  std::vector<uint8_t> values;    // [rows, hidden]
  std::vector<std::byte> scales;  // [rows, scale_count] float32 or exponent bytes
  bool operator==(const QuantizedRows&) const = default;
};
QuantizedRows quantize(const Problem& problem, const Tensor& rows);
Tensor dequantize(const Problem& problem, const QuantizedRows& rows);

struct Outputs {
  QuantizedRows quantized;  // what came, where tokens are quantised; `tokens` is then their values
  Tensor tokens, y, out, d_y, d_tokens, d_x;
  std::vector<float> row_weights, d_row_weights, d_weights;
  std::vector<int32_t> group_sizes;
  int32_t num_rows = -1, num_dropped = -1, ok = -1;
  std::vector<int32_t> home, source_slots, slot_start, slot_rows;  // not the oracle's business

  std::vector<std::byte> bytes() const;  // of everything, to compare runs
};

// Expert e multiplies by this, so that a token at the wrong expert shows.
inline float factor(int expert) { return 0.5F + 0.37F * static_cast<float>(expert); }
// out[row] = factor(expert of the row) * in[row]
void apply_experts(const Problem& problem, int rank, const std::vector<int32_t>& group_sizes,
                   const Tensor& in, Tensor& out);

std::vector<Outputs> oracle(const Problem& problem, const std::vector<Inputs>& inputs);

}  // namespace pplx::moe::testing
