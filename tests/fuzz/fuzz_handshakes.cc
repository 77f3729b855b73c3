// What NICs of fabric "verbs" send each other before they are connected: read, or refused as malformed; and
// whatever hellos come, a queue pair is connected once in its life.
#include <algorithm>
#include <set>

#include "proxy/fabric/verbs_handshake.h"
#include "tests/fuzz/fuzz.h"

namespace pplx::fuzz {
namespace {

EngineId id_of(uint8_t value) {
  EngineId id;
  id.fill(std::byte{value});
  return id;
}

Handshake sound(Input& input) {
  Handshake made;
  made.type = static_cast<Handshake::Type>(1 + input.byte() % 3);
  made.wants_reply = input.byte() % 2 != 0;
  made.job = 17;
  made.to = id_of(2);
  made.nic = {.lid = 3, .datagram_qp = 0x123456, .mtu = 3, .id = id_of(1)};
  made.label = "host-a:12 (engine 01010101)";
  made.link = kMessageLink;
  made.number = 5;
  made.qp = 0xABCDEF;
  made.arrived = 40;
  made.text = "because";
  return made;
}

bool printable(const std::string& text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return c >= ' ' && c <= '~'; });
}

void handshake(std::span<const std::byte> bytes) {
  try {
    const Handshake got = decode_handshake(bytes);
    // Both are shown to people.
    FUZZ_CHECK(printable(got.label) && got.label.size() <= 96);
    FUZZ_CHECK(printable(got.text) && got.text.size() <= kMaxHandshake);
    const HandshakeSelf self{id_of(2), "host-b:34", 17};
    const auto why = refusal(got, self);
    FUZZ_CHECK(why.has_value() ==
               (got.version != kHandshakeVersion || got.to != self.id || got.job != self.job));
    if (got.version != kHandshakeVersion) return;
    FUZZ_CHECK(got.type != Handshake::Type::kHello || got.number != 0);
    FUZZ_CHECK(got.qp < 1U << 24 && got.psn < 1U << 24 && got.nic.datagram_qp < 1U << 24);
    // What is read is written as it was understood. Texts are cut to their length as they are written.
    const auto again = encode(got);
    FUZZ_CHECK(again.size() <= kMaxHandshake);
    FUZZ_CHECK(encode(decode_handshake(again)) == again);
  } catch (const Error& error) {
    FUZZ_CHECK(error.kind() == ErrorKind::kInvalidArgument);
  }
}

void nic_address(std::span<const std::byte> bytes) {
  try {
    const auto again = encode(decode_nic_address(bytes));
    FUZZ_CHECK(std::equal(again.begin(), again.end(), bytes.begin(), bytes.end()));
  } catch (const Error& error) {
    FUZZ_CHECK(error.kind() == ErrorKind::kInvalidArgument);
  }
}

// One side, as VerbsFabric drives it, and a peer that says anything.
void pairing(Input& input) {
  Pairing side;
  uint32_t made = 0, newest = 0;
  std::set<uint32_t> connected;  // of this side's queue pairs
  while (!input.done()) {
    const uint8_t what = input.byte();
    if (what % 8 == 0) {
      side.renewed(0);  // it broke, and nobody needs it
      continue;
    }
    if (what % 8 == 1) {
      side.renewed(++made);  // it broke, or this side begins
      continue;
    }
    const uint32_t number = 1U + input.byte() % 16, ack = input.byte() % 16;
    const bool was_confirmed = side.confirmed();
    const auto step = side.on_hello(number, ack, (what & 128) != 0);
    if (step.renew) side.renewed(++made);
    if (step.pair) {
      FUZZ_CHECK(side.local() != 0 && side.remote() == 0 && number >= newest);
      FUZZ_CHECK(connected.insert(side.local()).second);
      const bool now = side.paired(number, ack);
      newest = number;
      FUZZ_CHECK(side.remote() == number && now == side.confirmed());
      FUZZ_CHECK(!now || ack == side.local());
    } else if (step.confirmed) {
      FUZZ_CHECK(!was_confirmed && side.confirmed() && number == side.remote() && ack == side.local());
    }
    FUZZ_CHECK(!side.confirmed() || (side.local() != 0 && side.remote() != 0));
  }
}

}  // namespace
}  // namespace pplx::fuzz

extern "C" int LLVMFuzzerInitialize(int*, char***) { return 0; }

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace pplx;
  fuzz::Input input(data, size);
  switch (input.byte() % 5) {
    case 0: {
      fuzz::handshake(input.rest());
      break;
    }
    case 1: {
      fuzz::handshake(fuzz::with_checksum(input.rest()));
      break;
    }
    case 2: {
      auto bytes = encode(fuzz::sound(input));
      bytes.resize(bytes.size() - sizeof(uint64_t));
      input.damage(bytes);
      fuzz::handshake(fuzz::with_checksum(bytes));
      break;
    }
    case 3: {
      fuzz::nic_address(input.rest());
      break;
    }
    default:
      fuzz::pairing(input);
  }
  return 0;
}
