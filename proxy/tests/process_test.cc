// Engines of several processes, as in production; and what is left when one is killed. Run each test in a
// process of its own, as ctest does: a fork of one that has loaded libfabric cannot use it.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <thread>

#include "proxy/tests/support.h"

namespace pplx::testing {
namespace {

// A byte stream between parent and child for the out-of-band exchange.
struct Pipe {
  Pipe() { EXPECT_EQ(pipe(ends), 0); }
  ~Pipe() {
    drop(0);
    drop(1);
  }
  void drop(int end) {
    if (ends[end] >= 0) ::close(ends[end]);
    ends[end] = -1;
  }
  void put(const Bytes& bytes) {
    size_t size = bytes.size();
    ASSERT_EQ(::write(ends[1], &size, sizeof size), static_cast<ssize_t>(sizeof size));
    ASSERT_EQ(::write(ends[1], bytes.data(), size), static_cast<ssize_t>(size));
  }
  Bytes get() {
    size_t size = 0;
    if (::read(ends[0], &size, sizeof size) != static_cast<ssize_t>(sizeof size)) return {};
    Bytes bytes(size);
    for (size_t at = 0; at < size;) {
      auto count = ::read(ends[0], bytes.data() + at, size - at);
      if (count <= 0) return {};
      at += static_cast<size_t>(count);
    }
    return bytes;
  }
  int ends[2];
};

class ProcessTest : public ::testing::TestWithParam<FabricCase> {
 protected:
  // Runs `child` in a process forked before any engine exists here (providers do not survive a fork).
  template <typename Child>
  void start(Child&& child) {
    pid = fork();
    ASSERT_GE(pid, 0);
    // Each keeps its own ends, so that reading from a dead process ends at once.
    to_child.drop(pid == 0 ? 1 : 0);
    to_parent.drop(pid == 0 ? 0 : 1);
    if (pid != 0) return;
    alarm(static_cast<unsigned>(60 * time_scale()));
    int code = 1;
    try {
      code = child() ? 0 : 1;
    } catch (const std::exception& error) {
      fprintf(stderr, "child: %s\n", error.what());
    }
    _exit(code);
  }
  int finish() {
    int status = 0;
    EXPECT_EQ(waitpid(pid, &status, 0), pid);
    pid = -1;
    return status;
  }
  void TearDown() override {
    if (pid > 0) kill(pid, SIGKILL), finish();
  }
  Pipe to_child, to_parent;
  pid_t pid = -1;
};

constexpr size_t kSize = (1 << 20) + 3;
constexpr uint64_t kRounds = 50;

TEST_P(ProcessTest, PingPong) {
  auto play = [](Pipe& in, Pipe& out, const EngineConfig& config, bool first) {
    TransferEngine engine(config);
    auto source = engine.allocate(kSize), target = engine.allocate(kSize);
    out.put(target->descriptor().bytes());
    auto remote = engine.open(RegionDescriptor(in.get()));
    auto counter = engine.imm_counter(1);
    Bytes expected(kSize);
    bool good = true;
    auto& done = lasting_counter();
    for (uint64_t round = 1; round <= kRounds; ++round) {
      fill_random(expected.data(), kSize, round);
      size_t length = round * 7919 % kSize;
      auto write = [&] {
        wait_done(engine, done, round - 1);
        std::memcpy(source->data(), expected.data(), kSize);
        engine.write({source.get(), 0, remote.get(), kSize - length, length, 1}, &done);
      };
      if (first) write();
      counter.wait(round);
      good = good && std::memcmp(target->data() + kSize - length, expected.data(), length) == 0;
      if (!first) write();
    }
    good = good && wait_done(engine, done, kRounds) == kRounds && done.failed() == 0;
    // Both stay until both are done.
    out.put({std::byte{1}});
    in.get();
    return good;
  };
  start([&] { return play(to_child, to_parent, GetParam().config, false); });
  EXPECT_TRUE(play(to_parent, to_child, GetParam().config, true));
  EXPECT_EQ(finish(), 0);
}

std::vector<FabricCase> between_processes() {
  std::vector<FabricCase> found = all_fabrics();
  std::erase_if(found, [](const FabricCase& fabric) {
    return fabric.config.fabric == "local" || fabric.config.fabric == "sim" || !fabric.config.nics.empty();
  });
  return found;
}

TEST_P(ProcessTest, KilledPeerFailsWritesToItOnly) {
  auto config = GetParam().config;
  config.timeout = GetParam().config.fabric == "verbs" ? scaled(12s) : 3s;  // emulated NICs are slow
  start([&] {
    TransferEngine engine(config);
    auto target = engine.allocate(kSize);
    to_parent.put(target->descriptor().bytes());
    engine.imm_counter(1).wait(1, scaled(30s));
    to_parent.put({std::byte{1}});
    for (;;) engine.progress();
    return true;
  });
  TransferEngine engine(config), other(config);
  if (shm_needs_processes(engine)) GTEST_SKIP();
  auto source = engine.allocate(kSize);
  auto remote = engine.open(RegionDescriptor(to_parent.get()));
  auto at_other = other.allocate(kSize);
  auto to_other = engine.open(at_other->descriptor());
  auto& done = lasting_counter();
  engine.write({source.get(), 0, remote.get(), 0, kSize, 1}, &done);
  ASSERT_EQ(wait_done(engine, done, 1), 1u);
  ASSERT_EQ(done.failed(), 0u);
  ASSERT_FALSE(to_parent.get().empty());
  kill(pid, SIGKILL);
  finish();

  constexpr uint64_t kWrites = 40;
  auto& lost = lasting_counter();
  auto& good = lasting_counter();
  for (uint64_t i = 0; i < kWrites; ++i) {
    engine.write({source.get(), 0, remote.get(), 0, kSize, 1}, &lost);
    engine.write({source.get(), 0, to_other.get(), 0, kSize, 1}, &good);
  }
  other.imm_counter(1).wait(kWrites, scaled(20s));
  // shm of libfabric 1 completes in order over all peers, so that there a dead one holds up the rest.
  if (GetParam().name != "shm") {
    EXPECT_EQ(wait_done(engine, good, kWrites), kWrites);
    EXPECT_EQ(good.failed(), 0u) << good.error()->what();
  }
  ASSERT_EQ(wait_done(engine, lost, kWrites, 15s), kWrites) << "no write may hang";
  EXPECT_EQ(lost.failed(), kWrites);
  auto kind = lost.error()->kind();
  EXPECT_TRUE(kind == ErrorKind::kPeer || kind == ErrorKind::kTimeout) << lost.error()->what();
  auto started = Clock::now();
  engine.close();
  EXPECT_LT(Clock::now() - started, 5s);
}

}  // namespace

INSTANTIATE_TEST_SUITE_P(Fabrics, ProcessTest, ::testing::ValuesIn(between_processes()), case_name);

}  // namespace pplx::testing
