// Reliable-datagram endpoints of any libfabric provider with RMA: tcp, shm, efa, ...
#pragma once

#include <memory>

#include "proxy/fabric/fabric.h"

namespace pplx {

std::unique_ptr<Fabric> make_libfabric(const EngineConfig& config);

}  // namespace pplx
