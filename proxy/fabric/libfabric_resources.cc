#include "proxy/fabric/libfabric_resources.h"

#include <utility>

namespace pplx {

LibfabricResources& LibfabricResources::operator=(LibfabricResources&& other) noexcept {
  fabric = std::exchange(other.fabric, nullptr);
  domain = std::exchange(other.domain, nullptr);
  cq = std::exchange(other.cq, nullptr);
  av = std::exchange(other.av, nullptr);
  endpoints = std::exchange(other.endpoints, {});
  memory = std::exchange(other.memory, {});
  return *this;
}

LibfabricResources::~LibfabricResources() {
  for (auto*& endpoint : endpoints) close_fid(endpoint);
  for (auto*& mr : memory) close_fid(mr);
  close_fid(cq);
  close_fid(av);
  close_fid(domain);
  close_fid(fabric);
}

ShmGraveyard& ShmGraveyard::get() {
  static auto* graveyard = new ShmGraveyard;  // leaked: engines may close during exit
  return *graveyard;
}

void ShmGraveyard::opened() {
  std::lock_guard lock(mutex_);
  ++open_;
}

void ShmGraveyard::bury(const EngineId& engine, LibfabricResources resources) {
  for (auto*& mr : resources.memory) close_fid(mr);
  resources.memory.clear();
  std::vector<LibfabricResources> last;
  std::lock_guard lock(mutex_);
  buried_.push_back(std::move(resources));
  engines_.insert(engine);
  if (--open_ > 0) return;
  last.swap(buried_);
  engines_.clear();
}

bool ShmGraveyard::holds(const EngineId& engine) {
  std::lock_guard lock(mutex_);
  return engines_.contains(engine);
}

}  // namespace pplx
