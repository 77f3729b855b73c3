// Transport within one process: "local" delivers by memcpy in order, "sim" in whatever order a seed chooses.
#pragma once

#include <memory>
#include <string>

#include "proxy/fabric/fabric.h"

namespace pplx {

std::unique_ptr<Fabric> make_sim(const EngineConfig& config);

// For tests: the engine with this address falls silent, as a killed process does. Its writes vanish; writes
// to it fail with kPeer.
void sim_drop_peer(const std::string& network, const Address& address);

// For tests: a NIC of the engine with this address breaks. Nothing goes in or out any more, what is under way
// is cut off where it is, and acknowledgements of what has landed may be lost. `tells`: its engine hears of
// it at once; otherwise it learns from operations that fail.
void sim_break_nic(const std::string& network, const Address& address, size_t nic, bool tells);

}  // namespace pplx
