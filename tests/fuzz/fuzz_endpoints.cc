// What ranks publish at bootstrap: a group connects, or says what is wrong with it.
#include "tests/fuzz/fuzz.h"
#include "xla_ffi/tests/rogue.h"

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  ::setenv("PPLX_LOG_LEVEL", "off", 1);
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace pplx;
  using namespace pplx::moe::testing;
  static const Problem problem{.ranks = 2, .experts = 4, .top_k = 2, .hidden = 4, .max_tokens = 2};
  static moe::Member peer(problem.shape(1), group_config(problem, 1, local()));
  static const Bytes sound = peer.group.endpoint();
  fuzz::Input input(data, size);
  const uint8_t mode = input.byte();
  Bytes theirs(sound.begin(), sound.end() - sizeof(uint64_t));
  if ((mode & 1) != 0) {
    const auto rest = input.rest();
    theirs.assign(rest.begin(), rest.end());
  } else {
    input.damage(theirs);
  }
  if ((mode & 2) == 0) theirs = fuzz::with_checksum(theirs);
  moe::GroupConfig config = group_config(problem, 0, local());
  moe::Member member(problem.shape(0), config);
  try {
    member.group.connect({member.group.endpoint(), theirs});
  } catch (const Error&) {
  }
  member.group.close();
  return 0;
}
