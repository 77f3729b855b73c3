// A rank made by hand from engine calls, that says what a test wants it to say.
#pragma once

#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "proxy/bytes.h"
#include "proxy/fabric/address.h"
#include "xla_ffi/tests/support.h"

namespace pplx::moe::testing {

// A group's endpoint, field by field.
struct Endpoint {
  uint32_t magic = 0x50504d45, nonce = 0, rank = 0, shards = 1;
  uint64_t fingerprint = 1;
  std::string text, process = "rogue", space;
  int32_t pid = 0;
  Bytes regions, headers, notices;  // descriptors; no headers: they are read in the regions

  static Endpoint parse(const Bytes& bytes) {
    ByteReader in(checked(bytes, "endpoint"), "endpoint");
    Endpoint out;
    const auto blob = [&] {
      const auto field = in.blob();
      return Bytes(field.begin(), field.end());
    };
    out.magic = in.get<uint32_t>();
    out.nonce = in.get<uint32_t>();
    out.rank = in.get<uint32_t>();
    out.shards = in.get<uint32_t>();
    out.fingerprint = in.get<uint64_t>();
    out.text = in.text();
    out.process = in.text();
    out.space = in.text();
    out.pid = in.get<int32_t>();
    out.regions = blob();
    out.headers = blob();
    out.notices = blob();
    in.finish();
    return out;
  }
  Bytes bytes() const {
    ByteWriter out;
    out.put(magic);
    out.put(nonce);
    out.put(rank);
    out.put(shards);
    out.put(fingerprint);
    out.text(text);
    out.text(process);
    out.text(space);
    out.put(pid);
    out.blob(regions);
    out.blob(headers);
    out.blob(notices);
    out.checksum();
    return out.take();
  }
  Address address() const { return Address(decode_descriptor(regions).address); }
};

// Rank 1 of two; rank 0 is real. `pid`: of this host, which it says it is.
class Rogue {
 public:
  explicit Rogue(const Problem& problem, const std::function<void(GroupConfig&)>& adjust = {},
                 int32_t pid = 0)
      : problem_(problem), engine_(local()) {
    GroupConfig config = group_config(problem, 0, local());
    if (adjust) adjust(config);
    region_bytes_ = config.region_bytes;
    real_ = std::make_unique<Member>(problem.shape(0), config);
    theirs_ = Endpoint::parse(real_->group.endpoint());
    regions_ = engine_.allocate(2 * problem.depth * 2 * region_bytes_);
    notices_ = engine_.allocate(3 * 2 * sizeof(AbortNotice));
    scratch_ = engine_.allocate(region_bytes_ + sizeof(AbortNotice));
    Endpoint mine;
    mine.nonce = kNonce;
    mine.rank = 1;
    mine.pid = pid;
    if (pid != 0) mine.space = theirs_.space;
    mine.regions = regions_->descriptor().bytes();
    mine.notices = notices_->descriptor().bytes();
    real_->group.connect({real_->group.endpoint(), mine.bytes()});
    to_regions_ = engine_.open(RegionDescriptor(theirs_.regions));
    to_notices_ = engine_.open(RegionDescriptor(theirs_.notices));
  }
  ~Rogue() {
    real_->group.close();
    engine_.close();  // before what it sends from, and what it tells, where a test has failed meanwhile
  }

  Member& real() { return *real_; }
  uint32_t nonce() const { return theirs_.nonce; }
  size_t region_bytes() const { return region_bytes_; }

  // Writes what exchange `number` expects from rank 1.
  void send(uint64_t number, const Bytes& message) {
    const auto lane = static_cast<uint32_t>(number % (2 * problem_.depth));
    write(*to_regions_, (lane * 2 + 1) * region_bytes_, message, immediate(nonce(), 1, lane));
  }
  // What the real rank said when it closed.
  AbortNotice last_words() const {
    AbortNotice notice;
    std::memcpy(&notice, notices_->data() + sizeof(notice), sizeof(notice));
    return notice;
  }
  void notify(const AbortNotice& notice, bool closed) {
    Bytes bytes(sizeof(notice));
    std::memcpy(bytes.data(), &notice, sizeof(notice));
    write(*to_notices_, (1 * 2 + (closed ? 1 : 0)) * sizeof(AbortNotice), bytes,
          immediate(nonce(), 1, closed ? kClosedLane : kFailedLane));
  }
  void stray(uint32_t imm) { write(*to_regions_, 0, Bytes(16), imm); }
  AbortNotice good_notice() const {
    AbortNotice notice{};
    notice.magic = kMagic;
    notice.version = kWireVersion;
    notice.nonce = kNonce;
    notice.source = 1;
    notice.culprit = 1;
    return notice;
  }

  static constexpr uint32_t kNonce = 4242;

 private:
  void write(const RemoteRegion& to, size_t offset, const Bytes& bytes, uint32_t imm) {
    std::memcpy(scratch_->data(), bytes.data(), bytes.size());
    CompletionCounter& done = sent_.emplace_back();
    engine_.write({.source = scratch_.get(),
                   .target = &to,
                   .target_offset = offset,
                   .length = bytes.size(),
                   .imm = imm},
                  &done);
    ASSERT_TRUE(engine_.wait_until([&] { return done.done() == 1; }, Clock::now() + 20s));
    sent_.pop_back();
  }

  Problem problem_;
  TransferEngine engine_;
  size_t region_bytes_;
  std::unique_ptr<Member> real_;
  Endpoint theirs_;
  std::shared_ptr<Region> regions_, notices_, scratch_;
  std::deque<CompletionCounter> sent_;  // not complete
  std::shared_ptr<RemoteRegion> to_regions_, to_notices_;
};

}  // namespace pplx::moe::testing
