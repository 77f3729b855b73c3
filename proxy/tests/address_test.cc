// Bytes from elsewhere are checked before use.
#include "proxy/fabric/address.h"

#include "proxy/bytes.h"
#include "proxy/tests/support.h"

namespace pplx::testing {
namespace {

PeerAddress sample() {
  auto address = make_address("libfabric", "tcp");
  address.endpoints = {{std::byte{1}, std::byte{2}}, {std::byte{3}}};
  return address;
}

TEST(Address, SurvivesTheRoundTrip) {
  auto address = sample();
  auto parsed = decode_address(encode(address));
  EXPECT_EQ(parsed.fabric, address.fabric);
  EXPECT_EQ(parsed.provider, address.provider);
  EXPECT_EQ(parsed.engine, address.engine);
  EXPECT_EQ(parsed.pid, address.pid);
  EXPECT_EQ(parsed.host, address.host);
  EXPECT_EQ(parsed.endpoints, address.endpoints);
  EXPECT_NE(make_address("a", "b").engine, make_address("a", "b").engine);
}

TEST(Address, DamagedBytesAreRefused) {
  TransferEngine engine(local());
  auto region = engine.allocate(64);
  const Bytes good = region->descriptor().bytes();
  auto refused = [&](Bytes bytes) {
    EXPECT_EQ(kind_of([&] { engine.open(RegionDescriptor(bytes)); }), ErrorKind::kInvalidArgument);
    EXPECT_EQ(kind_of([&] { engine.send(Address(bytes), {}); }), ErrorKind::kInvalidArgument);
  };
  for (size_t length = 0; length < good.size(); ++length) refused(Bytes(good.begin(), good.begin() + length));
  for (size_t bit = 0; bit < good.size() * 8; ++bit) {
    Bytes bad = good;
    bad[bit / 8] ^= static_cast<std::byte>(1 << bit % 8);
    refused(bad);
  }
  Bytes longer = good;
  longer.push_back({});
  refused(longer);
  engine.open(RegionDescriptor(good));
}

// Sealed again after the damage, so that the fields themselves are looked at.
TEST(Address, ImpossibleFieldsAreRefused) {
  auto refused = [](const DescriptorFields& fields) {
    EXPECT_EQ(kind_of([&] { decode_descriptor(encode(fields)); }), ErrorKind::kInvalidArgument);
  };
  auto address = encode(sample());
  refused({address, UINT64_MAX, 2, {1}});
  refused({address, 0, 8, {}});
  refused({address, 0, 8, std::vector<uint64_t>(17)});
  auto nameless = sample();
  nameless.endpoints.clear();
  EXPECT_EQ(kind_of([&] { decode_address(encode(nameless)); }), ErrorKind::kInvalidArgument);

  Bytes body = address;
  body.resize(body.size() - sizeof(uint64_t));
  for (size_t length = 0; length < body.size(); ++length) {
    ByteWriter out;
    out.raw(std::span(body).first(length));
    out.checksum();
    EXPECT_EQ(kind_of([&] { decode_address(out.take()); }), ErrorKind::kInvalidArgument) << length;
  }
}

TEST(Address, OtherFabricsAreRefused) {
  TransferEngine here(local());
  auto config = local();
  config.sim.network = "elsewhere";
  TransferEngine there(config);
  auto region = there.allocate(8);
  EXPECT_EQ(kind_of([&] { here.open(region->descriptor()); }), ErrorKind::kInvalidArgument);
  EXPECT_EQ(kind_of([] { TransferEngine engine(provider("no-such-provider")); }), ErrorKind::kFabric);
  EXPECT_EQ(kind_of([] { TransferEngine engine(provider("tcp", 0)); }), ErrorKind::kInvalidArgument);
}

}  // namespace
}  // namespace pplx::testing
