#include "proxy/engine/engine.h"

#include "proxy/engine/core.h"

namespace pplx {

TransferEngine::TransferEngine(const EngineConfig& config) : core_(std::make_shared<EngineCore>(config)) {
  core_->start();
}

TransferEngine::~TransferEngine() { close(); }

const EngineConfig& TransferEngine::config() const noexcept { return core_->config(); }
std::string TransferEngine::fabric_name() const { return core_->fabric_name(); }
const Address& TransferEngine::address() const noexcept { return core_->address(); }

std::shared_ptr<Region> TransferEngine::register_memory(void* data, size_t size,
                                                        std::shared_ptr<void> keepalive) {
  return core_->register_memory(
      data, size, [&](Fabric& fabric) { return fabric.register_memory(data, size); }, std::move(keepalive));
}
std::shared_ptr<Region> TransferEngine::register_memory(const DeviceMemory& memory,
                                                        std::shared_ptr<void> keepalive) {
  return core_->register_memory(memory, std::move(keepalive));
}
bool TransferEngine::takes_device_memory() const noexcept { return core_->takes_device_memory(); }
std::shared_ptr<Region> TransferEngine::allocate(size_t size) { return core_->allocate(size); }
std::shared_ptr<RemoteRegion> TransferEngine::open(const RegionDescriptor& descriptor) {
  return core_->open(descriptor);
}

void TransferEngine::write(const WriteRequest& request, CompletionSink* sink) { core_->write(request, sink); }

std::future<void> TransferEngine::write_future(const WriteRequest& request) {
  auto sink = std::make_unique<FutureSink>();
  auto future = sink->future();
  core_->write(request, sink.get());
  sink.release();
  return future;
}

void TransferEngine::read(const ReadRequest& request, CompletionSink* sink) { core_->read(request, sink); }

std::future<void> TransferEngine::read_future(const ReadRequest& request) {
  auto sink = std::make_unique<FutureSink>();
  auto future = sink->future();
  core_->read(request, sink.get());
  sink.release();
  return future;
}

void TransferEngine::paged_write(const PagedWriteRequest& request, CompletionSink* sink) {
  core_->paged_write(request, sink);
}

uint64_t TransferEngine::new_id() noexcept { return core_->new_id(); }
size_t TransferEngine::cancel(uint64_t id) { return core_->cancel(id); }
size_t TransferEngine::shards() const noexcept { return core_->shards(); }
void TransferEngine::remove_nic(size_t index) { core_->remove_nic(index); }
bool TransferEngine::remove_peer(const Address& address) { return core_->remove_peer(address); }

void TransferEngine::when(const ImmCounter& counter, uint64_t n, CompletionSink* sink, uint64_t id) {
  core_->when(counter, n, sink, id);
}
void TransferEngine::when_message(CompletionSink* sink, uint64_t id) { core_->when_message(sink, id); }

std::shared_ptr<WatchWord> TransferEngine::watch_word(WatchConfig config) {
  return core_->watch_word(std::move(config));
}

std::shared_ptr<ReceivePool> TransferEngine::receive_pool(PoolConfig config) {
  return core_->receive_pool(std::move(config));
}
std::shared_ptr<RemotePool> TransferEngine::open(const PoolDescriptor& descriptor) {
  return core_->open(descriptor);
}
void TransferEngine::send(const RemotePool& pool, std::shared_ptr<const Region> source, size_t offset,
                          size_t length, CompletionSink* sink) {
  core_->send(pool, std::move(source), offset, length, sink);
}

void TransferEngine::write_callback(const WriteRequest& request, std::function<void(const Error*)> done) {
  core_->write_callback(request, std::move(done));
}

void TransferEngine::scatter(const Region& source, std::span<const ScatterEntry> entries,
                             std::optional<uint32_t> imm, CompletionSink* sink) {
  core_->scatter(source, entries, imm, sink);
}

std::shared_ptr<GroupRegions> TransferEngine::open(PeerGroup& group,
                                                   std::span<const RegionDescriptor> descriptors) {
  return core_->open(group, descriptors);
}
void TransferEngine::scatter(const Region& source, const GroupRegions& targets,
                             std::span<const GroupEntry> entries, std::optional<uint32_t> imm,
                             CompletionSink* sink) {
  core_->scatter(source, targets, entries, imm, sink);
}

size_t TransferEngine::max_message() const noexcept { return core_->max_message(); }
std::future<void> TransferEngine::send(const Address& to, std::span<const std::byte> payload) {
  return core_->send(to, payload);
}
Message TransferEngine::recv(std::optional<Duration> timeout) { return core_->recv(timeout); }

ImmCounter TransferEngine::imm_counter(uint32_t imm) { return core_->imm_counter(imm); }
ImmCounter TransferEngine::watch(uint32_t imm) { return core_->watch(imm); }
void TransferEngine::unwatch(uint32_t imm) { core_->unwatch(imm); }
void TransferEngine::release_immediate(uint32_t imm) { core_->release_immediate(imm); }

std::shared_ptr<PeerGroup> TransferEngine::peer_group(const std::vector<Address>& members, uint32_t id) {
  return core_->peer_group(members, id);
}
void TransferEngine::barrier(PeerGroup& group, std::optional<Duration> timeout) {
  core_->barrier(group, timeout);
}

size_t TransferEngine::progress() { return core_->progress(); }
void TransferEngine::relax(unsigned idle) { back_off(idle); }
EngineStats TransferEngine::stats() const { return core_->stats(); }
EngineDetails TransferEngine::details() const { return core_->details(); }
void TransferEngine::start_timeline(size_t events) { core_->start_timeline(events); }
void TransferEngine::stop_timeline() { core_->stop_timeline(); }
std::string TransferEngine::timeline() const { return core_->timeline(); }
void TransferEngine::close() { core_->close(); }
bool TransferEngine::closed() const noexcept { return core_->closed(); }
bool TransferEngine::forked() const noexcept { return core_->forked(); }
void TransferEngine::require_own_process() const { core_->require_own_process(); }

}  // namespace pplx
