// What kernels find wrong, as errors for people.
#pragma once

#include <functional>
#include <optional>
#include <string>

#include "proxy/error.h"
#include "proxy/moe/exchange_group.h"
#include "xla_ffi/cuda/control.h"
#include "xla_ffi/cuda/control_block.h"
#include "xla_ffi/layout.h"

namespace pplx::moe::cuda {

// A rank's call by kind and tag, where this process can know it.
using FindSite = std::function<std::optional<Site>(uint32_t rank, Kind kind, uint64_t tag)>;

struct FaultContext {
  const ExchangeGroup& group;
  const MoeShape& shape;
  const Sites& sites;
  const FindSite& site_of_peer;
};

// A copy of the record, if it is complete.
std::optional<FaultRecord> read_fault(FaultRecord& record);
Error fault_error(const FaultContext& context, const FaultRecord& record);

}  // namespace pplx::moe::cuda
