// What libfabric's providers want, in one place.
#pragma once

#include <rdma/fabric.h>

#include <cstdint>
#include <string>
#include <vector>

namespace pplx {

struct ProviderTraits {
  std::string provider;  // fi_fabric_attr.prov_name
  std::string fabric;    // fi_fabric_attr.name; empty: whatever it is
  std::string label;     // in addresses: ends of different labels don't understand each other
  uint32_t api = FI_VERSION(1, 17);
  bool sockets = false;  // listens on an IP address
  // FI_DELIVERY_COMPLETE is asked for where it is offered. `delivered`: completions mean that without being
  // asked.
  bool ask_delivery = true, delivered = false;
  // FI_HMEM is asked for where it is offered; the provider must not call CUDA itself, which could wait for a
  // kernel that waits for this very NIC.
  bool hmem = false;
  bool mutual = false;  // see FabricCaps::mutual
  // Writes with immediates use up no receive, so that only the completion queue's length holds those that
  // come while nobody polls: as long as the device allows.
  bool unsolicited = false;
  bool rnr_retries = false;       // knows FI_OPT_EFA_RNR_RETRY
  bool own_message_size = false;  // messages are shorter than ep_attr->max_msg_size, which is that of writes
  bool always_immediate =
      false;  // shm: without remote data it copies straight into the peer and checks no key
};

// In order of preference. Throws kFabric, with what is needed and why, where this version of libfabric is too
// old.
std::vector<ProviderTraits> provider_traits(const std::string& fabric, uint32_t version);

}  // namespace pplx
