// Which provider is asked for what: EFA's rules, which no machine of CI can try.
#include "proxy/fabric/libfabric_traits.h"

#include "proxy/fabric/libfabric.h"
#include "proxy/tests/support.h"

namespace pplx::testing {
namespace {

TEST(ProviderTraits, EfaPrefersDirect) {
  auto traits = provider_traits("efa", FI_VERSION(2, 1));
  ASSERT_EQ(traits.size(), 2u);
  EXPECT_EQ(traits[0].fabric, "efa-direct");
  EXPECT_EQ(traits[1].fabric, "efa");
  for (const auto& one : traits) {
    EXPECT_EQ(one.provider, "efa");
    EXPECT_TRUE(one.mutual);
    EXPECT_TRUE(one.hmem);
    EXPECT_FALSE(one.sockets);
    EXPECT_TRUE(one.ask_delivery != one.delivered) << "completions mean delivery, asked or not";
  }
  EXPECT_NE(traits[0].label, traits[1].label) << "the two don't understand each other";
  EXPECT_TRUE(traits[0].own_message_size);
}

TEST(ProviderTraits, EfaNeedsNewLibraries) {
  EXPECT_EQ(provider_traits("efa", FI_VERSION(1, 22)).size(), 1u);
  EXPECT_EQ(provider_traits("efa", FI_VERSION(1, 22))[0].fabric, "efa");
  EXPECT_EQ(provider_traits("efa-direct", FI_VERSION(2, 1)).size(), 1u);
  for (auto [name, version, need] :
       {std::tuple("efa", FI_VERSION(1, 21), "1.22"), std::tuple("efa-direct", FI_VERSION(2, 0), "2.1")}) {
    try {
      provider_traits(name, version);
      ADD_FAILURE() << name;
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::kFabric);
      EXPECT_NE(std::string(error.what()).find(need), std::string::npos) << error.what();
      EXPECT_NE(std::string(error.what()).find("/opt/amazon/efa"), std::string::npos);
    }
  }
}

TEST(ProviderTraits, TcpIsCalledNetIn117) {
  EXPECT_EQ(provider_traits("tcp", FI_VERSION(1, 17))[0].provider, "net");
  EXPECT_EQ(provider_traits("tcp", FI_VERSION(1, 18))[0].provider, "tcp");
  EXPECT_TRUE(provider_traits("tcp;ofi_rxm", FI_VERSION(1, 17))[0].sockets);
  EXPECT_TRUE(provider_traits("shm", FI_VERSION(1, 17))[0].always_immediate);
}

TEST(DeviceMemory, IsRefusedWhereTheNicCannotReachIt) {
  for (const auto& config : {local(), provider("tcp")}) {
    TransferEngine engine(config);
    std::vector<std::byte> memory(64);
    EXPECT_EQ(kind_of([&] {
                engine.register_memory(DeviceMemory{memory.data(), 64, 0, -1, 0});
              }),
              ErrorKind::kFabric);
    EXPECT_EQ(kind_of([&] { engine.register_memory(DeviceMemory{}); }), ErrorKind::kInvalidArgument);
  }
}

}  // namespace
}  // namespace pplx::testing
