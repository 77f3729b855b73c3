// A peer group and the state of its barriers.
#pragma once

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <optional>

#include "proxy/bytes.h"
#include "proxy/engine/core.h"

namespace pplx {

// Barrier n is passed when everyone's n-th notice, or a later one, has arrived. Numbers only grow, so that
// notices may come in any order; the hash and generation keep groups of equal ids apart.
class GroupImpl final : public PeerGroup, public std::enable_shared_from_this<GroupImpl> {
 public:
  GroupImpl(std::shared_ptr<EngineCore> core, const std::vector<Address>& members, uint32_t group_id,
            const Address& self)
      : id(group_id), core_(std::move(core)), arrived_(members.size()) {
    ByteWriter out;
    out.put(group_id);
    for (size_t rank = 0; rank < members.size(); ++rank) {
      decode_address(members[rank].bytes());
      out.blob(members[rank].bytes());
      if (!ranks_.emplace(members[rank].bytes(), rank).second) {
        throw Error(ErrorKind::kInvalidArgument, "peer_group: a member is named twice");
      }
    }
    auto own = ranks_.find(self.bytes());
    if (own == ranks_.end()) throw Error(ErrorKind::kInvalidArgument, "peer_group: this engine is no member");
    rank_ = own->second;
    hash = fnv1a(out.take());
  }
  size_t size() const noexcept override { return arrived_.size(); }
  size_t rank() const noexcept override { return rank_; }
  const std::shared_ptr<EngineCore>& core() const { return core_; }
  size_t rank_of(const Bytes& address) const {
    auto found = ranks_.find(address);
    return found == ranks_.end() ? SIZE_MAX : found->second;
  }

  void arrive(const Bytes& from, uint64_t number) {
    auto rank = ranks_.find(from);
    if (rank == ranks_.end()) return;
    auto& last = arrived_[rank->second];
    if (number > last.load(std::memory_order_relaxed)) last.store(number, std::memory_order_release);
  }
  bool passed(uint64_t number) const {
    for (size_t rank = 0; rank < arrived_.size(); ++rank) {
      if (rank != rank_ && arrived_[rank].load(std::memory_order_acquire) < number) return false;
    }
    return true;
  }
  std::string missing(uint64_t number) const {
    std::string text;
    for (size_t rank = 0; rank < arrived_.size(); ++rank) {
      if (rank == rank_ || arrived_[rank].load() >= number) continue;
      text += (text.empty() ? "" : ", ") + labels[rank];
    }
    return text;
  }
  void fail(const Error& error) {
    std::lock_guard lock(mutex_);
    if (!error_) error_ = error;
    failed.store(true);
  }
  Error error() const {
    std::lock_guard lock(mutex_);
    return *error_;
  }

  const uint32_t id;
  uint64_t hash = 0;
  uint32_t generation = 0;
  std::vector<uint32_t> peers;
  std::vector<std::string> labels;
  std::atomic<uint64_t> entered{0};
  std::atomic<bool> failed{false};

 private:
  std::shared_ptr<EngineCore> core_;
  std::map<Bytes, size_t, BytesLess> ranks_;
  std::vector<std::atomic<uint64_t>> arrived_;
  size_t rank_ = 0;
  mutable std::mutex mutex_;
  std::optional<Error> error_;
};

// The fate of one barrier notice; deletes itself once told.
class BarrierSink final : public CompletionSink {
 public:
  explicit BarrierSink(std::shared_ptr<GroupImpl> group) : group_(std::move(group)) {}
  void complete(const Error* error) noexcept override {
    if (error != nullptr) group_->fail(*error);
    delete this;
  }

 private:
  std::shared_ptr<GroupImpl> group_;
};

}  // namespace pplx
