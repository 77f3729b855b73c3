#include "xla_ffi/tests/oracle.h"

#include <algorithm>
#include <bit>
#include <cmath>

namespace pplx::moe::testing {

uint16_t round_to_bfloat16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const auto low = static_cast<uint16_t>(bits >> 16);
  if (std::isinf(value)) return low;
  // In double everything here is exact. One past the largest finite value stands for infinity.
  const auto magnitude = [](uint32_t high) {
    const int exponent = static_cast<int>(high >> 7 & 0xff);
    const double mantissa = high & 0x7f;
    return exponent == 0 ? std::ldexp(mantissa, -133) : std::ldexp(128 + mantissa, exponent - 134);
  };
  const uint32_t below = low & 0x7fffU, above = below + 1;
  const double x = std::fabs(double{value});
  const double to_below = x - magnitude(below), to_above = magnitude(above) - x;
  const bool up = to_above < to_below || (to_above == to_below && (below & 1U) != 0);
  return static_cast<uint16_t>((low & 0x8000U) | (up ? above : below));
}

namespace {

// The multiple of 2^max(exponent of x, lowest) - bits) nearest to x, even ones first.
double round_even(double x, int bits, int lowest) {
  if (x == 0 || std::isinf(x)) return x;
  const double step = std::ldexp(1.0, std::max(std::ilogb(x), lowest) - bits);
  return std::nearbyint(x / step) * step;
}

}  // namespace

double decode_float16(uint16_t half) {
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  const double magnitude = exponent == 31  ? (mantissa == 0 ? HUGE_VAL : NAN)
                           : exponent == 0 ? std::ldexp(mantissa, -24)
                                           : std::ldexp(1024 + mantissa, exponent - 25);
  return (half & 0x8000) != 0 ? -magnitude : magnitude;
}

uint16_t round_to_float16(float value) {
  const double rounded = std::fabs(round_even(value, 10, -14));
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (rounded >= 65536) return sign | 0x7c00;
  // Halves grow with their bits.
  int low = 0, high = 0x7bff;
  while (low < high) {
    const int middle = (low + high) / 2;
    decode_float16(static_cast<uint16_t>(middle)) < rounded ? low = middle + 1 : high = middle;
  }
  return static_cast<uint16_t>(sign | low);
}

double decode_e4m3(uint8_t byte) {
  const int exponent = byte >> 3 & 15, mantissa = byte & 7;
  const double magnitude = (byte & 0x7f) == 0x7f ? NAN
                           : exponent == 0       ? std::ldexp(mantissa, -9)
                                                 : std::ldexp(8 + mantissa, exponent - 10);
  return (byte & 0x80) != 0 ? -magnitude : magnitude;
}

uint8_t round_to_e4m3(float value) {
  const double rounded = std::min(std::fabs(round_even(value, 3, -6)), 448.0);
  uint8_t byte = 0;
  while (decode_e4m3(byte) < rounded) ++byte;
  return static_cast<uint8_t>((std::signbit(value) ? 0x80 : 0) | byte);
}

QuantizedRows quantize(const Problem& problem, const Tensor& rows) {
  QuantizedRows out;
  for (int64_t row = 0; row * problem.hidden < rows.count(); ++row) {
    for (int begin = 0; begin < problem.hidden; begin += 128) {
      const int end = std::min(begin + 128, problem.hidden);
      float max = std::ldexp(1.0F, -100);
      for (int h = begin; h < end; ++h) max = std::max(max, std::fabs(rows.get(row * problem.hidden + h)));
      float inverse = 448.0F / max;
      if (problem.quant == Quant::kFp8) {
        const float scale = max / 448.0F;
        std::byte bytes[4];
        std::memcpy(bytes, &scale, 4);
        out.scales.insert(out.scales.end(), bytes, bytes + 4);
      } else {
        int exponent = -127;
        while (448 * std::ldexp(1.0, exponent) < max) ++exponent;
        inverse = std::ldexp(1.0F, -exponent);
        out.scales.push_back(std::byte(exponent + 127));
      }
      for (int h = begin; h < end; ++h) {
        const float scaled = rows.get(row * problem.hidden + h) * inverse;
        out.values.push_back(round_to_e4m3(scaled));
      }
    }
  }
  return out;
}

