// Rows in 16-byte pieces: types, rounding, sums. The same bits as rows.h and quantize.h give, but for the
// payload of a NaN.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "xla_ffi/cuda/sync.cuh"
#include "xla_ffi/layout.h"

namespace pplx::moe::cuda {

// Elements of T in 16 bytes.
template <typename T>
inline constexpr int kVec = 16 / static_cast<int>(sizeof(T));

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float to_float(__half value) { return __half2float(value); }
template <typename T>
__device__ inline T from_float(float value);
template <>
__device__ inline float from_float<float>(float value) {
  return value;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ inline __half from_float<__half>(float value) {
  return __float2half_rn(value);
}

// Of memory that another agent writes while this kernel runs: past the first-level cache.
__device__ inline uint4 load_shared_vec(const void* at) { return __ldcg(static_cast<const uint4*>(at)); }
__device__ inline uint4 load_vec(const void* at) { return __ldg(static_cast<const uint4*>(at)); }
__device__ inline void store_vec(void* at, uint4 value) { *static_cast<uint4*>(at) = value; }

template <typename T>
__device__ inline void unpack(uint4 packed, float (&out)[kVec<T>]) {
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      out[i] = __uint_as_float(words[i]);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      out[2 * i] = __uint_as_float(words[i] << 16);
      out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000U);
    } else {
      const float2 two = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
      out[2 * i] = two.x;
      out[2 * i + 1] = two.y;
    }
  }
}

template <typename T>
__device__ inline uint4 pack(const float* values) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      words[i] = __float_as_uint(values[i]);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      const __nv_bfloat162 two = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
      words[i] = *reinterpret_cast<const uint32_t*>(&two);
    } else {
      const __half2 two = __floats2half2_rn(values[2 * i], values[2 * i + 1]);
      words[i] = *reinterpret_cast<const uint32_t*>(&two);
    }
  }
  return {words[0], words[1], words[2], words[3]};
}

// kCount values as W, from kCount * sizeof(W) bytes.
template <typename W, int kCount>
__device__ inline void store_values(std::byte* at, const float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i += kVec<W>) {
    store_vec(at + i * static_cast<int>(sizeof(W)), pack<W>(values + i));
  }
}
// Reads what store_values wrote. kShared: another agent may be writing nearby.
template <typename W, bool kShared, int kCount>
__device__ inline void load_values(const std::byte* at, float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i += kVec<W>) {
    float some[kVec<W>];
    const std::byte* from = at + i * static_cast<int>(sizeof(W));
    unpack<W>(kShared ? load_shared_vec(from) : load_vec(from), some);
#pragma unroll
    for (int j = 0; j < kVec<W>; ++j) values[i + j] = some[j];
  }
}

// What a sum starts from: -0, to which adding the first term gives that term; 0 if there is none.
__device__ inline float start_of_sum(bool empty) { return empty ? 0.0F : -0.0F; }

// acc += weight * values, product and sum rounded apart.
template <int kCount>
__device__ inline void accumulate(float (&acc)[kCount], const float (&values)[kCount], float weight) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) acc[i] = __fadd_rn(acc[i], __fmul_rn(weight, values[i]));
}

// --- float8: quantize.h says what the numbers are ---

inline constexpr float kLargestE4m3 = 448.0F;
inline constexpr float kSmallestMaximum = 7.888609052210118e-31F;  // 2^-100

// Two finite values, the first in the low byte.
#if __CUDA_ARCH__ >= 890
__device__ inline uint32_t e4m3_pair(float first, float second) {
  uint16_t bytes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(bytes) : "f"(second), "f"(first));
  return bytes;
}
#else
__device__ inline uint32_t e4m3(float value) {
  const uint32_t bits = __float_as_uint(value);
  const uint32_t sign = (bits >> 24) & 0x80U;
  const uint32_t magnitude = bits & 0x7fffffffU;
  const uint32_t normal = (magnitude - (120U << 23) + 0x7ffffU + ((magnitude >> 20) & 1U)) >> 20;
  const uint32_t subnormal =
      __float_as_uint(__fadd_rn(__uint_as_float(magnitude), 16384.0F)) - __float_as_uint(16384.0F);
  uint32_t byte = magnitude < (121U << 23) ? subnormal : normal;
  byte = magnitude >= __float_as_uint(kLargestE4m3) ? 0x7eU : byte;
  return sign | byte;
}
__device__ inline uint32_t e4m3_pair(float first, float second) { return e4m3(first) | e4m3(second) << 8; }
#endif

struct BlockScale {
  float value;
  uint8_t exponent;
  float inverse;
};
__device__ inline BlockScale block_scale(float max, Quant quant) {
  max = fmaxf(max, kSmallestMaximum);
  if (quant == Quant::kFp8) return {__fdiv_rn(max, kLargestE4m3), 0, __fdiv_rn(kLargestE4m3, max)};
  const uint32_t bits = __float_as_uint(max);
  const uint32_t fits = (bits & 0x7fffffU) <= 0x600000U ? 0U : 1U;
  const uint32_t exponent = (bits >> 23) - 8 + fits;
  return {0.0F, static_cast<uint8_t>(exponent), __uint_as_float((254U - exponent) << 23)};
}

}  // namespace pplx::moe::cuda
