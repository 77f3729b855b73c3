// A token's row, or a part of it, from one place to several, quantised on the way where it has to be.
#pragma once

#include "xla_ffi/cuda/exchange.cuh"
#include "xla_ffi/cuda/vec.cuh"

namespace pplx::moe::cuda {

// Which bytes of a dispatched row, and which of its scales, a part has.
struct Part {
  int32_t begin, end;
  int32_t scale_begin, scale_end;
};

__device__ inline Part part_of_token(const Args& args, int32_t part) {
  if (args.scales == 0) {
    const int32_t vecs = args.row_bytes / 16;
    return {(vecs * part >> args.part_shift) * 16, (vecs * (part + 1) >> args.part_shift) * 16, 0, 0};
  }
  const int32_t first = args.scales * part >> args.part_shift,
                last = args.scales * (part + 1) >> args.part_shift;
  return {first * kScaleBlock, min(last * kScaleBlock, args.token_bytes), first, last};
}

// Where a row goes: the lanes in `lanes` hold one place each.
struct Places {
  uint32_t lanes;
  std::byte* row;
  std::byte* scales;

  // visit(row) or visit(row, scales) for each; by the whole warp.
  template <typename Visit>
  __device__ void each_row(Visit&& visit) const {
    for (uint32_t left = lanes; left != 0; left &= left - 1)
      visit(of(row, __ffs(static_cast<int>(left)) - 1));
  }
  template <typename Visit>
  __device__ void each(Visit&& visit) const {
    for (uint32_t left = lanes; left != 0; left &= left - 1) {
      const int lane = __ffs(static_cast<int>(left)) - 1;
      visit(of(row, lane), of(scales, lane));
    }
  }

 private:
  __device__ static std::byte* of(std::byte* mine, int lane) {
    return reinterpret_cast<std::byte*>(__shfl_sync(kAllLanes, reinterpret_cast<uint64_t>(mine), lane));
  }
};

// By a warp. kShared: another agent wrote the source while this kernel ran. `places()` is asked for when the
// first loads are under way.
template <bool kShared, typename FindPlaces>
__device__ inline Places copy_bytes_to(const std::byte* source, Part part, FindPlaces&& find) {
  constexpr int kAtOnce = 8;
  Places to{};
  bool found = false;
  for (int32_t base = part.begin; base < part.end; base += kAtOnce * kWarp * 16) {
    uint4 some[kAtOnce];
    const int32_t first = base + lane_id() * 16;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int32_t at = first + i * kWarp * 16;
      if (at < part.end) some[i] = kShared ? load_shared_vec(source + at) : load_vec(source + at);
    }
    if (!found) {
      to = find();
      found = true;
    }
    to.each_row([&](std::byte* row) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int32_t at = first + i * kWarp * 16;
        if (at < part.end) store_vec(row + at, some[i]);
      }
    });
  }
  return found ? to : find();
}
template <bool kShared>
__device__ __forceinline__ void copy_bytes(const std::byte* source, Part part, Places to) {
  copy_bytes_to<kShared>(source, part, [&] { return to; });
}

template <bool kShared>
__device__ __forceinline__ void copy_scales(Quant quant, const std::byte* source, Part part, Places to) {
  for (int32_t base = part.scale_begin; base < part.scale_end; base += kWarp) {
    const int32_t at = base + lane_id();
    const bool mine = at < part.scale_end;
    if (quant == Quant::kFp8) {
      const auto* from = reinterpret_cast<const float*>(source) + at;
      const float scale = mine ? (kShared ? __ldcg(from) : __ldg(from)) : 0.0F;
      to.each([&](std::byte*, std::byte* scales) {
        if (mine) reinterpret_cast<float*>(scales)[at] = scale;
      });
    } else {
      const auto* from = reinterpret_cast<const unsigned char*>(source) + at;
      const unsigned char scale = mine ? (kShared ? __ldcg(from) : __ldg(from)) : 0;
      to.each([&](std::byte*, std::byte* scales) {
        if (mine) reinterpret_cast<unsigned char*>(scales)[at] = scale;
      });
    }
  }
}

