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

namespace pplx::moe {

// One device's membership in a group.
struct Member {
  MoeShape shape;
  ExchangeGroup group;
  Member(const MoeShape& member_shape, GroupConfig config) : shape(member_shape), group(std::move(config)) {}
};

// A process has one. Compiled programs outlive groups: a number may point to nothing, to a closed group, or
// to a later group that is equal by value.
class Registry {
 public:
  static Registry& instance();

  void put(int64_t group, int32_t device, std::shared_ptr<Member> member);
  void erase(int64_t group, int32_t device, const Member* member);
  // Connects the group first if it is known to Python but not yet connected. Throws kClosed.
  std::shared_ptr<Member> get(int64_t group, int32_t device);

  // Called without locks held by the first exchange of a group that is not connected.
  void set_connector(std::function<void(int64_t group)> connector);

 private:
  std::shared_ptr<Member> find(int64_t group, int32_t device) const;

  const ProcessMark mark_;
  mutable std::mutex mutex_;
  std::map<std::pair<int64_t, int32_t>, std::shared_ptr<Member>> members_;
  std::function<void(int64_t)> connector_;
};

// Bytes of one source's region and of one lane's send buffer.
struct BufferSizes {
  size_t region_bytes;
  size_t staging_bytes;
};
BufferSizes buffer_sizes(const MoeShape& shape);

}  // namespace pplx::moe
