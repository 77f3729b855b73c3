// Memory of the members in this process, whose addresses serve every device here.
#pragma once

#include <map>
#include <memory>
#include <mutex>

#include "xla_ffi/cuda/control_block.h"
#include "xla_ffi/cuda/fd_exchange.h"
#include "xla_ffi/cuda/memory.h"

namespace pplx::moe::cuda {

struct LocalRank {
  std::shared_ptr<DeviceRegions> regions;
  const Sites* sites = nullptr;  // of a control block, which is never freed
};

// By token.
class LocalRegions {
 public:
  static LocalRegions& instance() {
    static auto* regions = new LocalRegions;  // leaked, like registries
    return *regions;
  }
  void put(const Token& token, const LocalRank& rank) {
    const std::lock_guard guard(mutex_);
    std::erase_if(ranks_, [](const auto& entry) { return entry.second.regions.expired(); });
    ranks_[token] = {rank.regions, rank.sites};
  }
  // Without regions where there is none, or no more.
  LocalRank find(const Token& token) {
    const std::lock_guard guard(mutex_);
    const auto at = ranks_.find(token);
    if (at == ranks_.end()) return {};
    return {at->second.regions.lock(), at->second.sites};
  }

 private:
  struct Entry {
    std::weak_ptr<DeviceRegions> regions;
    const Sites* sites = nullptr;
  };
  std::mutex mutex_;
  std::map<Token, Entry> ranks_;
};

}  // namespace pplx::moe::cuda
