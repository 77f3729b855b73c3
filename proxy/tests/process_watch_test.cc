// Who has ended, of the processes of this host.
#include "proxy/process_watch.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <thread>

namespace pplx::testing {
namespace {

using namespace std::chrono_literals;

pid_t sleeping_child() {
  const pid_t child = fork();
  if (child == 0) {
    for (;;) pause();
  }
  return child;
}

TEST(ProcessWatch, SeesTheEnd) {
  const pid_t child = sleeping_child();
  ASSERT_GT(child, 0);
  ProcessWatch watch({.space = ProcessIdentity::own().space, .pid = child});
  EXPECT_FALSE(watch.blind());
  EXPECT_FALSE(watch.ended());
  kill(child, SIGSTOP);
  EXPECT_FALSE(watch.ended());
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  EXPECT_TRUE(watch.ended());
  EXPECT_TRUE(ProcessWatch({.space = ProcessIdentity::own().space, .pid = child}).ended());
  const ProcessWatch moved = std::move(watch);
  EXPECT_TRUE(moved.ended());
}

TEST(ProcessWatch, NobodyNeedsToWaitForIt) {
  const pid_t child = sleeping_child();
  ASSERT_GT(child, 0);
  const ProcessWatch watch({.space = ProcessIdentity::own().space, .pid = child});
  kill(child, SIGKILL);
  for (int i = 0; i < 2000 && !watch.ended(); ++i) std::this_thread::sleep_for(10ms);
  EXPECT_TRUE(watch.ended());
  waitpid(child, nullptr, 0);
}

TEST(ProcessWatch, IsBlindElsewhere) {
  const pid_t child = sleeping_child();
  ASSERT_GT(child, 0);
  const std::string here = ProcessIdentity::own().space;
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  for (const auto& [space, pid] :
       {std::pair{std::string("another host"), child}, std::pair{std::string(), child},
        std::pair{here, getpid()}, std::pair{here, pid_t{0}}, std::pair{here, pid_t{-1}}}) {
    const ProcessWatch watch({.space = space, .pid = pid});
    EXPECT_TRUE(watch.blind()) << space << ' ' << pid;
    EXPECT_FALSE(watch.ended()) << space << ' ' << pid;
  }
  EXPECT_FALSE(ProcessWatch().ended());
}

}  // namespace
}  // namespace pplx::testing
