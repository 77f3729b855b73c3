// Shared by the tests: the fabrics they run over and a pair of engines.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <filesystem>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "proxy/engine/engine.h"
#include "proxy/fabric/sim.h"

namespace pplx::testing {

using namespace std::chrono_literals;

// An assertion that fails, or a wait that throws, leaves a test while its operations are under way, and
// workers go on with whatever those refer to. So tests make nothing of the kind in their own frames: neither
// sinks (this declaration hides the real one, so that one on the stack does not compile) nor memory to send
// from.
class CompletionCounter;

// A counter that is never freed.
inline pplx::CompletionCounter& lasting_counter() {
  static std::mutex mutex;
  static auto& all = *new std::deque<pplx::CompletionCounter>;
  std::lock_guard lock(mutex);
  return all.emplace_back();
}

// What it allocates stays until it is closed, whoever drops the handle.
class TransferEngine : public pplx::TransferEngine {
 public:
  using pplx::TransferEngine::TransferEngine;
  ~TransferEngine() { close(); }
  std::shared_ptr<Region> allocate(size_t size) {
    std::lock_guard lock(mutex_);
    return kept_.emplace_back(pplx::TransferEngine::allocate(size));
  }
  // For tests of what is registered no more; nothing of this engine's may be under way from or into it.
  void drop(std::shared_ptr<Region>& region) {
    std::lock_guard lock(mutex_);
    std::erase(kept_, region);
    region.reset();
  }