// By a warp, a block by kLanes lanes, each of which writes 16 bytes.
template <typename T>
__device__ __noinline__ void quantize_part(Quant quant, const T* source, Part part, Places to) {
  constexpr int kEach = 16, kLanes = kScaleBlock / kEach, kBlocks = kWarp / kLanes, kAtOnce = 2;
  constexpr int kLoads = kEach / kVec<T>;
#pragma unroll 1
  for (int32_t base = part.scale_begin; base < part.scale_end; base += kBlocks * kAtOnce) {
    const int32_t first = base + lane_id() / kLanes;
    uint4 some[kAtOnce][kLoads];
#pragma unroll
    for (int m = 0; m < kAtOnce; ++m) {
      const int32_t at = (first + m * kBlocks) * kScaleBlock + lane_id() % kLanes * kEach;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        some[m][i] = at + i * kVec<T> < part.end ? load_vec(source + at + i * kVec<T>) : uint4{0, 0, 0, 0};
      }
    }
#pragma unroll
    for (int m = 0; m < kAtOnce; ++m) {
      const int32_t block = first + m * kBlocks;
      const int32_t at = block * kScaleBlock + lane_id() % kLanes * kEach;
      float values[kEach];
      uint32_t max = 0;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        float of[kVec<T>];
        unpack<T>(some[m][i], of);
#pragma unroll
        for (int j = 0; j < kVec<T>; ++j) {
          values[i * kVec<T> + j] = of[j];
          max = ::max(max, __float_as_uint(of[j]) & 0x7fffffffU);
        }
      }
#pragma unroll
      for (int width = kLanes / 2; width > 0; width /= 2) {
        max = ::max(max, __shfl_xor_sync(kAllLanes, max, width));
      }
      const bool finite = max < 0x7f800000U;
      const BlockScale scale = block_scale(finite ? __uint_as_float(max) : 0.0F, quant);
      uint32_t words[kEach / 4];
#pragma unroll
      for (int w = 0; w < kEach / 4; ++w) {
        words[w] = 0;
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
          const uint32_t two = e4m3_pair(__fmul_rn(values[4 * w + j], scale.inverse),
                                         __fmul_rn(values[4 * w + j + 1], scale.inverse));
          words[w] |= (finite ? two : 0x7f7fU) << (8 * j);
        }
      }
      const bool mine = at < part.end;
      to.each([&](std::byte* row, std::byte* scales) {
        if (!mine) return;
        store_vec(row + at, {words[0], words[1], words[2], words[3]});
        if (lane_id() % kLanes != 0) return;
        if (quant == Quant::kFp8) {
          reinterpret_cast<float*>(scales)[block] = scale.value;
        } else {
          reinterpret_cast<uint8_t*>(scales)[block] = scale.exponent;
        }
      });
    }
  }
}

// By a warp: `bytes`, a multiple of 16, of zeros.
__device__ inline void clear_bytes(std::byte* at, int64_t bytes) {
  for (int64_t i = lane_id() * 16; i < bytes; i += kWarp * 16) store_vec(at + i, {0, 0, 0, 0});
}

// By a block: `count` NaNs of a type, or bytes of a value.
template <typename T>
__device__ __noinline__ void fill(T* at, int64_t count, T value) {
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) at[i] = value;
}
__device__ inline void fill_nan(void* at, int64_t count, DType dtype) {
  if (dtype == DType::kFloat32) return fill(static_cast<uint32_t*>(at), count, 0x7fc00000U);
  fill(static_cast<uint16_t*>(at), count,
       static_cast<uint16_t>(dtype == DType::kBFloat16 ? 0x7fc0U : 0x7e00U));
}

}  // namespace pplx::moe::cuda
