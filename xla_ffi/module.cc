// The extension module pplx_jax._core: handlers to register with JAX, groups, the TransferEngine.
#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "xla_ffi/handlers.h"
#include "xla_ffi/python_group.h"
#include "xla_ffi/registry.h"
#include "xla_ffi/verbs_config.h"

namespace nb = nanobind;

namespace pplx {

void bind_engine(nb::module_& m);    // engine_bindings.cc
void bind_topology(nb::module_& m);  // topology_bindings.cc

namespace {

using moe::DType;
using moe::GroupConfig;
using moe::Member;
using moe::MoeShape;
using moe::Registry;

Duration from_seconds(double seconds) {
  return std::chrono::duration_cast<Duration>(std::chrono::duration<double>(seconds));
}

// Python's handle to one device's membership. The registry holds the member until close().
class MemberHandle {
 public:
  MemberHandle(int64_t group, int32_t device, const MoeShape& shape, GroupConfig config)
      : group_(group), device_(device) {
    const moe::BufferSizes sizes = moe::buffer_sizes(shape);
    config.rank = static_cast<uint32_t>(shape.rank);
    config.num_ranks = static_cast<uint32_t>(shape.num_ranks);
    config.region_bytes = sizes.region_bytes;
    config.staging_bytes = sizes.staging_bytes;
    member_ = std::make_shared<Member>(shape, std::move(config));
  }
  ~MemberHandle() {
    nb::gil_scoped_release release;
    member_->group.close();
    Registry::instance().erase(group_, device_, member_.get());
    member_.reset();
  }

  nb::bytes endpoint() const { return moe::to_python(member_->group.endpoint()); }
  void connect(const std::vector<nb::bytes>& endpoints) {
    const std::vector<Bytes> all = moe::from_python(endpoints);
    nb::gil_scoped_release release;
    member_->group.connect(all);
  }
  // Lets compiled programs find the group; after every rank has connected.
  void publish() { Registry::instance().put(group_, device_, member_); }
  // The closed member stays where compiled programs find it, so that they say that it is closed.
  void close() {
    nb::gil_scoped_release release;
    member_->group.close();
  }
  void fail(const std::string& why) {
    nb::gil_scoped_release release;
    member_->group.fail(Error(ErrorKind::kPeer, why), member_->group.config().rank);
  }
  std::optional<moe::Report> failure() const { return moe::to_report(member_->group.failure()); }
  // The rank held responsible for the failure.
  std::optional<uint32_t> failure_culprit() const {
    const uint32_t culprit = member_->group.failure_culprit();
    return culprit == moe::ExchangeGroup::kNobody ? std::nullopt : std::optional(culprit);
  }
  // With whether it is this rank's own.
  std::optional<std::tuple<std::string, std::string, bool>> take_data_error() {
    const bool own = member_->group.data_error_culprit() == member_->group.config().rank;
    const auto error = moe::to_report(member_->group.take_data_error());
    if (!error) return std::nullopt;
    return std::tuple(error->first, error->second, own);
  }

  nb::dict stats() const {
    const moe::GroupStats stats = [&] {
      const nb::gil_scoped_release release;
      return member_->group.stats();
    }();
    nb::dict out = moe::stats_dict(stats, member_->shape.rank);
    const moe::LossCounts losses = member_->losses.counts();
    nb::dict lost;
    lost["routed_tokens"] = losses.routed;
    lost["tokens"] = losses.tokens;
    lost["whole_tokens"] = losses.whole;
    lost["by_share"] = std::vector<uint64_t>(losses.by_share.begin(), losses.by_share.end());
    lost["weight"] = losses.weight;
    out["lost"] = lost;
    return out;
  }

