// Private state of an ExchangeGroup, shared by exchange_group.cc and exchange.cc.
#pragma once

#include "proxy/moe/exchange_group.h"

namespace pplx::moe {

struct ExchangeGroup::Peer {
  uint32_t nonce = 0;
  uint32_t shards = 1;  // immediates a message of this peer consists of
  std::string process;
  std::shared_ptr<RemoteRegion> regions, notice_region;
  std::vector<ImmCounter> arrivals;  // by lane
  ImmCounter heartbeats, notices;
  std::atomic<uint64_t> notices_read{0};
  std::atomic<bool> gone{false};  // closed the group in good order
  uint64_t signs = 0;             // of life, by the monitor alone
  Clock::time_point last_sign;
  std::atomic<uint64_t> sent_bytes{0}, received_bytes{0};
  std::atomic<int64_t> waited_ns{0};
};

struct ExchangeGroup::Lane {
  CompletionCounter local;  // local completions of what was posted from this lane's send buffer
  uint64_t posted = 0;
};

}  // namespace pplx::moe
