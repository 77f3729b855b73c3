// What an exchange of a group with this shape is, as its messages say it.
#pragma once

#include <cstdint>
#include <string_view>

#include "proxy/moe/exchange_group.h"
#include "xla_ffi/layout.h"

namespace pplx::moe {

inline CallSite call_site(const MoeShape& shape, Kind kind, uint64_t tag, int64_t tokens,
                          std::string_view name) {
  return {.kind = kind,
          .tag = tag,
          .tokens = static_cast<uint32_t>(tokens),
          .hidden = static_cast<uint32_t>(shape.hidden),
          .format = shape.format(),
          .top_k = static_cast<uint8_t>(shape.top_k),
          .local_experts = static_cast<uint16_t>(shape.experts_per_rank),
          .name = name};
}

}  // namespace pplx::moe
