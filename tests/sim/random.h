// A small random generator with arithmetic of its own: the standard's distributions differ between libraries.
#pragma once

#include <cstdint>
#include <vector>

namespace pplx::sim {

// SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t operator()() noexcept {
    uint64_t z = (state_ += 0x9E3779B97F4A7C15ULL);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
    return z ^ (z >> 31);
  }
  // In [0, n); 0 for n = 0.
  uint64_t below(uint64_t n) noexcept { return n == 0 ? 0 : (*this)() % n; }
  int64_t between(int64_t low, int64_t high) noexcept {
    return low + static_cast<int64_t>(below(static_cast<uint64_t>(high - low + 1)));
  }
  bool one_in(uint64_t n) noexcept { return below(n) == 0; }
  // Of any magnitude from 1 to `high`.
  int64_t any_magnitude(int64_t high) noexcept {
    uint64_t bits = 0;
    while (bits < 62 && (int64_t{1} << (bits + 1)) <= high) ++bits;
    const int64_t scale = int64_t{1} << below(bits + 1);
    return between(1, scale * 2 < high ? scale * 2 : high);
  }
  template <typename T>
  const T& pick(const std::vector<T>& from) noexcept {
    return from[below(from.size())];
  }
  template <typename T>
  void shuffle(std::vector<T>& values) noexcept {
    for (size_t i = values.size(); i > 1; --i) std::swap(values[i - 1], values[below(i)]);
  }
  // Another generator that does not depend on what is drawn from this one later.
  Random fork() noexcept { return Random((*this)()); }

  // As the standard's engines, for std::shuffle and the like.
  using result_type = uint64_t;
  static constexpr uint64_t min() { return 0; }
  static constexpr uint64_t max() { return UINT64_MAX; }

 private:
  uint64_t state_;
};

}  // namespace pplx::sim
