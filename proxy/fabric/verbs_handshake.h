// How two NICs agree on a pair of queue pairs: datagrams that are repeated until they are answered, in any
// order, with either or both sides beginning. Nothing here touches a device.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "proxy/fabric/address.h"
#include "proxy/fabric/verbs_select.h"

namespace pplx {

inline constexpr uint16_t kHandshakeVersion = 2;
// Every datagram fits the smallest packet of Ethernet's and InfiniBand's usual sizes.
inline constexpr size_t kMaxHandshake = 512;
inline constexpr uint8_t kMessageLink = 0xFF;  // the others are numbered by the rail of whoever began

// Where a NIC takes datagrams; also what its address holds.
struct NicAddress {
  Gid gid{};
  uint16_t lid = 0;
  uint32_t datagram_qp = 0;
  uint8_t mtu = 0;  // ibv_mtu
  EngineId id{};    // random: an engine has one for each of its NICs, and a restarted one has others
  bool operator==(const NicAddress&) const = default;
};
std::vector<std::byte> encode(const NicAddress& address);
NicAddress decode_nic_address(std::span<const std::byte> bytes);  // throws kInvalidArgument

struct Handshake {
  enum class Type : uint8_t { kHello = 1, kRefuse = 2, kBye = 3 };

  Type type = Type::kHello;
  bool wants_reply = false;
  uint16_t version = kHandshakeVersion;
  uint64_t job = 0;
  EngineId to{};
  NicAddress nic;     // of the sender
  std::string label;  // of the sender, for people
  // What follows is not read from another version's.
  uint8_t link = 0;
  // Of the sender's queue pair: grows, and is never used again. In a goodbye: 0 as its engine closes, 1 as
  // only this NIC leaves.
  uint32_t number = 0;
  uint32_t ack = 0;  // of the receiver's queue pair that this one is paired with; 0: none yet
  uint32_t qp = 0, psn = 0;
  // Of the receiver's queue pair that the sender's last one was connected with, 0: there was none, and how
  // many immediates came on it. Final: that queue pair is gone.
  uint32_t last = 0;
  uint64_t arrived = 0;
  std::string text;  // why it is refused
};
std::vector<std::byte> encode(const Handshake& handshake);
// Throws kInvalidArgument for anything that is not a handshake. One of another version has only the fields
// that all versions have.
Handshake decode_handshake(std::span<const std::byte> bytes);

// Who takes part, as this side knows it.
struct HandshakeSelf {
  EngineId id{};
  std::string label;
  uint64_t job = 0;
};
// Why a handshake is refused, naming both sides; nullopt when all is well.
std::optional<std::string> refusal(const Handshake& handshake, const HandshakeSelf& self);

// One side's view of one link. A queue pair is paired once in its life, with one that this side has not been
// paired with before; who has to pair again makes a new one first. So packets of an old pair never reach a
// new one, and late or repeated datagrams change nothing for good.
class Pairing {
 public:
  struct Step {
    bool renew = false;      // make a new queue pair and call renewed()
    bool pair = false;       // then connect it with the sender's and call paired()
    bool reply = false;      // then send the state as it is
    bool confirmed = false;  // the sender's is connected with ours: operations may be posted
  };
  Step on_hello(uint32_t number, uint32_t ack, bool wants_reply);

  // A new queue pair, not connected. Numbers grow, over all links of an engine. 0: there is none.
  void renewed(uint32_t number) {
    local_ = number;
    remote_ = 0;
    confirmed_ = false;
  }
  // Returns whether that confirms the pair at once.
  bool paired(uint32_t number, uint32_t ack) {
    remote_ = newest_ = number;
    confirmed_ = ack != 0 && ack == local_;
    return confirmed_;
  }

  uint32_t local() const { return local_; }
  uint32_t remote() const { return remote_; }
  bool confirmed() const { return confirmed_; }

 private:
  uint32_t local_ = 0;
  uint32_t remote_ = 0;  // 0: not paired
  uint32_t newest_ = 0;  // of all numbers ever paired with
  bool confirmed_ = false;
};

}  // namespace pplx
