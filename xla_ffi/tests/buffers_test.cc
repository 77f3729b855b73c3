// Groups whose regions and send buffers the CPU cannot reach, as in a GPU's memory: messages packed there by
// somebody else arrive whole, and their headers where the CPU can check them.
#include "proxy/moe/buffers.h"

#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "proxy/moe/exchange_group.h"
#include "xla_ffi/cuda/tests/fake_device.h"

namespace pplx::moe {
namespace {

using cuda::testing::FakeDevice;

constexpr uint32_t kRanks = 3;
constexpr size_t kRegion = 1024;
const CallSite kSite{.kind = Kind::kCombine, .tag = 5, .tokens = 2, .name = "layer"};

struct Rank {
  std::vector<std::unique_ptr<FakeDevice>> devices;
  std::unique_ptr<ExchangeGroup> group;

  Rank(uint32_t rank, bool device, EngineConfig engine) {
    GroupConfig config;
    config.name = "buffers";
    config.rank = rank;
    config.num_ranks = kRanks;
    config.region_bytes = kRegion;
    config.staging_bytes = kRegion * kRanks;
    config.stall_timeout = config.first_stall_timeout = std::chrono::seconds(10);
    config.engine = std::move(engine);
    config.engine.sim.copy = FakeDevice::copy;
    const auto place = [this](TransferEngine& on, size_t regions, size_t staging) {
      const auto made = [&](size_t bytes) {
        devices.push_back(std::make_unique<FakeDevice>(bytes));
        return on.register_memory(DeviceMemory{.data = devices.back()->data(), .size = bytes});
      };
      return GroupBuffers{.regions = made(regions), .staging = made(staging), .readable = false};
    };
    group = std::make_unique<ExchangeGroup>(config, device ? place : PlaceBuffers());
  }
  uint32_t number() const { return group->config().rank; }
  // Of two lanes.
  std::byte* place(std::span<std::byte> memory, uint64_t exchange, uint32_t rank) const {
    return FakeDevice::inside(memory.data() + (exchange % 2 * kRanks + rank) * kRegion);
  }
  static size_t body_bytes(uint64_t exchange, uint32_t source, uint32_t to) {
    return (exchange * 7 + source * 3 + to) * 16 % (kRegion - sizeof(RegionHeader));
  }
  static int value(uint64_t exchange, uint32_t source, uint32_t to) {
    return static_cast<int>((exchange * 9 + source * 3 + to) % 251 + 1);
  }

  void exchange(uint64_t number_) const {
    Exchange exchange(*group, kSite, 0, 1);
    for (uint32_t to = 0; to < kRanks; ++to) {
      const size_t body = body_bytes(number_, number(), to);
      std::memset(place(group->staging(), number_, to) + sizeof(RegionHeader), value(number_, number(), to),
                  body);
      ASSERT_NE(exchange.packed(to, sizeof(RegionHeader) + body), nullptr);
      exchange.post(static_cast<uint32_t>(number_));
    }
    ASSERT_TRUE(exchange.wait()) << group->failure()->what();
    for (uint32_t source = 0; source < kRanks; ++source) {
      if (source == number()) continue;
      const size_t body = body_bytes(number_, source, number());
      const std::byte* region = place(group->regions(), number_, source);
      RegionHeader there;
      std::memcpy(&there, region, sizeof(there));
      EXPECT_EQ(there.exchange, number_);
      EXPECT_EQ(exchange.header(source).slots, number_);
      EXPECT_EQ(exchange.body_bytes(source), body);
      for (size_t i = 0; i < body; ++i) {
        ASSERT_EQ(static_cast<int>(region[sizeof(RegionHeader) + i]), value(number_, source, number()));
      }
    }
  }
};

EngineConfig network(const std::string& fabric, uint64_t seed, size_t nics) {
  EngineConfig config;
  config.fabric = fabric;
  config.nics.resize(nics);
  config.sim.network = "buffers";
  config.sim.seed = seed;
  config.sim.reorder = true;
  config.sim.max_delay = 3;
  config.sim.max_pieces = 4;
  return config;
}

void run(const std::vector<bool>& device, const EngineConfig& engine, uint64_t exchanges) {
  std::vector<std::unique_ptr<Rank>> ranks;
  std::vector<Bytes> endpoints;
  for (uint32_t rank = 0; rank < kRanks; ++rank) {
    ranks.push_back(std::make_unique<Rank>(rank, device[rank], engine));
    endpoints.push_back(ranks.back()->group->endpoint());
  }
  for (auto& rank : ranks) rank->group->connect(endpoints);
  std::vector<std::jthread> threads;
  threads.reserve(kRanks);
  for (auto& rank : ranks) {
    threads.emplace_back([&rank, exchanges] {
      for (uint64_t i = 0; i < exchanges && !::testing::Test::HasFailure(); ++i) rank->exchange(i);
    });
  }
  threads.clear();
  for (auto& rank : ranks) rank->group->close();
}

TEST(UnreadableBuffers, MessagesArriveWholeWhoeverHasThem) {
  for (unsigned mask = 0; mask < 1U << kRanks; ++mask) {
    const std::vector<bool> device = {(mask & 1) != 0, (mask & 2) != 0, (mask & 4) != 0};
    run(device, network("local", 0, 1), 20);
  }
}

TEST(UnreadableBuffers, MessagesArriveWholeInAnyOrder) {
  for (uint64_t seed = 0; seed < 12; ++seed) {
    run({true, seed % 2 == 0, seed % 3 == 0}, network("sim", seed, 1 + seed % 3), 8);
  }
}

TEST(UnreadableBuffers, AreNotPackedByTheCpu) {
  const Rank rank(0, true, network("local", 0, 1));
  Exchange exchange(*rank.group, kSite, 0, 1);
  EXPECT_THROW(exchange.message(1, 200), Error);
}

}  // namespace
}  // namespace pplx::moe
