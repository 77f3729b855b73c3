// libibverbs: reliable connected queue pairs over RoCE and InfiniBand. docs/protocol.md, "Verbs", has what is
// relied on.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "proxy/fabric/fabric.h"

namespace pplx {

std::unique_ptr<Fabric> make_verbs(const EngineConfig& config);

// Of every port that engines could use, "mlx5_0:1"; throws kFabric saying why there is none.
std::vector<std::string> verbs_ports();

}  // namespace pplx
