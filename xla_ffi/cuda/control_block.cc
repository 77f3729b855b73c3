#include "xla_ffi/cuda/control_block.h"

#include <algorithm>
#include <map>
#include <utility>

#include "proxy/error.h"
#include "xla_ffi/cuda/device.h"

namespace pplx::moe::cuda {

uint32_t Sites::index(Kind kind, uint64_t tag, std::string_view name) {
  const std::lock_guard guard(mutex_);
  const auto at = std::find_if(sites_.begin(), sites_.end(), [&](const Site& site) {
    return site.kind == kind && site.tag == tag && site.name == name;
  });
  if (at != sites_.end()) return static_cast<uint32_t>(at - sites_.begin());
  if (sites_.size() == kMaxSites) {
    throw Error(ErrorKind::kInvalidArgument,
                "more than " + std::to_string(kMaxSites) +
                    " different call sites ran on one group, the last '" + std::string(name) +
                    "': give calls of equal shape one name=, or make several groups");
  }
  sites_.push_back({.kind = kind, .tag = tag, .name = std::string(name)});
  if (book_) book_->add(sites_.back());
  return static_cast<uint32_t>(sites_.size() - 1);
}

const Site* Sites::at(uint32_t index) const {
  const std::lock_guard guard(mutex_);
  return index < sites_.size() ? &sites_[index] : nullptr;
}

std::optional<Site> Sites::find(Kind kind, uint64_t tag) const {
  const std::lock_guard guard(mutex_);
  for (const Site& site : sites_) {
    if (site.kind == kind && site.tag == tag) return site;
  }
  return std::nullopt;
}

OwnedFd Sites::share() {
  const std::lock_guard guard(mutex_);
  if (!book_) {
    book_.emplace(kMaxSites);
    for (const Site& site : sites_) book_->add(site);
  }
  return book_->share();
}

void ControlBlock::write(const Control& values) const {
  const OnDevice current(device);
  const Stream stream(device);
  check(cudaMemcpyAsync(control, &values, sizeof(values), cudaMemcpyHostToDevice, stream.get()),
        "writing a group's control block");
  stream.wait("writing a group's control block");
}

void ControlBlock::shut() const {
  const OnDevice current(device);
  const Stream stream(device);
  check(cudaMemsetAsync(&control->open, 0, sizeof(control->open), stream.get()), "closing a control block");
  stream.wait("closing a control block");
}

uint64_t ControlBlock::next() const {
  const OnDevice current(device);
  const Stream stream(device);
  uint64_t number = 0;
  check(cudaMemcpyAsync(&number, &control->next, sizeof(number), cudaMemcpyDeviceToHost, stream.get()),
        "reading a control block");
  stream.wait("reading a control block");
  return number;
}

ControlBlock& control_block(int64_t group, int device) {
  // Leaked, as compiled programs may run until the process ends.
  static auto* mutex = new std::mutex;
  static auto* blocks = new std::map<std::pair<int64_t, int>, ControlBlock>;
  const std::lock_guard guard(*mutex);
  ControlBlock& block = (*blocks)[{group, device}];
  if (block.control != nullptr) return block;
  const OnDevice current(device);
  void* memory = nullptr;
  check(cudaMalloc(&memory, ControlBlock::kBytes + kGpuPage), "allocating a group's control block");
  block.device = device;
  const auto skipped = static_cast<size_t>(-reinterpret_cast<uintptr_t>(memory) % kGpuPage);
  block.control = reinterpret_cast<Control*>(static_cast<std::byte*>(memory) + skipped);
  block.write(Control{});
  return block;
}

}  // namespace pplx::moe::cuda
