#include "tests/sim/scheduler.h"

#include <cxxabi.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstring>
#include <exception>
#include <new>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#define PPLX_SIM_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define PPLX_SIM_ASAN 1
#endif
#endif
#ifdef PPLX_SIM_ASAN
#include <pthread.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace pplx::sim {
namespace {

constexpr size_t kStackBytes = 256 << 10, kGuardBytes = 4 << 10;

void* new_stack() {
  void* stack = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) throw std::bad_alloc();
  mprotect(stack, kGuardBytes, PROT_NONE);
  return stack;
}

// The exceptions that a thread is handling are the C++ runtime's business, and it knows threads only: two
// pointer-sized words (Itanium C++ ABI, 2.2.2).
struct Handling {
  void* words[2] = {nullptr, nullptr};
  void save() { std::memcpy(words, abi::__cxa_get_globals(), sizeof words); }
  void restore() const { std::memcpy(static_cast<void*>(abi::__cxa_get_globals()), words, sizeof words); }
};

}  // namespace

struct Scheduler::Fiber {
  uint64_t id = 0;
  uint32_t process = 0;
  std::function<void()> body;
  void* stack = nullptr;
  jmp_buf here;
  Handling handling;
  uint64_t sleeps = 0;
  const void* on = nullptr;  // what it waits for
  bool woken = false, ended = false;
  void* fake_stack = nullptr;  // AddressSanitizer's
  const void* stack_bottom = nullptr;
  size_t stack_bytes = 0;
};

Scheduler* Scheduler::running_ = nullptr;

// AddressSanitizer wants to know which stack is in use.
void Scheduler::switching([[maybe_unused]] Fiber& from, [[maybe_unused]] const Fiber& to) {
#ifdef PPLX_SIM_ASAN
  __sanitizer_start_switch_fiber(from.ended ? nullptr : &from.fake_stack, to.stack_bottom, to.stack_bytes);
#endif
}
void Scheduler::switched([[maybe_unused]] const Fiber& to) {
#ifdef PPLX_SIM_ASAN
  __sanitizer_finish_switch_fiber(to.fake_stack, nullptr, nullptr);
#endif
}

Scheduler::Scheduler(uint64_t seed) : main_(std::make_unique<Fiber>()), random_(seed) {
#ifdef PPLX_SIM_ASAN
  pthread_attr_t attributes;
  void* bottom = nullptr;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &bottom, &main_->stack_bytes);
  pthread_attr_destroy(&attributes);
  main_->stack_bottom = bottom;
#endif
}

// Fibers of the dead are abandoned where they are.
Scheduler::~Scheduler() {
  for (void* stack : stacks_) munmap(stack, kGuardBytes + kStackBytes);
}

uint64_t Scheduler::fiber() const noexcept { return active_->id; }
uint32_t Scheduler::process() const noexcept { return active_->process; }

// A fiber begins here, on its own stack.
void Scheduler::enter() {
  Fiber& fiber = *running_->active_;
  switched(fiber);
  if (_setjmp(fiber.here) == 0) {
    switching(fiber, *running_->spawner_);
    _longjmp(running_->spawner_->here, 1);  // back to spawn()
  }
  switched(fiber);
  try {
    fiber.body();
  } catch (...) {
    if (!running_->thrown_) running_->thrown_ = std::current_exception();
  }
  fiber.body = nullptr;
  running_->finish();
}

void Scheduler::finish() {
  Fiber& fiber = *active_;
  fiber.ended = true;
  --living_;
  wake_all(&fiber);
  Fiber* to = thrown_ ? nullptr : next();
  resume(to != nullptr ? *to : *main_);
  std::terminate();  // nobody resumes it
}

// makecontext() is the one portable way onto another stack; from there on _setjmp() and _longjmp(), as
// swapcontext() makes a system call each time.
uint64_t Scheduler::spawn(uint32_t process, std::function<void()> body) {
  fibers_.push_back(std::make_unique<Fiber>());
  Fiber& fiber = *fibers_.back();
  fiber.id = fibers_.size();
  fiber.process = process;
  fiber.body = std::move(body);
  if (stacks_.empty()) {
    fiber.stack = new_stack();
  } else {
    fiber.stack = stacks_.back();
    stacks_.pop_back();
#ifdef PPLX_SIM_ASAN
    ASAN_UNPOISON_MEMORY_REGION(static_cast<char*>(fiber.stack) + kGuardBytes, kStackBytes);
#endif
  }
  fiber.stack_bottom = static_cast<char*>(fiber.stack) + kGuardBytes;
  fiber.stack_bytes = kStackBytes;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = static_cast<char*>(fiber.stack) + kGuardBytes;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, &Scheduler::enter, 0);
  // Runs the fiber up to its _setjmp(), from which it will be resumed.
  Scheduler* const before = std::exchange(running_, this);
  Fiber* const spawner = std::exchange(active_, &fiber);
  spawner_ = spawner != nullptr ? spawner : main_.get();
  if (_setjmp(spawner_->here) == 0) {
    switching(*spawner_, fiber);
    setcontext(&context);
  }
  switched(*spawner_);
  active_ = spawner;
  running_ = before;
  ++living_;
  push(fiber, now_);
  return fiber.id;
}

