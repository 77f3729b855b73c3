// What the engine and the protocol ask of the system, answered by the simulation. The linker puts each
// __wrap_NAME in the place of NAME in this program's objects, those of the libraries under test included
// (--wrap in CMakeLists.txt); outside of a simulation everything goes to the system as ever.
//
// So the code under test is the very code that is shipped, from the same object files. What it is asked about
// besides (memory, files, environment variables) is the real system's.
#include "tests/sim/system.h"

#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <random>
#include <thread>

namespace pplx::sim {
namespace {

using Steady = std::chrono::steady_clock;
using Wall = std::chrono::system_clock;

// Clocks begin here: not at zero, where "never" often is.
constexpr std::chrono::nanoseconds kUptime = std::chrono::hours(10);
constexpr std::chrono::nanoseconds kToday = std::chrono::hours(24 * 365 * 50);

Nanoseconds from_uptime(const timespec& at) {
  return at.tv_sec * kSecond + at.tv_nsec - Nanoseconds{kUptime.count()};
}

// The system never wakes anybody too early, but late as it likes.
Nanoseconds oversleep(Random& random, Nanoseconds wanted) {
  const Nanoseconds late = static_cast<Nanoseconds>(random.below(static_cast<uint64_t>(wanted) / 2 + 1));
  return random.one_in(64) ? late + random.any_magnitude(2 * kMillisecond) : late;
}

void nap(Nanoseconds duration) {
  Scheduler& scheduler = *Scheduler::current();
  scheduler.sleep(duration + oversleep(scheduler.random(), duration));
}

}  // namespace

// Short naps first, then longer ones: what a wait polls for in vain costs real time, too.
void back_off(unsigned idle) {
  Nanoseconds pause = 200 + 100 * Nanoseconds{idle};
  if (idle >= 16) pause = 2 * kMicrosecond << std::min(12U, (idle - 16) / 4);
  nap(std::min<Nanoseconds>(pause, 5 * kMillisecond));
}

}  // namespace pplx::sim

using pplx::sim::Nanoseconds;
using pplx::sim::Scheduler;

