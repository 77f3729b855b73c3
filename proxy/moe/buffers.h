// Where a group's regions and send buffers lie: in host memory of its own, or where its owner puts them.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>

#include "proxy/engine/engine.h"

namespace pplx::moe {

struct GroupBuffers {
  std::shared_ptr<Region> regions;  // [lane][source] of region_bytes
  std::shared_ptr<Region> staging;  // [lane] of staging_bytes
  // False: a GPU's memory, which the CPU must not touch. Headers then travel by themselves as well.
  bool readable = true;
};

// Makes them with the group's engine, zeroed, of just these sizes. What it returns is unregistered when the
// group closes and used no more; whose memory it is decides when it is freed after that.
using PlaceBuffers =
    std::function<GroupBuffers(TransferEngine& engine, size_t region_bytes, size_t staging_bytes)>;

}  // namespace pplx::moe
