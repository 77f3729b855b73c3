// Where received rows go: row = base[expert] + source_base[source][expert] + ordinal.
#pragma once

#include "xla_ffi/cuda/exchange.cuh"

namespace pplx::moe::cuda {

// In shared memory.
struct PlacementTables {
  int32_t* source_base;  // [R, experts_per_rank] position of the source's first row among the expert's
  int32_t* base;         // [experts_per_rank + 1] first row of each expert; then one past the last
  int32_t* kept;         // [experts_per_rank] rows of the expert that are kept
  int64_t* needed;       // [1] rows that would hold everything
  int32_t* dropped;      // [1]
};

__device__ inline int32_t aligned(const MoeShape& shape, int32_t rows) {
  if (shape.alignment == 1) return rows;  // a division saved
  const auto alignment = static_cast<uint32_t>(shape.alignment);
  return static_cast<int32_t>((static_cast<uint32_t>(rows) + alignment - 1) / alignment * alignment);
}

// By a warp: rows of all experts if each keeps at most `clip`.
__device__ inline int64_t rows_with_clip(const MoeShape& shape, const int32_t* sizes, int64_t clip) {
  int64_t rows = 0;
  for (int32_t e = lane_id(); e < shape.experts_per_rank; e += kWarp) {
    rows += aligned(shape, static_cast<int32_t>(sizes[e] < clip ? sizes[e] : clip));
  }
  return warp_sum(rows);
}

// By the team, whose source_base holds counts; after a barrier, and before another one. The same in every
// block.
__device__ inline void place(const MoeShape& shape, const Team& team, int64_t rows, const PlacementTables& to) {
  const int32_t experts = shape.experts_per_rank;
  for (int32_t e = team.thread(); e < experts; e += team.threads) {
    int32_t size = 0;
    for (int32_t s = 0; s < shape.num_ranks; ++s) {
      int32_t& at = to.source_base[int64_t{s} * experts + e];
      const int32_t count = at;
      at = size;
      size += count;
    }
    to.kept[e] = size;
  }
  team.sync();
  if (team.warp() != 0) return;
  const int64_t room = rows / experts;
  int64_t needed = rows_with_clip(shape, to.kept, INT32_MAX), clip = room;
  if (!shape.padded) {
    clip = INT32_MAX;
    if (needed > rows) {
      int64_t low = 0, high = INT32_MAX;
      while (low < high) {
        const int64_t middle = (low + high + 1) / 2;
        if (rows_with_clip(shape, to.kept, middle) <= rows) {
          low = middle;
        } else {
          high = middle - 1;
        }
      }
      clip = low;
    }
  }
  // A scan, a warp's width at a time.
  int64_t end = 0, dropped = 0;
  int32_t most = 0;
  for (int32_t first = 0; first < experts; first += kWarp) {
    const int32_t e = first + lane_id();
    const int32_t size = e < experts ? to.kept[e] : 0;
    const int32_t kept = static_cast<int32_t>(size < clip ? size : clip);
    int64_t taken = e < experts ? (shape.padded ? room : aligned(shape, kept)) : 0;
    dropped += size - kept;
    most = max(most, size);
    const int64_t own = taken;
#pragma unroll
    for (int width = 1; width < kWarp; width *= 2) {
      const int64_t other = __shfl_up_sync(kAllLanes, taken, width);
      if (lane_id() >= width) taken += other;
    }
    if (e < experts) {
      to.kept[e] = kept;
      to.base[e] = static_cast<int32_t>(end + taken - own);
    }
    end += __shfl_sync(kAllLanes, taken, kWarp - 1);
  }
  dropped = warp_sum(dropped);
  if (shape.padded) needed = __reduce_max_sync(kAllLanes, static_cast<uint32_t>(most));
  if (lane_id() == 0) {
    to.base[experts] = static_cast<int32_t>(end);
    *to.needed = needed;
    *to.dropped = static_cast<int32_t>(dropped);
  }
}

}  // namespace pplx::moe::cuda
