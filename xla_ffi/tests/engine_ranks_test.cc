// What every fabric must do, between engines of processes that are maybe on several hosts.
#include <algorithm>
#include <numeric>
#include <set>

#include "proxy/tests/meeting.h"

namespace pplx::testing {
namespace {

constexpr size_t kSlot = (128 << 10) + 3;

class EngineRanksTest : public RankTest {
 public:
  // One engine a rank, and what all know of each other.
  struct Network {
    explicit Network(const EngineConfig& config) : engine(config) {}
    TransferEngine engine;
    std::shared_ptr<Region> source, target;
    std::vector<Address> addresses;
    std::vector<RegionDescriptor> sources, targets;
    std::vector<std::shared_ptr<RemoteRegion>> to;  // targets of the others
    std::shared_ptr<PeerGroup> group;
  };

  void meet(Network& network) {
    auto& engine = network.engine;
    network.source = engine.allocate(static_cast<size_t>(ranks_) * kSlot);
    network.target = engine.allocate(static_cast<size_t>(ranks_) * kSlot);
    for (const Bytes& one : meeting_->gather(engine.address().bytes())) network.addresses.emplace_back(one);
    for (const Bytes& one : meeting_->gather(network.source->descriptor().bytes())) {
      network.sources.emplace_back(one);
    }
    for (const Bytes& one : meeting_->gather(network.target->descriptor().bytes())) {
      network.targets.emplace_back(one);
    }
    for (int peer = 0; peer < ranks_; ++peer) {
      network.to.push_back(peer == rank_ ? nullptr : engine.open(network.targets[static_cast<size_t>(peer)]));
    }
    network.group = engine.peer_group(network.addresses, 1);
  }
  // The others, each rank in another order.
  std::vector<size_t> others() const {
    std::vector<size_t> found;
    for (int offset = 1; offset < ranks_; ++offset) {
      found.push_back(static_cast<size_t>((rank_ + offset) % ranks_));
    }
    return found;
  }
  static uint64_t seed(size_t from, size_t to, size_t round) { return from * 10007 + to * 101 + round; }
  static Bytes random(size_t size, uint64_t of) {
    Bytes bytes(size);
    fill_random(bytes.data(), size, of);
    return bytes;
  }
  static std::byte* slot(const Region& region, size_t number) { return region.data() + number * kSlot; }
  size_t self() const { return static_cast<size_t>(rank_); }

