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

}  // namespace pplx
