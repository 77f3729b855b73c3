#include "proxy/fabric/libfabric_traits.h"

#include "proxy/error.h"

namespace pplx {
namespace {

std::string text_of(uint32_t version) {
  return std::to_string(FI_MAJOR(version)) + "." + std::to_string(FI_MINOR(version));
}

// SRD delivers in any order. Immediates need "unsolicited write receive": without it each would use up a
// posted receive, which this code does not post for them (FI_RX_CQ_DATA is never asked for). It came with
// libfabric 1.22 and rdma-core 52. efa-direct, from 2.1 on, leaves the provider's own protocol out: no
// copies, no inject, messages up to the MTU, and the target's address vector must have the initiator before
// it may write. Every RDMA write of an EFA device completes when it has been delivered.
std::vector<ProviderTraits> efa(const std::string& wanted, uint32_t version) {
  ProviderTraits base;
  base.provider = "efa";
  base.api = FI_VERSION(1, 22);
  base.hmem = true;
  base.mutual = true;
  base.unsolicited = true;
  base.rnr_retries = true;
  std::vector<ProviderTraits> found;
  if (version >= FI_VERSION(2, 1)) {
    ProviderTraits direct = base;
    direct.fabric = direct.label = "efa-direct";
    direct.ask_delivery = false;
    direct.delivered = true;
    direct.own_message_size = true;
    found.push_back(direct);
  }
  if (wanted == "efa" && version >= FI_VERSION(1, 22)) {
    ProviderTraits rdm = base;
    rdm.fabric = rdm.label = "efa";
    found.push_back(rdm);
  }
  if (found.empty()) {
    const bool direct = wanted == "efa-direct";
    throw Error(
        ErrorKind::kFabric,
        "libfabric " + text_of(version) + " is too old for " + wanted + ": " +
            (direct ? "it came with 2.1"
                    : "writes with immediates need 1.22 and rdma-core 52 (unsolicited write receive)") +
            ". Install AWS's EFA software (/opt/amazon/efa), or set PPLX_LIBFABRIC to a newer one");
  }
  return found;
}

}  // namespace

std::vector<ProviderTraits> provider_traits(const std::string& fabric, uint32_t version) {
  if (fabric == "efa" || fabric == "efa-direct") return efa(fabric, version);
  ProviderTraits traits;
  // 1.17 calls the native provider "net" and means tcp;ofi_rxm by "tcp".
  traits.provider = fabric == "tcp" && version < FI_VERSION(1, 18) ? "net" : fabric;
  traits.sockets = traits.provider.find("tcp") != std::string::npos ||
                   traits.provider.find("udp") != std::string::npos || traits.provider == "net" ||
                   traits.provider == "sockets";
  traits.always_immediate = traits.provider == "shm";
  return {traits};
}

}  // namespace pplx
