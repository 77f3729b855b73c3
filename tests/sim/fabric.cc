#include "tests/sim/fabric.h"

#include <memory>
#include <utility>

#include "proxy/fabric/sim.h"
#include "tests/sim/scheduler.h"

namespace pplx::sim {
namespace {

Border* g_border = nullptr;

// proxy/fabric/sim.cc does the work.
class BorderFabric final : public Fabric {
 public:
  BorderFabric(std::unique_ptr<Fabric> inner, uint32_t process)
      : inner_(std::move(inner)), process_(process) {}

  const FabricCaps& caps() const override { return inner_->caps(); }
  std::string name() const override { return inner_->name(); }
  const PeerAddress& address() const override { return inner_->address(); }
  FabricMemory register_memory(void* data, size_t size) override {
    return inner_->register_memory(data, size);
  }
  void unregister_memory(const FabricMemory& memory) override { inner_->unregister_memory(memory); }
  uint32_t connect(const PeerAddress& peer) override { return inner_->connect(peer); }
  Post try_write(FabricOp& op) override {
    return stepping([&] { return inner_->try_write(op); });
  }
  Post try_read(FabricOp& op) override {
    return stepping([&] { return inner_->try_read(op); });
  }
  Post try_send(FabricOp& op) override {
    return stepping([&] { return inner_->try_send(op); });
  }
  size_t poll(FabricEvents& events) override {
    step();
    polling_ = true;
    const size_t count = inner_->poll(events);
    polling_ = false;
    return count;
  }
  bool alive(uint32_t peer) override { return inner_->alive(peer); }
  void close() override { inner_->close(); }

 private:
  template <typename Action>
  Post stepping(Action&& action) {
    step();
    const Post result = action();
    step();
    return result;
  }
  // Not from within the fabric, which may hold a lock of a peer that outlives this process.
  void step() {
    if (!polling_ && g_border != nullptr && Scheduler::current() != nullptr) g_border->step(process_);
  }

  std::unique_ptr<Fabric> inner_;
  uint32_t process_;
  bool polling_ = false;
};

}  // namespace

void set_border(Border* border) { g_border = border; }

}  // namespace pplx::sim

// In the place of pplx::make_sim(const EngineConfig&), see system.cc.
#pragma GCC visibility push(default)
std::unique_ptr<pplx::Fabric> real_make_sim(const pplx::EngineConfig& config) __asm__(
    "__real__ZN4pplx8make_simERKNS_12EngineConfigE");
std::unique_ptr<pplx::Fabric> wrap_make_sim(const pplx::EngineConfig& config) __asm__(
    "__wrap__ZN4pplx8make_simERKNS_12EngineConfigE");

std::unique_ptr<pplx::Fabric> wrap_make_sim(const pplx::EngineConfig& config) {
  auto fabric = real_make_sim(config);
  const auto* scheduler = pplx::sim::Scheduler::current();
  if (scheduler == nullptr) return fabric;
  return std::make_unique<pplx::sim::BorderFabric>(std::move(fabric), scheduler->process());
}
#pragma GCC visibility pop
