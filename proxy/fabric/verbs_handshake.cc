#include "proxy/fabric/verbs_handshake.h"

#include <algorithm>
#include <cstring>

#include "proxy/bytes.h"

namespace pplx {
namespace {

constexpr uint32_t kMagic = 0x48584c50;  // "PLXH"
constexpr size_t kMaxLabel = 96;
constexpr size_t kMaxText = 200;

template <size_t N, typename Byte>
void read_array(ByteReader& in, std::array<Byte, N>& array) {
  std::memcpy(array.data(), in.raw(N).data(), N);
}

void put_nic(ByteWriter& out, const NicAddress& nic) {
  out.raw(std::as_bytes(std::span(nic.gid)));
  out.put(nic.lid);
  out.put(nic.datagram_qp);
  out.put(nic.mtu);
  out.raw(nic.id);
}

NicAddress read_nic(ByteReader& in) {
  NicAddress nic;
  read_array(in, nic.gid);
  nic.lid = in.get<uint16_t>();
  nic.datagram_qp = in.get<uint32_t>();
  nic.mtu = in.get<uint8_t>();
  read_array(in, nic.id);
  if (nic.datagram_qp >= 1U << 24) in.malformed("its queue pair number has more than 24 bits");
  if (nic.mtu < 1 || nic.mtu > 5) in.malformed("its MTU is none of 256 to 4096");
  return nic;
}

std::string_view clipped(const std::string& text, size_t limit) {
  return std::string_view(text).substr(0, limit);
}

void put_text(ByteWriter& out, std::string_view text) { out.blob(std::as_bytes(std::span(text))); }

// For error messages and logs: what strangers send is printed.
std::string printable(std::string text) {
  std::replace_if(
      text.begin(), text.end(), [](char c) { return c < ' ' || c > '~'; }, '?');
  return text;
}

}  // namespace

std::vector<std::byte> encode(const NicAddress& address) {
  ByteWriter out;
  put_nic(out, address);
  return out.take();
}

NicAddress decode_nic_address(std::span<const std::byte> bytes) {
  ByteReader in(bytes, "NIC address");
  NicAddress nic = read_nic(in);
  in.finish();
  return nic;
}

std::vector<std::byte> encode(const Handshake& handshake) {
  ByteWriter out;
  out.put(kMagic);
  out.put(handshake.version);
  out.put(static_cast<uint8_t>(handshake.type));
  out.put(static_cast<uint8_t>(handshake.wants_reply ? 1 : 0));
  out.put(handshake.job);
  out.raw(handshake.to);
  put_nic(out, handshake.nic);
  put_text(out, clipped(handshake.label, kMaxLabel));
  out.put(handshake.link);
  out.put(handshake.number);
  out.put(handshake.ack);
  out.put(handshake.qp);
  out.put(handshake.psn);
  out.put(handshake.last);
  out.put(handshake.arrived);
  put_text(out, clipped(handshake.text, kMaxText));
  out.checksum();
  return out.take();
}

Handshake decode_handshake(std::span<const std::byte> bytes) {
  if (bytes.size() > kMaxHandshake) ByteReader(bytes, "handshake").malformed("it is too long");
  ByteReader in(checked(bytes, "handshake"), "handshake");
  Handshake handshake;
  if (in.get<uint32_t>() != kMagic) in.malformed("its magic number is wrong");
  handshake.version = in.get<uint16_t>();
  const auto type = in.get<uint8_t>();
  const auto flags = in.get<uint8_t>();
  if (type < 1 || type > 3) in.malformed("its type is unknown");
  handshake.type = static_cast<Handshake::Type>(type);
  handshake.wants_reply = (flags & 1) != 0;
  handshake.job = in.get<uint64_t>();
  read_array(in, handshake.to);
  handshake.nic = read_nic(in);
  handshake.label = printable(in.text());
  if (handshake.label.size() > kMaxLabel) in.malformed("its label is too long");
  if (handshake.version != kHandshakeVersion) return handshake;
  handshake.link = in.get<uint8_t>();
  handshake.number = in.get<uint32_t>();
  handshake.ack = in.get<uint32_t>();
  handshake.qp = in.get<uint32_t>();
  handshake.psn = in.get<uint32_t>();
  handshake.last = in.get<uint32_t>();
  handshake.arrived = in.get<uint64_t>();
  handshake.text = printable(in.text());
  in.finish();
  if (flags > 1) in.malformed("it has unknown flags");
  if (handshake.link != kMessageLink && handshake.link >= 64) in.malformed("its link is out of range");
  if (handshake.type == Handshake::Type::kHello && handshake.number == 0) {
    in.malformed("its queue pair has no number");
  }
  if (handshake.qp >= 1U << 24 || handshake.psn >= 1U << 24) {
    in.malformed("a number of its queue pair has more than 24 bits");
  }
  return handshake;
}

std::optional<std::string> refusal(const Handshake& handshake, const HandshakeSelf& self) {
  if (handshake.version != kHandshakeVersion) {
    return self.label + " speaks version " + std::to_string(kHandshakeVersion) + " of the handshake, " +
           handshake.label + " version " + std::to_string(handshake.version);
  }
  if (handshake.to != self.id) {
    return self.label + " is not the engine that " + handshake.label + " looks for, which is gone";
  }
  if (handshake.job != self.job) {
    return self.label + " and " + handshake.label + " have different job tokens";
  }
  return std::nullopt;
}

Pairing::Step Pairing::on_hello(uint32_t number, uint32_t ack, bool wants_reply) {
  Step step;
  if (number < newest_) return step;  // overtaken by a later one
  if (remote_ != 0 && number == remote_) {
    step.confirmed = !confirmed_ && ack == local_;
    confirmed_ = confirmed_ || step.confirmed;
    step.reply = wants_reply;
    return step;
  }
  step.reply = true;
  step.renew = local_ == 0 || remote_ != 0;
  // One that is connected with ours was never connected with another. One that is connected with none may
  // still be taken, unless we took it before, for a queue pair that we have given up since. Any other's owner
  // makes a new one when it hears of ours.
  const bool with_ours = !step.renew && ack == local_;
  const bool fresh = ack == 0 && number != newest_;
  step.pair = with_ours || fresh;
  return step;
}

}  // namespace pplx