#pragma GCC visibility push(default)
extern "C" {

// --- time ------------------------------------------------------------------------------------------------

pplx::sim::Steady::time_point __real__ZNSt6chrono3_V212steady_clock3nowEv();
pplx::sim::Steady::time_point __wrap__ZNSt6chrono3_V212steady_clock3nowEv() {
  const Scheduler* scheduler = Scheduler::current();
  if (scheduler == nullptr) return __real__ZNSt6chrono3_V212steady_clock3nowEv();
  return pplx::sim::Steady::time_point(pplx::sim::kUptime + std::chrono::nanoseconds(scheduler->now()));
}

pplx::sim::Wall::time_point __real__ZNSt6chrono3_V212system_clock3nowEv();
pplx::sim::Wall::time_point __wrap__ZNSt6chrono3_V212system_clock3nowEv() {
  const Scheduler* scheduler = Scheduler::current();
  if (scheduler == nullptr) return __real__ZNSt6chrono3_V212system_clock3nowEv();
  return pplx::sim::Wall::time_point(pplx::sim::kToday + std::chrono::nanoseconds(scheduler->now()));
}

int __real_nanosleep(const timespec* wanted, timespec* left);
int __wrap_nanosleep(const timespec* wanted, timespec* left) {
  if (Scheduler::current() == nullptr) return __real_nanosleep(wanted, left);
  pplx::sim::nap(wanted->tv_sec * pplx::sim::kSecond + wanted->tv_nsec);
  return 0;
}

int __real_sched_yield();
int __wrap_sched_yield() {
  if (Scheduler::current() == nullptr) return __real_sched_yield();
  pplx::sim::nap(pplx::sim::kMicrosecond);
  return 0;
}

// pplx::back_off(unsigned): what a thread does between two polls in vain.
void __real__ZN4pplx8back_offEj(unsigned idle);
void __wrap__ZN4pplx8back_offEj(unsigned idle) {
  if (Scheduler::current() == nullptr) return __real__ZN4pplx8back_offEj(idle);
  pplx::sim::back_off(idle);
}

// --- threads ---------------------------------------------------------------------------------------------

// std::thread::_M_start_thread, join, detach. A thread's id is its fiber's number.
static void set_id(std::thread* thread, uint64_t id) {
  static_assert(sizeof(std::thread) == sizeof(pthread_t) && sizeof(pthread_t) == sizeof(uint64_t));
  std::memcpy(static_cast<void*>(thread), &id, sizeof id);
}
static uint64_t id_of(const std::thread* thread) {
  uint64_t id = 0;
  std::memcpy(&id, static_cast<const void*>(thread), sizeof id);
  return id;
}

void __real__ZNSt6thread15_M_start_threadESt10unique_ptrINS_6_StateESt14default_deleteIS1_EEPFvvE(
    std::thread*, std::thread::_State_ptr, void (*)());
void __wrap__ZNSt6thread15_M_start_threadESt10unique_ptrINS_6_StateESt14default_deleteIS1_EEPFvvE(
    std::thread* self, std::thread::_State_ptr state, void (*depend)()) {
  Scheduler* scheduler = Scheduler::current();
  if (scheduler == nullptr) {
    __real__ZNSt6thread15_M_start_threadESt10unique_ptrINS_6_StateESt14default_deleteIS1_EEPFvvE(
        self, std::move(state), depend);
    return;
  }
  std::shared_ptr<std::thread::_State> shared(state.release());
  set_id(self, scheduler->spawn(scheduler->process(), [shared] { shared->_M_run(); }));
}

void __real__ZNSt6thread4joinEv(std::thread* self);
void __wrap__ZNSt6thread4joinEv(std::thread* self) {
  Scheduler* scheduler = Scheduler::current();
  if (scheduler == nullptr) return __real__ZNSt6thread4joinEv(self);
  scheduler->join(id_of(self));
  set_id(self, 0);
}

void __real__ZNSt6thread6detachEv(std::thread* self);
void __wrap__ZNSt6thread6detachEv(std::thread* self) {
  if (Scheduler::current() == nullptr) return __real__ZNSt6thread6detachEv(self);
  set_id(self, 0);
}

unsigned __real__ZNSt6thread20hardware_concurrencyEv();
unsigned __wrap__ZNSt6thread20hardware_concurrencyEv() {
  return Scheduler::current() == nullptr ? __real__ZNSt6thread20hardware_concurrencyEv() : 2;
}

pthread_t __real_pthread_self();
pthread_t __wrap_pthread_self() {
  const Scheduler* scheduler = Scheduler::current();
  return scheduler == nullptr ? __real_pthread_self() : static_cast<pthread_t>(scheduler->fiber());
}

int __real_pthread_setname_np(pthread_t thread, const char* name);
int __wrap_pthread_setname_np(pthread_t thread, const char* name) {
  return Scheduler::current() == nullptr ? __real_pthread_setname_np(thread, name) : 0;
}

int __real_prctl(int option, unsigned long a, unsigned long b, unsigned long c, unsigned long d);
int __wrap_prctl(int option, unsigned long a, unsigned long b, unsigned long c, unsigned long d) {
  return Scheduler::current() == nullptr ? __real_prctl(option, a, b, c, d) : 0;
}

// --- locks -----------------------------------------------------------------------------------------------

// The system's own locks hold the state. One OS thread runs all fibers, so that what is taken is taken by
// another fiber, or the code under test deadlocks, which the scheduler notices.

int __real_pthread_mutex_lock(pthread_mutex_t* mutex);
int __wrap_pthread_mutex_lock(pthread_mutex_t* mutex) {
  Scheduler* scheduler = Scheduler::current();
  if (scheduler == nullptr) return __real_pthread_mutex_lock(mutex);
  while (pthread_mutex_trylock(mutex) != 0) scheduler->wait(mutex);
  return 0;
}

int __real_pthread_mutex_unlock(pthread_mutex_t* mutex);
int __wrap_pthread_mutex_unlock(pthread_mutex_t* mutex) {
  const int result = __real_pthread_mutex_unlock(mutex);
  if (Scheduler* scheduler = Scheduler::current()) scheduler->wake_one(mutex);
  return result;
}

int __real_pthread_rwlock_rdlock(pthread_rwlock_t* lock);
int __wrap_pthread_rwlock_rdlock(pthread_rwlock_t* lock) {
  Scheduler* scheduler = Scheduler::current();
  if (scheduler == nullptr) return __real_pthread_rwlock_rdlock(lock);
  while (pthread_rwlock_tryrdlock(lock) != 0) scheduler->wait(lock);
  return 0;
}

int __real_pthread_rwlock_wrlock(pthread_rwlock_t* lock);
int __wrap_pthread_rwlock_wrlock(pthread_rwlock_t* lock) {
  Scheduler* scheduler = Scheduler::current();
  if (scheduler == nullptr) return __real_pthread_rwlock_wrlock(lock);
  while (pthread_rwlock_trywrlock(lock) != 0) scheduler->wait(lock);
  return 0;
}

int __real_pthread_rwlock_unlock(pthread_rwlock_t* lock);
int __wrap_pthread_rwlock_unlock(pthread_rwlock_t* lock) {
  const int result = __real_pthread_rwlock_unlock(lock);
  if (Scheduler* scheduler = Scheduler::current()) scheduler->wake_all(lock);
  return result;
}

// A std::condition_variable is its pthread_cond_t.
int __real_pthread_cond_clockwait(pthread_cond_t* cond, pthread_mutex_t* mutex, clockid_t clock,
                                  const timespec* until);
int __wrap_pthread_cond_clockwait(pthread_cond_t* cond, pthread_mutex_t* mutex, clockid_t clock,
                                  const timespec* until) {
  Scheduler* scheduler = Scheduler::current();
  if (scheduler == nullptr) return __real_pthread_cond_clockwait(cond, mutex, clock, until);
  if (clock != CLOCK_MONOTONIC) std::abort();
  __wrap_pthread_mutex_unlock(mutex);
  const Nanoseconds due = std::max(pplx::sim::from_uptime(*until), scheduler->now());
  const bool woken =
      scheduler->wait(cond, due + pplx::sim::oversleep(scheduler->random(), pplx::sim::kMillisecond));
  __wrap_pthread_mutex_lock(mutex);
  return woken ? 0 : ETIMEDOUT;
}

void __real__ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE(std::condition_variable* cond,
                                                                      std::unique_lock<std::mutex>& lock);
void __wrap__ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE(std::condition_variable* cond,
                                                                      std::unique_lock<std::mutex>& lock) {
  Scheduler* scheduler = Scheduler::current();
  if (scheduler == nullptr) {
    __real__ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE(cond, lock);
    return;
  }
  lock.unlock();
  scheduler->wait(cond);
  lock.lock();
}

void __real__ZNSt18condition_variable10notify_oneEv(std::condition_variable* cond);
void __wrap__ZNSt18condition_variable10notify_oneEv(std::condition_variable* cond) {
  Scheduler* scheduler = Scheduler::current();
  if (scheduler == nullptr) return __real__ZNSt18condition_variable10notify_oneEv(cond);
  scheduler->wake_one(cond);
}

void __real__ZNSt18condition_variable10notify_allEv(std::condition_variable* cond);
void __wrap__ZNSt18condition_variable10notify_allEv(std::condition_variable* cond) {
  Scheduler* scheduler = Scheduler::current();
  if (scheduler == nullptr) return __real__ZNSt18condition_variable10notify_allEv(cond);
  scheduler->wake_all(cond);
}

// --- chance, and who is who ------------------------------------------------------------------------------

// std::random_device: nonces and the ids of engines.
unsigned __real__ZNSt13random_device9_M_getvalEv(std::random_device* device);
unsigned __wrap__ZNSt13random_device9_M_getvalEv(std::random_device* device) {
  Scheduler* scheduler = Scheduler::current();
  if (scheduler == nullptr) return __real__ZNSt13random_device9_M_getvalEv(device);
  return static_cast<unsigned>(scheduler->random()());
}

pid_t __real_getpid();
pid_t __wrap_getpid() {
  const Scheduler* scheduler = Scheduler::current();
  return scheduler == nullptr ? __real_getpid() : static_cast<pid_t>(1000 + scheduler->process());
}

int __real_gethostname(char* name, size_t size);
int __wrap_gethostname(char* name, size_t size) {
  const Scheduler* scheduler = Scheduler::current();
  if (scheduler == nullptr) return __real_gethostname(name, size);
  std::snprintf(name, size, "host%u", scheduler->process());
  return 0;
}
}
#pragma GCC visibility pop

