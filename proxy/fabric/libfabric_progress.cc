// Posting, and completions: what arrived, what was sent, what failed.
#include <rdma/fi_endpoint.h>
#include <rdma/fi_eq.h>
#include <rdma/fi_rma.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "proxy/fabric/libfabric_fabric.h"
#include "proxy/log.h"

namespace pplx {
namespace {

constexpr size_t kReceives = 64;  // posted receive buffers, replenished as they are consumed
constexpr size_t kPollBatch = 32;

// Errors that say "the peer or the path to it is gone", as opposed to a refused operation.
bool is_peer_error(int code) {
  switch (code) {
    case ECONNRESET:
    case ECONNREFUSED:
    case ECONNABORTED:
    case ENOTCONN:
    case EPIPE:
    case ESHUTDOWN:
    case EHOSTUNREACH:
    case ENETUNREACH:
    case ETIMEDOUT:
    case ECANCELED:
    case EIO:
    case ENOENT:  // shm: the peer's segment is gone
      return true;
    default:
      return false;
  }
}

}  // namespace

Post LibfabricFabric::posted(ssize_t rc, const char* what) const {
  if (rc == 0) [[likely]]
    return Post::kPosted;
  if (rc == -FI_EAGAIN) return Post::kFull;
  throw Error(is_peer_error(static_cast<int>(-rc)) ? ErrorKind::kPeer : ErrorKind::kFabric,
              std::string("libfabric provider ") + provider_ + " refused a " + what + ": " + error_text(rc));
}

// Always fi_writemsg: 1.17's tcp takes FI_DELIVERY_COMPLETE from the flags of the call only, not from the
// endpoint's.
Post LibfabricFabric::try_write(FabricOp& op) {
  const auto& addresses = peers_[op.peer].addresses;
  // The source of an empty write is valid all the same: ofi_rxd reads the first without looking at their
  // number.
  bool empty = op.length == 0;
  iovec source{empty ? receive_bytes_.data() : const_cast<std::byte*>(op.source), op.length};
  void* local = empty ? receive_memory_.local : op.local;
  fi_rma_iov target{op.target, op.length, op.key};
  fi_msg_rma message;
  message.msg_iov = &source;
  message.desc = &local;
  message.iov_count = 1;
  message.addr = addresses.size() == 1 ? addresses[0] : addresses[op.rail % addresses.size()];
  message.rma_iov = &target;
  message.rma_iov_count = 1;
  message.context = &op;
  message.data = op.has_imm ? op.imm : kNoImmediate;
  uint64_t flags = FI_COMPLETION;
  if (op.has_imm || traits_.always_immediate) flags |= FI_REMOTE_CQ_DATA;
  // Of no bytes none can be late, and shm (1.17) never completes an empty write that asks for delivery.
  if (!empty) flags |= completion_;
  return posted(fi_writemsg(open_.endpoints[op.rail], &message, flags), "write");
}

Post LibfabricFabric::try_read(FabricOp& op) {
  const auto& addresses = peers_[op.peer].addresses;
  auto* into = const_cast<std::byte*>(op.source);
  return posted(fi_read(open_.endpoints[op.rail], into, op.length, op.local,
                        addresses[op.rail % addresses.size()], op.target, op.key, &op),
                "read");
}

Post LibfabricFabric::try_send(FabricOp& op) {
  fi_addr_t to = peers_[op.peer].addresses[0];
  return posted(fi_send(open_.endpoints[0], op.source, op.length, op.local, to, &op), "send");
}

void LibfabricFabric::report(ssize_t rc) const {
  if (rc != 0) log(LogLevel::kError, "libfabric ", provider_, ": posting a receive: ", error_text(rc));
}

ssize_t LibfabricFabric::try_receive(FabricOp& op) {
  auto* buffer = const_cast<std::byte*>(op.source);
  return fi_recv(open_.endpoints[0], buffer, kMessageBytes, op.local, FI_ADDR_UNSPEC, &op);
}

void LibfabricFabric::post_receive(FabricOp& op) {
  report(unposted_.post(op, [this](FabricOp& one) { return try_receive(one); }));
}

void LibfabricFabric::post_receives() {
  receive_bytes_.resize(kReceives * kMessageBytes);
  receive_memory_ = register_memory(receive_bytes_.data(), receive_bytes_.size());
  receives_.resize(kReceives);
  for (size_t i = 0; i < kReceives; ++i) {
    receives_[i].kind = FabricOp::Kind::kReceive;
    receives_[i].source = receive_bytes_.data() + i * kMessageBytes;
    receives_[i].local = receive_memory_.local;
    post_receive(receives_[i]);
  }
}

size_t LibfabricFabric::poll(FabricEvents& events) {
  if (!unposted_.empty()) [[unlikely]]
    report(unposted_.retry([this](FabricOp& op) { return try_receive(op); }));
  fi_cq_data_entry entries[kPollBatch];
  ssize_t count = fi_cq_read(open_.cq, entries, kPollBatch);
  if (count == -FI_EAGAIN) return 0;
  if (count == -FI_EAVAIL) return report_error(events);
  if (count < 0) {
    events.on_down(Error(ErrorKind::kFabric, "polling " + provider_ + ": " + error_text(count)));
    return 0;
  }
  for (ssize_t i = 0; i < count; ++i) {
    const auto& entry = entries[i];
    // FI_REMOTE_WRITE first: "sockets" sets FI_REMOTE_CQ_DATA on the initiator's completions as well.
    if ((entry.flags & FI_REMOTE_WRITE) != 0) {
      auto imm = static_cast<uint32_t>(entry.data);
      if (imm != kNoImmediate) events.on_immediate(imm);
    } else if (auto* op = static_cast<FabricOp*>(entry.op_context); op == nullptr) {
      continue;
    } else if (op->kind == FabricOp::Kind::kReceive) {
      events.on_message({op->source, std::min(entry.len, kMessageBytes)});
      post_receive(*op);
    } else {
      events.on_complete(*op, nullptr);
    }
  }
  return static_cast<size_t>(count);
}

size_t LibfabricFabric::report_error(FabricEvents& events) {
  union {
    fi_cq_err_entry entry;
    char room[256];  // newer APIs have longer entries
  };
  std::memset(room, 0, sizeof room);
  ssize_t rc = fi_cq_readerr(open_.cq, &entry, 0);
  if (rc == -FI_EAGAIN) return 0;
  if (rc < 0) {
    events.on_error(Error(ErrorKind::kFabric, "reading an error of " + provider_ + ": " + error_text(rc)));
    return 0;
  }
  char buffer[256] = {};
  const char* detail = fi_cq_strerror(open_.cq, entry.prov_errno, entry.err_data, buffer, sizeof buffer);
  std::string text = provider_ + ": " + error_text(entry.err);
  if (entry.prov_errno != 0 && entry.prov_errno != entry.err && detail != nullptr) {
    text += std::string(", ") + detail + " (" + std::to_string(entry.prov_errno) + ")";
  }
  Error error(is_peer_error(entry.err) ? ErrorKind::kPeer : ErrorKind::kFabric, text);
  auto* op = static_cast<FabricOp*>(entry.op_context);
  if (op == nullptr || (entry.flags & FI_REMOTE_WRITE) != 0) {
    events.on_error(error);
  } else if (op->kind == FabricOp::Kind::kReceive) {
    events.on_error(error);
    if (entry.err != FI_ECANCELED) post_receive(*op);
  } else {
    events.on_complete(*op, &error);
  }
  return 1;
}

}  // namespace pplx
