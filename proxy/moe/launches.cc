#include "proxy/moe/launches.h"

namespace pplx::moe {

bool Launches::agree(uint64_t exchange, int64_t run) {
  const std::lock_guard guard(mutex_);
  Entry& entry = entries_[exchange % entries_.size()];
  if (entry.exchange != exchange) entry = {.exchange = exchange, .run = run};
  return entry.run == run;
}

}  // namespace pplx::moe
