// Index arithmetic of the exchange: which slot, which row. Host and device code share it.
// docs/protocol.md, section "Layout", is the reference.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define PPLX_HD __host__ __device__
#else
#define PPLX_HD
#endif

namespace pplx::moe {

inline constexpr int kMaxTopK = 16;

enum class DType : uint8_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// How dispatched tokens are quantised: float8 e4m3 with a scale for every kScaleBlock values of a row.
enum class Quant : uint8_t {
  kNone = 0,
  kFp8 = 1,       // float32 scales
  kFp8Ue8m0 = 2,  // scales are powers of two, an exponent byte each
};
inline constexpr int kScaleBlock = 128;

PPLX_HD constexpr size_t item_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

PPLX_HD constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Values of `home`, the sanitised routing of a rank's own tokens: a physical expert (rank * experts_per_rank
// + local expert), or one of these.
inline constexpr int32_t kNotRouted = -1;
inline constexpr int32_t kPastEnd = -2;  // the token is at or past num_tokens

// Everything static about a group's exchanges; equal on all ranks but for `rank`.
struct MoeShape {
  int32_t rank = 0;
  int32_t num_ranks = 1;
  int32_t num_experts = 1;       // logical
  int32_t experts_per_rank = 1;  // physical slots for experts on each rank
  int32_t top_k = 1;
  int32_t hidden = 1;
  int32_t max_tokens = 1;
  int32_t chunk = 1;      // tokens of one round
  int32_t alignment = 1;  // of an expert's first row
  DType dtype = DType::kFloat32;
  DType home_dtype = DType::kFloat32;  // of rows on their way home: dtype, or float32
  Quant quant = Quant::kNone;
  bool padded = false;  // every expert has rows / experts_per_rank rows of its own
  bool zero_tail = true;
  bool drop = false;  // on overflow: drop and count; otherwise a data error

  PPLX_HD int32_t physical_experts() const { return num_ranks * experts_per_rank; }
  // Most experts of one token on one rank.
  PPLX_HD int32_t entries() const { return top_k < experts_per_rank ? top_k : experts_per_rank; }
  PPLX_HD int32_t rounds(int32_t tokens) const { return tokens <= chunk ? 1 : (tokens + chunk - 1) / chunk; }
  PPLX_HD int64_t row_bytes() const { return hidden * static_cast<int64_t>(item_size(dtype)); }

  // Of a dispatched row and its scales, on the wire and in the output.
  PPLX_HD int64_t token_bytes() const { return quant == Quant::kNone ? row_bytes() : hidden; }
  PPLX_HD int64_t scales() const {
    return quant == Quant::kNone ? 0 : (hidden + kScaleBlock - 1) / kScaleBlock;
  }
  PPLX_HD int64_t scale_bytes() const { return scales() * (quant == Quant::kFp8Ue8m0 ? 1 : 4); }
  // Tells formats apart in a message's header.
  PPLX_HD uint8_t format() const {
    return static_cast<uint8_t>(static_cast<int>(dtype) | static_cast<int>(home_dtype) << 2 |
                                static_cast<int>(quant) << 4 | (padded ? 1 : 0) << 6);
  }

  // Bytes of a message's parts, all multiples of 16.
  PPLX_HD int64_t counts_bytes() const { return round_up(4 * experts_per_rank, 64); }
  PPLX_HD int64_t slot_header_bytes() const { return round_up(8 + 12 * entries(), 16); }
  PPLX_HD int64_t row_stride() const { return round_up(row_bytes(), 16); }
  PPLX_HD int64_t home_stride() const {
    return round_up(hidden * static_cast<int64_t>(item_size(home_dtype)), 16);
  }
  PPLX_HD int64_t token_stride() const { return round_up(token_bytes(), 16); }
  PPLX_HD int64_t dispatch_stride() const {
    return slot_header_bytes() + token_stride() + round_up(scale_bytes(), 16);
  }
  PPLX_HD int64_t dispatch_transpose_stride() const { return home_stride() + round_up(4 * entries(), 16); }
  PPLX_HD int64_t longest_body() const {
    int64_t stride = dispatch_stride();
    if (dispatch_transpose_stride() > stride) stride = dispatch_transpose_stride();
    if (row_stride() > stride) stride = row_stride();
    return counts_bytes() + chunk * stride;
  }
};

// One expert of a token on the destination rank, in top-k column order.
struct SlotEntry {
  float weight;
  uint32_t ordinal;  // among the source's tokens for this expert, all rounds together
  uint16_t local_expert;
  uint8_t column;
  uint8_t reserved;
};
static_assert(sizeof(SlotEntry) == 12);

// In front of a dispatched row.
struct SlotHeader {
  uint32_t token;
  uint32_t entries;
};
static_assert(sizeof(SlotHeader) == 8);

// The distinct ranks that a token's experts lie on, ascending; returns how many. Ascending order makes the
// sum at home the same on every transport.
PPLX_HD inline int destinations(const int32_t* home, int top_k, int experts_per_rank, int32_t* ranks) {
  int count = 0;
  for (int k = 0; k < top_k; ++k) {
    if (home[k] < 0) continue;
    const int32_t rank = home[k] / experts_per_rank;
    int at = count;
    while (at > 0 && ranks[at - 1] > rank) --at;
    if (at > 0 && ranks[at - 1] == rank) continue;
    for (int i = count; i > at; --i) ranks[i] = ranks[i - 1];
    ranks[at] = rank;
    ++count;
  }
  return count;
}

// The largest c <= `most` with sum over experts of round_up(min(sizes[e], c), alignment) <= rows.
PPLX_HD inline int64_t largest_clip(const int64_t* sizes, int experts, int64_t alignment, int64_t rows,
                                    int64_t most) {
  int64_t low = 0, high = most;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    int64_t total = 0;
    for (int e = 0; e < experts; ++e) total += round_up(sizes[e] < middle ? sizes[e] : middle, alignment);
    if (total <= rows) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

}  // namespace pplx::moe
