#include "proxy/topology/placement.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <tuple>

namespace pplx {
namespace {

// Bridges between two devices: tells apart what has the same Distance.
size_t bridges_between(const PciDevice& a, const PciDevice& b) {
  const auto [left, right] =
      std::mismatch(a.bridges.begin(), a.bridges.end(), b.bridges.begin(), b.bridges.end());
  return static_cast<size_t>((a.bridges.end() - left) + (b.bridges.end() - right));
}

// "Behind the same switch, or switches" is one class: what counts is that data does not cross the processor.
int rank_of(Distance distance) {
  return std::max(static_cast<int>(Distance::kSwitches), static_cast<int>(distance));
}

class NicSharing {
 public:
  explicit NicSharing(const Topology& topology)
      : topology_(topology), candidates_(topology.gpus.size()), users_(topology.nics.size()) {
    for (size_t gpu = 0; gpu < topology.gpus.size(); ++gpu) candidates_[gpu] = nearest(gpu);
  }

  std::vector<std::vector<size_t>> solve() {
    std::vector<std::vector<size_t>> chosen(candidates_.size());
    for (const auto& group : groups()) share(group, chosen);
    return chosen;
  }

 private:
  std::vector<size_t> nearest(size_t gpu) const {
    const PciDevice& device = topology_.gpus[gpu];
    auto near = [&](size_t nic) { return rank_of(distance(device, topology_.nics[nic])); };
    std::vector<size_t> nics(topology_.nics.size());
    std::iota(nics.begin(), nics.end(), size_t{0});
    int best = std::numeric_limits<int>::max();
    for (size_t nic : nics) best = std::min(best, near(nic));
    std::erase_if(nics, [&](size_t nic) { return near(nic) != best; });
    std::stable_sort(nics.begin(), nics.end(), [&](size_t a, size_t b) {
      return bridges_between(device, topology_.nics[a]) < bridges_between(device, topology_.nics[b]);
    });
    return nics;
  }

  // GPUs that have a candidate in common, directly or through others, have to agree.
  std::vector<std::vector<size_t>> groups() const {
    std::vector<size_t> group(candidates_.size());
    std::iota(group.begin(), group.end(), size_t{0});
    for (size_t a = 0; a < group.size(); ++a) {
      for (size_t b = 0; b < a; ++b) {
        const bool meet = std::any_of(candidates_[a].begin(), candidates_[a].end(), [&](size_t nic) {
          return std::find(candidates_[b].begin(), candidates_[b].end(), nic) != candidates_[b].end();
        });
        if (!meet || group[a] == group[b]) continue;
        const size_t from = group[a], to = group[b];
        std::replace(group.begin(), group.end(), from, to);
      }
    }
    std::vector<std::vector<size_t>> members(group.size());
    for (size_t gpu = 0; gpu < group.size(); ++gpu) members[group[gpu]].push_back(gpu);
    std::erase_if(members, [](const auto& one) { return one.empty(); });
    return members;
  }

  // A NIC for each GPU, round by round, as long as every GPU gets one. What is left over stays unused: an
  // exchange is as fast as its slowest rank.
  void share(const std::vector<size_t>& gpus, std::vector<std::vector<size_t>>& chosen) {
    for (bool first = true;; first = false) {
      std::vector<std::tuple<size_t, size_t>> round;
      for (size_t gpu : gpus) {
        const auto nic = least_used(gpu, chosen[gpu]);
        if (!nic || (!first && users_[*nic] > 0)) break;
        ++users_[*nic];
        round.emplace_back(gpu, *nic);
      }
      if (round.size() < gpus.size()) {
        for (auto [gpu, nic] : round) --users_[nic];
        return;
      }
      for (auto [gpu, nic] : round) chosen[gpu].push_back(nic);
    }
  }

  std::optional<size_t> least_used(size_t gpu, const std::vector<size_t>& own) const {
    std::optional<size_t> best;
    for (size_t nic : candidates_[gpu]) {
      if (std::find(own.begin(), own.end(), nic) != own.end()) continue;
      if (!best || users_[nic] < users_[*best]) best = nic;
    }
    return best;
  }

  const Topology& topology_;
  std::vector<std::vector<size_t>> candidates_;  // by GPU, nearest first
  std::vector<size_t> users_;                    // by NIC
};

// The first hardware thread of each core among these.
std::vector<int> cores_among(const Topology& topology, const std::vector<int>& cpus) {
  std::vector<int> cores;
  for (const Core& core : topology.cores) {
    if (core.cpus.empty()) continue;
    if (std::binary_search(cpus.begin(), cpus.end(), core.cpus.front())) cores.push_back(core.cpus.front());
  }
  std::sort(cores.begin(), cores.end());
  return cores;
}

std::vector<int> share_of_cores(const Topology& topology, size_t gpu) {
  const auto& cpus = topology.gpus[gpu].cpus;
  size_t before = 0, all = 0;
  for (size_t other = 0; other < topology.gpus.size(); ++other) {
    if (topology.gpus[other].cpus != cpus) continue;
    before += other < gpu ? 1 : 0;
    ++all;
  }
  const auto cores = cores_among(topology, cpus);
  if (cores.size() < all) return cores;  // too few to share out
  return {cores.begin() + static_cast<ptrdiff_t>(cores.size() * before / all),
          cores.begin() + static_cast<ptrdiff_t>(cores.size() * (before + 1) / all)};
}

}  // namespace

std::vector<Placement> place_gpus(const Topology& topology) {
  auto nics = NicSharing(topology).solve();
  std::vector<size_t> users(topology.nics.size());
  for (const auto& chosen : nics) {
    for (size_t nic : chosen) ++users[nic];
  }
  std::vector<Placement> placements(topology.gpus.size());
  for (size_t gpu = 0; gpu < placements.size(); ++gpu) {
    Placement& placement = placements[gpu];
    placement.nics = std::move(nics[gpu]);
    placement.cores = share_of_cores(topology, gpu);
    if (!placement.nics.empty()) placement.distance = Distance::kSwitch;
    for (size_t nic : placement.nics) {
      placement.distance = std::max(placement.distance, distance(topology.gpus[gpu], topology.nics[nic]));
      placement.shared = placement.shared || users[nic] > 1;
    }
  }
  return placements;
}

std::vector<int> cores_near(const Topology& topology, std::string_view device) {
  if (device.empty()) return {};
  for (size_t gpu = 0; gpu < topology.gpus.size(); ++gpu) {
    if (topology.gpus[gpu].bus_id == device) return share_of_cores(topology, gpu);
  }
  for (const PciDevice& nic : topology.nics) {
    if (nic.bus_id == device || nic.name == device || nic.interface == device) {
      return cores_among(topology, nic.cpus);
    }
  }
  return {};
}

}  // namespace pplx