 private:
  int64_t group_;
  int32_t device_;
  std::shared_ptr<Member> member_;
};

void bind_shape(nb::module_& m) {
  nb::enum_<DType>(m, "DType")
      .value("float32", DType::kFloat32)
      .value("bfloat16", DType::kBFloat16)
      .value("float16", DType::kFloat16);
  nb::enum_<moe::Quant>(m, "Quant")
      .value("none", moe::Quant::kNone)
      .value("fp8", moe::Quant::kFp8)
      .value("fp8_ue8m0", moe::Quant::kFp8Ue8m0);
  nb::class_<MoeShape>(m, "MoeShape")
      .def(nb::init<>())
      .def_rw("rank", &MoeShape::rank)
      .def_rw("num_ranks", &MoeShape::num_ranks)
      .def_rw("num_experts", &MoeShape::num_experts)
      .def_rw("experts_per_rank", &MoeShape::experts_per_rank)
      .def_rw("top_k", &MoeShape::top_k)
      .def_rw("hidden", &MoeShape::hidden)
      .def_rw("max_tokens", &MoeShape::max_tokens)
      .def_rw("chunk", &MoeShape::chunk)
      .def_rw("alignment", &MoeShape::alignment)
      .def_rw("dtype", &MoeShape::dtype)
      .def_rw("home_dtype", &MoeShape::home_dtype)
      .def_rw("quant", &MoeShape::quant)
      .def_rw("padded", &MoeShape::padded)
      .def_rw("zero_tail", &MoeShape::zero_tail)
      .def_rw("drop", &MoeShape::drop)
      .def("rounds", &MoeShape::rounds)
      .def("scales", &MoeShape::scales)
      .def("buffer_bytes", [](const MoeShape& shape) {
        const moe::BufferSizes sizes = moe::buffer_sizes(shape);
        return std::pair(sizes.region_bytes, sizes.staging_bytes);
      });
}

void bind_group(nb::module_& m) {
  nb::class_<moe::Launches>(m, "Launches").def(nb::init<>());
  nb::class_<GroupConfig>(m, "GroupConfig")
      .def(nb::init<>())
      .def_rw("name", &GroupConfig::name)
      .def_rw("depth", &GroupConfig::depth)
      .def_rw("fingerprint", &GroupConfig::fingerprint)
      .def_rw("fingerprint_text", &GroupConfig::fingerprint_text)
      .def("set_timeouts",
           [](GroupConfig& config, double timeout, double stall_timeout, double first_stall_timeout) {
             config.timeout = config.engine.timeout = from_seconds(timeout);
             config.stall_timeout = from_seconds(stall_timeout);
             config.first_stall_timeout = from_seconds(first_stall_timeout);
           })
      .def("set_fabric",
           [](GroupConfig& config, const std::string& fabric, int endpoints, const std::string& bind_address,
              const std::string& nic) {
             config.engine.fabric = fabric;
             config.engine.endpoints = endpoints;
             config.engine.bind_address = bind_address;
             config.engine.nic = nic;
           })
      .def("set_nics",
           [](GroupConfig& config, const std::vector<std::string>& names) {
             config.engine.nics.clear();
             for (const auto& name : names) config.engine.nics.push_back({name, config.engine.bind_address});
           })
      .def("set_job", [](GroupConfig& config, std::string token) { config.engine.job = std::move(token); })
      .def("set_near", [](GroupConfig& config, const std::string& device) { config.engine.near = device; })
      .def("set_verbs", [](GroupConfig& config,
                           const nb::dict& options) { config.engine.verbs = to_verbs_config(options); })
      .def_rw("launches", &GroupConfig::launches)
      .def_rw("absent", &GroupConfig::absent)
      .def("set_simulation", [](GroupConfig& config, uint64_t seed, const std::string& network, bool reorder,
                                uint32_t max_delay, uint32_t max_pieces, uint32_t stall_every) {
        SimConfig& sim = config.engine.sim;
        sim.seed = seed;
        sim.network = network;
        sim.reorder = reorder;
        sim.max_delay = max_delay;
        sim.max_pieces = max_pieces;
        sim.stall_every = stall_every;
      });
  nb::class_<MemberHandle>(m, "Member")
      .def(nb::init<int64_t, int32_t, const MoeShape&, GroupConfig>())
      .def("endpoint", &MemberHandle::endpoint)
      .def("connect", &MemberHandle::connect)
      .def("publish", &MemberHandle::publish)
      .def("close", &MemberHandle::close)
      .def("fail", &MemberHandle::fail)
      .def("failure", &MemberHandle::failure)
      .def("failure_culprit", &MemberHandle::failure_culprit)
      .def("take_data_error", &MemberHandle::take_data_error)
      .def("stats", &MemberHandle::stats);
}

}  // namespace

NB_MODULE(_core, m) {
  // The connector below lives as long as the process, on purpose.
  nb::set_leak_warnings(false);
  bind_engine(m);
  bind_topology(m);
  bind_shape(m);
  bind_group(m);
  m.def("registrations", [] {
    nb::dict out;
    for (const auto& [name, handler] : moe::cpu_handlers()) out[name.c_str()] = nb::capsule(handler);
    return out;
  });
  m.def("set_connector", [](nb::callable connector) {
    Registry::instance().set_connector(moe::python_connector(std::move(connector)));
  });
}

}  // namespace pplx
