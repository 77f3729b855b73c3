// Messages, notices and immediates from a broken peer, through a step's four exchanges: each ends, with sound
// outputs or with an error, and nothing is read or written out of bounds.
#include "tests/fuzz/fuzz.h"
#include "xla_ffi/tests/rogue.h"

namespace pplx::moe::testing {
namespace {

constexpr int kTokens = 3;
const Problem kProblem{.ranks = 2, .experts = 4, .top_k = 3, .hidden = 4, .max_tokens = kTokens};

// What rank 1 would send in a step in which each rank sends the other some tokens.
Bytes sound_message(Rogue& rogue, Kind kind, const MoeShape& shape, const Site& site) {
  const Call call = make_call(rogue.real(), kind, kTokens, site);
  RegionHeader header{};
  header.magic = kMagic;
  header.version = kWireVersion;
  header.kind = static_cast<uint8_t>(kind);
  header.nonce = rogue.nonce();
  header.source = 1;
  header.tag = call.site.tag;
  header.tokens = call.site.tokens;
  header.hidden = call.site.hidden;
  header.culprit = ~0U;
  header.format = call.site.format;
  header.top_k = call.site.top_k;
  header.local_experts = call.site.local_experts;
  int64_t stride = 0, before = 0;
  switch (kind) {
    case Kind::kDispatch:
      header.exchange = 0, header.slots = 2, stride = shape.dispatch_stride(), before = shape.counts_bytes();
      break;
    case Kind::kCombine:
      header.exchange = 1, header.slots = 1, stride = shape.home_stride();
      break;
    case Kind::kCombineTranspose:
      header.exchange = 2, header.slots = 2, stride = shape.row_stride();
      break;
    case Kind::kDispatchTranspose:
      header.exchange = 3, header.slots = 1, stride = shape.dispatch_transpose_stride();
      break;
  }
  header.bytes = static_cast<uint32_t>(sizeof header + before + header.slots * stride);
  Bytes out(sizeof header + shape.longest_body());
  std::memcpy(out.data(), &header, sizeof header);
  if (kind == Kind::kDispatch) {
    const uint32_t counts[2] = {1, 2};
    const SlotHeader slots[2] = {{0, 2}, {2, 1}};
    const SlotEntry entries[2][2] = {{{0.5F, 0, 0, 0, 0}, {0.25F, 0, 1, 1, 0}}, {{2.0F, 1, 1, 2, 0}, {}}};
    std::byte* at = out.data() + sizeof header;
    std::memcpy(at, counts, sizeof counts);
    at += before;
    for (int slot = 0; slot < 2; ++slot, at += stride) {
      std::memcpy(at, &slots[slot], sizeof slots[slot]);
      std::memcpy(at + sizeof slots[slot], entries[slot], sizeof entries[slot]);
    }
  }
  return out;
}

struct Attack {
  uint8_t at = 4;     // the exchange that is damaged
  uint8_t extra = 0;  // what comes besides: 1 a failure's notice, 2 a close's, 3 a stray immediate
};

void step(fuzz::Input& input) {
  const Attack attack{.at = static_cast<uint8_t>(input.byte() % 5),
                      .extra = static_cast<uint8_t>(input.byte() % 4)};
  Rogue rogue(kProblem, [](GroupConfig& config) {
    // A wait that nobody ends would be a bug: libFuzzer's own limit is longer.
    config.stall_timeout = config.first_stall_timeout = 20s;
  });
  Inputs in = random_inputs(kProblem, kTokens, kTokens, Routing::kNobody, 1);
  in.indices[0] = 0;
  in.indices[1] = 2;
  const Site site;
  Outputs out;
  out.d_row_weights.assign(kProblem.row_count(kTokens), 0);
  const MoeShape& shape = rogue.real().shape;
  std::optional<Error> error;
  for (uint8_t q = 0; q < 4 && !error; ++q) {
    static constexpr Kind kKinds[] = {Kind::kDispatch, Kind::kCombine, Kind::kCombineTranspose,
                                      Kind::kDispatchTranspose};
    Bytes message = sound_message(rogue, kKinds[q], shape, site);
    if (q == attack.at) {
      input.damage(message);
      if (attack.extra == 1 || attack.extra == 2) {
        AbortNotice notice = rogue.good_notice();
        notice.closed = attack.extra == 2 ? 1 : 0;
        input.damage(std::as_writable_bytes(std::span(&notice, 1)));
        rogue.notify(notice, attack.extra == 2);
      } else if (attack.extra == 3) {
        // Not the lanes' own: one of those too many would break P2, which trusts peers' NICs.
        rogue.stray(0x8000'000cU | (static_cast<uint32_t>(input.word()) << 4));
      }
    }
    rogue.send(q, message);
    Member& member = rogue.real();
    switch (q) {
      case 0:
        error = run_dispatch(kProblem, member, in, out, site);
        apply_experts(kProblem, 0, out.group_sizes, out.tokens, out.y);
        break;
      case 1:
        error = run_combine(kProblem, member, in, out, site);
        break;
      case 2:
        error = run_combine_transpose(kProblem, member, in, out, site);
        apply_experts(kProblem, 0, out.group_sizes, out.d_y, out.d_tokens);
        break;
      default:
        error = run_dispatch_transpose(kProblem, member, in, out, site);
    }
    if (attack.at == 4) FUZZ_CHECK(!error && !member.group.failure());
  }
}

}  // namespace
}  // namespace pplx::moe::testing

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  ::setenv("PPLX_LOG_LEVEL", "off", 1);
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  pplx::fuzz::Input input(data, size);
  pplx::moe::testing::step(input);
  return 0;
}
