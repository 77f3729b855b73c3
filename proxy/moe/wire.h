// What ranks write into each other's regions. docs/protocol.md section "Messages" is the reference.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace pplx::moe {

inline constexpr uint32_t kMagic = 0x50504c58;  // "PPLX"
inline constexpr uint16_t kWireVersion = 1;

enum class Kind : uint8_t {
  kDispatch = 0,
  kCombine = 1,
  kDispatchTranspose = 2,
  kCombineTranspose = 3,
};
inline constexpr uint8_t kKinds = 4;

constexpr const char* kind_name(Kind kind) {
  switch (kind) {
    case Kind::kDispatch:
      return "dispatch";
    case Kind::kCombine:
      return "combine";
    case Kind::kDispatchTranspose:
      return "dispatch transpose";
    case Kind::kCombineTranspose:
      return "combine transpose";
  }
  return "unknown exchange";
}

enum HeaderFlag : uint8_t {
  kPoisoned = 1,  // the sender's data is wrong: what it sends counts as NaN
  kRaise = 2,     // a data error of an earlier execution is pending: every rank raises in this exchange
};

// First bytes of a region. Little-endian; every field is checked before anything else is read.
struct RegionHeader {
  uint32_t magic;
  uint16_t version;
  uint8_t kind;
  uint8_t flags;
  uint32_t nonce;   // the receiver's, so that a message of another generation is refused
  uint32_t source;  // sender's rank
  uint64_t exchange;
  uint64_t tag;     // what is exchanged and where in the program
  uint32_t tokens;  // T
  uint32_t round;
  uint32_t hidden;
  uint32_t slots;    // that follow in this message
  uint32_t culprit;  // with flags: the rank whose data is wrong
  uint32_t bytes;    // of this message, header included
  uint8_t format;    // of rows: dtype, quantisation, layout
  uint8_t top_k;
  uint16_t local_experts;
  char site[68];  // zero-terminated description of the call, for error messages only
};
static_assert(sizeof(RegionHeader) == 128 && std::is_trivially_copyable_v<RegionHeader>);

// A rank's last words: it failed, or it closed the group.
struct AbortNotice {
  uint32_t magic;
  uint16_t version;
  uint8_t closed;      // 1: an orderly close, 0: a failure
  uint8_t error_kind;  // ErrorKind of the failure, also of a close after one
  uint32_t nonce;      // the sender's
  uint32_t source;
  uint32_t culprit;   // the rank held responsible; ~0: none
  uint32_t heard;     // a close after a failure: 1: of which another rank told the closer
  uint64_t exchange;  // a failure: the one under way; a close: how many were sent in full
  char text[224];     // zero-terminated; of a close in good order empty
};
static_assert(sizeof(AbortNotice) == 256 && std::is_trivially_copyable_v<AbortNotice>);

// Immediates: reserved bit | nonce:16 | source:11 | lane:4.
inline constexpr uint32_t kLaneBits = 4, kSourceBits = 11, kNonceBits = 16;
inline constexpr uint32_t kMaxRanks = 1U << kSourceBits;
inline constexpr uint32_t kMaxNonce = (1U << kNonceBits) - 2;  // no immediate is 0xFFFFFFFF, the engine's own
inline constexpr uint32_t kMaxLanes = 12;
// The two notices have immediates of their own: one must not be read when only the other is here.
inline constexpr uint32_t kClosedLane = 13, kHeartbeatLane = 14, kFailedLane = 15;

constexpr uint32_t immediate(uint32_t nonce, uint32_t source, uint32_t lane) {
  return 0x8000'0000U | (nonce << (kSourceBits + kLaneBits)) | (source << kLaneBits) | lane;
}

}  // namespace pplx::moe
