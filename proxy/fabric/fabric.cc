#include "proxy/fabric/fabric.h"

#include "proxy/fabric/libfabric.h"
#include "proxy/fabric/signal_guard.h"
#include "proxy/fabric/sim.h"
#include "proxy/fabric/verbs.h"

namespace pplx {

std::unique_ptr<Fabric> make_fabric(const EngineConfig& config) {
  if (config.fabric.empty()) throw Error(ErrorKind::kInvalidArgument, "EngineConfig.fabric is empty");
  if (config.endpoints < 1 || config.endpoints > 64) {
    throw Error(ErrorKind::kInvalidArgument,
                "EngineConfig.endpoints is " + std::to_string(config.endpoints) + ", not in 1..64");
  }
  if (config.fabric == "local" || config.fabric == "sim") return make_sim(config);
  if (config.fabric == "verbs") return make_verbs(config);
  const ForkedSignals forks;
  const SignalGuard guard{SIGINT};  // shm's other handlers remove its files and pass the signal on
  return make_libfabric(config);
}

}  // namespace pplx
