// A queue pair to one NIC of a peer, and the operations that it holds.
#pragma once

#include <array>
#include <deque>
#include <optional>

#include "proxy/fabric/verbs_device.h"

namespace pplx {

class VerbsLink {
 public:
  // What an operation that the queue pair gave back has to be told.
  enum class Fate {
    kDone,
    kRefused,      // by the target, or for its own sake here
    kUndelivered,  // nothing of it arrived: a refused one before it stopped the queue
    kDoubtful,     // the connection broke: it may have arrived
  };
  struct Returned {
    FabricOp* op;
    Fate fate;
    ibv_wc_status status;
  };

  VerbsLink(VerbsDevice& device, uint8_t number, uint32_t peer)
      : peer(peer), number(number), device_(device), queue_(device.queue_depth()) {}

  // ---- life of the queue pair; all throw kFabric or kPeer
  void open(uint32_t queue_pair_number);  // a new one, ready to be connected
  void connect(const NicAddress& nic, uint32_t remote_qp, uint32_t remote_psn);
  void break_off();  // takes nothing more; all it holds comes back by completions
  void close();      // what it still holds is returned by take_back()
  bool is_open() const { return qp_ != nullptr; }
  bool broken() const { return broken_; }
  uint32_t queue_pair() const { return qp_ ? qp_->qp_num : 0; }
  uint32_t psn() const { return psn_; }
  ibv_qp* raw() const { return qp_.get(); }  // for benchmarks
  uint32_t inline_bytes() const { return inline_bytes_; }

  // ---- operations
  bool full() const { return queue_.full(); }
  uint32_t outstanding() const { return queue_.size(); }
  // Adds it to the chain of work requests. True: post them now, as nothing is under way whose completion
  // would bring the next occasion, or as the chain is full.
  bool add(FabricOp& op);
  // Posts the chain. What could not be posted is in `held`, and post_error() says why.
  void flush();
  bool has_chain() const { return chained_ > 0; }
  // A completion: fills `returned` with what it settles, in order. False: it is none of this queue pair's.
  void complete(uint32_t place, ibv_wc_status status, std::vector<Returned>& returned);
  FabricOp* take_back() { return queue_.empty() ? nullptr : queue_.pop(); }
  std::optional<ibv_wc_status> first_error() const { return first_error_; }
  std::optional<int> post_error() const { return post_error_; }

  // ---- for the fabric's use
  Pairing pairing;
  const uint32_t peer;
  const uint8_t number;
  bool wanted = false;             // somebody here has operations for it
  std::vector<FabricOp*> held;     // to be posted again on the next queue pair
  std::vector<Returned> doubtful;  // told when it is known whether the peer still lives
  Clock::time_point next_hello{}, deadline{};
  Drain drain;
  uint64_t* arrived = nullptr;  // immediates on the present pair of queue pairs; null: it is not connected
  uint32_t last = 0;            // the peer's queue pair that ours was connected with before
  // What the peer says of our last queue pair.
  uint32_t told_last = 0;
  uint64_t told_arrived = 0;
  Duration interval{};
  unsigned hellos = 0;

 private:
  static constexpr uint32_t kChain = 16;

  VerbsDevice& device_;
  VerbsHandle<ibv_qp> qp_;
  uint32_t inline_bytes_ = 0;
  uint32_t queue_number_ = 0;
  uint32_t psn_ = 0;
  uint64_t immediates_ = 0;  // writes with an immediate that it has taken
  bool broken_ = false;
  std::optional<ibv_wc_status> first_error_;
  std::optional<int> post_error_;
  SendQueue queue_;
  uint32_t chained_ = 0;  // work requests not posted yet
  std::array<ibv_send_wr, kChain> chain_;
  std::array<ibv_sge, kChain> pieces_;
};

std::string to_text(const Verbs& lib, ibv_wc_status status);

}  // namespace pplx
