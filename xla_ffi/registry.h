// Groups that compiled programs may run on, found by the number that is in their HLO and by device.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "proxy/moe/exchange_group.h"
#include "proxy/process.h"
#include "xla_ffi/layout.h"
#include "xla_ffi/losses.h"

namespace pplx::moe {

// A process has one for each kind of member. Compiled programs outlive groups: a number may point to nothing,
// to a closed group, or to a later group that is equal by value.
template <typename M>
class RegistryOf {
 public:
  static RegistryOf& instance() {
    // Leaked: XLA's threads may run handlers while static objects are destroyed.
    static auto* registry = new RegistryOf;
    return *registry;
  }

  void put(int64_t group, int32_t device, std::shared_ptr<M> member) {
    std::shared_ptr<M> before;  // destroyed after the lock: closing takes time
    const std::lock_guard guard(mutex_);
    before = std::exchange(members_[{group, device}], std::move(member));
  }

  void erase(int64_t group, int32_t device, const M* member) {
    std::shared_ptr<M> before;
    const std::lock_guard guard(mutex_);
    const auto at = members_.find({group, device});
    if (at == members_.end() || at->second.get() != member) return;
    before = std::move(at->second);
    members_.erase(at);
  }

  // Connects the group first if it is known to Python but not yet connected. Throws kClosed.
  std::shared_ptr<M> get(int64_t group, int32_t device) {
    mark_.require("the group");
    if (auto member = find(group, device); member && !member->closed()) return member;
    std::function<void(int64_t)> connector;
    {
      const std::lock_guard guard(mutex_);
      connector = connector_;
    }
    if (connector) connector(group);
    if (auto member = find(group, device)) return member;
    throw Error(ErrorKind::kClosed,
                "the expert-parallel group of this program is not open on device " + std::to_string(device) +
                    ": it was closed, or its ExpertParallel object is gone; make an equal one");
  }

  // Called without locks held by the first exchange of a group that is not connected.
  void set_connector(std::function<void(int64_t group)> connector) {
    const std::lock_guard guard(mutex_);
    connector_ = std::move(connector);
  }

 private:
  std::shared_ptr<M> find(int64_t group, int32_t device) const {
    const std::lock_guard guard(mutex_);
    const auto at = members_.find({group, device});
    return at == members_.end() ? nullptr : at->second;
  }

  const ProcessMark mark_;
  mutable std::mutex mutex_;
  std::map<std::pair<int64_t, int32_t>, std::shared_ptr<M>> members_;
  std::function<void(int64_t)> connector_;
};

// One CPU device's membership in a group.
struct Member {
  MoeShape shape;
  ExchangeGroup group;
  Losses losses;
  Member(const MoeShape& member_shape, GroupConfig config) : shape(member_shape), group(std::move(config)) {}
  bool closed() const noexcept { return group.closed(); }
};
using Registry = RegistryOf<Member>;

// Bytes of one source's region and of one lane's send buffer.
struct BufferSizes {
  size_t region_bytes;
  size_t staging_bytes;
};
BufferSizes buffer_sizes(const MoeShape& shape);

}  // namespace pplx::moe
