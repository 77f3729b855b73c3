#include "proxy/process.h"

#include <pthread.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "proxy/error.h"

namespace pplx {
namespace {

std::atomic<uint32_t> g_generation{0};

struct Forks {
  std::mutex mutex;
  std::map<const void*, std::weak_ptr<void>> kept;
  std::array<void (*)() noexcept, 8> actions{};
  std::atomic<size_t> num_actions{0};

  // Leaked: threads may come here while static objects are destroyed.
  static Forks& get() {
    static auto* forks = [] {
      auto* made = new Forks;
      pthread_atfork([] { get().mutex.lock(); }, [] { get().mutex.unlock(); }, [] { get().in_child(); });
      return made;
    }();
    return *forks;
  }

  void in_child() {
    g_generation.fetch_add(1, std::memory_order_relaxed);
    for (size_t i = 0; i < num_actions; ++i) actions[i]();
    auto* living = new std::vector<std::shared_ptr<void>>;  // leaked on purpose
    for (auto& [key, of] : kept) living->push_back(of.lock());
    kept.clear();
    mutex.unlock();
  }
};

std::atomic<pid_t> g_owner{0};  // of what leave() keeps from being unloaded

void leave(int status, void* /*unused*/) {
  if (getpid() == g_owner) return;
  std::fflush(nullptr);
  _exit(status);
}

}  // namespace

ProcessMark::ProcessMark() : generation_((Forks::get(), g_generation.load())), pid_(getpid()) {}

bool ProcessMark::forked() const noexcept {
  return g_generation.load(std::memory_order_relaxed) != generation_;
}

void ProcessMark::require(const char* what) const {
  if (!forked()) return;
  throw Error(
      ErrorKind::kFabric,
      std::string(what) + " belongs to process " + std::to_string(pid_) + "; this one, " +
          std::to_string(getpid()) +
          ", was forked from it, and neither threads nor network endpoints survive a fork: make it in "
          "the process that uses it, and start processes with "
          "multiprocessing.get_context('spawn')");
}

void keep_in_forks(const void* key, std::weak_ptr<void> of) {
  const std::lock_guard guard(Forks::get().mutex);
  Forks::get().kept[key] = std::move(of);
}

void withdraw_from_forks(const void* key) noexcept {
  const std::lock_guard guard(Forks::get().mutex);
  Forks::get().kept.erase(key);
}

void at_fork_in_child(void (*action)() noexcept) {
  Forks& forks = Forks::get();
  const std::lock_guard guard(forks.mutex);
  if (forks.num_actions == forks.actions.size()) {
    throw Error(ErrorKind::kInvalidArgument, "more than 8 actions at fork");
  }
  forks.actions[forks.num_actions] = action;
  ++forks.num_actions;
}

void exit_early_in_forks() {
  g_owner = getpid();
  on_exit(leave, nullptr);
}

}  // namespace pplx
