// Locked memory that has run out (RLIMIT_MEMLOCK): NICs pin what is registered with them.
#include <linux/capability.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "proxy/tests/support.h"

namespace pplx::testing {
namespace {

// This thread may lock `bytes` and no more, even where it is root's: that capability is set aside.
class LockedMemory {
 public:
  explicit LockedMemory(rlim_t bytes) {
    getrlimit(RLIMIT_MEMLOCK, &limit_);
    const rlimit low{bytes, limit_.rlim_max};
    syscall(SYS_capget, &header_, before_);
    __user_cap_data_struct without[2] = {before_[0], before_[1]};
    without[CAP_TO_INDEX(CAP_IPC_LOCK)].effective &= ~CAP_TO_MASK(CAP_IPC_LOCK);
    limited_ = syscall(SYS_capset, &header_, without) == 0 && setrlimit(RLIMIT_MEMLOCK, &low) == 0;
  }
  ~LockedMemory() {
    setrlimit(RLIMIT_MEMLOCK, &limit_);
    syscall(SYS_capset, &header_, before_);
  }
  LockedMemory(const LockedMemory&) = delete;
  LockedMemory& operator=(const LockedMemory&) = delete;
  bool limited() const { return limited_; }

 private:
  __user_cap_header_struct header_{_LINUX_CAPABILITY_VERSION_3, 0};
  __user_cap_data_struct before_[2] = {};
  rlimit limit_{};
  bool limited_ = false;
};

class VerbsMemlock : public ::testing::Test {
 protected:
  void SetUp() override {
    if (auto why = no_verbs()) GTEST_SKIP() << *why;
  }
};

void expect_told(const std::function<void()>& call) {
  try {
    call();
    ADD_FAILURE() << "registered beyond the limit";
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::kFabric) << error.what();
    EXPECT_NE(std::string(error.what()).find("ulimit -l"), std::string::npos) << error.what();
  }
}

TEST_F(VerbsMemlock, IsNamedAndTheEngineGoesOn) {
  TransferEngine engine(verbs());
  {
    const LockedMemory limit(64 << 10);
    ASSERT_TRUE(limit.limited());
    expect_told([&] { engine.allocate(8 << 20); });
    expect_told([] { TransferEngine another(verbs()); });
  }
  const auto region = engine.allocate(8 << 20);
  const auto own = engine.open(region->descriptor());
  auto& done = lasting_counter();
  engine.write({.source = region.get(), .target = own.get(), .length = 4096}, &done);
  EXPECT_TRUE(engine.wait_until([&] { return done.done() == 1; }, Clock::now() + 20s));
  EXPECT_EQ(done.failed(), 0U);
}

}  // namespace
}  // namespace pplx::testing
