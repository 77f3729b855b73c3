// What the TransferEngine adds to its provider: two processes play ping-pong and stream, over a bare loop and
// over the engine in turn, so that both see the same machine. The bare loop has one NIC, however many the
// engine has. In-process fabrics (local, sim) move bytes within one thread, against memcpy.
//
//   bench_engine [local|sim|shm|tcp|verbs|efa|PROVIDER]... [--nics 1,2,4,8] [--names NIC,NIC...]
//                [--repeats N] [--longest BYTES]
#include "proxy/engine/engine.h"

#include <sys/mman.h>
#include <sys/select.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "benchmarks/bare.h"
#ifdef PPLX_WITH_VERBS
#include "benchmarks/bare_verbs.h"
#endif

namespace pplx::bench {
namespace {

constexpr size_t kLongest = 64 << 20;
constexpr size_t kMostNics = 8;
constexpr uint64_t kWindow = 64;  // writes in flight while streaming

struct Options {
  int repeats = 20;
  size_t longest = kLongest;
  std::vector<size_t> nics = {1};
  std::vector<std::string>
      names;  // of NICs; empty: the first, or addresses 127.0.0.2, ... where those are NICs
};

EngineConfig configuration(const std::string& fabric, const Options& options, size_t nics) {
  EngineConfig config;
  config.fabric = fabric;
  config.sim.reorder = fabric == "sim";
  if (!options.names.empty()) config.nic = options.names.front();
  if (nics == 1) return config;
  config.nics.resize(nics);
  for (size_t i = 0; i < nics; ++i) {
    if (!options.names.empty()) {
      config.nics[i].name = options.names[i % options.names.size()];
    } else if (fabric.find("tcp") != std::string::npos) {
      config.nics[i].bind_address = "127.0.0." + std::to_string(2 + i);
    }
  }
  return config;
}

// The same kind of memory for both, so that alignment and page size don't tell them apart.
std::byte* pages(size_t size) {
  void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) std::abort();
  std::memset(memory, 1, size);
  return static_cast<std::byte*>(memory);
}

class EngineSide {
 public:
  EngineSide(const EngineConfig& config, size_t size)
      : engine_(config),
        source_(engine_.register_memory(pages(size), size)),
        target_(engine_.register_memory(pages(size), size)) {
    counter_ = engine_.imm_counter(7);
  }
  std::vector<std::byte> descriptor() const { return target_->descriptor().bytes(); }
  void connect(const std::vector<std::byte>& peer) { remote_ = engine_.open(RegionDescriptor(peer)); }
  void post(size_t length) { engine_.write({source_.get(), 0, remote_.get(), 0, length, 7}, &done_); }
  void poll() { engine_.progress(); }
  uint64_t sent() const { return done_.done(); }
  uint64_t received() const { return counter_.value(); }
  std::string name() const { return engine_.fabric_name(); }

 private:
  CompletionCounter done_;
  TransferEngine engine_;
  std::shared_ptr<Region> source_, target_;
  std::shared_ptr<RemoteRegion> remote_;
  ImmCounter counter_;
};

// What in-process fabrics come down to.
class CopySide {
 public:
  explicit CopySide(size_t size) : source_(pages(size)), target_(pages(size)) {}
  void connect(const std::vector<std::byte>&) {}
  std::vector<std::byte> descriptor() const { return {}; }
  void post(size_t length) {
    std::memcpy(target_, source_, length);
    asm volatile("" ::"r"(target_) : "memory");
    ++done_;
  }
  void poll() {}
  uint64_t sent() const { return done_; }
  uint64_t received() const { return done_; }

