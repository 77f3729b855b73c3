// The border between engines and the simulated fabric: where a simulation counts what a rank does, takes its
// core away, and lets faults strike.
#pragma once

#include <cstdint>

namespace pplx::sim {

class Border {
 public:
  virtual ~Border() = default;
  // A fiber of `process` is about to post or to poll, or has just posted. It holds its engine's lock.
  virtual void step(uint32_t process) = 0;
};

// Of all fabrics made from now on; null: none.
void set_border(Border* border);

}  // namespace pplx::sim
