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
  return core_->register_memory(data, size, std::move(keepalive));
}
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

void TransferEngine::write_callback(const WriteRequest& request, std::function<void(const Error*)> done) {
  core_->write_callback(request, std::move(done));
}

void TransferEngine::scatter(const Region& source, std::span<const ScatterEntry> entries,
                             std::optional<uint32_t> imm, CompletionSink* sink) {
  core_->scatter(source, entries, imm, sink);
}

size_t TransferEngine::max_message() const noexcept { return core_->max_message(); }
std::future<void> TransferEngine::send(const Address& to, std::span<const std::byte> payload) {
  return core_->send(to, payload);
}
Message TransferEngine::recv(std::optional<Duration> timeout) { return core_->recv(timeout); }

ImmCounter TransferEngine::imm_counter(uint32_t imm) { return core_->imm_counter(imm); }
ImmCounter TransferEngine::watch(uint32_t imm) { return core_->watch(imm); }
void TransferEngine::unwatch(uint32_t imm) { core_->unwatch(imm); }

std::shared_ptr<PeerGroup> TransferEngine::peer_group(const std::vector<Address>& members, uint32_t id) {
  return core_->peer_group(members, id);
}
void TransferEngine::barrier(PeerGroup& group, std::optional<Duration> timeout) {
  core_->barrier(group, timeout);
}

size_t TransferEngine::progress() { return core_->progress(); }
void TransferEngine::relax(unsigned idle) { back_off(idle); }
EngineStats TransferEngine::stats() const { return core_->stats(); }
void TransferEngine::close() { core_->close(); }
bool TransferEngine::closed() const noexcept { return core_->closed(); }
bool TransferEngine::forked() const noexcept { return core_->forked(); }
void TransferEngine::require_own_process() const { core_->require_own_process(); }

}  // namespace pplx
