// Writes with an immediate whose way failed while they were under way. Whether such a write arrived, only its
// target knows, and it may be repeated only if it did not:
//
//   sender                              receiver
//   ask {question, our NIC, its NIC} ->
//                                       fence: nothing of that NIC's is let in on that NIC any more
//                                    <- verdict {question, immediates that came, by channel}
//   arrived: done. Not: over another NIC
//
// Nothing late can come after the verdict, which is why it is final; see Fabric::fence. All guarded by the
// progress lock.
#pragma once

#include <deque>
#include <vector>

#include "proxy/engine/core.h"

namespace pplx {

class Doubts {
 public:
  explicit Doubts(EngineCore& core) : core_(core) {}

  // Takes the operation until its fate is known. False: nobody can find out.
  bool take(Op* op, const Error& failure);
  // Within a fabric's poll, which forbids to answer at once.
  void arrived(MessageType type, const Bytes& from, std::span<const std::byte> body);
  void work() {
    if (!questions_.empty() || !arrivals_.empty() || !fences_.empty()) [[unlikely]]
      go_on();
  }
  // Fails what is older than `limit` milliseconds.
  void maintain(uint32_t now, uint32_t limit);
  void fail(uint32_t peer, const Error& error);
  size_t count(uint32_t peer) const;

 private:
  struct Question {
    uint64_t number;
    uint32_t peer;
    uint16_t path;
    Error failure;
    bool asked = false;
    OpQueue ops{};
  };
  struct Arrival {
    MessageType type;
    Bytes from, body;
  };
  // That a peer has asked for.
  struct Wanted {
    Bytes from;
    uint64_t question;
    uint8_t its_nic, our_nic;
  };
  void go_on();
  void ask(Question& question);
  void take_in(const Arrival& arrival);
  bool answer(const Wanted& wanted);
  void decide(Question question, const Fence& fence);
  void give_up(Op* op, const Error& failure, const std::string& why);

  EngineCore& core_;
  uint64_t next_ = 1;
  std::deque<Question> questions_;
  std::vector<Arrival> arrivals_;
  std::vector<Wanted> fences_;
};

}  // namespace pplx
