#include "proxy/engine/watch.h"

#include "proxy/log.h"

namespace pplx {
namespace {

// More at once than any writer makes between two looks: somebody else has written there.
constexpr uint64_t kMaxJump = 1 << 20;

class WatchHandle final : public WatchWord {
 public:
  explicit WatchHandle(std::shared_ptr<WatchImpl> impl) : impl_(std::move(impl)) {}
  ~WatchHandle() override { impl_->core->unwatch(*impl_); }
  uint64_t* word() const noexcept override { return impl_->config.word; }
  uint64_t seen() const noexcept override { return impl_->seen.load(std::memory_order_acquire); }
  uint64_t posted() const noexcept override { return impl_->posted.load(std::memory_order_acquire); }
  uint64_t completed() const noexcept override { return impl_->completed.load(std::memory_order_acquire); }
  std::optional<Error> error() const override {
    std::lock_guard lock(impl_->mutex);
    return impl_->error;
  }

 private:
  std::shared_ptr<WatchImpl> impl_;
};

uint64_t load(uint64_t* word) { return std::atomic_ref<uint64_t>(*word).load(std::memory_order_acquire); }

}  // namespace

WatchImpl::WatchImpl(std::shared_ptr<EngineCore> owner, WatchConfig wanted)
    : core(std::move(owner)), config(std::move(wanted)) {
  seen = load(config.word);
}

void WatchImpl::fail(const Error& failure) {
  std::lock_guard lock(mutex);
  if (!error) error = failure;
}

size_t WatchImpl::look(EngineCore& engine) {
  const uint64_t before = seen.load(std::memory_order_relaxed);
  const uint64_t now = load(config.word);
  if (now == before || broken_) [[likely]]
    return 0;
  if (now < before || now - before > kMaxJump) {
    broken_ = true;
    fail(Error(ErrorKind::kInvalidArgument, "a watch word went from " + std::to_string(before) + " to " +
                                                std::to_string(now) +
                                                ": it only grows, and by no more than 2^20 between two "
                                                "looks; it is watched no more"));
    log(LogLevel::kError, error->what());
    return 0;
  }
  if (!config.writes.empty()) {
    for (uint64_t value = before; value < now; ++value) {
      self_ = shared_from_this();  // until all that was posted is complete
      posted.fetch_add(config.writes.size(), std::memory_order_release);
      for (const PreparedWrite& write : config.writes) {
        engine.submit(engine.make_write({.source = write.source.get(),
                                         .source_offset = write.source_offset,
                                         .target = write.target.get(),
                                         .target_offset = write.target_offset,
                                         .length = write.length,
                                         .imm = write.imm},
                                        this));
      }
    }
  }
  seen.store(now, std::memory_order_release);
  if (config.changed && !telling_.exchange(true)) {
    engine.callbacks_.post(
        [self = shared_from_this()](const Error*) {
          self->telling_ = false;
          self->config.changed(self->seen.load(std::memory_order_acquire));
        },
        nullptr);
  }
  return static_cast<size_t>(now - before);
}

void WatchImpl::complete(const Error* failure) noexcept {
  if (failure != nullptr) fail(*failure);
  if (completed.fetch_add(1, std::memory_order_acq_rel) + 1 != posted.load(std::memory_order_acquire)) return;
  const auto last = std::move(self_);  // may end this
}

std::shared_ptr<WatchWord> EngineCore::watch_word(WatchConfig config) {
  if (config.word == nullptr) {
    struct alignas(64) Line {
      uint64_t word = 0;
    };
    auto line = std::make_shared<Line>();
    config.word = &line->word;
    config.keepalive = std::move(line);
  } else if (reinterpret_cast<uintptr_t>(config.word) % sizeof(uint64_t) != 0) {
    throw Error(ErrorKind::kInvalidArgument, "a watch word must be aligned to 8 bytes");
  }
  for (const PreparedWrite& write : config.writes) check(write);
  require_open();
  callbacks_.start();
  auto word = std::make_shared<WatchImpl>(shared_from_this(), std::move(config));
  Locked locked(*this);
  if (fabric_closed_) require_open();
  words_.push_back(word);
  watching_.fetch_add(1, std::memory_order_relaxed);
  spin_for_words_ = true;
  return std::make_shared<WatchHandle>(std::move(word));
}

void EngineCore::unwatch(WatchImpl& word) noexcept {
  if (forked()) return;
  Locked locked(*this);
  if (std::erase_if(words_, [&](const auto& one) { return one.get() == &word; }) != 0) {
    watching_.fetch_sub(1, std::memory_order_relaxed);
    spin_for_words_ = !words_.empty();
  }
}

size_t EngineCore::look_at_words() {
  size_t count = 0;
  for (const auto& word : words_) count += word->look(*this);
  return count;
}

}  // namespace pplx
