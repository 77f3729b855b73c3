// Arithmetic on rows of activations. Products and sums are rounded apart (-ffp-contract=off) in float32 and
// in a fixed order, so that every transport and platform gives the same bits.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace pplx::moe {

struct BFloat16 {
  uint16_t bits;
};

inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
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

template <typename T>
[[gnu::always_inline]] inline void sum_rows(T* out, const T* const* rows, const float* weights, int n,
                                            int64_t hidden) {
  if (n == 1 && weights == nullptr) {
    if (out != rows[0]) std::memcpy(out, rows[0], hidden * sizeof(T));
    return;
  }
  float acc[kBlock];
  for (int64_t at = 0; at < hidden; at += kBlock) {
    const int width = static_cast<int>(std::min<int64_t>(kBlock, hidden - at));
    for (int i = 0; i < n; ++i) {
      const T* row = rows[i] + at;
      if (weights != nullptr) {
        const float weight = weights[i];
        if (i == 0) {
          for (int h = 0; h < width; ++h) acc[h] = weight * to_float(row[h]);
        } else {
          for (int h = 0; h < width; ++h) acc[h] += weight * to_float(row[h]);
        }
      } else if (i == 0) {
        for (int h = 0; h < width; ++h) acc[h] = to_float(row[h]);
      } else {
        for (int h = 0; h < width; ++h) acc[h] += to_float(row[h]);
      }
    }
    for (int h = 0; h < width; ++h) out[at + h] = from_float<T>(acc[h]);
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

template <typename T>
PPLX_AVX2 void sum_rows_avx2(T* out, const T* const* rows, const float* weights, int n, int64_t hidden) {
  loops::sum_rows(out, rows, weights, n, hidden);
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

// out = sum of weights[i] * rows[i], or of rows[i] where weights is null, starting from the first term.
// `n` > 0; out may be one of rows.
template <typename T>
void sum_rows(T* out, const T* const* rows, const float* weights, int n, int64_t hidden) {
  kHasAvx2 ? loops::sum_rows_avx2(out, rows, weights, n, hidden)
           : loops::sum_rows(out, rows, weights, n, hidden);
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
