// TransferEngine as Python sees it: conversions, the GIL, lifetimes. Bound in engine_bindings.cc.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "proxy/engine/engine.h"
#include "proxy/process.h"
#include "xla_ffi/engine_support.h"

namespace pplx {

class PyImmCounter {
 public:
  PyImmCounter(std::shared_ptr<TransferEngine> engine, ImmCounter counter, uint32_t imm)
      : engine_(std::move(engine)), counter_(std::move(counter)), imm_(imm) {}

  const ImmCounter& counter() const noexcept { return counter_; }
  uint64_t value() const noexcept { return counter_.value(); }
  uint32_t imm() const noexcept { return imm_; }

  void wait(uint64_t n, std::optional<double> timeout) const {
    const Duration limit = to_duration(timeout).value_or(engine_->config().timeout);
    const bool reached = wait_in_slices(limit, [&](Duration slice) {
      try {
        counter_.wait(n, slice);
        return true;
      } catch (const Error& error) {
        if (error.kind() != ErrorKind::kTimeout) throw;
        return false;
      }
    });
    if (!reached) {
      throw Error(ErrorKind::kTimeout, "imm_counter(" + std::to_string(imm_) + ").wait(" + std::to_string(n) +
                                           "): " + std::to_string(value()) + " arrived within " +
                                           seconds_text(limit));
    }
  }

 private:
  std::shared_ptr<TransferEngine> engine_;  // a wait drives the engine's progress
  ImmCounter counter_;
  uint32_t imm_;
};

using PyScatterEntry = std::tuple<size_t, const PyRemoteRegion*, size_t, size_t>;

class PyEngine {
 public:
  explicit PyEngine(const EngineConfig& config) : completer_(std::make_shared<Completer>()) {
    const nb::gil_scoped_release release;
    engine_ = std::make_shared<TransferEngine>(config);
    keep_in_forks(this, completer_);  // its thread is not there to be joined
  }
  PyEngine(const PyEngine&) = delete;
  PyEngine& operator=(const PyEngine&) = delete;
  ~PyEngine() {
    const nb::gil_scoped_release release;
    withdraw_from_forks(this);
    shut_down();
    engine_.reset();
  }

  std::string fabric_name() const { return engine_->fabric_name(); }
  nb::bytes address() const { return to_python(engine_->address().bytes()); }
  size_t max_message() const { return engine_->max_message(); }
  bool closed() const { return engine_->closed(); }

  PyRegion register_buffer(const nb::object& object, bool writable) {
    Graveyard::instance().release_all();
    auto buffer = std::make_unique<Py_buffer>();
    const int flags = PyBUF_C_CONTIGUOUS | (writable ? PyBUF_WRITABLE : 0);
    if (PyObject_GetBuffer(object.ptr(), buffer.get(), flags) != 0) throw nb::python_error();
    void* const data = buffer->buf;
    const auto size = static_cast<size_t>(buffer->len);
    auto hold = std::make_shared<BufferHold>(std::move(buffer));
    const nb::gil_scoped_release release;
    return PyRegion(engine_->register_memory(data, size, std::move(hold)));
  }

  PyRegion allocate(size_t size) {
    const nb::gil_scoped_release release;
    return PyRegion(engine_->allocate(size));
  }

  PyRemoteRegion open(const nb::bytes& descriptor) {
    const RegionDescriptor parsed(to_bytes(descriptor));
    const nb::gil_scoped_release release;
    return PyRemoteRegion(engine_->open(parsed));
  }

  void write(const PyRegion* source, size_t source_offset, const PyRemoteRegion& target, size_t target_offset,
             size_t length, std::optional<uint32_t> imm, nb::object future, uint64_t id) {
    WriteRequest request;
    request.source = source != nullptr ? source->value.get() : nullptr;
    request.source_offset = source_offset;
    request.target = target.value.get();
    request.target_offset = target_offset;
    request.length = length;
    request.imm = imm;
    request.id = id;
    post(std::move(future), 1, source, {target.value},
         [&](CompletionSink* sink) { engine_->write(request, sink); });
  }

  void read(const PyRegion& target, size_t target_offset, const PyRemoteRegion& source, size_t source_offset,
            size_t length, nb::object future, uint64_t id) {
    const ReadRequest request{.target = target.value.get(),
                              .target_offset = target_offset,
                              .source = source.value.get(),
                              .source_offset = source_offset,
                              .length = length,
                              .id = id};
    post(std::move(future), 1, &target, {source.value},
         [&](CompletionSink* sink) { engine_->read(request, sink); });
  }

