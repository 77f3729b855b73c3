// What tokens lose where ranks of a group are absent: the experts that nobody else hosts.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <mutex>

namespace pplx::moe {

struct LossCounts {
  uint64_t routed = 0;  // tokens that had an expert
  uint64_t tokens = 0;  // of these: that lost one or more
  uint64_t whole = 0;   // of these: that lost all
  // Those that lost some, by the share of their router weight that was lost: below a quarter, a half, three
  // quarters, and from there on.
  std::array<uint64_t, 4> by_share{};
  double weight = 0;  // router weight lost, all tokens together
};

// A rank's, since it connected. Added to by exchanges, read by anybody.
class Losses {
 public:
  void add(const LossCounts& more) {
    const std::lock_guard guard(mutex_);
    counts_.routed += more.routed;
    counts_.tokens += more.tokens;
    counts_.whole += more.whole;
    for (size_t i = 0; i < more.by_share.size(); ++i) counts_.by_share[i] += more.by_share[i];
    counts_.weight += more.weight;
  }
  LossCounts counts() const {
    const std::lock_guard guard(mutex_);
    return counts_;
  }

 private:
  mutable std::mutex mutex_;
  LossCounts counts_;
};

}  // namespace pplx::moe
