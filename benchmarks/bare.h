// The floor of the engine benchmark: the shortest loop over libfabric that does the same work, written out
// for one peer. It makes the very calls that the engine makes, with none of its bookkeeping.
#pragma once

#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_eq.h>
#include <rdma/fi_rma.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "proxy/fabric/libfabric_loader.h"

namespace pplx::bench {

inline void require(long rc, const char* what) {
  if (rc == 0) return;
  std::fprintf(stderr, "bare libfabric: %s failed: %ld\n", what, rc);
  std::exit(1);
}

class BareSide {
 public:
  BareSide(const std::string& fabric, std::byte* source, std::byte* target, size_t size)
      : lib_(load_libfabric()), source_(source), target_(target) {
    bool old_tcp = fabric == "tcp" && lib_.version() < FI_VERSION(1, 18);
    fi_info* hints = lib_.dupinfo(nullptr);
    hints->caps = FI_MSG | FI_RMA;
    hints->mode = FI_CONTEXT | FI_CONTEXT2;
    hints->ep_attr->type = FI_EP_RDM;
    hints->domain_attr->mr_mode = FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY | FI_MR_LOCAL;
    hints->domain_attr->threading = FI_THREAD_DOMAIN;
    hints->domain_attr->control_progress = FI_PROGRESS_MANUAL;
    hints->domain_attr->data_progress = FI_PROGRESS_MANUAL;
    hints->tx_attr->op_flags = FI_DELIVERY_COMPLETE;
    hints->fabric_attr->prov_name = strdup(old_tcp ? "net" : fabric.c_str());
    const char* node = fabric.find("tcp") != std::string::npos ? "127.0.0.1" : nullptr;
    require(lib_.getinfo(FI_VERSION(1, 17), node, nullptr, node != nullptr ? FI_SOURCE : 0, hints, &info_),
            "fi_getinfo");
    lib_.freeinfo(hints);
    require(lib_.fabric(info_->fabric_attr, &fabric_, nullptr), "fi_fabric");
    require(fi_domain(fabric_, info_, &domain_, nullptr), "fi_domain");
    fi_cq_attr cq{};
    cq.format = FI_CQ_FORMAT_DATA;
    cq.wait_obj = FI_WAIT_NONE;
    cq.size = info_->tx_attr->size + info_->rx_attr->size;
    require(fi_cq_open(domain_, &cq, &cq_, nullptr), "fi_cq_open");
    fi_av_attr av{};
    require(fi_av_open(domain_, &av, &av_, nullptr), "fi_av_open");
    require(fi_endpoint(domain_, info_, &endpoint_, nullptr), "fi_endpoint");
    require(fi_ep_bind(endpoint_, &cq_->fid, FI_TRANSMIT | FI_RECV), "fi_ep_bind");
    require(fi_ep_bind(endpoint_, &av_->fid, 0), "fi_ep_bind");
    require(fi_enable(endpoint_), "fi_enable");
    require(fi_mr_reg(domain_, source_, size, FI_WRITE, 0, 1, 0, &source_mr_, nullptr), "fi_mr_reg");
    require(fi_mr_reg(domain_, target_, size, FI_REMOTE_WRITE, 0, 2, 0, &target_mr_, nullptr), "fi_mr_reg");
    contexts_.resize(kContexts);
  }
  ~BareSide() {
    fi_close(&endpoint_->fid);
    fi_close(&source_mr_->fid);
    fi_close(&target_mr_->fid);
    fi_close(&cq_->fid);
    fi_close(&av_->fid);
    fi_close(&domain_->fid);
    fi_close(&fabric_->fid);
    lib_.freeinfo(info_);
  }

  std::vector<std::byte> descriptor() const {
    std::vector<std::byte> bytes(528);
    bool virtual_address = (info_->domain_attr->mr_mode & FI_MR_VIRT_ADDR) != 0;
    uint64_t base = virtual_address ? reinterpret_cast<uint64_t>(target_) : 0;
    uint64_t key = fi_mr_key(target_mr_);
    std::memcpy(bytes.data(), &base, 8);
    std::memcpy(bytes.data() + 8, &key, 8);
    size_t size = 512;
    require(fi_getname(&endpoint_->fid, bytes.data() + 16, &size), "fi_getname");
    return bytes;
  }
  void connect(const std::vector<std::byte>& peer) {
    std::memcpy(&remote_base_, peer.data(), 8);
    std::memcpy(&remote_key_, peer.data() + 8, 8);
    if (fi_av_insert(av_, peer.data() + 16, 1, &peer_, 0, nullptr) != 1) require(-1, "fi_av_insert");
  }
  void post(size_t length) {
    iovec source{source_, length};
    void* local = fi_mr_desc(source_mr_);
    fi_rma_iov target{remote_base_, length, remote_key_};
    fi_msg_rma message{&source, &local, 1, peer_, &target, 1, &contexts_[next_++ % kContexts], 7};
    constexpr uint64_t kFlags = FI_COMPLETION | FI_REMOTE_CQ_DATA | FI_DELIVERY_COMPLETE;
    for (;;) {
      ssize_t rc = fi_writemsg(endpoint_, &message, kFlags);
      if (rc == 0) return;
      if (rc != -FI_EAGAIN) require(rc, "fi_writemsg");
      poll();
    }
  }
  void poll() {
    fi_cq_data_entry entries[32];
    ssize_t count = fi_cq_read(cq_, entries, 32);
    if (count == -FI_EAGAIN) return;
    if (count < 0) require(count, "fi_cq_read");
    for (ssize_t i = 0; i < count; ++i) ++((entries[i].flags & FI_REMOTE_WRITE) != 0 ? received_ : sent_);
  }
  uint64_t sent() const { return sent_; }
  uint64_t received() const { return received_; }

 private:
  static constexpr size_t kContexts = 4096;  // more than are ever outstanding here
  const Libfabric& lib_;
  std::byte *source_, *target_;
  fi_info* info_ = nullptr;
  fid_fabric* fabric_ = nullptr;
  fid_domain* domain_ = nullptr;
  fid_cq* cq_ = nullptr;
  fid_av* av_ = nullptr;
  fid_ep* endpoint_ = nullptr;
  fid_mr* source_mr_ = nullptr;
  fid_mr* target_mr_ = nullptr;
  std::vector<fi_context2> contexts_;
  size_t next_ = 0;
  fi_addr_t peer_ = FI_ADDR_UNSPEC;
  uint64_t remote_base_ = 0, remote_key_ = 0;
  uint64_t sent_ = 0, received_ = 0;
};

}  // namespace pplx::bench