  // A page list: offset, stride, indices or None.
  using PyPages = std::tuple<size_t, size_t, std::optional<std::vector<uint64_t>>>;
  void paged_write(const PyRegion& source, const PyPages& source_pages, const PyRemoteRegion& target,
                   const PyPages& target_pages, size_t count, size_t page_bytes, std::optional<uint32_t> imm,
                   size_t group, nb::object future, uint64_t id) {
    const auto list = [](const PyPages& pages) {
      const auto& [offset, stride, indices] = pages;
      return PageList{offset, stride,
                      indices ? std::span<const uint64_t>(*indices) : std::span<const uint64_t>()};
    };
    const PagedWriteRequest request{.source = source.value.get(),
                                    .source_pages = list(source_pages),
                                    .target = target.value.get(),
                                    .target_pages = list(target_pages),
                                    .count = count,
                                    .page_bytes = page_bytes,
                                    .imm = imm,
                                    .group = group,
                                    .id = id};
    post(std::move(future), 1, &source, {target.value},
         [&](CompletionSink* sink) { engine_->paged_write(request, sink); });
  }

  PyGroupRegions open_group(const PyPeerGroup& group, const std::vector<nb::bytes>& descriptors) {
    std::vector<RegionDescriptor> parsed;
    parsed.reserve(descriptors.size());
    for (const nb::bytes& descriptor : descriptors) parsed.emplace_back(to_bytes(descriptor));
    const nb::gil_scoped_release release;
    return PyGroupRegions(engine_->open(*group.value, parsed));
  }

  void scatter_group(const PyRegion& source, const PyGroupRegions& targets,
                     const std::vector<std::tuple<size_t, size_t, size_t, size_t>>& entries,
                     std::optional<uint32_t> imm, nb::object future) {
    std::vector<GroupEntry> converted;
    converted.reserve(entries.size());
    for (const auto& [rank, source_offset, target_offset, length] : entries) {
      converted.push_back({rank, source_offset, target_offset, length});
    }
    post(std::move(future), entries.size(), &source, {}, [&](CompletionSink* sink) {
      engine_->scatter(*source.value, *targets.value, converted, imm, sink);
    });
  }

  uint64_t new_id() { return engine_->new_id(); }
  size_t cancel(uint64_t id) {
    const nb::gil_scoped_release release;
    return engine_->cancel(id);
  }
  void remove_nic(size_t index) {
    const nb::gil_scoped_release release;
    engine_->remove_nic(index);
  }
  bool remove_peer(const nb::bytes& peer) {
    const Address address(to_bytes(peer));
    const nb::gil_scoped_release release;
    return engine_->remove_peer(address);
  }

  void when(const PyImmCounter& counter, uint64_t n, nb::object future, uint64_t id) {
    post(std::move(future), 1, nullptr, {},
         [&](CompletionSink* sink) { engine_->when(counter.counter(), n, sink, id); });
  }
  void when_message(nb::object future, uint64_t id) {
    post(std::move(future), 1, nullptr, {}, [&](CompletionSink* sink) { engine_->when_message(sink, id); });
  }

  std::shared_ptr<TransferEngine> engine() const { return engine_; }

  PyRemotePool open_pool(const nb::bytes& descriptor) {
    const PoolDescriptor parsed(to_bytes(descriptor));
    const nb::gil_scoped_release release;
    return PyRemotePool(engine_->open(parsed));
  }
  void send_to_pool(const PyRemotePool& pool, const PyRegion& source, size_t offset, size_t length,
                    nb::object future) {
    post(std::move(future), 1, &source, {},
         [&](CompletionSink* sink) { engine_->send(*pool.value, source.value, offset, length, sink); });
  }

  void start_timeline(size_t events) {
    const nb::gil_scoped_release release;
    engine_->start_timeline(events);
  }
  void stop_timeline() {
    const nb::gil_scoped_release release;
    engine_->stop_timeline();
  }
  std::string timeline() const {
    const nb::gil_scoped_release release;
    return engine_->timeline();
  }

  void scatter(const PyRegion& source, const std::vector<PyScatterEntry>& entries,
               std::optional<uint32_t> imm, nb::object future) {
    std::vector<ScatterEntry> converted;
    std::vector<std::shared_ptr<const RemoteRegion>> targets;
    converted.reserve(entries.size());
    targets.reserve(entries.size());
    for (const auto& [source_offset, target, target_offset, length] : entries) {
      converted.push_back({source_offset, target->value, target_offset, length});
      targets.push_back(target->value);
    }
    post(std::move(future), entries.size(), &source, std::move(targets),
         [&](CompletionSink* sink) { engine_->scatter(*source.value, converted, imm, sink); });
  }

  void send(const nb::bytes& to, const nb::bytes& payload, nb::object future) {
    const Address address(to_bytes(to));
    const Bytes bytes = to_bytes(payload);
    post(std::move(future), 1, nullptr, {}, [&](Completer::Operation* operation) {
      completer_->follow(operation, engine_->send(address, bytes));
    });
  }

  std::tuple<nb::bytes, nb::bytes> recv(std::optional<double> timeout) {
    const Duration limit = to_duration(timeout).value_or(engine_->config().timeout);
    std::optional<Message> message;
    const bool received = wait_in_slices(limit, [&](Duration slice) {
      try {
        message = engine_->recv(slice);
        return true;
      } catch (const Error& error) {
        if (error.kind() != ErrorKind::kTimeout) throw;
        return false;
      }
    });
    if (!received) {
      throw Error(ErrorKind::kTimeout, "recv(): no message arrived within " + seconds_text(limit));
    }
    return {to_python(message->from.bytes()), to_python(message->payload)};
  }