 private:
  std::byte *source_, *target_;
  uint64_t done_ = 0;
};

// A blocking byte stream to the other process.
struct Link {
  int in, out;
  void put(const std::vector<std::byte>& bytes) const {
    size_t size = bytes.size();
    if (write(out, &size, sizeof size) != sizeof size || write(out, bytes.data(), size) != ssize_t(size))
      _exit(1);
  }
  std::vector<std::byte> get() const {
    size_t size = 0;
    if (read(in, &size, sizeof size) != sizeof size) _exit(1);
    std::vector<std::byte> bytes(size);
    if (read(in, bytes.data(), size) != ssize_t(size)) _exit(1);
    return bytes;
  }
  void meet() const {
    put({std::byte{0}});
    get();
  }
};

double seconds() { return std::chrono::duration<double>(Clock::now().time_since_epoch()).count(); }

// The other side may still need our acknowledgements: polls until it is done as well.
template <typename Side>
void meet_polling(Side& side, const Link& link) {
  link.put({std::byte{0}});
  for (;;) {
    side.poll();
    fd_set set;
    FD_ZERO(&set);
    FD_SET(link.in, &set);
    timeval now{0, 0};
    if (select(link.in + 1, &set, nullptr, nullptr, &now) > 0) break;
  }
  link.get();
}

// Seconds of half a round trip.
template <typename Side>
double ping_pong(Side& side, const Link& link, bool first, size_t length, uint64_t rounds) {
  uint64_t sent = side.sent(), received = side.received();
  link.meet();
  double started = seconds();
  for (uint64_t i = 1; i <= rounds; ++i) {
    if (first) side.post(length);
    while (side.received() < received + i) side.poll();
    if (!first) side.post(length);
  }
  double elapsed = seconds() - started;
  while (side.sent() < sent + rounds) side.poll();
  meet_polling(side, link);
  return elapsed / double(rounds) / 2;
}

// Seconds a write, from the first post to the last completion.
template <typename Side>
double stream(Side& side, const Link& link, bool first, size_t length, uint64_t writes) {
  uint64_t sent = side.sent(), received = side.received();
  link.meet();
  double started = seconds();
  if (first) {
    for (uint64_t i = 0; i < writes; ++i) {
      while (sent + i - side.sent() >= kWindow) side.poll();
      side.post(length);
    }
    while (side.sent() < sent + writes) side.poll();
  } else {
    while (side.received() < received + writes) side.poll();
  }
  double elapsed = seconds() - started;
  meet_polling(side, link);
  return elapsed / double(writes);
}

// The best of many short trials: what others do on the machine only ever adds to a time.
struct Pair {
  double bare = 1e9, engine = 1e9;
  double difference() const { return engine - bare; }
  double ratio() const { return engine / bare; }
};

double memcpy_rate(size_t length) {
  std::vector<std::byte> a(length), b(length);
  std::memset(a.data(), 1, a.size());
  size_t rounds = std::max<size_t>(4, (64 << 20) / std::max<size_t>(length, 64));
  for (int warm = 0;; ++warm) {
    double started = seconds();
    for (size_t i = 0; i < rounds; ++i) {
      std::memcpy(b.data(), a.data(), length);
      asm volatile("" ::"r"(b.data()) : "memory");
    }
    if (warm == 2) return double(length) * double(rounds) / (seconds() - started);
  }
}

template <typename Bare>
void play(Bare& bare, EngineSide& engine, const Link& link, bool first, const Options& options) {
  for (auto* text : {"bare", "engine"}) {
    bool is_bare = text[0] == 'b';
    link.put(is_bare ? bare.descriptor() : engine.descriptor());
    auto peer = link.get();
    is_bare ? bare.connect(peer) : engine.connect(peer);
  }
  if (first) {
    std::printf("\n%s, %d trials in turn, the best of each\n", engine.name().c_str(), options.repeats);
    std::printf("%9s | %21s %8s %6s | %19s %6s | %15s %7s\n", "", "half round trip us", "+ns", "ratio",
                "million writes/s", "ratio", "GB/s", "memcpy");
    std::printf("%9s | %10s %10s %8s %6s | %9s %9s %6s | %7s %7s %7s\n", "bytes", "bare", "engine", "", "",
                "bare", "engine", "", "bare", "engine", "GB/s");
  }
  for (size_t length : {size_t{8}, size_t{256}, size_t{4096}, size_t{16384}, size_t{65536}, size_t{1} << 20,
                        size_t{8} << 20, kLongest}) {
    if (length > options.longest) break;
    auto rounds = std::clamp<uint64_t>((16 << 20) / length, 4, 2000);
    auto writes = std::clamp<uint64_t>((64 << 20) / length, length < kLongest ? 8 : 2, 10000);
    Pair latency, rate;
    for (int i = 0; i < options.repeats; ++i) {
      for (bool is_bare : {i % 2 == 0, i % 2 != 0}) {
        double half = is_bare ? ping_pong(bare, link, first, length, rounds)
                              : ping_pong(engine, link, first, length, rounds);
        double write =
            is_bare ? stream(bare, link, first, length, writes) : stream(engine, link, first, length, writes);
        double& best_half = is_bare ? latency.bare : latency.engine;
        double& best_write = is_bare ? rate.bare : rate.engine;
        best_half = std::min(best_half, half);
        best_write = std::min(best_write, write);
      }
    }
    if (!first) continue;
    std::printf("%9zu | %10.2f %10.2f %8.0f %6.3f | %9.3f %9.3f %6.3f | %7.2f %7.2f %7.1f\n", length,
                latency.bare * 1e6, latency.engine * 1e6, latency.difference() * 1e9, latency.ratio(),
                1e-6 / rate.bare, 1e-6 / rate.engine, 1 / rate.ratio(), double(length) / rate.bare * 1e-9,
                double(length) / rate.engine * 1e-9, memcpy_rate(length) * 1e-9);
    std::fflush(stdout);
  }
  link.meet();
}

// Seconds a write that a process sends to itself, with `window` in flight: one thread, so that neither the
// other process nor the scheduler is in the way of the engine's own cost.
template <typename Side>
double loopback(Side& side, uint64_t window, size_t length = 8, uint64_t kWrites = 1024) {
  uint64_t sent = side.sent(), received = side.received();
  double started = seconds();
  for (uint64_t i = 0; i < kWrites; ++i) {
    while (sent + i - side.sent() >= window || received + i - side.received() >= window) side.poll();
    side.post(length);
  }
  while (side.sent() < sent + kWrites || side.received() < received + kWrites) side.poll();
  return (seconds() - started) / double(kWrites);
}

template <typename Bare>
void play_loopback(Bare& bare, EngineSide& engine, const Options& options) {
  bare.connect(bare.descriptor());
  engine.connect(engine.descriptor());
  std::printf("\n%s, 8 bytes from a process to itself, the best of %d trials in turn\n",
              engine.name().c_str(), options.repeats * 20);
  for (uint64_t window : {uint64_t{1}, kWindow}) {
    Pair time;
    for (int i = 0; i < options.repeats * 20; ++i) {
      time.bare = std::min(time.bare, loopback(bare, window));
      time.engine = std::min(time.engine, loopback(engine, window));
    }
    std::printf("%3d in flight: bare %6.0f ns a write, engine %6.0f ns, %+5.0f ns, ratio %.3f\n", int(window),
                time.bare * 1e9, time.engine * 1e9, time.difference() * 1e9, time.ratio());
  }
}

// In one thread: what a write of each length costs beyond copying its bytes.
void play_in_process(CopySide& bare, EngineSide& engine, const Options& options) {
  engine.connect(engine.descriptor());
  std::printf("\n%s, from a process to itself, the best of %d trials in turn\n", engine.name().c_str(),
              options.repeats);
  std::printf("%9s | %12s %12s %9s\n", "bytes", "memcpy ns", "engine ns", "GB/s");
  for (size_t length = 8; length <= options.longest; length *= 8) {
    const auto writes = std::clamp<uint64_t>((16 << 20) / length, 2, 1024);
    Pair time;
    for (int i = 0; i < options.repeats; ++i) {
      time.bare = std::min(time.bare, loopback(bare, kWindow, length, writes));
      time.engine = std::min(time.engine, loopback(engine, kWindow, length, writes));
    }
    std::printf("%9zu | %12.0f %12.0f %9.2f\n", length, time.bare * 1e9, time.engine * 1e9,
                double(length) / time.engine * 1e-9);
    std::fflush(stdout);
  }
}

// Makes both sides, with `size` bytes each to write from and to, and hands them to `game`.
template <typename Game>
void with_sides(const std::string& fabric, const Options& options, size_t nics, size_t size, Game&& game) {
  if (fabric == "verbs") {
#ifdef PPLX_WITH_VERBS
    BareVerbsSide bare(configuration(fabric, options, 1), pages(size), pages(size), size);
    EngineSide engine(configuration(fabric, options, nics), size);
    game(bare, engine);
#else
    std::fprintf(stderr, "built without libibverbs' headers\n");
    std::exit(1);
#endif
    return;
  }
  BareSide bare(fabric, pages(size), pages(size), size);
  EngineSide engine(configuration(fabric, options, nics), size);
  game(bare, engine);
}

int run(const std::string& fabric, const Options& options, size_t nics) {
  std::fflush(stdout);
  const bool in_process = fabric == "local" || fabric == "sim";
  pid_t alone = fork();
  if (alone == 0) {
    if (in_process) {
      CopySide bare(kLongest);
      EngineSide engine(configuration(fabric, options, nics), kLongest);
      play_in_process(bare, engine, options);
    } else {
      with_sides(fabric, options, nics, 4096,
                 [&](auto& bare, EngineSide& engine) { play_loopback(bare, engine, options); });
    }
    std::fflush(stdout);
    _exit(0);
  }
  int alone_status = 0;
  waitpid(alone, &alone_status, 0);
  if (options.longest < 8 || in_process) return alone_status != 0;

  int down[2], up[2];
  if (pipe(down) != 0 || pipe(up) != 0) return 1;
  pid_t child = fork();  // before libfabric is touched: providers do not survive a fork
  if (child == 0) {
    with_sides(fabric, options, nics, kLongest, [&](auto& bare, EngineSide& engine) {
      play(bare, engine, {down[0], up[1]}, false, options);
    });
    _exit(0);
  }
  // Again in a child, so that the next provider forks from a clean process.
  pid_t parent = fork();
  if (parent == 0) {
    with_sides(fabric, options, nics, kLongest, [&](auto& bare, EngineSide& engine) {
      play(bare, engine, {up[0], down[1]}, true, options);
    });
    std::fflush(stdout);
    _exit(0);
  }
  int status = 0, other = 0;
  waitpid(parent, &status, 0);
  waitpid(child, &other, 0);
  return alone_status != 0 || status != 0 || other != 0;
}

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    if (end > begin) parts.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

}  // namespace
}  // namespace pplx::bench

