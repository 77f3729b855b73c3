// How long it takes from a kernel's epoch to the posted write: a kernel stores epochs into a word in pinned
// memory, the engine watches it (TransferEngine::watch_word) and posts a write of 8 bytes for each, and the
// kernel waits for what that write brings back. The floor is a CPU thread that does nothing but copy the
// word.
//
//   bench_epoch [FABRIC] [--rounds N] [--repeats N]
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "proxy/engine/engine.h"

namespace pplx::bench {
namespace {

void require(cudaError_t rc, const char* what) {
  if (rc == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(rc));
  std::exit(1);
}

__global__ void ping_pong(uint64_t* word, const uint64_t* reply, uint64_t first, uint64_t rounds) {
  for (uint64_t epoch = first; epoch < first + rounds; ++epoch) {
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(word), "l"(epoch) : "memory");
    uint64_t seen = 0;
    do {
      asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(seen) : "l"(reply) : "memory");
    } while (seen < epoch);
  }
}

// Two words on cache lines of their own, which GPU and CPU reach.
struct Words {
  Words() {
    require(cudaHostAlloc(&memory, kBytes, cudaHostAllocMapped | cudaHostAllocPortable), "cudaHostAlloc");
    std::memset(memory, 0, kBytes);
  }
  ~Words() { cudaFreeHost(memory); }
  uint64_t* word() const { return static_cast<uint64_t*>(memory); }
  uint64_t* reply() const { return word() + kReply / sizeof(uint64_t); }

  static constexpr size_t kBytes = 8192, kReply = 4096;
  void* memory = nullptr;
};

// Microseconds of a round trip, on average over one kernel.
double round_trip(const Words& words, uint64_t& next, uint64_t rounds) {
  cudaEvent_t begin, end;
  require(cudaEventCreate(&begin), "cudaEventCreate");
  require(cudaEventCreate(&end), "cudaEventCreate");
  require(cudaEventRecord(begin), "cudaEventRecord");
  ping_pong<<<1, 1>>>(words.word(), words.reply(), next, rounds);
  require(cudaEventRecord(end), "cudaEventRecord");
  require(cudaEventSynchronize(end), "the kernel");
  next += rounds;
  float milliseconds = 0;
  require(cudaEventElapsedTime(&milliseconds, begin, end), "cudaEventElapsedTime");
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return 1e3 * milliseconds / double(rounds);
}

double best_of(const Words& words, uint64_t rounds, int repeats) {
  uint64_t next = 1;
  round_trip(words, next, 100);
  double best = 1e9;
  for (int i = 0; i < repeats; ++i) best = std::min(best, round_trip(words, next, rounds));
  return best;
}

double bare(uint64_t rounds, int repeats) {
  Words words;
  std::atomic<bool> stop{false};
  std::thread copier([&] {
    std::atomic_ref<uint64_t> word(*words.word()), reply(*words.reply());
    for (uint64_t seen = 0; !stop.load(std::memory_order_relaxed);) {
      const uint64_t now = word.load(std::memory_order_acquire);
      if (now == seen) continue;
      reply.store(now, std::memory_order_release);
      seen = now;
    }
  });
  const double best = best_of(words, rounds, repeats);
  stop = true;
  copier.join();
  return best;
}

double with_engine(const std::string& fabric, uint64_t rounds, int repeats) {
  Words words;
  EngineConfig config;
  config.fabric = fabric;
  TransferEngine engine(config);
  std::shared_ptr<Region> region = engine.register_memory(words.memory, Words::kBytes);
  std::shared_ptr<RemoteRegion> remote = engine.open(region->descriptor());
  WatchConfig watch;
  watch.word = words.word();
  watch.writes.push_back({region, 0, remote, Words::kReply, sizeof(uint64_t)});
  const auto watched = engine.watch_word(std::move(watch));
  const double best = best_of(words, rounds, repeats);
  if (auto error = watched->error()) std::printf("error: %s\n", error->what());
  std::printf("engine on %s, worker on core %d (-1: none of its own, so that it naps)\n",
              engine.fabric_name().c_str(), engine.stats().worker_core);
  return best;
}

int run(const std::string& fabric, uint64_t rounds, int repeats) {
  cudaDeviceProp properties{};
  require(cudaGetDeviceProperties(&properties, 0), "no GPU");
  std::printf("%s, %llu rounds, the best of %d\n", properties.name, static_cast<unsigned long long>(rounds),
              repeats);
  const double floor = bare(rounds, repeats);
  const double engine = with_engine(fabric, rounds, repeats);
  std::printf("round trip: bare thread %.2f us, engine %.2f us, added %.2f us\n", floor, engine,
              engine - floor);
  // The way back, which the write has behind it then, is half of the bare thread's round trip.
  std::printf("from the epoch until the write has landed: %.2f us (aim for posted: 4)\n", engine - floor / 2);
  return 0;
}

}  // namespace
}  // namespace pplx::bench

int main(int argc, char** argv) {
  std::string fabric = "local";
  uint64_t rounds = 20000;
  int repeats = 10;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--rounds") == 0 && i + 1 < argc) {
      rounds = std::max(1ULL, std::strtoull(argv[++i], nullptr, 10));
    } else if (std::strcmp(argv[i], "--repeats") == 0 && i + 1 < argc) {
      repeats = std::max(1, std::atoi(argv[++i]));
    } else {
      fabric = argv[i];
    }
  }
  return pplx::bench::run(fabric, rounds, repeats);
}
