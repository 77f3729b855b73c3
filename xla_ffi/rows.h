// Arithmetic on rows of activations. Products and sums are rounded apart (-ffp-contract=off) in float32 and
// in a fixed order, so that every transport and platform gives the same bits.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace pplx::moe {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}

// No float arithmetic on subnormal operands: XLA's threads may flush those to zero.
inline float to_float(Float16 value) {
  const uint32_t magnitude = value.bits & 0x7fffU;
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000U) << 16;
  const uint32_t normal = (magnitude << 13) + (112U << 23);
  const uint32_t special = (magnitude << 13) | 0x7f800000U;
  const auto subnormal =
      std::bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24F);
  const uint32_t bits = magnitude >= 0x7c00U ? special : magnitude < 0x400U ? subnormal : normal;
  return std::bit_cast<float>(sign | bits);
}

template <typename T>
T from_float(float value);
template <>
inline float from_float<float>(float value) {
  return value;
}
// Round to nearest even. A NaN keeps its sign and becomes quiet; the selects keep the loop vectorisable.
template <>
inline BFloat16 from_float<BFloat16>(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40U;
  const bool nan = (bits & 0x7fffffffU) > 0x7f800000U;
  return {static_cast<uint16_t>(nan ? quiet : rounded)};
}

// Round to nearest even; from 65520 on that is infinity. A NaN becomes quiet.
template <>
inline Float16 from_float<Float16>(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000U;
  const uint32_t magnitude = bits & 0x7fffffffU;
  const uint32_t normal = (magnitude - (112U << 23) + 0xfffU + ((magnitude >> 13) & 1U)) >> 13;
  // The last place of 0.5 is 2^-24, a half's smallest step.
  const uint32_t subnormal =
      std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5F) - std::bit_cast<uint32_t>(0.5F);
  uint32_t half = magnitude < (113U << 23) ? subnormal : normal;
  half = magnitude >= 0x477ff000U ? 0x7c00U : half;
  half = magnitude > 0x7f800000U ? 0x7e00U | ((bits >> 13) & 0x1ffU) : half;
  return {static_cast<uint16_t>(sign | half)};
}

inline constexpr int kBlock = 256;  // elements accumulated in registers and L1 at a time

// The loops below are compiled for the baseline and for AVX2, without its fused multiply-add: twice to four
// times as fast, the same bits.
#if defined(__x86_64__)
#define PPLX_AVX2 [[gnu::target("avx2")]]
inline const bool kHasAvx2 = __builtin_cpu_supports("avx2") != 0;
#else
#define PPLX_AVX2
inline constexpr bool kHasAvx2 = false;
#endif

namespace loops {

template <bool kFirst, typename T>
[[gnu::always_inline]] inline void add_row(float* acc, const T* row, const float* weight, int width) {
  if (weight != nullptr) {
    const float w = *weight;
    for (int h = 0; h < width; ++h) acc[h] = kFirst ? w * to_float(row[h]) : acc[h] + w * to_float(row[h]);
  } else {
    for (int h = 0; h < width; ++h) acc[h] = kFirst ? to_float(row[h]) : acc[h] + to_float(row[h]);
  }
}

template <typename Out, typename In>
[[gnu::always_inline]] inline void sum_rows(Out* out, const Out* start, const In* const* rows,
                                            const float* weights, int n, int64_t hidden) {
  float acc[kBlock];
  for (int64_t at = 0; at < hidden; at += kBlock) {
    const int width = static_cast<int>(std::min<int64_t>(kBlock, hidden - at));
    if (start != nullptr) add_row<true>(acc, start + at, nullptr, width);
    for (int i = 0; i < n; ++i) {
      const float* weight = weights == nullptr ? nullptr : weights + i;
      if (i == 0 && start == nullptr) {
        add_row<true>(acc, rows[i] + at, weight, width);
      } else {
        add_row<false>(acc, rows[i] + at, weight, width);
      }
    }
    for (int h = 0; h < width; ++h) out[at + h] = from_float<Out>(acc[h]);
  }
}

template <typename T>
[[gnu::always_inline]] inline void scale_row(T* out, const T* row, float weight, int64_t hidden) {
  for (int64_t h = 0; h < hidden; ++h) out[h] = from_float<T>(weight * to_float(row[h]));
}

// Sixteen partial sums in a fixed pattern, added pairwise: vectorises, and the order never changes.
template <typename T>
[[gnu::always_inline]] inline float dot_rows(const T* a, const T* b, int64_t hidden) {
  constexpr int kLanes = 16;
  float acc[kLanes] = {};
  int64_t h = 0;
  for (; h + kLanes <= hidden; h += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) acc[lane] += to_float(a[h + lane]) * to_float(b[h + lane]);
  }
  for (int lane = 0; h < hidden; ++h, ++lane) acc[lane] += to_float(a[h]) * to_float(b[h]);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) acc[lane] += acc[lane + width];
  }
  return acc[0];
}

template <typename Out, typename In>
PPLX_AVX2 void sum_rows_avx2(Out* out, const Out* start, const In* const* rows, const float* weights, int n,
                             int64_t hidden) {
  loops::sum_rows(out, start, rows, weights, n, hidden);
}
template <typename T>
PPLX_AVX2 void scale_row_avx2(T* out, const T* row, float weight, int64_t hidden) {
  loops::scale_row(out, row, weight, hidden);
}
template <typename T>
PPLX_AVX2 float dot_rows_avx2(const T* a, const T* b, int64_t hidden) {
  return loops::dot_rows(a, b, hidden);
}

}  // namespace loops

// out = start + sum of weights[i] * rows[i], or of rows[i] where weights is null, from the first term on;
// start may be null. One term at least; out may be one of them.
template <typename Out, typename In>
void sum_rows(Out* out, const Out* start, const In* const* rows, const float* weights, int n,
              int64_t hidden) {
  if constexpr (std::is_same_v<Out, In>) {
    const Out* only = n == 0 ? start : n == 1 && start == nullptr && weights == nullptr ? rows[0] : nullptr;
    if (only != nullptr) {
      if (out != only) std::memcpy(static_cast<void*>(out), only, hidden * sizeof(Out));
      return;
    }
  }
  kHasAvx2 ? loops::sum_rows_avx2(out, start, rows, weights, n, hidden)
           : loops::sum_rows(out, start, rows, weights, n, hidden);
}

template <typename T>
void scale_row(T* out, const T* row, float weight, int64_t hidden) {
  kHasAvx2 ? loops::scale_row_avx2(out, row, weight, hidden) : loops::scale_row(out, row, weight, hidden);
}

template <typename T>
float dot_rows(const T* a, const T* b, int64_t hidden) {
  return kHasAvx2 ? loops::dot_rows_avx2(a, b, hidden) : loops::dot_rows(a, b, hidden);
}

template <typename T>
void fill_nan(T* out, int64_t count) {
  std::fill(out, out + count, from_float<T>(std::numeric_limits<float>::quiet_NaN()));
}

}  // namespace pplx::moe