Tensor dequantize(const Problem& problem, const QuantizedRows& rows) {
  Tensor out(problem.dtype, static_cast<int64_t>(rows.values.size()));
  for (int64_t i = 0; i < out.count(); ++i) {
    const int64_t at = i / problem.hidden * problem.scale_count() + i % problem.hidden / 128;
    float scale = 0;
    if (problem.quant == Quant::kFp8) {
      std::memcpy(&scale, rows.scales.data() + at * 4, 4);
    } else {
      scale = std::ldexp(1.0F, std::to_integer<int>(rows.scales[at]) - 127);
    }
    const float value = static_cast<float>(decode_e4m3(rows.values[i])) * scale;
    out.set(i, value);
  }
  return out;
}

float reference_dot(const std::vector<float>& a, const std::vector<float>& b) {
  float partial[16] = {};
  for (size_t h = 0; h < a.size(); ++h) {
    const float product = a[h] * b[h];
    partial[h % 16] = partial[h % 16] + product;
  }
  float eight[8], four[4];
  for (int i = 0; i < 8; ++i) eight[i] = partial[i] + partial[i + 8];
  for (int i = 0; i < 4; ++i) four[i] = eight[i] + eight[i + 4];
  return (four[0] + four[2]) + (four[1] + four[3]);
}

float Tensor::get(int64_t at) const {
  if (dtype_ == DType::kFloat32) {
    float value;
    std::memcpy(&value, bytes_.data() + at * 4, 4);
    return value;
  }
  uint16_t half;
  std::memcpy(&half, bytes_.data() + at * 2, 2);
  if (dtype_ == DType::kFloat16) return static_cast<float>(decode_float16(half));
  return std::bit_cast<float>(uint32_t{half} << 16);
}

void Tensor::set(int64_t at, float value) {
  if (dtype_ == DType::kFloat32) {
    std::memcpy(bytes_.data() + at * 4, &value, 4);
    return;
  }
  const uint16_t half = dtype_ == DType::kFloat16 ? round_to_float16(value) : round_to_bfloat16(value);
  std::memcpy(bytes_.data() + at * 2, &half, 2);
}

int64_t Problem::row_count(int tokens) const {
  if (rows >= 0) return rows;
  if (padded) return int64_t{experts_per_rank()} * ranks * tokens;
  const int64_t per_token = std::min(top_k, experts_per_rank());
  return int64_t{ranks} * tokens * per_token + int64_t{experts_per_rank()} * (alignment - 1);
}

std::vector<int32_t> Problem::map() const {
  if (!expert_map.empty()) return expert_map;
  std::vector<int32_t> contiguous(ranks * experts_per_rank(), -1);
  for (int e = 0; e < experts; ++e) contiguous[e] = e;
  return contiguous;
}

MoeShape Problem::shape(int rank) const {
  MoeShape shape;
  shape.rank = rank;
  shape.num_ranks = ranks;
  shape.num_experts = experts;
  shape.experts_per_rank = experts_per_rank();
  shape.top_k = top_k;
  shape.hidden = hidden;
  shape.max_tokens = max_tokens;
  shape.chunk = chunk == 0 ? std::max(max_tokens, 1) : chunk;
  shape.alignment = alignment;
  shape.dtype = dtype;
  shape.drop = drop;
  shape.padded = padded;
  shape.home_dtype = home_dtype.value_or(dtype);
  shape.quant = quant;
  return shape;
}

std::vector<std::byte> Outputs::bytes() const {
  std::string all;
  const auto add = [&](const auto& values) {
    all.append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(values[0]));
  };
  for (const Tensor* tensor : {&tokens, &y, &out, &d_y, &d_tokens, &d_x}) add(tensor->bytes());
  for (const auto* values : {&row_weights, &d_row_weights, &d_weights}) add(*values);
  for (const auto* values : {&group_sizes, &home, &source_slots, &slot_start, &slot_rows}) add(*values);
  add(quantized.values);
  add(quantized.scales);
  add(std::vector<int32_t>{num_rows, num_dropped, ok});
  const auto* begin = reinterpret_cast<const std::byte*>(all.data());
  return {begin, begin + all.size()};
}

void apply_experts(const Problem& problem, int rank, const std::vector<int32_t>& group_sizes,
                   const Tensor& in, Tensor& out) {
  out = Tensor(problem.dtype, in.count());
  const std::vector<int32_t> map = problem.map();
  int64_t at = 0;
  for (int e = 0; e < problem.experts_per_rank(); ++e) {
    const float scale = factor(map[rank * problem.experts_per_rank() + e]);
    if (problem.padded) at = in.count() / problem.experts_per_rank() * e;
    for (int64_t n = int64_t{group_sizes[e]} * problem.hidden; n > 0; --n, ++at) {
      const float product = scale * in.get(at);
      out.set(at, product);
    }
  }
}

