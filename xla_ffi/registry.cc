#include "xla_ffi/registry.h"

#include <algorithm>

namespace pplx::moe {

BufferSizes buffer_sizes(const MoeShape& shape) {
  const auto message = [&](int64_t body) {
    return round_up(static_cast<int64_t>(sizeof(RegionHeader)) + body, 64);
  };
  const int64_t region = message(shape.longest_body());
  // A step sends at most chunk * min(K, R) rows; a combine of more than that drains the buffer on the way.
  const int64_t stride = std::max(shape.dispatch_stride(), shape.dispatch_transpose_stride());
  const int64_t copies = int64_t{shape.chunk} * std::min(shape.top_k, shape.num_ranks);
  const int64_t staging = shape.num_ranks * message(shape.counts_bytes()) + copies * stride;
  return {.region_bytes = static_cast<size_t>(region),
          .staging_bytes = static_cast<size_t>(round_up(std::max(region, staging), 64))};
}

}  // namespace pplx::moe
