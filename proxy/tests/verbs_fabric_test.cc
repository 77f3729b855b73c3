// Fabric "verbs" without an engine above it. Needs an RDMA device: tests/soft_roce makes one.
#include "proxy/fabric/verbs_fabric.h"

#include <unistd.h>

#include "proxy/tests/support.h"

namespace pplx::testing {
namespace {

class VerbsFabricTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (auto why = no_verbs()) GTEST_SKIP() << *why;
  }
};

struct Listener final : FabricEvents {
  void on_complete(FabricOp&, const Error* error) override { ++(error == nullptr ? completed : failed); }
  void on_immediate(uint32_t) override {}
  void on_message(std::span<const std::byte>) override { ++messages; }
  void on_error(const Error&) override {}
  void on_down(const Error&) override {}
  int completed = 0, failed = 0, messages = 0;
};

// `from` connects to `to` and sends it something.
void greet(VerbsFabric& from, VerbsFabric& to, Listener& listener) {
  static std::byte bytes[8];
  const FabricMemory memory = from.register_memory(bytes, sizeof bytes);
  FabricOp op{};
  op.kind = FabricOp::Kind::kMessage;
  op.source = bytes;
  op.length = sizeof bytes;
  op.local = memory.local;
  op.peer = from.connect(to.address());
  bool posted = false;
  for (const auto until = Clock::now() + scaled(10s); listener.completed == 0 && Clock::now() < until;) {
    posted = posted || from.try_send(op) == Post::kPosted;
    from.poll(listener);
    to.poll(listener);
  }
  ASSERT_EQ(listener.completed, 1);
  from.unregister_memory(memory);
}

// Engines look at addresses already (JobTest); whoever does not meets the handshake's check.
TEST_F(VerbsFabricTest, ForeignJobsAreRefusedAndBothSidesNamed) {
  auto config = verbs();
  VerbsFabric one(config);
  config.job = "another";
  VerbsFabric other(config);
  const uint32_t peer = one.connect(other.address());
  std::byte bytes[8] = {};
  const FabricMemory memory = one.register_memory(bytes, sizeof bytes);
  Listener listener;
  FabricOp op{};
  op.kind = FabricOp::Kind::kMessage;
  op.source = bytes;
  op.length = sizeof bytes;
  op.local = memory.local;
  op.peer = peer;
  std::string text;
  for (const auto until = Clock::now() + scaled(10s); text.empty() && Clock::now() < until;) {
    try {
      one.try_send(op);
    } catch (const Error& error) {
      text = error.what();
    }
    one.poll(listener);
    other.poll(listener);
  }
  EXPECT_NE(text.find("different job tokens"), std::string::npos) << text;
  const auto pid = std::to_string(getpid());
  const auto first = text.find(pid, text.find("refused"));
  ASSERT_NE(first, std::string::npos) << text;
  EXPECT_NE(text.find(pid, first + 1), std::string::npos) << text;
}

// One that was killed says no goodbye; here it merely stops to move.
TEST_F(VerbsFabricTest, SilentPeersAreForgotten) {
  auto config = verbs();
  config.verbs.connect_timeout = scaled(300ms);
  VerbsFabric stays(config);
  Listener listener;
  auto visitor = std::make_unique<VerbsFabric>(config);
  greet(*visitor, stays, listener);
  ASSERT_EQ(stays.peers(), 1U);
  // Whoever answers stays.
  for (const auto until = Clock::now() + 9 * config.verbs.connect_timeout; Clock::now() < until;) {
    stays.poll(listener);
    visitor->poll(listener);
  }
  EXPECT_EQ(stays.peers(), 1U);
  for (const auto until = Clock::now() + 12 * config.verbs.connect_timeout;
       stays.peers() > 0 && Clock::now() < until;) {
    stays.poll(listener);
  }
  EXPECT_EQ(stays.peers(), 0U);
}

// Somebody said hello, was answered, and is gone. Much later this side wants to write there: it begins anew
// and so finds out, rather than wait for ever for an answer to what it said before.
TEST_F(VerbsFabricTest, ALinkWhosePeerGaveUpIsBegunAnew) {
  auto config = verbs();
  config.verbs.connect_timeout = scaled(300ms);
  VerbsFabric gone(config), stays(config);
  Listener listener;
  std::byte bytes[8] = {};
  auto message = [&](VerbsFabric& from, VerbsFabric& to) {
    FabricOp op{};
    op.kind = FabricOp::Kind::kMessage;
    op.source = bytes;
    op.length = sizeof bytes;
    op.local = from.register_memory(bytes, sizeof bytes).local;
    op.peer = from.connect(to.address());
    return op;
  };
  FabricOp hello = message(gone, stays);
  EXPECT_EQ(gone.try_send(hello), Post::kFull);
  for (const auto until = Clock::now() + 2 * config.verbs.connect_timeout; Clock::now() < until;) {
    stays.poll(listener);
  }
  ASSERT_EQ(stays.peers(), 1U);
  FabricOp op = message(stays, gone);
  std::string text;
  for (const auto until = Clock::now() + 5 * config.verbs.connect_timeout;
       text.empty() && Clock::now() < until;) {
    try {
      EXPECT_EQ(stays.try_send(op), Post::kFull);
    } catch (const Error& error) {
      text = error.what();
    }
    stays.poll(listener);
  }
  EXPECT_NE(text.find("no answer from"), std::string::npos) << text;
}

}  // namespace
}  // namespace pplx::testing