int main(int argc, char** argv) {
  std::vector<std::string> fabrics;
  pplx::bench::Options options;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--repeats") == 0 && i + 1 < argc) {
      options.repeats = std::max(1, std::atoi(argv[++i]));
    } else if (std::strcmp(argv[i], "--longest") == 0 && i + 1 < argc) {
      options.longest = std::min(pplx::bench::kLongest, size_t(std::strtoull(argv[++i], nullptr, 10)));
    } else if (std::strcmp(argv[i], "--nics") == 0 && i + 1 < argc) {
      options.nics.clear();
      for (const auto& text : pplx::bench::split(argv[++i])) {
        const size_t nics = std::strtoull(text.c_str(), nullptr, 10);
        options.nics.push_back(std::clamp(nics, size_t{1}, pplx::bench::kMostNics));
      }
    } else if (std::strcmp(argv[i], "--names") == 0 && i + 1 < argc) {
      options.names = pplx::bench::split(argv[++i]);
    } else {
      fabrics.emplace_back(argv[i]);
    }
  }
  if (fabrics.empty()) fabrics = {"shm", "tcp"};
  int failed = 0;
  for (const auto& fabric : fabrics) {
    for (size_t nics : options.nics) {
      if (nics > 1 && fabric == "shm") {
        std::printf("\nshm has no NICs to choose from: one\n");
        continue;
      }
      failed |= pplx::bench::run(fabric, options, nics);
    }
  }
  return failed;
}