void Scheduler::run(Nanoseconds limit) {
  limit_ = limit;
  running_ = this;
  Fiber* first = next();
  if (first != nullptr) {
    active_ = main_.get();
    resume(*first);
  }
  active_ = nullptr;
  running_ = nullptr;
  if (thrown_) std::rethrow_exception(std::exchange(thrown_, nullptr));
  if (!due_.empty()) {
    throw Stuck("not at an end after " + std::to_string(limit / kSecond) + " s of virtual time");
  }
  for (const auto& fiber : fibers_) {
    if (fiber->ended || frozen_until(fiber->process) == kForever) continue;
    throw Stuck("everybody waits: a deadlock, with process " + std::to_string(fiber->process) + " in it");
  }
}

Nanoseconds Scheduler::frozen_until(uint32_t process) const {
  return process < frozen_.size() ? frozen_[process] : 0;
}

void Scheduler::push(Fiber& fiber, Nanoseconds time) { due_.push({time, order_++, &fiber, fiber.sleeps}); }

// Takes the next fiber out of the queue, and the clock to its time; null: the run is over.
Scheduler::Fiber* Scheduler::next() {
  while (!due_.empty()) {
    const Due due = due_.top();
    if (due.time > limit_) return nullptr;
    due_.pop();
    Fiber& fiber = *due.fiber;
    if (fiber.ended || due.sleep != fiber.sleeps) continue;
    if (const Nanoseconds until = frozen_until(fiber.process); until > due.time) {
      if (until != kForever) push(fiber, until);
      continue;
    }
    now_ = due.time;
    return &fiber;
  }
  return nullptr;
}

// Leaves the fiber that runs, which is in the queue or waits.
void Scheduler::suspend() {
  Fiber* to = next();
  if (to == active_) {
    ++to->sleeps;
    return;
  }
  resume(to != nullptr ? *to : *main_);
}

void Scheduler::resume(Fiber& to) {
  Fiber& from = *std::exchange(active_, &to);
  ++switches_;
  add_to_digest(to.id ^ static_cast<uint64_t>(now_) << 12);
  ++to.sleeps;
  from.handling.save();
  jump(from, to);
  active_->handling.restore();
}

void Scheduler::jump(Fiber& from, Fiber& to) {
  if (_setjmp(from.here) == 0) {
    switching(from, to);
    _longjmp(to.here, 1);
  }
  switched(from);
}

void Scheduler::sleep(Nanoseconds duration) {
  const Nanoseconds until = now_ + (duration < 0 ? 0 : duration);
  // The usual case of a fiber that is the next one itself.
  if ((due_.empty() || until < due_.top().time) && until <= limit_ &&
      frozen_until(active_->process) <= until) {
    now_ = until;
    add_to_digest(static_cast<uint64_t>(now_));
    return;
  }
  push(*active_, until);
  suspend();
}

bool Scheduler::wait(const void* on, Nanoseconds until) {
  Fiber& self = *active_;
  self.on = on;
  self.woken = false;
  waiting_[on].push_back(&self);
  if (until != kForever) push(self, until < now_ ? now_ : until);
  suspend();
  if (!self.woken) {
    auto found = waiting_.find(on);
    std::erase(found->second, &self);
    if (found->second.empty()) waiting_.erase(found);
  }
  self.on = nullptr;
  return self.woken;
}

void Scheduler::wake(Fiber& fiber) {
  fiber.woken = true;
  ++fiber.sleeps;  // its time-out is not due any more
  push(fiber, now_);
}

void Scheduler::wake_one(const void* on) {
  auto found = waiting_.find(on);
  if (found == waiting_.end()) return;
  auto& fibers = found->second;
  const size_t chosen = random_.below(fibers.size());
  Fiber* fiber = fibers[chosen];
  fibers.erase(fibers.begin() + static_cast<ptrdiff_t>(chosen));
  if (fibers.empty()) waiting_.erase(found);
  wake(*fiber);
}

void Scheduler::wake_all(const void* on) {
  auto found = waiting_.find(on);
  if (found == waiting_.end()) return;
  std::vector<Fiber*> fibers = std::move(found->second);
  waiting_.erase(found);
  random_.shuffle(fibers);
  for (Fiber* fiber : fibers) wake(*fiber);
}

void Scheduler::join(uint64_t id) {
  Fiber& fiber = *fibers_.at(id - 1);
  while (!fiber.ended) wait(&fiber);
  if (fiber.stack != nullptr) stacks_.push_back(std::exchange(fiber.stack, nullptr));
}

void Scheduler::freeze(uint32_t process, Nanoseconds until) {
  if (frozen_.size() <= process) frozen_.resize(process + 1, 0);
  frozen_[process] = std::max(frozen_[process], until);
  if (active_ != nullptr && active_->process == process) sleep(0);
}

}  // namespace pplx::sim
