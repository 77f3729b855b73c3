// What of fabric "verbs" needs no device: choosing a GID, queue accounting, the handshake.
#include <algorithm>
#include <deque>
#include <map>
#include <set>

#include "proxy/bytes.h"
#include "proxy/fabric/verbs_handshake.h"
#include "proxy/fabric/verbs_queue.h"
#include "proxy/fabric/verbs_select.h"
#include "proxy/tests/support.h"

namespace pplx::testing {
namespace {

// ---- selection

Gid gid(std::initializer_list<int> head, std::initializer_list<int> tail) {
  Gid made{};
  std::transform(head.begin(), head.end(), made.begin(), [](int b) { return static_cast<uint8_t>(b); });
  std::transform(tail.begin(), tail.end(), made.end() - static_cast<ptrdiff_t>(tail.size()),
                 [](int b) { return static_cast<uint8_t>(b); });
  return made;
}

const Gid kLinkLocal = gid({0xfe, 0x80}, {2, 0, 0, 1});
const Gid kGlobal = gid({0x20, 0x01}, {0, 0, 0, 1});
const Gid kIpv4 = gid({}, {0xff, 0xff, 10, 9, 0, 1});
const Gid kOtherIpv4 = gid({}, {0xff, 0xff, 10, 9, 0, 2});

// As a ConnectX shows them: each address once for each version of RoCE.
const std::vector<GidEntry> kTable = {{0, GidType::kRoceV1, kLinkLocal}, {1, GidType::kRoceV2, kLinkLocal},
                                      {2, GidType::kRoceV1, kGlobal},    {3, GidType::kRoceV2, kGlobal},
                                      {4, GidType::kRoceV1, kIpv4},      {5, GidType::kRoceV2, kIpv4},
                                      {6, GidType::kRoceV2, kOtherIpv4}, {7, GidType::kRoceV2, Gid{}}};

TEST(VerbsGid, RoceVersion2OverIpv4ComesFirst) {
  EXPECT_EQ(choose_gid(kTable, {}, "p").index, 5);
  auto table = kTable;
  table.erase(table.begin() + 4, table.end());
  EXPECT_EQ(choose_gid(table, {}, "p").index, 3) << "then a global IPv6 address";
  table.erase(table.begin() + 2, table.end());
  EXPECT_EQ(choose_gid(table, {}, "p").index, 1) << "then a link-local one";
  table.pop_back();
  EXPECT_EQ(choose_gid(table, {}, "p").index, 0) << "then version 1";
}

TEST(VerbsGid, AnIndexOrAnAddressDecides) {
  EXPECT_EQ(choose_gid(kTable, {.index = 2}, "p").index, 2);
  EXPECT_EQ(choose_gid(kTable, {.address = "10.9.0.2"}, "p").index, 6);
  EXPECT_EQ(choose_gid(kTable, {.address = "2001::1"}, "p").index, 3);
  EXPECT_EQ(choose_gid(kTable, {.index = 4, .address = "10.9.0.1"}, "p").index, 4);
}

TEST(VerbsGid, WhatIsNotThereIsListed) {
  const auto text_of = [](const std::vector<GidEntry>& table, const GidWish& wish) -> std::string {
    try {
      choose_gid(table, wish, "mlx5_0:1");
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  const auto text = text_of(kTable, {.index = 9});
  EXPECT_NE(text.find("mlx5_0:1"), std::string::npos) << text;
  EXPECT_NE(text.find("5: 10.9.0.1 (RoCE v2)"), std::string::npos) << text;
  EXPECT_FALSE(text_of(kTable, {.index = 7}).empty()) << "an empty entry is none";
  EXPECT_FALSE(text_of(kTable, {.address = "10.9.0.3"}).empty());
  EXPECT_NE(text_of({}, {}).find("IP address"), std::string::npos);
  EXPECT_EQ(kind_of([] { choose_gid(kTable, {.address = "localhost"}, "p"); }), ErrorKind::kInvalidArgument);
}

TEST(VerbsGid, InfinibandTakesItsFirst) {
  const std::vector<GidEntry> table = {{0, GidType::kInfiniBand, kLinkLocal},
                                       {1, GidType::kInfiniBand, kGlobal}};
  EXPECT_EQ(choose_gid(table, {.ethernet = false}, "p").index, 0);
  EXPECT_EQ(choose_gid(table, {.index = 1, .ethernet = false}, "p").index, 1);
  EXPECT_EQ(kind_of([&] { choose_gid(table, {}, "p"); }), ErrorKind::kFabric);
}

TEST(VerbsGid, TypesAreReadAsTheKernelWritesThem) {
  EXPECT_EQ(parse_gid_type("RoCE v2\n"), GidType::kRoceV2);
  EXPECT_EQ(parse_gid_type("IB/RoCE v1\n"), GidType::kRoceV1);
  EXPECT_EQ(parse_gid_type(""), std::nullopt);
  EXPECT_EQ(parse_gid_type("RoCE v3"), std::nullopt);
}

TEST(VerbsNic, NamesAreParsed) {
  EXPECT_EQ(parse_nic("").device, "");
  EXPECT_EQ(parse_nic("mlx5_0").device, "mlx5_0");
  EXPECT_EQ(parse_nic("mlx5_0").port, 0);
  EXPECT_EQ(parse_nic("mlx5_bond_0:2").port, 2);
  for (const char* bad : {"mlx5_0:", "mlx5_0:0", "mlx5_0:x", "mlx5_0:1x", ":1", "mlx5_0:256"}) {
    EXPECT_EQ(kind_of([&] { parse_nic(bad); }), ErrorKind::kInvalidArgument) << bad;
  }
}

// ---- queues

TEST(VerbsQueue, IdsKeepTheirFields) {
  for (auto kind : {WorkId::Kind::kSend, WorkId::Kind::kDatagramSend}) {
    for (uint32_t queue : {0U, 1U, 0xFF'FFFFU}) {
      for (uint32_t index : {0U, 7U, 0xFFFF'FFFFU}) {
        const WorkId id = WorkId::unpack(WorkId{kind, queue, index}.pack());
        EXPECT_EQ(id.kind, kind);
        EXPECT_EQ(id.queue, queue);
        EXPECT_EQ(id.index, index);
      }
    }
  }
}

// Against a plain deque, with places that wrap around.
TEST(VerbsQueue, HoldsExactlyWhatHasNotCompleted) {
  for (uint32_t depth : {1U, 2U, 3U, 8U, 13U}) {
    SendQueue queue(depth);
    std::deque<std::pair<uint32_t, FabricOp*>> model;
    std::vector<FabricOp> ops(64);
    std::mt19937 rng(depth);
    for (int step = 0; step < 20000; ++step) {
      ASSERT_EQ(queue.size(), model.size());
      ASSERT_EQ(queue.full(), model.size() == depth);
      ASSERT_EQ(queue.empty(), model.empty());
      if (!queue.full() && rng() % 2 == 0) {
        FabricOp* op = &ops[rng() % ops.size()];
        const uint32_t place = queue.push(op);
        ASSERT_TRUE(queue.holds(place));
        model.emplace_back(place, op);
      } else if (!model.empty() && rng() % 8 == 0) {
        ASSERT_EQ(queue.pop_newest(), model.back().second);
        ASSERT_FALSE(queue.holds(model.back().first));
        model.pop_back();
      } else if (!model.empty()) {
        // A signalled completion settles everything up to its place.
        const uint32_t place = model[rng() % model.size()].first;
        while (queue.holds(place)) {
          ASSERT_EQ(queue.oldest(), model.front().first);
          ASSERT_EQ(queue.pop(), model.front().second);
          model.pop_front();
        }
      }
    }
  }
}

TEST(VerbsQueue, ReceivesAreReplenishedWellBeforeTheyRunOut) {
  for (uint32_t depth : {1U, 8U, 100U, 4096U}) {
    ReceiveCredit credit(depth);
    std::mt19937 rng(depth);
    for (int step = 0; step < 10000; ++step) {
      credit.consumed();
      ASSERT_LE(credit.missing(), std::max(1U, depth / 8)) << "of " << depth;
      if (const uint32_t due = credit.due(); due > 0) {
        ASSERT_EQ(due, credit.missing());
        const uint32_t taken = 1 + rng() % due;  // the queue may take fewer than are offered
        credit.posted(taken);
        if (taken < due) credit.posted(credit.missing());
        ASSERT_EQ(credit.missing(), 0U);
      }
    }
  }
}

// Some devices throw a queue pair's completions away with it: immediates would be lost that had arrived.
TEST(VerbsQueue, IsDestroyedWhenAllThatArrivedHasBeenRead) {
  const auto now = Clock::now();
  Drain drain;
  drain.stop(now, now + 1s);
  EXPECT_FALSE(drain.done(now, false, now + 1h)) << "the completion queue may hold some, for however long";
  EXPECT_FALSE(drain.done(now + 1ms, false, now + 1h))
      << "the device may have been in the middle of a packet";
  EXPECT_FALSE(drain.done(now + 5ms, true, now + 5ms)) << "what it sends has not come back";
  EXPECT_TRUE(drain.done(now + 5ms, false, now + 5ms));
  EXPECT_TRUE(drain.done(now + 5ms, true, now + 1s)) << "nor will it";
}

TEST(VerbsPeers, WhoIsSilentIsAskedAndThenGone) {
  const auto start = Clock::now();
  Liveness liveness(8s);
  liveness.heard(start);
  EXPECT_FALSE(liveness.ask(start + 8s));
  EXPECT_FALSE(liveness.gone(start + 16s));
  EXPECT_TRUE(liveness.ask(start + 9s));
  EXPECT_FALSE(liveness.ask(start + 9500ms)) << "not all the time";
  EXPECT_TRUE(liveness.ask(start + 11s));
  EXPECT_TRUE(liveness.gone(start + 17s));
  liveness.heard(start + 16s);
  EXPECT_FALSE(liveness.gone(start + 17s));
  EXPECT_FALSE(liveness.ask(start + 20s));
}

// ---- the handshake's datagrams

EngineId id_of(uint8_t value) {
  EngineId id;
  id.fill(std::byte{value});
  return id;
}

Handshake sample() {
  Handshake made;
  made.wants_reply = true;
  made.job = 17;
  made.to = id_of(2);
  made.nic = {kIpv4, 3, 0x123456, 3, id_of(1)};
  made.label = "host-a:12 (engine 01010101)";
  made.link = kMessageLink;
  made.number = 5;
  made.ack = 4;
  made.qp = 0xABCDEF;
  made.psn = 0xFFFFFF;
  made.last = 3;
  made.arrived = uint64_t{1} << 40;
  return made;
}

Bytes resealed(Bytes bytes) {
  bytes.resize(bytes.size() - sizeof(uint64_t));
  ByteWriter out;
  out.raw(bytes);
  out.checksum();
  return out.take();
}

TEST(VerbsHandshake, SurvivesTheRoundTrip) {
  for (auto type : {Handshake::Type::kHello, Handshake::Type::kRefuse, Handshake::Type::kBye}) {
    Handshake sent = sample();
    sent.type = type;
    sent.text = "because";
    const Handshake got = decode_handshake(encode(sent));
    EXPECT_EQ(got.type, sent.type);
    EXPECT_EQ(got.wants_reply, sent.wants_reply);
    EXPECT_EQ(got.job, sent.job);
    EXPECT_EQ(got.to, sent.to);
    EXPECT_EQ(got.nic, sent.nic);
    EXPECT_EQ(got.label, sent.label);
    EXPECT_EQ(got.link, sent.link);
    EXPECT_EQ(got.number, sent.number);
    EXPECT_EQ(got.ack, sent.ack);
    EXPECT_EQ(got.qp, sent.qp);
    EXPECT_EQ(got.psn, sent.psn);
    EXPECT_EQ(got.last, sent.last);
    EXPECT_EQ(got.arrived, sent.arrived);
    EXPECT_EQ(got.text, sent.text);
  }
  EXPECT_EQ(decode_nic_address(encode(sample().nic)), sample().nic);
  Handshake longest = sample();
  longest.label = std::string(1000, 'l');
  longest.text = std::string(1000, 't');
  EXPECT_LE(encode(longest).size(), kMaxHandshake);
  EXPECT_EQ(decode_handshake(encode(longest)).label.size(), 96U);
}

TEST(VerbsHandshake, DamagedAndTruncatedBytesAreRefused) {
  const auto refused = [](const Bytes& bytes) {
    EXPECT_EQ(kind_of([&] { decode_handshake(bytes); }), ErrorKind::kInvalidArgument);
  };
  const Bytes good = encode(sample());
  for (size_t length = 0; length < good.size(); ++length) {
    refused(Bytes(good.begin(), good.begin() + static_cast<ptrdiff_t>(length)));
    if (length < sizeof(uint64_t)) continue;
    // With a checksum that fits, so that the fields themselves are looked at.
    if (length < good.size() - sizeof(uint64_t)) {
      Bytes shorter(good.begin(), good.begin() + static_cast<ptrdiff_t>(length));
      shorter.resize(length + sizeof(uint64_t));
      refused(resealed(shorter));
    }
  }
  for (size_t bit = 0; bit < good.size() * 8; ++bit) {
    Bytes bad = good;
    bad[bit / 8] ^= static_cast<std::byte>(1 << bit % 8);
    refused(bad);
  }
  refused(Bytes(kMaxHandshake + 1));
  std::mt19937 rng(3);
  for (int i = 0; i < 20000; ++i) {
    Bytes noise(rng() % (kMaxHandshake + 20) + sizeof(uint64_t));
    std::generate(noise.begin(), noise.end(), [&] { return static_cast<std::byte>(rng()); });
    if (i % 2 == 0) std::copy_n(good.begin(), std::min<size_t>(noise.size(), 1 + rng() % 100), noise.begin());
    try {
      decode_handshake(resealed(noise));
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::kInvalidArgument);
    }
  }
}

TEST(VerbsHandshake, ImpossibleFieldsAreRefused) {
  const auto refused = [](auto change) {
    Handshake bad = sample();
    change(bad);
    EXPECT_EQ(kind_of([&] { decode_handshake(encode(bad)); }), ErrorKind::kInvalidArgument);
  };
  refused([](Handshake& h) { h.type = static_cast<Handshake::Type>(0); });
  refused([](Handshake& h) { h.type = static_cast<Handshake::Type>(4); });
  refused([](Handshake& h) { h.nic.datagram_qp = 1 << 24; });
  refused([](Handshake& h) { h.nic.mtu = 0; });
  refused([](Handshake& h) { h.nic.mtu = 6; });
  refused([](Handshake& h) { h.link = 64; });
  refused([](Handshake& h) { h.number = 0; });
  refused([](Handshake& h) { h.qp = 1 << 24; });
  refused([](Handshake& h) { h.psn = 1 << 24; });
  Handshake strange = sample();
  strange.label = "a\nb\x1b[2J";
  EXPECT_EQ(decode_handshake(encode(strange)).label, "a?b?[2J") << "labels are printed";
}

TEST(VerbsHandshake, StrangersAreRefusedAndBothSidesNamed) {
  const HandshakeSelf self{id_of(2), "host-b:34 (engine 02020202)", 17};
  EXPECT_EQ(refusal(sample(), self), std::nullopt);
  const auto refused = [&](auto change, const char* what) {
    Handshake bad = sample();
    change(bad);
    const auto why = refusal(decode_handshake(encode(bad)), self);
    ASSERT_TRUE(why) << what;
    EXPECT_NE(why->find("host-a:12"), std::string::npos) << *why;
    EXPECT_NE(why->find("host-b:34"), std::string::npos) << *why;
    EXPECT_NE(why->find(what), std::string::npos) << *why;
  };
  refused([](Handshake& h) { h.version = 9; }, "version 9");
  refused([](Handshake& h) { h.to = id_of(3); }, "is gone");
  refused([](Handshake& h) { h.job = job_hash("another"); }, "job");
  EXPECT_NE(job_hash("one"), job_hash("two"));
  EXPECT_EQ(job_hash(""), 0U);
  // Of another version nothing is read but what all versions share.
  Handshake newer = sample();
  newer.version = 9;
  newer.number = 0;
  EXPECT_EQ(decode_handshake(encode(newer)).label, newer.label);
}

// ---- pairing, over a network that loses, repeats and reorders

struct Datagram {
  int to;
  uint32_t number, ack;
  bool wants_reply;
};

struct Side {
  Pairing pairing;
  bool active = false;                     // repeats itself until it is confirmed
  std::map<uint32_t, uint32_t> connected;  // each queue pair of its life, and with which
};

class PairingWorld {
 public:
  explicit PairingWorld(uint64_t seed) : rng_(seed) {}

  void begin(int who) {
    sides[who].active = true;
    if (sides[who].pairing.local() == 0) renew(who);
    say(who);
  }
  // The queue pair breaks: whoever noticed makes a new one.
  void break_one(int who) {
    if (sides[who].pairing.remote() == 0) return;
    if (sides[who].active) {
      renew(who);
      say(who);
    } else {
      sides[who].pairing.renewed(0);
    }
  }
  void deliver_one() {
    if (network.empty()) return;
    const size_t at = rng_() % network.size();
    const Datagram datagram = network[at];
    if (rng_() % 8 != 0) network.erase(network.begin() + static_cast<ptrdiff_t>(at));  // or it comes again
    if (rng_() % 4 == 0) return;                                                       // or is lost
    receive(datagram);
  }
  void repeat(int who) {
    if (sides[who].active && !sides[who].pairing.confirmed()) say(who);
  }
  // Without loss: everything that is said arrives, oldest first.
  bool settle() {
    for (int round = 0; round < 60; ++round) {
      repeat(0);
      repeat(1);
      for (size_t count = 0; !network.empty(); ++count) {
        if (count > 5000) return false;
        const Datagram datagram = network.front();
        network.pop_front();
        receive(datagram);
      }
      if (agreed()) return true;
      // Operations to a queue pair that is no longer there fail, which is how its peer notices.
      for (const int who : {0, 1}) {
        if (sides[who].active && sides[who].pairing.confirmed()) break_one(who);
      }
    }
    return false;
  }
  bool agreed() const {
    for (const Side& side : sides) {
      if (side.active && !side.pairing.confirmed()) return false;
    }
    return sides[0].pairing.local() == sides[1].pairing.remote() &&
           sides[1].pairing.local() == sides[0].pairing.remote();
  }

  std::array<Side, 2> sides;
  std::deque<Datagram> network;

 private:
  void renew(int who) { sides[who].pairing.renewed(++numbers_[who]); }
  void say(int who) {
    const Pairing& pairing = sides[who].pairing;
    network.push_back({1 - who, pairing.local(), pairing.remote(), !pairing.confirmed()});
  }
  void receive(const Datagram& datagram) {
    const int who = datagram.to;
    Side& side = sides[who];
    const auto step = side.pairing.on_hello(datagram.number, datagram.ack, datagram.wants_reply);
    if (step.renew) renew(who);
    if (step.pair) {
      ASSERT_TRUE(side.connected.emplace(side.pairing.local(), datagram.number).second)
          << "a queue pair was connected twice";
      side.pairing.paired(datagram.number, datagram.ack);
    }
    if (side.pairing.confirmed()) {
      // Said only by who was connected with exactly this one.
      const auto& theirs = sides[1 - who].connected;
      const auto with = theirs.find(side.pairing.remote());
      ASSERT_TRUE(with != theirs.end() && with->second == side.pairing.local());
    }
    if (step.reply) say(who);
  }

  std::mt19937_64 rng_;
  std::array<uint32_t, 2> numbers_{0, 0};
};

TEST(VerbsPairing, OneSideBegins) {
  PairingWorld world(1);
  world.begin(0);
  ASSERT_TRUE(world.settle());
  EXPECT_EQ(world.sides[0].connected.size(), 1U) << "and needs one queue pair a side";
  EXPECT_EQ(world.sides[1].connected.size(), 1U);
}

TEST(VerbsPairing, BothBeginAtOnce) {
  PairingWorld world(1);
  world.begin(0);
  world.begin(1);
  ASSERT_TRUE(world.settle());
  EXPECT_EQ(world.sides[0].connected.size(), 1U);
  EXPECT_EQ(world.sides[1].connected.size(), 1U);
}

TEST(VerbsPairing, ConvergesWhateverTheNetworkDidBefore) {
  for (uint64_t seed = 0; seed < 4000; ++seed) {
    PairingWorld world(seed);
    std::mt19937_64 rng(seed * 7 + 1);
    world.begin(0);
    for (int step = 0; step < 300; ++step) {
      switch (rng() % 16) {
        case 0:
          world.begin(1);
          break;
        case 1:
          world.break_one(static_cast<int>(rng() % 2));
          break;
        case 2:
        case 3:
          world.repeat(static_cast<int>(rng() % 2));
          break;
        default:
          world.deliver_one();
      }
      if (HasFatalFailure()) FAIL() << "seed " << seed;
    }
    ASSERT_TRUE(world.settle()) << "seed " << seed;
    if (HasFatalFailure()) FAIL() << "seed " << seed;
    const auto before = world.sides[0].connected.size();
    world.repeat(0);
    ASSERT_TRUE(world.settle());
    EXPECT_EQ(world.sides[0].connected.size(), before) << "and then stays, seed " << seed;
  }
}

}  // namespace
}  // namespace pplx::testing
