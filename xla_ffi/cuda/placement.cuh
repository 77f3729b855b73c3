// Where received rows go: row = base[expert] + source_base[source][expert] + ordinal.
#pragma once

#include "xla_ffi/cuda/exchange.cuh"

namespace pplx::moe::cuda {

struct PlacementTables {
  SharedArray<int32_t>
      source_base;              // [R, experts_per_rank] position of the source's first row among the expert's
  SharedArray<int32_t> base;    // [experts_per_rank + 1] first row of each expert; then one past the last
  SharedArray<int32_t> kept;    // [experts_per_rank] rows of the expert that are kept
  SharedArray<int32_t> needed;  // [1] rows that would hold everything; padded: in the fullest expert
  SharedArray<int32_t> dropped;  // [1]
};

__device__ inline int32_t aligned(const MoeShape& shape, int32_t rows) {
  if (shape.alignment == 1) return rows;  // a division saved
  const auto alignment = static_cast<uint32_t>(shape.alignment);
  return static_cast<int32_t>((static_cast<uint32_t>(rows) + alignment - 1) / alignment * alignment);
}

// By a warp: the rows of all experts if each keeps at most `clip`, the same in all lanes.
__device__ inline int64_t rows_with_clip(const MoeShape& shape, const int32_t* sizes, int32_t clip) {
  int64_t rows = 0;
  for (int32_t e = lane_id(); e < shape.experts_per_rank; e += kWarp)
    rows += aligned(shape, min(sizes[e], clip));
  return warp_sum(rows);
}

// By the team, whose source_base holds counts; after a barrier, and before another one. The same in every
// block.
__device__ inline void place(const MoeShape& shape, const Team& team, int64_t rows,
                             const PlacementTables& to) {
  const int32_t experts = shape.experts_per_rank;
  for (int32_t e = team.thread(); e < experts; e += team.threads) {
    int32_t size = 0;
    for (int32_t s = 0; s < shape.num_ranks; ++s) {
      int32_t& at = to.source_base[s * experts + e];
      const int32_t count = at;
      at = size;
      size += count;
    }
    to.kept[e] = size;
  }
  team.sync();
  if (team.warp() != 0) return;
  const int32_t room = static_cast<int32_t>(rows / experts);
  int32_t clip = shape.padded ? room : INT32_MAX;
  for (int attempt = 0;; ++attempt) {
    // A scan, a warp's width at a time. Rows in all fit 32 bits (checked by Python), as does what is needed.
    int32_t end = 0, dropped = 0, most = 0;
    for (int32_t first = 0; first < experts; first += kWarp) {
      const int32_t e = first + lane_id();
      const int32_t size = e < experts ? to.kept[e] : 0;
      const int32_t kept = min(size, clip);
      const int32_t own = e >= experts ? 0 : shape.padded ? room : aligned(shape, kept);
      int32_t taken = own;
      dropped += size - kept;
      most = max(most, size);
#pragma unroll
      for (int width = 1; width < kWarp; width *= 2) {
        const int32_t other = __shfl_up_sync(kAllLanes, taken, width);
        if (lane_id() >= width) taken += other;
      }
      if (e < experts) to.base[e] = end + taken - own;
      end += __shfl_sync(kAllLanes, taken, kWarp - 1);
    }
    if (attempt == 0 && lane_id() == 0) *to.needed = end;
    if (!shape.padded && end > rows) {
      int32_t low = 0, high = INT32_MAX;
      while (low < high) {
        const auto middle = static_cast<int32_t>((int64_t{low} + high + 1) / 2);
        if (rows_with_clip(shape, to.kept, middle) <= rows) {
          low = middle;
        } else {
          high = middle - 1;
        }
      }
      clip = low;
      continue;
    }
    dropped = __reduce_add_sync(kAllLanes, dropped);
    most = __reduce_max_sync(kAllLanes, most);
    for (int32_t e = lane_id(); e < experts; e += kWarp) to.kept[e] = min(to.kept[e], clip);
    if (lane_id() == 0) {
      to.base[experts] = end;
      *to.dropped = dropped;
      if (shape.padded) *to.needed = most;
    }
    return;
  }
}

}  // namespace pplx::moe::cuda