  void writes(Network& net);
  void reads(Network& net);
  void pages(Network& net);
  void scatters(Network& net);
  void messages(Network& net);
  void pools(Network& net);
};

void EngineRanksTest::writes(Network& net) {
  const std::vector<size_t> sizes = {0, 1, 7, 4095, 4096, 4097, 65536, kSlot};
  auto& done = lasting_counter();
  for (size_t round = 0; round < sizes.size(); ++round) {
    const size_t size = sizes[round];
    for (const size_t peer : others()) {
      fill_random(slot(*net.source, peer), size, seed(self(), peer, round));
      net.engine.write({net.source.get(), peer * kSlot, net.to[peer].get(), self() * kSlot, size,
                        static_cast<uint32_t>(1 + self())},
                       &done);
    }
    for (const size_t peer : others()) {
      net.engine.imm_counter(static_cast<uint32_t>(1 + peer)).wait(round + 1);
      const Bytes wanted = random(size, seed(peer, self(), round));
      ASSERT_EQ(std::memcmp(slot(*net.target, peer), wanted.data(), size), 0)
          << size << " bytes from " << peer;
    }
    ASSERT_EQ(wait_done(net.engine, done, (round + 1) * others().size()), (round + 1) * others().size());
    net.engine.barrier(*net.group);
  }
  EXPECT_EQ(done.failed(), 0u) << done.error()->what();
}

void EngineRanksTest::reads(Network& net) {
  for (const size_t peer : others()) fill_random(slot(*net.source, peer), kSlot, seed(self(), peer, 100));
  net.engine.barrier(*net.group);
  for (const size_t peer : others()) {
    const auto from = net.engine.open(net.sources[peer]);
    net.engine.read_future({net.target.get(), peer * kSlot, from.get(), self() * kSlot, kSlot}).get();
    const Bytes wanted = random(kSlot, seed(peer, self(), 100));
    ASSERT_EQ(std::memcmp(slot(*net.target, peer), wanted.data(), kSlot), 0) << "from " << peer;
  }
  net.engine.barrier(*net.group);
}

void EngineRanksTest::pages(Network& net) {
  constexpr size_t kPages = 60, kBytes = 1000, kTogether = 8;
  constexpr uint32_t kImm = 100;
  // The first follow each other on both sides, the rest do not.
  std::vector<uint64_t> from(kPages), to(kPages);
  std::iota(from.begin(), from.end(), 0);
  std::reverse(from.begin() + 20, from.end());
  std::iota(to.begin(), to.end(), 0);
  std::rotate(to.begin(), to.begin() + 20, to.end());
  auto& done = lasting_counter();
  for (const size_t peer : others()) {
    fill_random(slot(*net.source, peer), kPages * kBytes, seed(self(), peer, 200));
    net.engine.paged_write({.source = net.source.get(),
                            .source_pages = {peer * kSlot, 0, from},
                            .target = net.to[peer].get(),
                            .target_pages = {self() * kSlot, 0, to},
                            .count = kPages,
                            .page_bytes = kBytes,
                            .imm = kImm + static_cast<uint32_t>(self()),
                            .group = kTogether},
                           &done);
  }
  for (const size_t peer : others()) {
    net.engine.imm_counter(kImm + static_cast<uint32_t>(peer)).wait((kPages + kTogether - 1) / kTogether);
    const Bytes wanted = random(kPages * kBytes, seed(peer, self(), 200));
    for (size_t i = 0; i < kPages; ++i) {
      ASSERT_EQ(
          std::memcmp(slot(*net.target, peer) + to[i] * kBytes, wanted.data() + from[i] * kBytes, kBytes), 0)
          << "page " << i << " from " << peer;
    }
  }
  ASSERT_EQ(wait_done(net.engine, done, others().size()), others().size());
  EXPECT_EQ(done.failed(), 0u) << done.error()->what();
  net.engine.barrier(*net.group);
}

void EngineRanksTest::scatters(Network& net) {
  constexpr uint32_t kImm = 200;
  const auto targets = net.engine.open(*net.group, net.targets);
  const auto size = [](size_t from, size_t to) { return 1000 * (from + 1) + to; };
  std::vector<GroupEntry> entries;
  for (const size_t peer : others()) {
    fill_random(slot(*net.source, peer), size(self(), peer), seed(self(), peer, 300));
    entries.push_back({peer, peer * kSlot, self() * kSlot, size(self(), peer)});
  }
  auto& done = lasting_counter();
  net.engine.scatter(*net.source, *targets, entries, kImm + static_cast<uint32_t>(self()), &done);
  for (const size_t peer : others()) {
    net.engine.imm_counter(kImm + static_cast<uint32_t>(peer)).wait(1);
    const Bytes wanted = random(size(peer, self()), seed(peer, self(), 300));
    ASSERT_EQ(std::memcmp(slot(*net.target, peer), wanted.data(), wanted.size()), 0) << "from " << peer;
  }
  ASSERT_EQ(wait_done(net.engine, done, entries.size()), entries.size());
  EXPECT_EQ(done.failed(), 0u) << done.error()->what();
  net.engine.barrier(*net.group);
}

void EngineRanksTest::messages(Network& net) {
  constexpr size_t kMany = 40;
  std::vector<std::future<void>> sent;
  for (size_t number = 0; number < kMany; ++number) {
    for (const size_t peer : others()) {
      sent.push_back(
          net.engine.send(net.addresses[peer], random(10 * number, seed(self(), peer, 400 + number))));
    }
  }
  std::map<size_t, std::multiset<Bytes>> arrived, wanted;
  for (size_t i = 0; i < kMany * others().size(); ++i) {
    const Message message = net.engine.recv();
    const auto from = std::find(net.addresses.begin(), net.addresses.end(), message.from);
    ASSERT_NE(from, net.addresses.end());
    arrived[static_cast<size_t>(from - net.addresses.begin())].insert(message.payload);
  }
  for (const size_t peer : others()) {
    for (size_t number = 0; number < kMany; ++number) {
      wanted[peer].insert(random(10 * number, seed(peer, self(), 400 + number)));
    }
  }
  EXPECT_EQ(arrived, wanted);
  for (auto& one : sent) one.get();
  net.engine.barrier(*net.group);
}

void EngineRanksTest::pools(Network& net) {
  constexpr size_t kMany = 5, kBytes = 8 << 10;
  const auto pool = net.engine.receive_pool({.buffer_bytes = kBytes, .buffers = 2});
  const std::vector<Bytes> pools = meeting_->gather(pool->descriptor().bytes());
  auto& done = lasting_counter();
  std::vector<std::shared_ptr<RemotePool>> remotes;
  for (const size_t peer : others()) {
    remotes.push_back(net.engine.open(PoolDescriptor(pools[peer])));
    for (size_t number = 0; number < kMany; ++number) {
      const size_t at = peer * kSlot + number * kBytes;
      fill_random(net.source->data() + at, kBytes - number, seed(self(), peer, 500 + number));
      net.engine.send(*remotes.back(), net.source, at, kBytes - number, &done);
    }
  }
  std::multiset<Bytes> arrived, wanted;
  for (size_t i = 0; i < kMany * others().size(); ++i) {
    const PoolMessage message = pool->recv();
    arrived.insert(Bytes(message.bytes.begin(), message.bytes.end()));
    pool->release(message.buffer);
  }
  for (const size_t peer : others()) {
    for (size_t number = 0; number < kMany; ++number) {
      wanted.insert(random(kBytes - number, seed(peer, self(), 500 + number)));
    }
  }
  EXPECT_EQ(arrived, wanted);
  ASSERT_EQ(wait_done(net.engine, done, kMany * others().size()), kMany * others().size());
  EXPECT_EQ(done.failed(), 0u) << done.error()->what();
  net.engine.barrier(*net.group);
}

TEST_F(EngineRanksTest, EveryOperationBringsItsBytes) {
  for (const std::string& fabric : fabrics_) {
    SCOPED_TRACE(fabric);
    const auto started = Clock::now();
    Network net(engine(fabric));
    meet(net);
    for (const auto part :
         {&EngineRanksTest::writes, &EngineRanksTest::reads, &EngineRanksTest::pages,
          &EngineRanksTest::scatters, &EngineRanksTest::messages, &EngineRanksTest::pools}) {
      (this->*part)(net);
      if (HasFatalFailure()) return;
    }
    meeting_->gather({});  // nobody closes before all are through
    const std::chrono::duration<double> taken = Clock::now() - started;
    std::printf("rank %d: the engine's operations over %s in %.1f s\n", rank_, fabric.c_str(), taken.count());
  }
}

}  // namespace
}  // namespace pplx::testing
