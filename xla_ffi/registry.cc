#include "xla_ffi/registry.h"

#include <algorithm>

namespace pplx::moe {

Registry& Registry::instance() {
  // Leaked: XLA's threads may run handlers while static objects are destroyed.
  static auto* registry = new Registry;
  return *registry;
}

void Registry::put(int64_t group, int32_t device, std::shared_ptr<Member> member) {
  std::shared_ptr<Member> before;  // destroyed after the lock: closing takes time
  const std::lock_guard guard(mutex_);
  before = std::exchange(members_[{group, device}], std::move(member));
}

void Registry::erase(int64_t group, int32_t device, const Member* member) {
  std::shared_ptr<Member> before;
  const std::lock_guard guard(mutex_);
  const auto at = members_.find({group, device});
  if (at == members_.end() || at->second.get() != member) return;
  before = std::move(at->second);
  members_.erase(at);
}

std::shared_ptr<Member> Registry::find(int64_t group, int32_t device) const {
  const std::lock_guard guard(mutex_);
  const auto at = members_.find({group, device});
  return at == members_.end() ? nullptr : at->second;
}

std::shared_ptr<Member> Registry::get(int64_t group, int32_t device) {
  mark_.require("the group");
  if (auto member = find(group, device); member && !member->group.closed()) return member;
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

void Registry::set_connector(std::function<void(int64_t)> connector) {
  const std::lock_guard guard(mutex_);
  connector_ = std::move(connector);
}

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
