// Messages and descriptors that an engine is handed: taken, or refused with an error that harms nobody.
// Whatever came, the engine still serves the next sound message.
#include <chrono>
#include <memory>
#include <utility>

#include "proxy/engine/engine.h"
#include "proxy/fabric/fabric.h"
#include "tests/fuzz/fuzz.h"

namespace pplx::fuzz {
namespace {

using namespace std::chrono_literals;

constexpr uint32_t kMagic = 0x4d584c50;
constexpr uint8_t kUser = 1;

class Nothing final : public FabricEvents {
 public:
  void on_complete(FabricOp&, const Error*) override { outstanding = false; }
  void on_immediate(uint32_t) override {}
  void on_message(std::span<const std::byte>) override {}
  void on_error(const Error&) override {}
  void on_down(const Error&) override {}
  bool outstanding = false;
};

// An engine with a receive pool, and a fabric beside it that sends it whatever it likes.
class Pair {
 public:
  Pair() : fabric_(make_fabric({})), sender_(encode(fabric_->address())) {
    PoolConfig config;
    config.buffer_bytes = 64;
    config.buffers = 2;
    pool_ = engine_.receive_pool(config);
    victim_ = fabric_->connect(decode_address(engine_.address().bytes()));
  }
  ~Pair() {
    engine_.close();
    fabric_->close();
  }
  Pair(const Pair&) = delete;
  Pair& operator=(const Pair&) = delete;

  TransferEngine& engine() { return engine_; }

  std::vector<std::byte> from_here(uint8_t type, std::span<const std::byte> body) const {
    ByteWriter out;
    out.put(kMagic);
    out.put(type);
    out.put(uint64_t{0});
    out.blob(sender_);
    out.raw(body);
    return out.take();
  }

  void send(const std::vector<std::byte>& message) {
    if (message.size() > fabric_->caps().max_message) return;
    FabricOp op{};
    op.kind = FabricOp::Kind::kMessage;
    op.source = message.data();
    op.length = message.size();
    op.peer = victim_;
    events_.outstanding = true;
    while (fabric_->try_send(op) == Post::kFull) fabric_->poll(events_);
    while (events_.outstanding) {
      fabric_->poll(events_);
      progress();
    }
  }

  // What arrived is read, up to this call's own message.
  void expect_service() {
    const auto mark = std::byte{++marks_};
    send(from_here(kUser, std::span(&mark, 1)));
    for (;;) {
      const Message message = engine_.recv(20s);
      if (message.payload.size() == 1 && message.payload[0] == mark && message.from.bytes() == sender_)
        return;
    }
  }

 private:
  void progress() {
    bool polled = false;
    engine_.wait_until([&] { return std::exchange(polled, true); }, Clock::now() + 1s);
  }

  TransferEngine engine_{EngineConfig{}};
  std::unique_ptr<Fabric> fabric_;
  std::vector<std::byte> sender_;
  std::shared_ptr<ReceivePool> pool_;
  uint32_t victim_ = 0;
  Nothing events_;
  uint8_t marks_ = 0;
};

}  // namespace
}  // namespace pplx::fuzz

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  ::setenv("PPLX_LOG_LEVEL", "off", 1);
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace pplx;
  // Anew now and then: peers that are made up add up.
  static std::unique_ptr<fuzz::Pair> pair;
  static int left = 0;
  if (left-- == 0) {
    pair = std::make_unique<fuzz::Pair>();
    left = 500;
  }
  fuzz::Input input(data, size);
  while (!input.done()) {
    const uint8_t what = input.byte();
    std::vector<std::byte> body;
    for (size_t length = input.byte(); body.size() < length && !input.done();) {
      body.push_back(static_cast<std::byte>(input.byte()));
    }
    try {
      if (what == 0) {
        pair->send(body);
      } else if (what == 255) {
        pair->engine().open(RegionDescriptor(fuzz::with_checksum(body)));
      } else if (what == 254) {
        pair->engine().open(PoolDescriptor(fuzz::with_checksum(body)));
      } else {
        pair->send(pair->from_here(what % 16, body));
      }
    } catch (const Error&) {
    }
  }
  pair->expect_service();
  return 0;
}
