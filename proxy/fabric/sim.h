// Transport within one process: "local" delivers by memcpy in order, "sim" in whatever order a seed chooses.
#pragma once

#include <memory>
#include <string>

#include "proxy/fabric/fabric.h"

namespace pplx {

std::unique_ptr<Fabric> make_sim(const EngineConfig& config);

// What AWS EFA (efa-direct) does not promise, and what it asks for: no order, short queues, writes of a MiB
// at most, messages of one packet, writes only by those whom the target knows, and no way to tell what came
// of a lost NIC. With several endpoints a peer, which EngineConfig says. That immediates have 4 bytes, that
// no bytes are taken along when an operation is posted ("inject"), and that writes without bytes have a valid
// target too, is so on every fabric here.
SimConfig efa_limits(uint64_t seed);

// For tests: the engine with this address falls silent, as a killed process does. Its writes vanish; writes
// to it fail with kPeer.
void sim_drop_peer(const std::string& network, const Address& address);

// For tests: a NIC of the engine with this address breaks. Nothing goes in or out any more, what is under way
// is cut off where it is, and acknowledgements of what has landed may be lost. `tells`: its engine hears of
// it at once; otherwise it learns from operations that fail.
void sim_break_nic(const std::string& network, const Address& address, size_t nic, bool tells);

// For tests: the cable of that NIC is pulled. Nothing goes in or out, and nobody is told of anything.
void sim_unplug_nic(const std::string& network, const Address& address, size_t nic);

}  // namespace pplx
