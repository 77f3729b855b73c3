// Set-up: which provider and NIC, and a domain with its queues and endpoints.
#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "proxy/fabric/libfabric_fabric.h"
#include "proxy/log.h"

namespace pplx {
namespace {

// Newer than the headers that this is built with.
constexpr int kOptCudaApiPermitted = 10;         // FI_OPT_CUDA_API_PERMITTED, 1.18
constexpr int kOptMaxMsgSize = 12;               // FI_OPT_MAX_MSG_SIZE, 2.0
constexpr int kOptEfaRnrRetry = -(0xefa << 16);  // FI_OPT_EFA_RNR_RETRY
constexpr size_t kRnrForEver = 7;                // of its values

constexpr size_t kLongestQueue = 65536, kShortestQueue = 1024;  // completions, where they come unsolicited

// Versions up to 1.x give up after three times that a target had no receive ready, which a target that is
// stopped for a while looks like. Who does not know the option has no such limit.
void retry_for_ever(fid_ep* endpoint) {
  size_t retries = kRnrForEver;
  const int rc = fi_setopt(&endpoint->fid, FI_OPT_ENDPOINT, kOptEfaRnrRetry, &retries, sizeof retries);
  if (rc != 0) log(LogLevel::kDebug, "libfabric: FI_OPT_EFA_RNR_RETRY was refused: ", rc);
}

}  // namespace

LibfabricInfo LibfabricFabric::make_hints(const ProviderTraits& traits, uint64_t completion,
                                          bool hmem) const {
  LibfabricInfo hints(lib_.dupinfo(nullptr), LibfabricInfoDeleter{&lib_});
  if (!hints) throw Error(ErrorKind::kFabric, "libfabric: out of memory");
  hints->caps = FI_MSG | FI_RMA;
  hints->mode = FI_CONTEXT | FI_CONTEXT2;
  hints->ep_attr->type = FI_EP_RDM;
  hints->domain_attr->mr_mode = FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY | FI_MR_LOCAL;
  if (hmem) {
    hints->caps |= FI_HMEM;
    hints->domain_attr->mr_mode |= FI_MR_HMEM;
  }
  hints->domain_attr->threading = FI_THREAD_DOMAIN;
  hints->domain_attr->control_progress = FI_PROGRESS_MANUAL;
  hints->domain_attr->data_progress = FI_PROGRESS_MANUAL;
  hints->domain_attr->resource_mgmt = FI_RM_ENABLED;
  hints->domain_attr->cq_data_size = 4;
  hints->tx_attr->op_flags = completion;
  hints->tx_attr->msg_order = FI_ORDER_NONE;
  hints->rx_attr->msg_order = FI_ORDER_NONE;
  hints->fabric_attr->prov_name = strdup(traits.provider.c_str());  // freeinfo frees these
  if (!traits.fabric.empty()) hints->fabric_attr->name = strdup(traits.fabric.c_str());
  return hints;
}

// What the configuration asks for, in the first way that is offered.
LibfabricInfo LibfabricFabric::find_provider(const EngineConfig& config) {
  int rc = 0;
  std::string node, tried;
  for (const ProviderTraits& traits : provider_traits(config.fabric, lib_.version())) {
    if (traits.sockets) node = config.bind_address.empty() ? "127.0.0.1" : config.bind_address;
    tried += (tried.empty() ? "'" : " or '") + (traits.label.empty() ? traits.provider : traits.label) + "'";
    for (bool hmem : {true, false}) {
      if (hmem && !traits.hmem) continue;
      for (uint64_t completion : {uint64_t{FI_DELIVERY_COMPLETE}, uint64_t{0}}) {
        if (completion != 0 && !traits.ask_delivery) continue;
        LibfabricInfo hints = make_hints(traits, completion, hmem);
        fi_info* found = nullptr;
        rc = lib_.getinfo(traits.api, node.empty() ? nullptr : node.c_str(), nullptr,
                          node.empty() ? 0 : FI_SOURCE, hints.get(), &found);
        if (rc != 0 || found == nullptr) continue;
        traits_ = traits;
        hmem_ = hmem;
        return choose_nic(LibfabricInfo(found, LibfabricInfoDeleter{&lib_}), config.nic, node);
      }
    }
  }
  throw Error(ErrorKind::kFabric, "libfabric " + std::to_string(lib_.major()) + "." +
                                      std::to_string(lib_.minor()) + " (" + lib_.path +
                                      ") offers no provider " + tried +
                                      " with reliable datagrams, RMA and 4-byte immediates" +
                                      (node.empty() ? "" : " on address " + node) + ": " + error_text(rc));
}

LibfabricInfo LibfabricFabric::choose_nic(LibfabricInfo all, const std::string& nic,
                                          const std::string& node) const {
  if (nic.empty() || traits_.provider == "shm") return all;
  std::string names;
  for (const fi_info* info = all.get(); info != nullptr; info = info->next) {
    // An RDMA device's domains are called after it: "rdmap0s6-rdm" and "rdmap0s6-dgrm" are EFA's.
    const std::string name = info->domain_attr->name;
    if (name == nic || name.starts_with(nic + "-"))
      return LibfabricInfo(lib_.dupinfo(info), LibfabricInfoDeleter{&lib_});
    if (!names.empty()) names += ", ";
    names += info->domain_attr->name;
  }
  throw Error(ErrorKind::kFabric, "the libfabric provider " + traits_.provider + " has no NIC '" + nic +
                                      "' (PPLX_NICS)" + (node.empty() ? "" : " with address " + node) +
                                      "; it has " + names);
}

void LibfabricFabric::forbid_cuda(fid_ep* endpoint) const {
  bool permitted = false;
  int rc = fi_setopt(&endpoint->fid, FI_OPT_ENDPOINT, kOptCudaApiPermitted, &permitted, sizeof permitted);
  if (rc == 0) return;
  // It would call CUDA then where it has to copy, and a kernel that waits for this NIC would wait for ever.
  throw Error(ErrorKind::kFabric, "libfabric provider " + provider_ +
                                      " cannot do without CUDA calls (FI_OPT_CUDA_API_PERMITTED): " +
                                      error_text(rc) + "; GPUDirect RDMA is needed");
}

// `outstanding`: of our own operations and receives.
void LibfabricFabric::open_completion_queue(size_t outstanding) {
  fi_cq_attr cq{};
  cq.format = FI_CQ_FORMAT_DATA;
  cq.wait_obj = FI_WAIT_NONE;
  const size_t wanted = traits_.unsolicited ? std::max(outstanding, kLongestQueue) : outstanding;
  const size_t least = traits_.unsolicited ? std::min(outstanding, kShortestQueue) : outstanding;
  const int rc = open_longest(wanted, least, [&](size_t size) {
    cq.size = size;
    return fi_cq_open(open_.domain, &cq, &open_.cq, nullptr);
  });
  check(rc, "opening the completion queue");
  if (cq.size >= outstanding) return;
  log(LogLevel::kWarn, "libfabric ", provider_, ": a completion queue of ", cq.size, " for ", outstanding,
      " operations is the longest that it opens: use fewer endpoints");
}

void LibfabricFabric::open_endpoints(int count) {
  check(lib_.fabric(info_->fabric_attr, &open_.fabric, nullptr), "opening the fabric");
  check(fi_domain(open_.fabric, info_.get(), &open_.domain, nullptr), "opening the domain");
  open_completion_queue(static_cast<size_t>(count) * (info_->tx_attr->size + info_->rx_attr->size));
  fi_av_attr av{};
  av.type = info_->domain_attr->av_type;
  check(fi_av_open(open_.domain, &av, &open_.av, nullptr), "opening the address vector");
  address_ = make_address("libfabric", provider_);
  if (provider_ == "shm") {
    ShmGraveyard::get().opened();
    in_graveyard_ = true;
  }
  for (int i = 0; i < count; ++i) {
    fid_ep* endpoint = nullptr;
    check(fi_endpoint(open_.domain, info_.get(), &endpoint, nullptr), "opening an endpoint");
    open_.endpoints.push_back(endpoint);
    if (hmem_) forbid_cuda(endpoint);
    if (traits_.rnr_retries) retry_for_ever(endpoint);
    check(fi_ep_bind(endpoint, &open_.cq->fid, FI_TRANSMIT | FI_RECV), "binding the completion queue");
    check(fi_ep_bind(endpoint, &open_.av->fid, 0), "binding the address vector");
    check(fi_enable(endpoint), "enabling an endpoint");
    address_.endpoints.push_back(endpoint_name(endpoint));
  }
  caps_.max_write = info_->ep_attr->max_msg_size;
  caps_.max_message = std::min(kMessageBytes, info_->ep_attr->max_msg_size);
  if (traits_.own_message_size) {
    size_t longest = 0, size = sizeof longest;
    check(fi_getopt(&open_.endpoints[0]->fid, FI_OPT_ENDPOINT, kOptMaxMsgSize, &longest, &size),
          "asking for the longest message");
    caps_.max_message = std::min(caps_.max_message, longest);
  }
  caps_.queue_depth = static_cast<size_t>(count) * info_->tx_attr->size;
  caps_.rails = static_cast<uint32_t>(count);
  completion_ = traits_.ask_delivery ? info_->tx_attr->op_flags & FI_DELIVERY_COMPLETE : 0;
  caps_.delivery_complete = completion_ != 0 || traits_.delivered;
  caps_.mutual = traits_.mutual;
  caps_.device_memory = hmem_;
}

std::vector<std::byte> LibfabricFabric::endpoint_name(fid_ep* endpoint) const {
  std::vector<std::byte> name(512);
  size_t size = name.size();
  check(fi_getname(&endpoint->fid, name.data(), &size), "reading an endpoint's name");
  name.resize(size);
  return name;
}

void LibfabricFabric::check(int rc, const char* what) const {
  if (rc == 0) return;
  throw Error(ErrorKind::kFabric,
              std::string("libfabric provider ") + provider_ + ": " + what + ": " + error_text(rc));
}

}  // namespace pplx
