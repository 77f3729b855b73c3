// Where messages that go by the host lie: what is chosen, and how GPU memory is registered.
#include "xla_ffi/cuda/proxy_memory.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <string>
#include <vector>

#include "proxy/fabric/sim.h"

namespace pplx::moe::cuda {
namespace {

TEST(RegionPlan, IsMadeByTheFabric) {
  const RegionPlan taken = plan_regions(RegionMemory::kAuto, "efa", true);
  EXPECT_TRUE(taken.device);
  EXPECT_EQ(taken.why, "fabric efa");
  const RegionPlan untaken = plan_regions(RegionMemory::kAuto, "libfabric:tcp 1.17", false);
  EXPECT_FALSE(untaken.device);
  EXPECT_EQ(untaken.why, "fabric libfabric:tcp 1.17 cannot register GPU memory");
}

TEST(RegionPlan, FollowsTheUser) {
  const RegionPlan pinned = plan_regions(RegionMemory::kPinned, "efa", true);
  EXPECT_FALSE(pinned.device);
  EXPECT_EQ(pinned.why, "PPLX_GPU_REGIONS=pinned");
  EXPECT_TRUE(plan_regions(RegionMemory::kDevice, "efa", true).device);
  try {
    plan_regions(RegionMemory::kDevice, "tcp", false);
    FAIL() << "was planned";
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::kFabric);
    EXPECT_TRUE(std::string(error.what()).starts_with("PPLX_GPU_REGIONS=device: fabric tcp cannot register"))
        << error.what();
  }
}

EngineConfig engine_config(bool takes) {
  EngineConfig config;
  if (takes) config.sim.copy = [](void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); };
  return config;
}

TEST(Engine, SaysWhetherItTakesDeviceMemory) {
  EXPECT_TRUE(TransferEngine(engine_config(true)).takes_device_memory());
  EXPECT_FALSE(TransferEngine(engine_config(false)).takes_device_memory());
}

class RegisterTest : public ::testing::Test {
 protected:
  std::vector<std::byte> bytes_ = std::vector<std::byte>(256);
  DeviceMemory memory_{.data = bytes_.data(), .size = bytes_.size()};
};

TEST_F(RegisterTest, ADmaBufIsPreferredAndClosed) {
  TransferEngine engine(engine_config(true));
  int exported = -1;
  const RegisteredRegion got = register_device_memory(engine, memory_, [&] {
    exported = dup(STDIN_FILENO);
    return OwnedFd(exported);
  });
  EXPECT_EQ(got.how, "by dma-buf");
  EXPECT_EQ(got.region->size(), bytes_.size());
  EXPECT_LT(dup(exported), 0) << "the descriptor was left open";
}

TEST_F(RegisterTest, WithoutADmaBufTheAddressWillDo) {
  TransferEngine engine(engine_config(true));
  EXPECT_EQ(register_device_memory(engine, memory_, {}).how, "by its address");
  const auto failing = []() -> OwnedFd { throw Error(ErrorKind::kFabric, "no export here"); };
  EXPECT_EQ(register_device_memory(engine, memory_, failing).how, "by its address");
}

TEST_F(RegisterTest, AnErrorNamesAllThatWasTried) {
  TransferEngine engine(engine_config(false));
  try {
    register_device_memory(engine, memory_,
                           []() -> OwnedFd { throw Error(ErrorKind::kFabric, "no export"); });
    FAIL() << "was registered";
  } catch (const Error& error) {
    const std::string text = error.what();
    EXPECT_NE(text.find("as a dma-buf: no export"), std::string::npos) << text;
    EXPECT_NE(text.find("by its address: local cannot register GPU memory"), std::string::npos) << text;
  }
}

}  // namespace
}  // namespace pplx::moe::cuda
