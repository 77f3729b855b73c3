// Time in which this process did not run is nobody's silence.
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include "proxy/fabric/verbs_queue.h"
#include "proxy/presence.h"
#include "proxy/tests/support.h"

namespace pplx::testing {
namespace {

using Time = Liveness::Time;

TEST(VerbsSuspended, OnlyLongGapsAreLeftOut) {
  Presence presence;
  const Time start = Time() + 1h;
  EXPECT_EQ(presence.absent(start), 0ns) << "the first look";
  EXPECT_EQ(presence.absent(start + 100ms), 0ns);
  EXPECT_EQ(presence.absent(start + 400ms), 200ms);
  EXPECT_EQ(presence.absent(start + 450ms), 0ns);
}

TEST(VerbsSuspended, NobodyIsGoneForTheTimeThatWeWere) {
  Presence presence;
  Liveness liveness(1s);
  Time now = Time() + 1h;
  presence.absent(now);
  liveness.heard(now);
  now += 10min;
  liveness.excuse(presence.absent(now));
  EXPECT_FALSE(liveness.gone(now));
  EXPECT_FALSE(liveness.ask(now)) << "it has been silent for a tenth of a second";
  // From here on it is silent while we listen.
  bool asked = false;
  Time gone{};
  for (Time look = now; look < now + 5s && gone == Time(); look += 20ms) {
    liveness.excuse(presence.absent(look));
    asked |= liveness.ask(look);
    if (liveness.gone(look)) gone = look;
  }
  EXPECT_TRUE(asked);
  EXPECT_NEAR(std::chrono::duration<double>(gone - now).count(), 1.9, 0.1);
}

// Stops this process, as a scheduler that suspends a job does, for longer than a silent peer is given.
TEST(VerbsSuspended, AJobGoesOnAfterIt) {
  if (auto why = no_verbs()) GTEST_SKIP() << *why;
  auto config = verbs();
  config.verbs.connect_timeout = scaled(1s);
  TransferEngine a(config), b(config);
  auto source = a.allocate(64), target = b.allocate(64);
  auto remote = a.open(target->descriptor());
  a.write_future({source.get(), 0, remote.get(), 0, 64, 1}).get();
  const auto seconds = std::chrono::ceil<std::chrono::seconds>(7 * scaled(1s)).count();
  const std::string script = "kill -STOP $PPID; sleep " + std::to_string(seconds) + "; kill -CONT $PPID";
  const char* arguments[] = {"sh", "-c", script.c_str(), nullptr};
  pid_t child = 0;
  const auto before = Clock::now();
  ASSERT_EQ(posix_spawn(&child, "/bin/sh", nullptr, nullptr, const_cast<char**>(arguments), environ), 0);
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_EQ(status, 0);
  ASSERT_GE(Clock::now() - before, std::chrono::seconds(seconds));
  for (int i = 0; i < 200; ++i) {
    a.progress(), b.progress();
    usleep(1000);
  }
  auto later = a.write_future({source.get(), 0, remote.get(), 0, 64, 1});
  ASSERT_EQ(later.wait_for(scaled(20s)), std::future_status::ready);
  EXPECT_NO_THROW(later.get());
  b.imm_counter(1).wait(2);
}

}  // namespace
}  // namespace pplx::testing
