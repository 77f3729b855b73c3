// The floor of the engine benchmark on fabric "verbs": one queue pair, one write with immediate a work
// request, every one signalled.
#pragma once

#include <array>
#include <cstring>

#include "benchmarks/bare.h"
#include "proxy/fabric/verbs_link.h"

namespace pplx::bench {

class BareVerbsSide {
 public:
  BareVerbsSide(const EngineConfig& config, std::byte* source, std::byte* target, size_t size)
      : device_(config),
        link_(device_, 0, 0),
        source_(device_.register_memory(source, size)),
        target_(device_.register_memory(target, size)) {
    link_.open(1);
    device_.replenish();
  }
  ~BareVerbsSide() { link_.close(); }
  BareVerbsSide(const BareVerbsSide&) = delete;
  BareVerbsSide& operator=(const BareVerbsSide&) = delete;

  std::vector<std::byte> descriptor() const {
    std::vector<std::byte> bytes(sizeof(Words));
    const Words words{target_.base, target_.key, link_.queue_pair(), link_.psn()};
    std::memcpy(bytes.data(), &words, sizeof words);
    const auto nic = encode(device_.address());
    bytes.insert(bytes.end(), nic.begin(), nic.end());
    return bytes;
  }
  void connect(const std::vector<std::byte>& peer) {
    Words words{};
    std::memcpy(&words, peer.data(), sizeof words);
    remote_ = words;
    link_.connect(decode_nic_address(std::span(peer).subspan(sizeof words)),
                  static_cast<uint32_t>(words.queue_pair), static_cast<uint32_t>(words.psn));
  }
  void post(size_t length) {
    ibv_sge piece{reinterpret_cast<uint64_t>(source_.data), static_cast<uint32_t>(length),
                  static_cast<const VerbsMemory*>(source_.local)->mr->lkey};
    ibv_send_wr request{};
    request.wr_id = WorkId{WorkId::Kind::kSend, 0, 0}.pack();
    request.sg_list = &piece;
    request.num_sge = 1;
    request.opcode = IBV_WR_RDMA_WRITE_WITH_IMM;
    request.send_flags = IBV_SEND_SIGNALED;
    if (length <= link_.inline_bytes()) request.send_flags |= IBV_SEND_INLINE;
    request.imm_data = 7;
    request.wr.rdma.remote_addr = remote_.base;
    request.wr.rdma.rkey = static_cast<uint32_t>(remote_.key);
    ibv_send_wr* bad = nullptr;
    require(ibv_post_send(link_.raw(), &request, &bad), "ibv_post_send");
  }
  void poll() {
    std::array<ibv_wc, 32> work;
    const int count = ibv_poll_cq(device_.cq(), static_cast<int>(work.size()), work.data());
    require(count < 0 ? count : 0, "ibv_poll_cq");
    for (int i = 0; i < count; ++i) {
      const ibv_wc& one = work[static_cast<size_t>(i)];
      require(one.status, "a work request");
      if (WorkId::unpack(one.wr_id).kind == WorkId::Kind::kSend) {
        ++sent_;
      } else {
        ++received_;
        device_.immediate_consumed();
      }
    }
    device_.replenish();
  }
  uint64_t sent() const { return sent_; }
  uint64_t received() const { return received_; }

 private:
  struct Words {
    uint64_t base, key, queue_pair, psn;
  };
  VerbsDevice device_;
  VerbsLink link_;
  FabricMemory source_, target_;
  Words remote_{};
  uint64_t sent_ = 0, received_ = 0;
};

}  // namespace pplx::bench
