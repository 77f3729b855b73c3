// Bytes that NICs write into GPU memory are visible to kernels before anybody is told of them. The driver is
// made up; the memory is a CPU's.
#include "proxy/engine/gpu_writes.h"

#include <atomic>

#include "proxy/error.h"
#include "proxy/tests/support.h"

namespace pplx::testing {
namespace {

// <cuda.h>
constexpr int kFlushOptions = 117, kOrdering = 118;

struct Gpus {
  std::atomic<int> ordering{0}, options{1}, flushes{0}, result{0};
  std::atomic<uint64_t> counted{0};  // when it was flushed last
  std::function<uint64_t()> count;

  std::shared_ptr<const CudaDriver> driver() {
    return std::make_shared<CudaDriver>(CudaDriver{
        .attribute =
            [this](int attribute, int, int& value) {
              value = attribute == kOrdering       ? ordering.load()
                      : attribute == kFlushOptions ? options.load()
                                                   : -1;
              return true;
            },
        .flush =
            [this](int) {
              ++flushes;
              if (count) counted = count();
              return result.load();
            },
    });
  }
};

TEST(GpuWrites, AreFlushedWhereTheGpuDoesNotOrderThem) {
  Gpus gpus;
  GpuWrites writes(gpus.driver());
  EXPECT_FALSE(writes.needed());
  auto one = writes.use(0), other = writes.use(3);
  EXPECT_TRUE(writes.needed());
  writes.flush();
  EXPECT_EQ(gpus.flushes, 2);
  one.reset();
  writes.flush();
  EXPECT_EQ(gpus.flushes, 3);
  other.reset();
  EXPECT_FALSE(writes.needed());
  for (int ordered : {100, 200}) {
    gpus.ordering = ordered;
    auto none = writes.use(0);
    EXPECT_FALSE(writes.needed());
  }
}

TEST(GpuWrites, AreRefusedWhereNothingMakesThemVisible) {
  Gpus gpus;
  gpus.options = 2;  // by memory operations of streams only
  GpuWrites writes(gpus.driver());
  EXPECT_EQ(kind_of([&] { writes.use(0); }), ErrorKind::kFabric);
  gpus.options = 1;
  auto use = writes.use(0);
  gpus.result = 999;
  EXPECT_EQ(kind_of([&] { writes.flush(); }), ErrorKind::kFabric);
}

EngineConfig with_gpus(Gpus& gpus) {
  EngineConfig config = local();
  config.cuda = gpus.driver();
  config.sim.copy = [](void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); };
  return config;
}

TEST(GpuWrites, AreVisibleBeforeTheyCount) {
  Gpus gpus;
  TransferEngine a(local()), b(with_gpus(gpus));
  std::vector<std::byte> memory(64);
  auto target = b.register_memory(DeviceMemory{memory.data(), memory.size(), 1});
  auto counter = b.imm_counter(1);
  gpus.count = [counter] { return counter.value(); };
  auto source = a.allocate(64);
  auto remote = a.open(target->descriptor());
  for (uint64_t i = 1; i <= 5; ++i) {
    a.write({source.get(), 0, remote.get(), 0, 64, 1});
    counter.wait(i);
    EXPECT_EQ(gpus.flushes, static_cast<int>(i));
    EXPECT_EQ(gpus.counted, i - 1) << "it was counted first";
  }
  // So are bytes that were read into it.
  auto there = a.allocate(64);
  b.read_future({target.get(), 0, b.open(there->descriptor()).get(), 0, 64}).get();
  EXPECT_EQ(gpus.flushes, 6);
  // With the last region of such a GPU the cost ends.
  target.reset();
  auto host = b.allocate(64);
  a.write({source.get(), 0, a.open(host->descriptor()).get(), 0, 64, 1});
  counter.wait(6);
  EXPECT_EQ(gpus.flushes, 6);
}

TEST(GpuWrites, AFailedFlushIsNoSilentOne) {
  Gpus gpus;
  TransferEngine a(local()), b(with_gpus(gpus));
  std::vector<std::byte> memory(64);
  auto target = b.register_memory(DeviceMemory{memory.data(), memory.size(), 0});
  auto source = a.allocate(64);
  auto remote = a.open(target->descriptor());
  gpus.result = 700;
  a.write({source.get(), 0, remote.get(), 0, 64, 1});
  ASSERT_TRUE(b.wait_until([&] { return !b.details().nics[0].error.empty(); }, Clock::now() + 10s));
  EXPECT_NE(b.details().nics[0].error.find("700"), std::string::npos);
  EXPECT_EQ(b.imm_counter(1).value(), 0u);
}

}  // namespace
}  // namespace pplx::testing