namespace pplx::sim {

// A name that the linker did not find to replace would go unnoticed and cost the simulation its determinism.
void check_system() {
  Scheduler scheduler(1);
  std::string wrong;
  const auto expect = [&](bool good, const char* what) {
    if (!good) wrong += std::string(wrong.empty() ? "" : ", ") + what;
  };
  scheduler.spawn(7, [&] {
    const auto began = Steady::now();
    scheduler.sleep(kSecond);
    expect(Steady::now() - began == std::chrono::seconds(1), "steady_clock");
    expect(Wall::now().time_since_epoch() < 2 * kToday && Wall::now().time_since_epoch() >= kToday,
           "system_clock");
    expect(std::thread::hardware_concurrency() == 2, "hardware_concurrency");
    expect(getpid() == 1007, "getpid");
    std::mutex mutex;
    std::condition_variable changed;
    bool ready = false;
    std::thread::id there;
    std::unique_lock lock(mutex);
    std::thread thread([&] {
      there = std::this_thread::get_id();
      const std::lock_guard guard(mutex);
      ready = true;
      changed.notify_all();
    });
    changed.wait(lock, [&] { return ready; });
    lock.unlock();
    thread.join();
    expect(there != std::this_thread::get_id(), "std::thread");
    lock.lock();
    const auto before = Steady::now();
    expect(!changed.wait_for(lock, std::chrono::hours(1), [] { return false; }) &&
               Steady::now() - before >= std::chrono::hours(1),
           "condition_variable");
  });
  scheduler.run(2 * 3600 * kSecond);
  const auto draw = [] {
    Scheduler twin(2);
    unsigned drawn = 0;
    twin.spawn(0, [&] { drawn = std::random_device{}(); });
    twin.run(kSecond);
    return drawn;
  };
  expect(draw() == draw(), "random_device");
  if (!wrong.empty()) throw std::runtime_error("this toolchain names differently: " + wrong);
}

}  // namespace pplx::sim
