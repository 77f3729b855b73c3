// What a TransferEngine hands to Python beyond regions: watch words and receive pools.
#pragma once

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "xla_ffi/engine_py.h"

namespace pplx {

// Source, its offset, target, its offset, length, immediate.
using PyPreparedWrite =
    std::tuple<const PyRegion*, size_t, const PyRemoteRegion*, size_t, size_t, std::optional<uint32_t>>;

class PyWatchWord {
 public:
  PyWatchWord(const PyEngine& engine, uint64_t address, const nb::object& keepalive,
              const std::vector<PyPreparedWrite>& writes, const nb::object& changed)
      : engine_(engine.engine()) {
    WatchConfig config;
    if (address != 0) {
      config.word = reinterpret_cast<uint64_t*>(address);  // NOLINT(performance-no-int-to-ptr)
      config.keepalive = keep_object(keepalive);
    }
    for (const auto& [source, source_offset, target, target_offset, length, imm] : writes) {
      config.writes.push_back({source->value, source_offset, target->value, target_offset, length, imm});
    }
    if (!changed.is_none()) {
      config.changed = [callable = keep_object(changed)](uint64_t value) {
        if (Py_IsInitialized() == 0) return;
        const nb::gil_scoped_acquire acquire;
        try {
          nb::handle(callable.get())(value);
        } catch (nb::python_error& error) {
          error.discard_as_unraisable("the callback of a watch word");
        }
      };
    }
    const nb::gil_scoped_release release;
    word_ = engine_->watch_word(std::move(config));
  }
  PyWatchWord(const PyWatchWord&) = delete;
  PyWatchWord& operator=(const PyWatchWord&) = delete;
  ~PyWatchWord() { close(); }

  void close() {
    const nb::gil_scoped_release release;
    word_.reset();
  }
  uint64_t address() const { return reinterpret_cast<uint64_t>(open().word()); }
  uint64_t value() const { return std::atomic_ref<uint64_t>(*open().word()).load(std::memory_order_acquire); }
  void increment(uint64_t by) {
    std::atomic_ref<uint64_t>(*open().word()).fetch_add(by, std::memory_order_release);
  }
  uint64_t seen() const { return open().seen(); }
  uint64_t posted() const { return open().posted(); }
  uint64_t completed() const { return open().completed(); }
  void raise() const {
    if (auto error = open().error()) throw Error(*error);
  }

 private:
  const WatchWord& open() const {
    if (word_ == nullptr) throw Error(ErrorKind::kClosed, "the watch word is closed");
    return *word_;
  }
  std::shared_ptr<TransferEngine> engine_;
  std::shared_ptr<WatchWord> word_;
};

class PyReceivePool {
 public:
  PyReceivePool(const PyEngine& engine, const PyRegion* region, size_t buffer_bytes, size_t buffers,
                size_t max_waiting)
      : engine_(engine.engine()) {
    PoolConfig config{.region = region != nullptr ? region->value : nullptr,
                      .buffer_bytes = buffer_bytes,
                      .buffers = buffers,
                      .max_waiting = max_waiting};
    const nb::gil_scoped_release release;
    pool_ = engine_->receive_pool(std::move(config));
  }
  PyReceivePool(const PyReceivePool&) = delete;
  PyReceivePool& operator=(const PyReceivePool&) = delete;
  ~PyReceivePool() {
    const nb::gil_scoped_release release;
    pool_.reset();
  }

  nb::bytes descriptor() const { return to_python(pool_->descriptor().bytes()); }
  size_t buffers() const { return pool_->buffers(); }
  size_t free_buffers() const { return pool_->free_buffers(); }
  size_t waiting() const { return pool_->waiting(); }
  size_t lost() const { return pool_->lost(); }
  PyRegion region() const { return PyRegion(pool_->region()); }

  // Sender, buffer, bytes.
  std::tuple<nb::bytes, size_t, size_t> recv(std::optional<double> timeout) {
    const Duration limit = to_duration(timeout).value_or(engine_->config().timeout);
    std::optional<PoolMessage> message;
    const bool received = wait_in_slices(limit, [&](Duration slice) {
      try {
        message = pool_->recv(slice);
        return true;
      } catch (const Error& error) {
        if (error.kind() != ErrorKind::kTimeout) throw;
        return false;
      }
    });
    if (!received) {
      throw Error(ErrorKind::kTimeout,
                  "ReceivePool.recv(): no message arrived within " + seconds_text(limit));
    }
    return {to_python(message->from.bytes()), message->buffer, message->bytes.size()};
  }
  void release(size_t buffer) {
    const nb::gil_scoped_release release;
    pool_->release(buffer);
  }

 private:
  std::shared_ptr<TransferEngine> engine_;
  std::shared_ptr<ReceivePool> pool_;
};

}  // namespace pplx
