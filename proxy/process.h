// What a fork does to engines and groups: their threads are gone, their locks may be held by nobody, and
// their endpoints belong to the process that made them. So a forked child gets an error from whatever it
// inherited, and neither locks, nor joins, nor frees it.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <memory>

namespace pplx {

// The process in which an object was made.
class ProcessMark {
 public:
  ProcessMark();
  // Whether this is a fork of it. Costs one load.
  bool forked() const noexcept;
  // Throws kFabric when it is; `what` is the object, "the TransferEngine".
  void require(const char* what) const;

 private:
  uint32_t generation_;
  pid_t pid_;
};

// A forked child never destroys the object that `of` points to: destroying joins threads that are not there.
// `key` is withdrawn by the object's destructor.
void keep_in_forks(const void* key, std::weak_ptr<void> of);
void withdraw_from_forks(const void* key) noexcept;

// What a forked child does at once, before anything else runs in it: must only make async-signal-safe calls.
// At most 8; never withdrawn.
void at_fork_in_child(void (*action)() noexcept);

// Unloading libfabric removes the files of shm's endpoints, whose owner is the parent. Called when it was
// loaded: a forked child's exit() skips what was loaded before, which is the unloading too.
void exit_early_in_forks();

}  // namespace pplx
