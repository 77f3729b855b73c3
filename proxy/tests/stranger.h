// Somebody who sends an engine whatever messages it likes.
#pragma once

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "proxy/bytes.h"
#include "proxy/engine/core.h"
#include "proxy/fabric/address.h"
#include "proxy/fabric/fabric.h"
#include "proxy/tests/support.h"

namespace pplx::testing {

// Sends an engine of fabric "local" whatever it likes.
class Stranger final : FabricEvents {
 public:
  explicit Stranger(TransferEngine& victim)
      : engine_(victim),
        fabric_(make_fabric({})),
        victim_(fabric_->connect(decode_address(victim.address().bytes()))) {}

  PeerAddress address() const { return fabric_->address(); }
  void send(const PeerAddress& from, uint8_t type, const Bytes& body, uint64_t number = 0) {
    ByteWriter out;
    out.put(uint32_t{0x4d584c50});
    out.put(type);
    out.put(number);
    out.blob(encode(from));
    out.raw(body);
    const Bytes message = out.take();
    FabricOp op{};
    op.kind = FabricOp::Kind::kMessage;
    op.source = message.data();
    op.length = message.size();
    op.peer = victim_;
    under_way_ = true;
    while (fabric_->try_send(op) == Post::kFull) fabric_->poll(*this);
    for (const auto until = Clock::now() + 10s; under_way_ && Clock::now() < until;) {
      if (fabric_->poll(*this) == 0) engine_.progress();
    }
    EXPECT_FALSE(under_way_);
  }
  void send(uint8_t type, const Bytes& body) { send(address(), type, body); }
  // Polls until the engine has sent it a message of that type; returns what follows the header.
  Bytes expect(uint8_t type) {
    for (const auto until = Clock::now() + scaled(10s); Clock::now() < until;) {
      const auto found =
          std::find_if(heard_.begin(), heard_.end(), [&](const auto& one) { return one.first == type; });
      if (found != heard_.end()) {
        Bytes body = std::move(found->second);
        heard_.erase(found);
        return body;
      }
      if (fabric_->poll(*this) == 0) engine_.progress();
    }
    ADD_FAILURE() << "no message of type " << int{type} << " came";
    return {};
  }

 private:
  void on_complete(FabricOp&, const Error*) override { under_way_ = false; }
  void on_immediate(uint32_t) override {}
  void on_message(std::span<const std::byte> message) override {
    ByteReader in(message, "message");
    in.get<uint32_t>();
    const auto type = in.get<uint8_t>();
    in.get<uint64_t>();
    in.blob();
    const auto rest = in.rest();
    heard_.emplace_back(type, Bytes(rest.begin(), rest.end()));
  }
  void on_error(const Error&) override {}
  void on_down(const Error&) override {}

  TransferEngine& engine_;
  std::unique_ptr<Fabric> fabric_;
  uint32_t victim_;
  bool under_way_ = false;
  std::vector<std::pair<uint8_t, Bytes>> heard_;
};

// Same bytes, another engine.
inline PeerAddress nth(PeerAddress address, uint32_t n) {
  std::memcpy(address.engine.data(), &n, sizeof n);
  return address;
}

}  // namespace pplx::testing