 private:
  std::mutex mutex_;
  std::vector<std::shared_ptr<Region>> kept_;
};

// tests/soft_roce gives emulated machines more time.
inline double time_scale() {
  const char* text = std::getenv("PPLX_TEST_TIME_SCALE");
  return text == nullptr ? 1.0 : std::max(1.0, std::atof(text));
}
inline Duration scaled(Duration limit) { return std::chrono::duration_cast<Duration>(limit * time_scale()); }

struct FabricCase {
  std::string name;
  EngineConfig config;
};

inline void PrintTo(const FabricCase& fabric, std::ostream* out) { *out << fabric.name; }

inline EngineConfig local() {
  EngineConfig config;
  config.timeout = scaled(10s);
  return config;
}

inline EngineConfig sim(uint64_t seed) {
  EngineConfig config = local();
  config.fabric = "sim";
  config.sim.seed = seed;
  config.sim.reorder = true;
  config.sim.max_delay = 4;
  config.sim.max_pieces = 5;
  config.sim.stall_every = 50;
  return config;
}

inline EngineConfig provider(const std::string& name, int endpoints = 1) {
  EngineConfig config = local();
  config.fabric = name;
  config.endpoints = endpoints;
  return config;
}

inline EngineConfig with_nics(EngineConfig config, size_t nics) {
  config.nics.resize(nics);
  // Addresses stand for NICs where sockets carry the traffic.
  if (config.fabric == "tcp") {
    for (size_t i = 0; i < nics; ++i) config.nics[i].bind_address = "127.0.0." + std::to_string(2 + i);
  }
  return config;
}

inline EngineConfig efa_like(uint64_t seed) {
  EngineConfig config = sim(seed);
  config.endpoints = 4;
  config.sim = efa_limits(seed);
  return config;
}

// Connections as those of RC queue pairs.
inline EngineConfig fenced(EngineConfig config) {
  config.sim.fences = true;
  return config;
}

// Runs of a property test: PPLX_TEST_RUNS multiplies them, for long searches.
inline uint64_t property_runs(uint64_t few) {
  const char* text = std::getenv("PPLX_TEST_RUNS");
  return few * (text == nullptr ? 1 : std::max(1ULL, std::strtoull(text, nullptr, 10)));
}

// Why fabric "verbs" cannot be tested on this machine; tests/soft_roce makes one where it can. Without
// loading libibverbs, which forked children then could not use.
inline std::optional<std::string> no_verbs() {
  std::error_code ignored;
  const std::filesystem::directory_iterator devices("/sys/class/infiniband", ignored);
  if (!ignored && devices != std::filesystem::directory_iterator()) return std::nullopt;
  return "this machine has no RDMA device (make test ONLY=soft-roce makes one)";
}

inline EngineConfig verbs(int endpoints = 1) {
  EngineConfig config = provider("verbs", endpoints);
  config.timeout = scaled(30s);  // emulated NICs are slow
  config.verbs.connect_timeout = scaled(10s);
  config.verbs.ack_timeout = 14;
  config.job = "test";
  return config;
}

// So few work requests and receives that all queues are full all the time.
inline EngineConfig tight_verbs() {
  EngineConfig config = verbs();
  config.verbs.send_depth = 2;
  config.verbs.outstanding = 16;
  config.verbs.receives = 8;
  return config;
}

inline std::vector<FabricCase> all_fabrics() {
  auto split = sim(4);
  split.sim.max_write = 4096;
  auto tight = sim(5);
  tight.sim.queue_depth = 4;
  std::vector<FabricCase> found = {{"local", local()},
                                   {"sim_seed1", sim(1)},
                                   {"sim_seed2", sim(2)},
                                   {"sim_seed3", sim(3)},
                                   {"sim_split", split},
                                   {"sim_tight", tight},
                                   {"tcp", provider("tcp")},
                                   {"shm", provider("shm")},
                                   {"tcp_x4", provider("tcp", 4)},
                                   {"sim_efa", efa_like(6)},
                                   {"sim_fences", with_nics(fenced(sim(9)), 2)},
                                   {"sim_nics3", with_nics(sim(7), 3)},
                                   {"efa_nics2", with_nics(efa_like(8), 2)},
                                   {"tcp_nics2", with_nics(provider("tcp"), 2)}};
  if (!no_verbs()) {
    found.insert(found.end(), {{"verbs", verbs()},
                               {"verbs_x4", verbs(4)},
                               {"verbs_tight", tight_verbs()},
                               {"verbs_nics2", with_nics(verbs(), 2)}});
  }
  return found;
}

inline std::string case_name(const ::testing::TestParamInfo<FabricCase>& info) { return info.param.name; }

inline void fill_random(std::byte* data, size_t size, uint64_t seed) {
  std::mt19937_64 rng(seed);
  for (size_t i = 0; i < size; ++i) data[i] = static_cast<std::byte>(rng());
}

template <typename Function>
ErrorKind kind_of(Function&& function) {
  try {
    function();
  } catch (const Error& error) {
    EXPECT_FALSE(std::string(error.what()).empty());
    return error.kind();
  }
  ADD_FAILURE() << "nothing was thrown";
  return ErrorKind::kRouting;
}

inline uint64_t wait_done(TransferEngine& engine, const pplx::CompletionCounter& counter, uint64_t n,
                          Duration timeout = 20s) {
  engine.wait_until([&] { return counter.done() >= n; }, Clock::now() + scaled(timeout));
  return counter.done();
}

// Waits for immediates at `to` on this thread alone. Where few writes may be under way both ends take turns,
// hundreds of them, and on a busy machine a worker may be given one every 100 ms only.
inline uint64_t wait_arrived(TransferEngine& from, TransferEngine& to, uint32_t imm, uint64_t n,
                             Duration timeout = 20s) {
  const auto counter = to.imm_counter(imm);
  from.wait_until(
      [&] {
        to.progress();
        return counter.value() >= n;
      },
      Clock::now() + scaled(timeout));
  return counter.value();
}

// libfabric 2's shm crashes between engines of one process, which the engine therefore refuses.
inline bool shm_needs_processes(const TransferEngine& engine) {
  return engine.fabric_name().starts_with("libfabric:shm 2");
}

// Two engines of one process, `a` writing to `b`.
class PairTest : public ::testing::TestWithParam<FabricCase> {
 protected:
  void SetUp() override {
    if (shm_needs_processes(a)) GTEST_SKIP() << a.fabric_name();
  }
  TransferEngine a{GetParam().config};
  TransferEngine b{GetParam().config};
};

}  // namespace pplx::testing
