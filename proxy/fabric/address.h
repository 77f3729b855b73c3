// What the opaque bytes of an Address hold.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace pplx {

inline constexpr size_t kMaxNics = 8;

using EngineId = std::array<std::byte, 16>;

struct PeerAddress {
  std::string fabric;    // "sim", "libfabric", ...: which implementation reads `endpoints`
  std::string provider;  // the provider for libfabric, the network for sim
  EngineId engine{};     // random: no two engines are ever the same, restarted ones included
  uint32_t pid = 0;
  uint64_t pid_namespace = 0;  // pids compare only within one; 0: unknown
  std::string host;
  uint64_t job = 0;  // job_hash of EngineConfig.job
  using Endpoints = std::vector<std::vector<std::byte>>;
  Endpoints endpoints;             // of the first NIC, or of the only one that this is about
  std::vector<Endpoints> further;  // of an engine's other NICs

  size_t nics() const { return 1 + further.size(); }
  // The same peer as it is reached by its NIC `index` alone.
  PeerAddress nic(size_t index) const;

  // For messages to people: "host:pid (engine 1a2b3c4d)".
  std::string label() const;
};

PeerAddress make_address(std::string fabric, std::string provider);  // of this process, without endpoints
uint64_t job_hash(const std::string& token);                         // 0: no token
// Throws kPeer, naming both, where they are of different jobs.
void check_job(const PeerAddress& ours, const PeerAddress& theirs);
std::vector<std::byte> encode(const PeerAddress& address);
PeerAddress decode_address(std::span<const std::byte> bytes);  // throws kInvalidArgument

struct DescriptorFields {
  std::vector<std::byte> address;
  uint64_t base = 0;  // what writes add their offset to; a virtual address or 0, as the provider wants it
  uint64_t length = 0;
  std::vector<uint64_t> keys;  // one a NIC of the owner
};

std::vector<std::byte> encode(const DescriptorFields& descriptor);
DescriptorFields decode_descriptor(std::span<const std::byte> bytes);  // throws kInvalidArgument

}  // namespace pplx
