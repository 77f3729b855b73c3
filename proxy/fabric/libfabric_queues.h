// What libfabric's queues need besides calls of libfabric.
#pragma once

#include <rdma/fi_errno.h>
#include <sys/types.h>

#include <algorithm>
#include <vector>

#include "proxy/fabric/fabric.h"

namespace pplx {

// Receives that the provider did not take back. They are tried again: an endpoint that has none left is deaf.
class UnpostedReceives {
 public:
  bool empty() const { return ops_.empty(); }
  // `post`: of libfabric, 0 or a negative error. Both return an error that nobody has been told of yet, or 0;
  // a provider that is full for the moment (FI_EAGAIN) is none.
  template <typename Post>
  ssize_t post(FabricOp& op, Post&& post) {
    const ssize_t rc = post(op);
    if (rc == 0) return 0;
    ops_.push_back(&op);
    return news(rc);
  }
  template <typename Post>
  ssize_t retry(Post&& post) {
    for (; !ops_.empty(); ops_.pop_back()) {
      if (const ssize_t rc = post(*ops_.back()); rc != 0) return news(rc);
    }
    told_ = 0;
    return 0;
  }

 private:
  ssize_t news(ssize_t rc) {
    if (rc == -FI_EAGAIN || rc == told_) return 0;
    return told_ = rc;
  }

  std::vector<FabricOp*> ops_;
  ssize_t told_ = 0;
};

// Opens a queue of `wanted` entries, or else half as many, and so on down to `least`, which is tried last.
// `open` takes a size and returns 0 or an error; returned is the last one.
template <typename Open>
int open_longest(size_t wanted, size_t least, Open&& open) {
  for (size_t size = std::max(wanted, least);; size = std::max(size / 2, least)) {
    if (const int rc = open(size); rc == 0 || size == least) return rc;
  }
}

}  // namespace pplx
