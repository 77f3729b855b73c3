// Broken messages and notices from a peer: rejected, never believed, never a crash.
#include <gtest/gtest.h>

#include "xla_ffi/tests/rogue.h"

namespace pplx::moe {
namespace {

using namespace pplx::moe::testing;

constexpr int kTokens = 3;

Problem problem() { return {.ranks = 2, .experts = 4, .top_k = 3, .hidden = 4, .max_tokens = kTokens}; }

// A sound dispatch from rank 1: two tokens for rank 0, the first for both its experts.
struct Message {
  RegionHeader header{};
  uint32_t counts[2] = {1, 2};
  struct Slot {
    SlotHeader header;
    SlotEntry entries[2];
  } slots[2] = {{{0, 2}, {{0.5F, 0, 0, 0, 0}, {0.25F, 0, 1, 1, 0}}}, {{2, 1}, {{2.0F, 1, 1, 2, 0}, {}}}};

  explicit Message(Rogue& rogue, const Call& call) {
    header.magic = kMagic;
    header.version = kWireVersion;
    header.kind = static_cast<uint8_t>(call.site.kind);
    header.nonce = rogue.nonce();
    header.source = 1;
    header.tag = call.site.tag;
    header.tokens = call.site.tokens;
    header.hidden = call.site.hidden;
    header.slots = 2;
    header.culprit = ~0U;
    header.format = call.site.format;
    header.top_k = call.site.top_k;
    header.local_experts = call.site.local_experts;
    std::strcpy(header.site, "layer");
  }
  Bytes bytes(const MoeShape& shape) {
    if (header.bytes == 0) header.bytes = sizeof(header) + shape.counts_bytes() + 2 * shape.dispatch_stride();
    Bytes out(sizeof(header) + shape.longest_body());
    std::memcpy(out.data(), &header, sizeof(header));
    std::byte* at = out.data() + sizeof(header);
    std::memcpy(at, counts, sizeof(counts));
    at += shape.counts_bytes();
    for (const Slot& slot : slots) {
      std::memcpy(at, &slot.header, sizeof(slot.header));
      std::memcpy(at + sizeof(slot.header), slot.entries, sizeof(slot.entries));
      const float row[4] = {1, 2, 3, 4};
      std::memcpy(at + shape.slot_header_bytes(), row, sizeof(row));
      at += shape.dispatch_stride();
    }
    return out;
  }
};

struct Outcome {
  std::optional<Error> returned, failure, data_error;
  Outputs out;
};

Inputs own_inputs() {
  Inputs in = random_inputs(problem(), kTokens, kTokens, Routing::kNobody, 1);
  in.indices[0] = 0;
  return in;
}

Outcome receive(const std::function<void(Message&, const MoeShape&)>& change) {
  Rogue rogue(problem());
  const Inputs in = own_inputs();
  const Site site;
  Message message(rogue, make_call(rogue.real(), Kind::kDispatch, kTokens, site));
  const MoeShape& shape = rogue.real().shape;
  if (change) change(message, shape);
  rogue.send(0, message.bytes(shape));
  Outcome outcome;
  outcome.returned = run_dispatch(problem(), rogue.real(), in, outcome.out, site);
  outcome.failure = rogue.real().group.failure();
  outcome.data_error = rogue.real().group.data_error();
  return outcome;
}

void expect_refused(const Outcome& outcome, ErrorKind kind, const std::string& text,
                    const std::string& what) {
  EXPECT_FALSE(outcome.returned) << what;  // poisons first; the next execution returns the error
  ASSERT_TRUE(outcome.failure) << what;
  EXPECT_EQ(outcome.failure->kind(), kind) << what << ": " << outcome.failure->what();
  EXPECT_NE(std::string(outcome.failure->what()).find(text), std::string::npos)
      << what << ": " << outcome.failure->what();
  EXPECT_NE(std::string(outcome.failure->what()).find("rank 1"), std::string::npos) << what;
  EXPECT_TRUE(all_nan(outcome.out.tokens)) << what;
  EXPECT_TRUE(all_nan(outcome.out.row_weights)) << what;
  EXPECT_EQ(outcome.out.ok, 0) << what;
  EXPECT_EQ(outcome.out.num_rows, 0) << what;
  EXPECT_EQ(outcome.out.group_sizes, (std::vector<int32_t>{0, 0})) << what;
}

TEST(Malformed, TheSoundMessageIsTaken) {
  const Outcome outcome = receive({});
  EXPECT_FALSE(outcome.failure);
  EXPECT_EQ(outcome.out.ok, 1);
  EXPECT_EQ(outcome.out.group_sizes, (std::vector<int32_t>{2, 2}));
  EXPECT_EQ(outcome.out.row_weights[1], 0.5F);
  EXPECT_EQ(outcome.out.row_weights[2], 0.25F);
  EXPECT_EQ(outcome.out.row_weights[3], 2.0F);
  EXPECT_EQ(outcome.out.tokens.get(4), 1.0F);
}

TEST(Malformed, HeadersThatMakeNoSense) {
  using Change = std::function<void(RegionHeader&)>;
  const std::vector<std::pair<std::string, Change>> changes = {
      {"magic", [](RegionHeader& h) { h.magic ^= 1; }},
      {"version", [](RegionHeader& h) { ++h.version; }},
      {"kind", [](RegionHeader& h) { h.kind = kKinds; }},
      {"kind 255", [](RegionHeader& h) { h.kind = 255; }},
      {"nonce", [](RegionHeader& h) { ++h.nonce; }},
      {"source", [](RegionHeader& h) { h.source = 0; }},
      {"source far", [](RegionHeader& h) { h.source = ~0U; }},
      {"bytes below a header", [](RegionHeader& h) { h.bytes = sizeof(RegionHeader) - 1; }},
      {"bytes beyond the region", [](RegionHeader& h) { h.bytes = ~0U; }},
  };
  for (const auto& [name, change] : changes) {
    expect_refused(receive([&](Message& m, const MoeShape&) { change(m.header); }), ErrorKind::kPeer,
                   "makes no sense", name);
  }
}

TEST(Malformed, HeadersOfAnotherExchange) {
  using Change = std::function<void(RegionHeader&)>;
  const std::vector<std::pair<std::string, Change>> changes = {
      {"exchange", [](RegionHeader& h) { h.exchange = 2; }},
      {"kind", [](RegionHeader& h) { h.kind = static_cast<uint8_t>(Kind::kCombine); }},
      {"tag", [](RegionHeader& h) { ++h.tag; }},
      {"tokens", [](RegionHeader& h) { ++h.tokens; }},
      {"round", [](RegionHeader& h) { ++h.round; }},
      {"hidden", [](RegionHeader& h) { ++h.hidden; }},
      {"format", [](RegionHeader& h) { ++h.format; }},
      {"top_k", [](RegionHeader& h) { ++h.top_k; }},
      {"local_experts", [](RegionHeader& h) { ++h.local_experts; }},
      {"a site without an end", [](RegionHeader& h) { ++h.tag, std::memset(h.site, 'x', sizeof(h.site)); }},
  };
  for (const auto& [name, change] : changes) {
    expect_refused(receive([&](Message& m, const MoeShape&) { change(m.header); }), ErrorKind::kMismatch,
                   "'layer'", name);
  }
}

TEST(Malformed, BodiesThatDoNotFitTheirHeader) {
  using Change = std::function<void(Message&, const MoeShape&)>;
  const std::vector<std::pair<std::string, Change>> changes = {
      {"more slots than tokens", [](Message& m, const MoeShape&) { m.header.slots = kTokens + 1; }},
      {"slots far", [](Message& m, const MoeShape&) { m.header.slots = ~0U; }},
      {"fewer slots than bytes", [](Message& m, const MoeShape&) { m.header.slots = 1; }},
      {"no counts", [](Message& m, const MoeShape&) { m.header.bytes = sizeof(RegionHeader) + 4; }},
      {"counts only",
       [](Message& m, const MoeShape& s) { m.header.bytes = sizeof(RegionHeader) + s.counts_bytes(); }},
      {"count beyond T", [](Message& m, const MoeShape&) { m.counts[1] = kTokens + 1; }},
      {"count far", [](Message& m, const MoeShape&) { m.counts[0] = ~0U; }},
      {"count too high", [](Message& m, const MoeShape&) { m.counts[0] = 2; }},
      {"count too low", [](Message& m, const MoeShape&) { m.counts[1] = 1; }},
      {"entries", [](Message& m, const MoeShape& s) { m.slots[0].header.entries = s.entries() + 1; }},
      {"entries far", [](Message& m, const MoeShape&) { m.slots[1].header.entries = ~0U; }},
      {"an entry too few", [](Message& m, const MoeShape&) { m.slots[0].header.entries = 1; }},
      {"expert", [](Message& m, const MoeShape&) { m.slots[1].entries[0].local_expert = 2; }},
      {"expert far", [](Message& m, const MoeShape&) { m.slots[1].entries[0].local_expert = 65535; }},
      {"ordinal", [](Message& m, const MoeShape&) { m.slots[1].entries[0].ordinal = 2; }},
      {"ordinal far", [](Message& m, const MoeShape&) { m.slots[1].entries[0].ordinal = ~0U; }},
  };
  for (const auto& [name, change] : changes) {
    expect_refused(receive(change), ErrorKind::kPeer, "broke the protocol", name);
  }
}

TEST(Malformed, FlagsAndCulpritsOutOfRange) {
  const Outcome poisoned = receive([](Message& m, const MoeShape&) {
    m.header.flags = kPoisoned | 0xf0;
    m.header.culprit = 9999;
  });
  EXPECT_FALSE(poisoned.failure);
  ASSERT_TRUE(poisoned.data_error);
  EXPECT_EQ(poisoned.data_error->kind(), ErrorKind::kRouting);

  const Outcome raised = receive([](Message& m, const MoeShape&) {
    m.header.flags = kRaise;
    m.header.culprit = 9999;
  });
  EXPECT_FALSE(raised.failure);
  ASSERT_TRUE(raised.returned);
  EXPECT_EQ(raised.returned->kind(), ErrorKind::kRouting);
}

TEST(Malformed, CombinesWithTheWrongNumberOfRows) {
  for (const uint32_t rows : {0U, 1U, 3U, ~0U}) {
    for (const int32_t bytes_rows : {0, 1, 2, 3}) {
      Rogue rogue(problem());
      Inputs in = own_inputs();
      in.indices = {2, -1, -1, 3, 2, -1, -1, -1, -1};  // two tokens to rank 1
      const Site site;
      const MoeShape& shape = rogue.real().shape;
      Message dispatched(rogue, make_call(rogue.real(), Kind::kDispatch, kTokens, site));
      rogue.send(0, dispatched.bytes(shape));
      Outputs out;
      run_dispatch(problem(), rogue.real(), in, out, site);
      ASSERT_EQ(out.ok, 1);
      out.y = out.tokens;
      Message combined(rogue, make_call(rogue.real(), Kind::kCombine, kTokens, site));
      combined.header.exchange = 1;
      combined.header.slots = rows;
      combined.header.bytes = sizeof(RegionHeader) + bytes_rows * shape.row_stride();
      rogue.send(1, combined.bytes(shape));
      EXPECT_FALSE(run_combine(problem(), rogue.real(), in, out, site));
      const auto failure = rogue.real().group.failure();
      ASSERT_TRUE(failure);
      EXPECT_EQ(failure->kind(), ErrorKind::kPeer);
      EXPECT_TRUE(all_nan(out.out));
    }
  }
}

// Whatever the bytes are, the call comes back, with outputs or with NaN.
TEST(Malformed, RandomDamage) {
  std::mt19937_64 rng(11);
  for (int trial = 0; trial < 150; ++trial) {
    Rogue rogue(problem());
    const Site site;
    Message message(rogue, make_call(rogue.real(), Kind::kDispatch, kTokens, site));
    const MoeShape& shape = rogue.real().shape;
    Bytes bytes = message.bytes(shape);
    // Mostly past what the header checks catch.
    const size_t begin = trial % 4 == 0 ? 0 : sizeof(RegionHeader);
    for (int damage = 1 + static_cast<int>(rng() % 4); damage > 0; --damage) {
      bytes[begin + rng() % (bytes.size() - begin)] = static_cast<std::byte>(rng());
    }
    rogue.send(0, bytes);
    Outputs out;
    const auto error = run_dispatch(problem(), rogue.real(), own_inputs(), out, site);
    if (error) {
      EXPECT_EQ(error->kind(), ErrorKind::kRouting);
    } else {
      EXPECT_EQ(out.ok, rogue.real().group.failure() ? 0 : 1);
    }
  }
}

TEST(Malformed, NoticesAreCheckedToo) {
  struct Bad {
    std::string name;
    std::function<void(AbortNotice&)> change;
    bool believed;
  };
  const std::vector<Bad> all = {
      {"sound", [](AbortNotice&) {}, true},
      {"kind", [](AbortNotice& n) { n.error_kind = 200; }, true},
      {"culprit", [](AbortNotice& n) { n.culprit = 12345; }, true},
      {"text without an end", [](AbortNotice& n) { std::memset(n.text, 'x', sizeof(n.text)); }, true},
      {"magic", [](AbortNotice& n) { n.magic = 0; }, false},
      {"version", [](AbortNotice& n) { ++n.version; }, false},
      {"source", [](AbortNotice& n) { n.source = 0; }, false},
      {"nonce", [](AbortNotice& n) { ++n.nonce; }, false},
      {"closed", [](AbortNotice& n) { n.closed = 1; }, false},
  };
  for (const Bad& bad : all) {
    Rogue rogue(problem(), [](GroupConfig& config) { config.first_stall_timeout = 300ms; });
    AbortNotice notice = rogue.good_notice();
    notice.error_kind = static_cast<uint8_t>(ErrorKind::kPeer);
    std::strcpy(notice.text, "it had enough");
    bad.change(notice);
    rogue.notify(notice, false);
    Outputs out;
    EXPECT_FALSE(run_dispatch(problem(), rogue.real(), own_inputs(), out));
    const auto failure = rogue.real().group.failure();
    ASSERT_TRUE(failure);
    EXPECT_EQ(failure->kind(), bad.believed ? ErrorKind::kPeer : ErrorKind::kTimeout) << bad.name;
  }
}

// Immediates of another generation of the group, or of nobody, are dropped and count for nothing.
TEST(Malformed, ImmediatesOfOtherGenerationsAreDropped) {
  Rogue rogue(problem(), [](GroupConfig& config) { config.first_stall_timeout = 300ms; });
  const GroupStats before = rogue.real().group.stats();
  rogue.stray(immediate(rogue.nonce() % kMaxNonce + 1, 1, 0));
  rogue.stray(immediate(rogue.nonce(), 0, 0));  // its own rank never sends to itself
  rogue.stray(immediate(rogue.nonce(), 7, 1));
  Outputs out;
  run_dispatch(problem(), rogue.real(), own_inputs(), out);
  const auto failure = rogue.real().group.failure();
  ASSERT_TRUE(failure);
  EXPECT_EQ(failure->kind(), ErrorKind::kTimeout);
  EXPECT_EQ(rogue.real().group.stats().engine.unknown_immediates, before.engine.unknown_immediates + 3);
}

}  // namespace
}  // namespace pplx::moe