  PyImmCounter imm_counter(uint32_t imm) {
    const nb::gil_scoped_release release;
    return {engine_, engine_->imm_counter(imm), imm};
  }
  void release_immediate(uint32_t imm) {
    const nb::gil_scoped_release release;
    engine_->release_immediate(imm);
  }

  PyPeerGroup peer_group(const std::vector<nb::bytes>& members, uint32_t id) {
    std::vector<Address> addresses;
    addresses.reserve(members.size());
    for (const nb::bytes& member : members) addresses.emplace_back(to_bytes(member));
    const nb::gil_scoped_release release;
    return PyPeerGroup(engine_->peer_group(addresses, id));
  }

  // A barrier that was entered cannot be left and entered again, so it is not waited for in slices: it runs
  // on a thread of its own, which ends by its deadline or by close() if Ctrl-C takes the caller away.
  void barrier(const PyPeerGroup& group, std::optional<double> timeout) {
    engine_->require_own_process();
    const Duration limit = to_duration(timeout).value_or(engine_->config().timeout);
    std::packaged_task<void()> task(
        [engine = engine_, members = group.value, limit] { engine->barrier(*members, limit); });
    std::future<void> entered = task.get_future();
    std::thread(std::move(task)).detach();
    // The engine's own deadline ends the wait; the factor only bounds it in case that it does not.
    wait_in_slices(2 * limit + std::chrono::seconds(10),
                   [&](Duration slice) { return entered.wait_for(slice) == std::future_status::ready; });
    const nb::gil_scoped_release release;
    entered.get();
  }

  nb::dict stats() const {
    EngineStats stats;
    EngineDetails details;
    {
      const nb::gil_scoped_release release;
      stats = engine_->stats();
      details = engine_->details();
    }
    nb::dict result;
    result["writes"] = stats.writes;
    result["write_bytes"] = stats.write_bytes;
    result["sends"] = stats.sends;
    result["receives"] = stats.receives;
    result["immediates"] = stats.immediates;
    result["unknown_immediates"] = stats.unknown_immediates;
    result["errors"] = stats.errors;
    result["polls"] = stats.polls;
    result["backpressure"] = stats.backpressure;
    result["worker_core"] = stats.worker_core;
    result["reads"] = stats.reads;
    result["read_bytes"] = stats.read_bytes;
    result["retries"] = stats.retries;
    result["cancelled"] = stats.cancelled;
    result["registrations"] = details.registrations;
    nb::list nics, peers;
    for (const NicStats& nic : details.nics) {
      nb::dict entry = traffic_dict(nic.traffic);
      entry["name"] = nic.name;
      entry["error"] = nic.error;
      entry["queue_depth"] = nic.queue_depth;
      entry["deepest"] = nic.deepest;
      nb::list buckets;
      for (const uint64_t bucket : nic.latency.buckets) buckets.append(bucket);
      entry["latency_buckets"] = buckets;
      entry["latency_p50"] = static_cast<double>(nic.latency.quantile(0.5)) * 1e-9;
      entry["latency_p99"] = static_cast<double>(nic.latency.quantile(0.99)) * 1e-9;
      nics.append(entry);
    }
    for (const PeerTraffic& peer : details.peers) {
      nb::dict entry = traffic_dict(peer.traffic);
      entry["peer"] = peer.peer;
      entry["error"] = peer.error;
      entry["paths"] = peer.paths;
      peers.append(entry);
    }
    result["nics"] = nics;
    result["peers"] = peers;
    return result;
  }

  void close() {
    const nb::gil_scoped_release release;
    shut_down();
  }

  void require_own_process() const { engine_->require_own_process(); }

 private:
  static nb::dict traffic_dict(const Traffic& traffic) {
    nb::dict result;
    result["writes"] = traffic.writes;
    result["write_bytes"] = traffic.write_bytes;
    result["reads"] = traffic.reads;
    result["read_bytes"] = traffic.read_bytes;
    result["messages"] = traffic.messages;
    result["errors"] = traffic.errors;
    result["outstanding"] = traffic.outstanding;
    result["queued"] = traffic.queued;
    return result;
  }

  template <typename Post>
  void post(nb::object future, size_t completions, const PyRegion* source,
            std::vector<std::shared_ptr<const RemoteRegion>> targets, Post&& post_operation) {
    engine_->require_own_process();  // before the completer's lock, which a fork may have left taken
    Completer::Operation* const operation = completer_->begin(
        std::move(future), completions, source != nullptr ? source->value : nullptr, std::move(targets));
    try {
      const nb::gil_scoped_release release;
      post_operation(operation);
    } catch (...) {
      completer_->abandon(operation);
      throw;
    }
  }

  void shut_down() {
    engine_->close();
    if (!engine_->forked()) completer_->stop();
  }

  std::shared_ptr<TransferEngine> engine_;
  std::shared_ptr<Completer> completer_;
};

}  // namespace pplx
