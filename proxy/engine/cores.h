// Which core a worker thread has for itself.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <vector>

namespace pplx {

// A core that no other engine of this machine (of this network namespace, to be exact) pins its worker to,
// until the claim goes or the process ends. Cores are taken from the top of the process' affinity mask, at
// most a quarter of them, and only if it has eight or more: with fewer, the workers would be in the way of
// what they serve. Of those near what the worker serves, where they are known (proxy/topology), a quarter is
// tried first.
class CoreClaim {
 public:
  static std::optional<CoreClaim> take(std::span<const int> near = {});
  // The first of these that is free.
  static std::optional<CoreClaim> take_one_of(std::span<const int> cores);
  ~CoreClaim();
  CoreClaim(CoreClaim&& other) noexcept;
  CoreClaim& operator=(CoreClaim&& other) noexcept;
  CoreClaim(const CoreClaim&) = delete;
  CoreClaim& operator=(const CoreClaim&) = delete;
  int core() const noexcept { return core_; }

 private:
  CoreClaim(int core, int socket) : core_(core), socket_(socket) {}
  int core_;
  int socket_;
};

// The cores that `take` should try first for a worker that serves a device of this machine: a GPU by PCI bus
// id, or a NIC by name. PPLX_CORES overrides that ("8-15,40"). Empty where nothing is known: a missing hwloc
// is logged once.
std::vector<int> cores_for(const std::string& device);

// Pins the calling thread. False if the system refuses.
bool pin_to_core(int core) noexcept;

}  // namespace pplx
