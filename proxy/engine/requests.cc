// What callers ask for: checked, and made into operations.
#include <algorithm>

#include "proxy/engine/group.h"
#include "proxy/engine/regions.h"
#include "proxy/engine/whole.h"

namespace pplx {
namespace {

[[noreturn]] void invalid(const std::string& what) { throw Error(ErrorKind::kInvalidArgument, what); }

struct Access {
  const char* verb = "write";
  const Region* local;
  size_t local_offset;
  const RemoteRegion* remote;
  size_t remote_offset;
  size_t length;
  std::optional<uint32_t> imm;
};

void check_range(const Access& access, size_t offset, size_t size, const char* what) {
  if (offset <= size && access.length <= size - offset) [[likely]]
    return;
  invalid(std::string(access.verb) + " of " + std::to_string(access.length) + " bytes at offset " +
          std::to_string(offset) + " of a " + what + " of " + std::to_string(size) + " bytes");
}

void check_access(const EngineCore& core, const Access& access) {
  const auto* remote = static_cast<const RemoteRegionImpl*>(access.remote);
  if (remote == nullptr) invalid(std::string("a ") + access.verb + " needs a remote region");
  if (remote->core != &core) invalid("the remote region was opened by another engine");
  check_range(access, access.remote_offset, remote->length, "remote region");
  const auto* local = static_cast<const RegionImpl*>(access.local);
  if (local == nullptr) {
    if (access.length != 0) invalid(std::string("a ") + access.verb + " of bytes needs a region");
  } else {
    if (local->core() != &core) invalid("the region was registered with another engine");
    check_range(access, access.local_offset, local->size(), "region");
  }
  if (access.imm == kNoImmediate) invalid("immediate 0xFFFFFFFF is the engine's own");
}

Access access_of(const WriteRequest& request) {
  return {"write",        request.source, request.source_offset, request.target, request.target_offset,
          request.length, request.imm};
}

void fill(Op& op, const Access& access, CompletionSink* sink, uint64_t id, uint32_t tick) {
  const auto& remote = static_cast<const RemoteRegionImpl&>(*access.remote);
  const auto* local = static_cast<const RegionImpl*>(access.local);
  op.source = nullptr;
  op.local = nullptr;
  if (local != nullptr) {
    const FabricMemory& memory = local->memory(0);
    op.source = memory.data + access.local_offset;
    op.local = memory.local;
  }
  op.length = access.length;
  op.target = remote.base + access.remote_offset;
  op.key = remote.key;
  op.to = remote.peer;
  op.imm = access.imm.value_or(0);
  op.has_imm = access.imm.has_value();
  op.kind = FabricOp::Kind::kWrite;
  op.sink = sink;
  op.id = id;
  op.stamp = tick;
  op.retries = 0;
  op.shared = false;
  op.abandoned = false;
  op.per_shard = false;
  op.region = local;
  if (remote.keys != nullptr) op.keys = remote.keys;
}

}  // namespace

void EngineCore::write(const WriteRequest& request, CompletionSink* sink) {
  require_open();
  const Access access = access_of(request);
  check_access(*this, access);
  post_or_queue([&](Op& op, uint32_t tick) {
    fill(op, access, sink, request.id, tick);
    op.per_shard = request.imm_per_shard && nics_.size() > 1;
  });
}

void EngineCore::read(const ReadRequest& request, CompletionSink* sink) {
  require_open();
  if (!reads_) throw Error(ErrorKind::kFabric, fabric_name_ + " cannot read from peers; let them write");
  const Access access{"read",         request.target,        request.target_offset,
                      request.source, request.source_offset, request.length,
                      std::nullopt};
  check_access(*this, access);
  post_or_queue([&](Op& op, uint32_t tick) {
    fill(op, access, sink, request.id, tick);
    op.kind = FabricOp::Kind::kRead;
  });
}

void EngineCore::check(const PreparedWrite& write) const {
  check_access(*this, {"write", write.source.get(), write.source_offset, write.target.get(),
                       write.target_offset, write.length, write.imm});
}

Op* EngineCore::make_write(const WriteRequest& request, CompletionSink* sink) {
  Op* op = pool_.take();
  fill(*op, access_of(request), sink, request.id, tick_.load(std::memory_order_relaxed));
  return op;
}

void EngineCore::scatter(const Region& source, std::span<const ScatterEntry> entries,
                         std::optional<uint32_t> imm, CompletionSink* sink) {
  require_open();
  auto request = [&](const ScatterEntry& entry) {
    return WriteRequest{&source, entry.source_offset, entry.target.get(), entry.target_offset, entry.length,
                        imm};
  };
  // All or none: a bad entry must not leave the others half sent.
  for (const auto& entry : entries) check_access(*this, access_of(request(entry)));
  Locked locked(*this);
  if (fabric_closed_) require_open();
  for (const auto& entry : entries) submit(make_write(request(entry), sink));
}

void EngineCore::scatter(const Region& source, const GroupRegions& base, std::span<const GroupEntry> entries,
                         std::optional<uint32_t> imm, CompletionSink* sink) {
  const auto& targets = static_cast<const GroupRegionsImpl&>(base);
  std::vector<ScatterEntry> resolved;
  resolved.reserve(entries.size());
  for (const auto& entry : entries) {
    if (entry.rank >= targets.size()) {
      invalid("scatter: rank " + std::to_string(entry.rank) + " of a group of " +
              std::to_string(targets.size()));
    }
    resolved.push_back({entry.source_offset, targets[entry.rank], entry.target_offset, entry.length});
  }
  scatter(source, resolved, imm, sink);
}

namespace {

struct Run {
  size_t source, target, length;
};

size_t place_of(const PageList& list, size_t index, size_t page_bytes, size_t size, const char* what) {
  const size_t page = list.pages.empty() ? index : static_cast<size_t>(list.pages[index]);
  size_t place = 0;
  if (__builtin_mul_overflow(page, list.stride == 0 ? page_bytes : list.stride, &place) ||
      __builtin_add_overflow(place, list.offset, &place) || place > size || page_bytes > size - place) {
    invalid("paged_write: page " + std::to_string(page) + " is outside of the " + what + " region of " +
            std::to_string(size) + " bytes");
  }
  return place;
}

}  // namespace

void EngineCore::paged_write(const PagedWriteRequest& request, CompletionSink* sink) {
  require_open();
  check_access(*this, {"paged write", request.source, 0, request.target, 0, 0, request.imm});
  if (request.count > 0 && request.source == nullptr) invalid("paged_write: pages need a source");
  if (request.count > 0 && request.page_bytes == 0) invalid("paged_write: pages have no bytes");
  for (const PageList* list : {&request.source_pages, &request.target_pages}) {
    if (!list->pages.empty() && list->pages.size() != request.count) {
      invalid("paged_write: " + std::to_string(list->pages.size()) + " indices for " +
              std::to_string(request.count) + " pages");
    }
  }
  // Groups of runs; pages that follow each other on both sides are one.
  const size_t group = request.group == 0 || !request.imm ? SIZE_MAX : request.group;
  std::vector<std::vector<Run>> groups(1);
  for (size_t page = 0; page < request.count; ++page) {
    if (page != 0 && page % group == 0) groups.emplace_back();
    auto& runs = groups.back();
    const Run run{place_of(request.source_pages, page, request.page_bytes, request.source->size(), "source"),
                  place_of(request.target_pages, page, request.page_bytes, request.target->size(), "target"),
                  request.page_bytes};
    if (!runs.empty() && runs.back().source + runs.back().length == run.source &&
        runs.back().target + runs.back().length == run.target) {
      runs.back().length += run.length;
    } else {
      runs.push_back(run);
    }
  }
  const bool parts =
      std::any_of(groups.begin(), groups.end(), [](const auto& runs) { return runs.size() > 1; });
  if (request.imm && parts && !delivery_complete_) {
    throw Error(ErrorKind::kFabric, fabric_name_ +
                                        " cannot tell when pages are visible, and so not deliver one "
                                        "immediate for several: give each page its own (group = 1)");
  }
  Locked locked(*this);
  if (fabric_closed_) require_open();
  auto* all = new Whole(*this, sink, request.id);
  auto make = [&](const Run& run, Whole* whole, bool with_imm) {
    return make_write({.source = request.source,
                       .source_offset = run.source,
                       .target = request.target,
                       .target_offset = run.target,
                       .length = run.length,
                       .imm = with_imm ? request.imm : std::nullopt,
                       .id = request.id},
                      whole);
  };
  for (const auto& runs : groups) {
    if (runs.empty()) {
      if (!request.imm) continue;
      all->add();
      submit(make({0, 0, 0}, all, true));
      continue;
    }
    if (!request.imm || runs.size() == 1) {
      for (const Run& run : runs) {
        all->add();
        submit(make(run, all, request.imm.has_value()));
      }
      continue;
    }
    all->add();
    auto* whole = new Whole(*this, all, request.id);
    Op* last = make(runs.back(), whole, true);
    bump(counters_.writes);
    bump(counters_.write_bytes, last->length);
    whole->hold(last);
    for (size_t i = 0; i + 1 < runs.size(); ++i) {
      whole->add();
      submit(make(runs[i], whole, false));
    }
    whole->complete(nullptr);
  }
  all->complete(nullptr);
}

void EngineCore::write_callback(const WriteRequest& request, CallbackThread::Callback done) {
  callbacks_.start();
  auto sink = std::make_unique<CallbackSink>(callbacks_, std::move(done));
  write(request, sink.get());
  sink.release();
}

size_t EngineCore::cancel(uint64_t id) {
  if (id == 0) return 0;
  require_own_process();
  const Error error(ErrorKind::kCancelled, "taken back before it had begun");
  Locked locked(*this);
  drain();
  auto wanted = [&](const Op& op) { return op.id == id; };
  OpQueue ops;
  for (size_t number = 0; number < peers_.size(); ++number) {
    Peer& peer = peers_[number];
    if (peer.removed) continue;
    peer.waiting.take(wanted, ops);
    for (Path& path : peer.paths) path.pending.take(wanted, ops);
  }
  size_t taken = 0;
  auto [begin, end] = wholes_.equal_range(id);
  for (auto it = begin; it != end; ++it) taken += it->second->refuse(error) ? 1 : 0;
  taken += cancel_waiters(id, error);
  for (; !ops.empty(); ++taken) {
    Op* op = ops.pop();
    Error failure = explain(*op, error);
    finish(op, &failure);
  }
  bump(counters_.cancelled, taken);
  return taken;
}

}  // namespace pplx
