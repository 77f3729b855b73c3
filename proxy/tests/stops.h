// A process that is stopped, by its job or a debugger, and goes on later.
#pragma once

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <functional>
#include <thread>

namespace pplx::testing {

// What `body` returns in a child of this process, which is let go on `absent` after every raise(SIGSTOP) in
// it.
inline bool through_stops(std::chrono::milliseconds absent, const std::function<bool()>& body) {
  const pid_t child = fork();
  if (child == 0) _exit(body() ? 0 : 1);
  int status = -1;
  while (child > 0 && waitpid(child, &status, WUNTRACED) == child && WIFSTOPPED(status)) {
    std::this_thread::sleep_for(absent);
    kill(child, SIGCONT);
  }
  return child > 0 && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

}  // namespace pplx::testing