namespace {

struct Pair {
  int source, token, column;
  int64_t row;  // -1: dropped
};

// By rank and local expert, in (source, token) order.
using Placed = std::vector<std::vector<std::vector<Pair>>>;

int place_of(const Problem& problem, const std::vector<int32_t>& map, int expert, int spread) {
  std::vector<int> places;
  for (int p = 0; p < problem.ranks * problem.experts_per_rank(); ++p) {
    if (map[p] == expert) places.push_back(p);
  }
  return places[spread % places.size()];
}

Placed place(const Problem& problem, const std::vector<Inputs>& inputs) {
  const int local = problem.experts_per_rank();
  const std::vector<int32_t> map = problem.map();
  Placed placed(problem.ranks, std::vector<std::vector<Pair>>(local));
  for (int s = 0; s < problem.ranks; ++s) {
    for (int t = 0; t < inputs[s].num_tokens; ++t) {
      for (int k = 0; k < problem.top_k; ++k) {
        const int expert = inputs[s].indices[t * problem.top_k + k];
        if (expert < 0) continue;
        const int physical = place_of(problem, map, expert, t + s);
        placed[physical / local][physical % local].push_back({s, t, k, -1});
      }
    }
  }
  for (auto& experts : placed) {
    const int64_t rows = problem.row_count(inputs[0].tokens);
    const auto padded = [&](int64_t n) {
      return (n + problem.alignment - 1) / problem.alignment * problem.alignment;
    };
    int64_t clip = 0;
    for (int64_t trial = 0; trial <= int64_t{problem.ranks} * problem.max_tokens; ++trial) {
      int64_t total = 0;
      for (const auto& pairs : experts) total += padded(std::min<int64_t>(pairs.size(), trial));
      if (total <= rows) clip = trial;
    }
    const int64_t room = rows / local;
    if (problem.padded) clip = room;
    int64_t base = 0;
    for (auto& pairs : experts) {
      const int64_t kept = std::min<int64_t>(pairs.size(), clip);
      for (int64_t i = 0; i < kept; ++i) pairs[i].row = base + i;
      base += problem.padded ? room : padded(kept);
    }
  }
  return placed;
}

// Sums float rows in order from the first term on.
class Sum {
 public:
  explicit Sum(int hidden) : row_(hidden, 0.0F) {}
  template <typename Term>
  void add(Term&& term) {
    for (size_t h = 0; h < row_.size(); ++h) {
      const float value = term(h);
      row_[h] = terms_ == 0 ? value : row_[h] + value;
    }
    ++terms_;
  }
  void store(Tensor& out, int64_t row) const {
    for (size_t h = 0; h < row_.size(); ++h) out.set(row * static_cast<int64_t>(row_.size()) + h, row_[h]);
  }
  bool empty() const { return terms_ == 0; }

 private:
  std::vector<float> row_;
  int terms_ = 0;
};

}  // namespace

