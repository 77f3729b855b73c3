// float8 e4m3 with a scale for every kScaleBlock values of a row. The arithmetic is spelled out, so that
// every platform gives the same bits: docs/protocol.md, section "Quantisation".
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "xla_ffi/layout.h"
#include "xla_ffi/rows.h"

namespace pplx::moe {

inline constexpr float kMaxE4m3 = 448.0F;
// Smaller maxima are treated as this one: its quotients are normal numbers.
inline constexpr float kSmallestMax = 0x1p-100F;
inline constexpr uint8_t kNanE4m3 = 0x7f, kNanE8m0 = 0xff;

// Round to nearest even, saturating; NaN stays NaN.
inline uint8_t to_e4m3(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 24) & 0x80U;
  const uint32_t magnitude = bits & 0x7fffffffU;
  const uint32_t normal = (magnitude - (120U << 23) + 0x7ffffU + ((magnitude >> 20) & 1U)) >> 20;
  // The last place of 2^14 is 2^-9, the smallest step of e4m3.
  const uint32_t subnormal =
      std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0x1p14F) - std::bit_cast<uint32_t>(0x1p14F);
  uint32_t byte = magnitude < (121U << 23) ? subnormal : normal;
  byte = magnitude >= std::bit_cast<uint32_t>(kMaxE4m3) ? 0x7eU : byte;
  byte = magnitude > 0x7f800000U ? uint32_t{kNanE4m3} : byte;
  return static_cast<uint8_t>(sign | byte);
}

// A block's scale as it travels, and what its values are multiplied by.
struct Scale {
  float value;       // float32 scale
  uint8_t exponent;  // UE8M0 scale: 2^(exponent - 127)
  float inverse;
};

inline Scale block_scale(float max, Quant quant) {
  max = std::max(max, kSmallestMax);
  if (quant == Quant::kFp8) return {max / kMaxE4m3, 0, kMaxE4m3 / max};
  // The smallest power of two, 2^e, with max <= 448 * 2^e = 1.75 * 2^(e + 8).
  const auto bits = std::bit_cast<uint32_t>(max);
  const uint32_t fits = (bits & 0x7fffffU) <= 0x600000U ? 0U : 1U;
  const uint32_t exponent = (bits >> 23) - 8 + fits;
  return {0.0F, static_cast<uint8_t>(exponent), std::bit_cast<float>((254U - exponent) << 23)};
}

namespace loops {

template <typename T>
[[gnu::always_inline]] inline float largest(const T* row, int width) {
  // Of the bits: the order of positive floats, and NaN is larger than anything.
  uint32_t max = 0;
  for (int h = 0; h < width; ++h) {
    max = std::max(max, std::bit_cast<uint32_t>(to_float(row[h])) & 0x7fffffffU);
  }
  return std::bit_cast<float>(max);
}

template <typename T>
[[gnu::always_inline]] inline void quantize_row(uint8_t* out, std::byte* scales, const T* row, int64_t hidden,
                                                Quant quant) {
  for (int64_t at = 0; at < hidden; at += kScaleBlock) {
    const int width = static_cast<int>(std::min<int64_t>(kScaleBlock, hidden - at));
    const float max = largest(row + at, width);
    // Infinity or NaN in a block: all of it is NaN.
    const bool finite = std::bit_cast<uint32_t>(max) < 0x7f800000U;
    const Scale scale = block_scale(finite ? max : 0.0F, quant);
    if (finite) {
      for (int h = 0; h < width; ++h) out[at + h] = to_e4m3(to_float(row[at + h]) * scale.inverse);
    } else {
      std::memset(out + at, kNanE4m3, width);
    }
    if (quant == Quant::kFp8) {
      std::memcpy(scales, &scale.value, sizeof(float));
      scales += sizeof(float);
    } else {
      *scales++ = std::byte{scale.exponent};
    }
  }
}

template <typename T>
PPLX_AVX2 void quantize_row_avx2(uint8_t* out, std::byte* scales, const T* row, int64_t hidden, Quant quant) {
  loops::quantize_row(out, scales, row, hidden, quant);
}

}  // namespace loops

template <typename T>
void quantize_row(uint8_t* out, std::byte* scales, const T* row, int64_t hidden, Quant quant) {
  kHasAvx2 ? loops::quantize_row_avx2(out, scales, row, hidden, quant)
           : loops::quantize_row(out, scales, row, hidden, quant);
}

}  // namespace pplx::moe
