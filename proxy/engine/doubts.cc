#include "proxy/engine/doubts.h"

#include <algorithm>

#include "proxy/bytes.h"
#include "proxy/log.h"

namespace pplx {
namespace {

constexpr size_t kMaxWaiting = 4096;  // questions of peers that are not answered yet
constexpr size_t kMaxChannels = 512;  // of a verdict: what fits the shortest message

Bytes operator+(Bytes left, const Bytes& right) {
  left.insert(left.end(), right.begin(), right.end());
  return left;
}

}  // namespace

bool Doubts::take(Op* op, const Error& failure) {
  if (op->kind != FabricOp::Kind::kWrite || !op->has_imm) return false;
  const Peer& peer = core_.peers_[op->to];
  if (peer.failed || peer.paths.size() == 1 || core_.fabric_closed_) return false;
  if (!core_.nics_[peer.paths[op->path].nic].caps.fences) return false;
  auto question = std::find_if(questions_.begin(), questions_.end(), [&](const Question& one) {
    return !one.asked && one.peer == op->to && one.path == op->path;
  });
  if (question == questions_.end()) {
    questions_.push_back({next_++, op->to, op->path, failure});
    question = questions_.end() - 1;
  }
  question->ops.push(op);
  return true;
}

void Doubts::arrived(MessageType type, const Bytes& from, std::span<const std::byte> body) {
  if (arrivals_.size() + fences_.size() >= kMaxWaiting) {
    throw Error(ErrorKind::kPeer, "4096 questions about lost NICs are not yet answered; one was dropped");
  }
  arrivals_.push_back({type, from, Bytes(body.begin(), body.end())});
}

void Doubts::go_on() {
  for (const Arrival& arrival : std::exchange(arrivals_, {})) {
    try {
      take_in(arrival);
    } catch (const Error& error) {
      core_.on_error(error);
    }
  }
  std::erase_if(fences_, [&](const Wanted& wanted) {
    try {
      return answer(wanted);
    } catch (const Error& error) {
      core_.on_error(error);
      return true;
    }
  });
  for (size_t i = 0; i < questions_.size(); ++i) {
    if (!questions_[i].asked) ask(questions_[i]);
  }
}

void Doubts::ask(Question& question) {
  question.asked = true;
  const Path& path = core_.peers_[question.peer].paths[question.path];
  ByteWriter body;
  body.put(question.number);
  body.put(static_cast<uint8_t>(path.nic));
  body.put(static_cast<uint8_t>(path.remote));
  log(LogLevel::kInfo, "asking ", core_.peers_[question.peer].label, " what came of ", question.ops.size(),
      " writes from NIC ", path.nic, " to its NIC ", path.remote);
  core_.queue_message(question.peer, core_.message_header(kAsk) + body.take(), new IgnoringSink);
}

void Doubts::take_in(const Arrival& arrival) {
  ByteReader in(arrival.body, "message about a lost NIC");
  const auto number = in.get<uint64_t>();
  if (arrival.type == kAsk) {
    const auto its_nic = in.get<uint8_t>(), our_nic = in.get<uint8_t>();
    in.finish();
    if (our_nic >= core_.nics_.size() || its_nic >= decode_address(arrival.from).nics()) {
      in.malformed("there is no such NIC");
    }
    fences_.push_back({arrival.from, number, its_nic, our_nic});
    return;
  }
  Fence fence;
  fence.state = in.get<uint8_t>() != 0 ? Fence::State::kSettled : Fence::State::kUnknown;
  const size_t channels = in.get<uint16_t>();
  for (size_t i = 0; i < channels; ++i) {
    const auto channel = in.get<uint32_t>();
    fence.arrived.push_back({channel, in.get<uint64_t>()});
  }
  in.finish();
  auto found = std::find_if(questions_.begin(), questions_.end(), [&](const Question& question) {
    return question.number == number && question.asked;
  });
  if (found == questions_.end()) return;  // given up
  if (core_.peers_[found->peer].address != arrival.from) {
    throw Error(ErrorKind::kPeer, "a verdict about a lost NIC came from somebody else");
  }
  Question question = std::move(*found);
  questions_.erase(found);
  decide(std::move(question), fence);
}

// False: not yet.
bool Doubts::answer(const Wanted& wanted) {
  const uint32_t peer = core_.connect(wanted.from);
  Fence fence = core_.nics_[wanted.our_nic].fabric->fence(decode_address(wanted.from).nic(wanted.its_nic));
  if (fence.state == Fence::State::kWait) return false;
  if (fence.arrived.size() > kMaxChannels) fence = {};
  ByteWriter body;
  body.put(wanted.question);
  body.put(static_cast<uint8_t>(fence.state == Fence::State::kSettled ? 1 : 0));
  body.put(static_cast<uint16_t>(fence.arrived.size()));
  for (const auto& [channel, immediates] : fence.arrived) {
    body.put(channel);
    body.put(immediates);
  }
  core_.queue_message(peer, core_.message_header(kVerdict) + body.take(), new IgnoringSink);
  return true;
}

void Doubts::decide(Question question, const Fence& fence) {
  while (!question.ops.empty()) {
    Op* op = question.ops.pop();
    if (fence.state != Fence::State::kSettled) {
      give_up(op, question.failure, "the peer cannot tell whether it arrived");
      continue;
    }
    auto channel = std::find_if(fence.arrived.begin(), fence.arrived.end(),
                                [&](const Arrived& one) { return one.channel == op->channel; });
    if (channel != fence.arrived.end() && op->serial <= channel->immediates) {
      core_.finish(op, nullptr);
      continue;
    }
    op->undelivered = true;
    if (!core_.retry(op)) give_up(op, question.failure, "it did not arrive, and there is no other way left");
  }
}

void Doubts::give_up(Op* op, const Error& failure, const std::string& why) {
  const Error error = core_.explain(*op, Error(failure.kind(), std::string(failure.what()) + "; " + why));
  core_.finish(op, &error);
}

void Doubts::maintain(uint32_t now, uint32_t limit) {
  for (size_t i = 0; i < questions_.size(); ++i) {
    OpQueue late;
    questions_[i].ops.take([&](const Op& op) { return now - op.stamp > limit; }, late);
    const Error failure = questions_[i].failure;
    while (!late.empty()) {
      give_up(late.pop(), failure, "the peer did not say in time whether it arrived");
    }
  }
  std::erase_if(questions_, [](const Question& question) { return question.asked && question.ops.empty(); });
}

void Doubts::fail(uint32_t peer, const Error& error) {
  for (size_t i = 0; i < questions_.size(); ++i) {
    if (questions_[i].peer != peer) continue;
    for (OpQueue ops = std::exchange(questions_[i].ops, {}); !ops.empty();) {
      give_up(ops.pop(), error, "whether it arrived is not known");
    }
    questions_[i].asked = true;
  }
}

size_t Doubts::count(uint32_t peer) const {
  size_t sum = 0;
  for (const Question& question : questions_) sum += question.peer == peer ? question.ops.size() : 0;
  return sum;
}

}  // namespace pplx