std::vector<Outputs> oracle(const Problem& problem, const std::vector<Inputs>& inputs) {
  const int hidden = problem.hidden, local = problem.experts_per_rank(), tokens = inputs[0].tokens;
  const int64_t rows = problem.row_count(tokens);
  const Placed placed = place(problem, inputs);
  std::vector<QuantizedRows> quantized(problem.ranks);
  for (int s = 0; s < problem.ranks && problem.quant != Quant::kNone; ++s) {
    quantized[s] = quantize(problem, inputs[s].x);
  }
  std::vector<Outputs> all(problem.ranks);
  for (int r = 0; r < problem.ranks; ++r) {
    Outputs& out = all[r];
    out.tokens = out.d_y = Tensor(problem.dtype, rows * hidden);
    const int64_t scale_bytes = problem.scale_count() * (problem.quant == Quant::kFp8 ? 4 : 1);
    if (problem.quant != Quant::kNone) {
      out.quantized.values.assign(rows * hidden, 0);
      out.quantized.scales.assign(rows * scale_bytes, std::byte{0});
    }
    out.row_weights.assign(rows, 0.0F);
    out.d_row_weights.assign(rows, 0.0F);
    out.num_rows = out.num_dropped = 0;
    out.ok = 1;
    for (int e = 0; e < local; ++e) {
      int kept = 0;
      for (const Pair& pair : placed[r][e]) {
        if (pair.row < 0) {
          ++out.num_dropped;
          continue;
        }
        ++kept;
        const Inputs& home = inputs[pair.source];
        for (int h = 0; h < hidden; ++h) {
          out.tokens.set(pair.row * hidden + h, home.x.get(int64_t{pair.token} * hidden + h));
        }
        if (problem.quant != Quant::kNone) {
          const QuantizedRows& from = quantized[pair.source];
          std::copy_n(from.values.begin() + int64_t{pair.token} * hidden, hidden,
                      out.quantized.values.begin() + pair.row * hidden);
          std::copy_n(from.scales.begin() + pair.token * scale_bytes, scale_bytes,
                      out.quantized.scales.begin() + pair.row * scale_bytes);
        }
        out.row_weights[pair.row] = home.weights[pair.token * problem.top_k + pair.column];
      }
      out.num_rows += kept;
      out.group_sizes.push_back(
          problem.padded ? kept : (kept + problem.alignment - 1) / problem.alignment * problem.alignment);
    }
    if (problem.quant != Quant::kNone) out.tokens = dequantize(problem, out.quantized);
    apply_experts(problem, r, out.group_sizes, out.tokens, out.y);
    for (int e = 0; e < local; ++e) {
      for (const Pair& pair : placed[r][e]) {
        if (pair.row < 0) continue;
        const Inputs& home = inputs[pair.source];
        std::vector<float> y(hidden), d_out(hidden);
        for (int h = 0; h < hidden; ++h) {
          y[h] = out.y.get(pair.row * hidden + h);
          d_out[h] = home.d_out.get(int64_t{pair.token} * hidden + h);
          out.d_y.set(pair.row * hidden + h, home.weighted ? out.row_weights[pair.row] * d_out[h] : d_out[h]);
        }
        if (home.weighted) out.d_row_weights[pair.row] = reference_dot(y, d_out);
      }
    }
    apply_experts(problem, r, out.group_sizes, out.d_y, out.d_tokens);
  }

  for (int s = 0; s < problem.ranks; ++s) {
    const Inputs& in = inputs[s];
    Outputs& out = all[s];
    out.out = out.d_x = Tensor(problem.dtype, int64_t{tokens} * hidden);
    out.d_weights.assign(int64_t{tokens} * problem.top_k, 0.0F);
    for (int t = 0; t < in.num_tokens; ++t) {
      Sum forward(hidden), backward(hidden);
      if (in.accumulates) forward.add([&](int64_t h) { return in.accumulate.get(int64_t{t} * hidden + h); });
      for (int r = 0; r < problem.ranks; ++r) {
        std::vector<std::pair<Pair, int64_t>> mine;
        for (int e = 0; e < local; ++e) {
          for (const Pair& pair : placed[r][e]) {
            if (pair.source == s && pair.token == t) mine.push_back({pair, pair.row});
          }
        }
        if (mine.empty()) continue;
        std::sort(mine.begin(), mine.end(),
                  [](const auto& a, const auto& b) { return a.first.column < b.first.column; });
        Sum partial(hidden), d_partial(hidden);
        for (const auto& [pair, row] : mine) {
          if (row < 0) continue;
          const Outputs& there = all[r];
          const int64_t at = row * hidden;
          partial.add([&](int64_t h) {
            const float y = there.y.get(at + h);
            return in.weighted ? there.row_weights[at / hidden] * y : y;
          });
          d_partial.add([&](int64_t h) { return there.d_tokens.get(at + h); });
          out.d_weights[int64_t{t} * problem.top_k + pair.column] = there.d_row_weights[row];
        }
        // What travels home is rounded; nothing kept is a row of zeros.
        const DType travels = problem.home_dtype.value_or(problem.dtype);
        Tensor wire(travels, hidden), d_wire(travels, hidden);
        partial.store(wire, 0);
        d_partial.store(d_wire, 0);
        forward.add([&](int64_t h) { return wire.get(h); });
        backward.add([&](int64_t h) { return d_wire.get(h); });
      }
      forward.store(out.out, t);
      backward.store(out.d_x, t);
    }
  }
  return all;
}

}  // namespace pplx::moe::testing
