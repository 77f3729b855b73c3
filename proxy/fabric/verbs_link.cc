#include "proxy/fabric/verbs_link.h"

#include <arpa/inet.h>

#include <algorithm>
#include <random>

#include "proxy/log.h"

namespace pplx {
namespace {

constexpr uint8_t kReceiverNotReadyTimer = 12;   // 0.64 ms until a sender without a receive tries again
constexpr uint8_t kReceiverNotReadyRetries = 7;  // for ever: a slow receiver is no failure

// The target, or its NIC, answered and said no, and has dropped whatever came after.
bool is_refusal(ibv_wc_status status) {
  switch (status) {
    case IBV_WC_REM_ACCESS_ERR:
    case IBV_WC_REM_INV_REQ_ERR:
    case IBV_WC_REM_OP_ERR:
    case IBV_WC_LOC_LEN_ERR:
    case IBV_WC_LOC_QP_OP_ERR:
    case IBV_WC_LOC_PROT_ERR:
    case IBV_WC_LOC_ACCESS_ERR:
    case IBV_WC_MW_BIND_ERR:
      return true;
    default:
      return false;
  }
}

uint32_t random_psn() {
  static thread_local std::mt19937 rng{std::random_device{}()};
  return rng() & 0xFF'FFFF;
}

}  // namespace

std::string to_text(const Verbs& lib, ibv_wc_status status) {
  return std::string(lib.wc_status_str(status)) + " (" + std::to_string(status) + ")";
}

void VerbsLink::open(uint32_t queue_pair_number) {
  auto made = device_.make_queue_pair(number == kMessageLink);
  ibv_qp_attr attributes{};
  attributes.qp_state = IBV_QPS_INIT;
  attributes.port_num = device_.port();
  attributes.qp_access_flags = number == kMessageLink ? 0 : IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ;
  int rc = device_.lib().modify_qp(made.qp.get(), &attributes,
                                   IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS);
  if (rc != 0) throw Error(ErrorKind::kFabric, device_.error_text("readying a queue pair", rc));
  qp_ = std::move(made.qp);
  inline_bytes_ = made.inline_bytes;
  queue_number_ = queue_pair_number;
  psn_ = random_psn();
  immediates_ = 0;
  broken_ = false;
  first_error_.reset();
  post_error_.reset();
}

void VerbsLink::connect(const NicAddress& nic, uint32_t remote_qp, uint32_t remote_psn) {
  const VerbsConfig& config = device_.config();
  ibv_qp_attr attributes{};
  attributes.qp_state = IBV_QPS_RTR;
  attributes.path_mtu = static_cast<ibv_mtu>(std::min(nic.mtu, device_.address().mtu));
  attributes.dest_qp_num = remote_qp;
  attributes.rq_psn = remote_psn;
  attributes.max_dest_rd_atomic = device_.max_reads();
  attributes.min_rnr_timer = kReceiverNotReadyTimer;
  attributes.ah_attr = device_.path_to(nic);
  int rc = device_.lib().modify_qp(qp_.get(), &attributes,
                                   IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN |
                                       IBV_QP_RQ_PSN | IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER);
  if (rc == 0) {
    attributes = {};
    attributes.qp_state = IBV_QPS_RTS;
    attributes.timeout = static_cast<uint8_t>(config.ack_timeout);
    attributes.retry_cnt = static_cast<uint8_t>(config.retries);
    attributes.rnr_retry = kReceiverNotReadyRetries;
    attributes.sq_psn = psn_;
    attributes.max_rd_atomic = device_.max_reads();
    rc = device_.lib().modify_qp(qp_.get(), &attributes,
                                 IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY |
                                     IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC);
  }
  if (rc != 0) {
    throw Error(ErrorKind::kPeer,
                device_.error_text(("connecting a queue pair with " + to_text(nic.gid)).c_str(), rc));
  }
}

void VerbsLink::break_off() {
  if (!qp_ || broken_) return;
  broken_ = true;
  flush();  // so that everything in the queue has been posted, and comes back
  ibv_qp_attr attributes{};
  attributes.qp_state = IBV_QPS_ERR;
  if (int rc = device_.lib().modify_qp(qp_.get(), &attributes, IBV_QP_STATE); rc != 0) {
    log(LogLevel::kWarn, device_.error_text("stopping a queue pair", rc));
  }
}

void VerbsLink::close() {
  qp_.reset();
  broken_ = false;
  chained_ = 0;
}

bool VerbsLink::add(FabricOp& op) {
  ibv_send_wr& request = chain_[chained_];
  ibv_sge& piece = pieces_[chained_];
  request = {};
  if (op.length > 0) {
    const auto& memory = *static_cast<const VerbsMemory*>(op.local);
    piece = {reinterpret_cast<uint64_t>(op.source), static_cast<uint32_t>(op.length), memory.mr->lkey};
    request.sg_list = &piece;
    request.num_sge = 1;
    if (memory.host && op.length <= inline_bytes_ && op.kind == FabricOp::Kind::kWrite) {
      request.send_flags = IBV_SEND_INLINE;
    }
  }
  switch (op.kind) {
    case FabricOp::Kind::kWrite:
      request.opcode = op.has_imm ? IBV_WR_RDMA_WRITE_WITH_IMM : IBV_WR_RDMA_WRITE;
      request.imm_data = htonl(op.imm);
      if (op.has_imm) {
        op.channel = queue_number_;
        op.serial = ++immediates_;
      }
      break;
    case FabricOp::Kind::kRead:
      request.opcode = IBV_WR_RDMA_READ;
      break;
    default:
      request.opcode = IBV_WR_SEND;
  }
  request.wr.rdma.remote_addr = op.target;
  request.wr.rdma.rkey = static_cast<uint32_t>(op.key);
  const bool idle = queue_.empty();
  request.wr_id = WorkId{WorkId::Kind::kSend, queue_number_, queue_.push(&op)}.pack();
  if (chained_ > 0) chain_[chained_ - 1].next = &request;
  ++chained_;
  return idle || chained_ == kChain;
}

void VerbsLink::flush() {
  if (chained_ == 0) return;
  // One signal a chain. The last of the chain is the newest operation of all, so that none waits for a signal
  // that never comes.
  chain_[chained_ - 1].send_flags |= IBV_SEND_SIGNALED;
  const uint32_t count = chained_;
  chained_ = 0;
  ibv_send_wr* bad = nullptr;
  const int rc = ibv_post_send(qp_.get(), chain_.data(), &bad);
  if (rc == 0) return;
  // What was not taken, from `bad` on, is the newest in the queue. What was taken may be unsignalled: it
  // comes back when the queue pair is stopped.
  const auto taken = static_cast<uint32_t>(bad != nullptr ? bad - chain_.data() : 0);
  for (uint32_t i = taken; i < count; ++i) held.push_back(queue_.pop_newest());
  std::reverse(held.end() - (count - taken), held.end());
  post_error_ = rc;
}

void VerbsLink::complete(uint32_t place, ibv_wc_status status, std::vector<Returned>& returned) {
  if (!queue_.holds(place)) return;
  while (queue_.oldest() != place) returned.push_back({queue_.pop(), Fate::kDone, IBV_WC_SUCCESS});
  FabricOp* op = queue_.pop();
  if (status == IBV_WC_SUCCESS) {
    returned.push_back({op, Fate::kDone, status});
    return;
  }
  const bool first = !first_error_;
  if (first) first_error_ = status;
  Fate fate = Fate::kDoubtful;
  if (is_refusal(*first_error_)) fate = first ? Fate::kRefused : Fate::kUndelivered;
  returned.push_back({op, fate, *first_error_});
}

}  // namespace pplx
