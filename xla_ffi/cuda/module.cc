// The extension module pplx_jax._cuda: handlers to register with JAX, and groups on GPUs. Import
// pplx_jax._core before: it binds the types of shapes and configurations.
#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "proxy/fabric/library_path.h"
#include "xla_ffi/cuda/device.h"
#include "xla_ffi/cuda/handlers.h"
#include "xla_ffi/cuda/member.h"
#include "xla_ffi/cuda/probe.h"
#include "xla_ffi/python_group.h"

namespace nb = nanobind;

namespace pplx::moe::cuda {
namespace {

RegionMemory region_memory(const std::string& wanted) {
  if (wanted == "auto") return RegionMemory::kAuto;
  if (wanted == "device") return RegionMemory::kDevice;
  if (wanted == "pinned") return RegionMemory::kPinned;
  throw Error(ErrorKind::kInvalidArgument, "regions in '" + wanted + "' memory: auto, device or pinned");
}

nb::dict placed_dict(const Placed& placed) {
  nb::dict out;
  out["memory"] = placed.memory;
  out["why"] = placed.why;
  return out;
}

// Python's handle to one device's membership. The registry holds the member until close().
class MemberHandle {
 public:
  MemberHandle(int64_t group, int32_t device, const MoeShape& shape, const GroupConfig& config,
               std::vector<bool> nvlink, bool proxies, bool shares, int num_sms, const std::string& regions)
      : group_(group), device_(device) {
    nb::gil_scoped_release release;
    member_ = std::make_shared<Member>(group, device, shape, config,
                                       MemberOptions{.nvlink = std::move(nvlink),
                                                     .proxies = proxies,
                                                     .shares = shares,
                                                     .num_sms = num_sms,
                                                     .regions = region_memory(regions)});
  }
  ~MemberHandle() {
    nb::gil_scoped_release release;
    member_->close();
    GpuRegistry::instance().erase(group_, device_, member_.get());
    member_.reset();
  }

  nb::bytes endpoint() const { return to_python(member_->endpoint()); }
  void connect(const std::vector<nb::bytes>& endpoints) {
    const std::vector<Bytes> all = from_python(endpoints);
    nb::gil_scoped_release release;
    member_->connect(all);
  }
  void publish() {
    nb::gil_scoped_release release;
    member_->publish();
    GpuRegistry::instance().put(group_, device_, member_);
  }
  void close() {
    nb::gil_scoped_release release;
    member_->close();
  }
  void fail(const std::string& why) {
    nb::gil_scoped_release release;
    member_->fail(why);
  }
  std::optional<Report> failure() const {
    const auto found = [&] {
      const nb::gil_scoped_release release;
      return member_->failure();
    }();
    return to_report(found);
  }
  std::optional<std::tuple<std::string, std::string, bool>> take_data_error() {
    const auto taken = [&] {
      const nb::gil_scoped_release release;
      return member_->take_data_error();
    }();
    if (!taken) return std::nullopt;
    const auto report = to_report(taken->first);
    return std::tuple(report->first, report->second, taken->second);
  }

  nb::dict stats() const {
    const MemberStats stats = [&] {
      const nb::gil_scoped_release release;
      return member_->stats();
    }();
    nb::dict out = stats_dict(stats.group, member_->shape().rank);
    nb::list peers(out["peers"]);
    for (size_t rank = 0; rank < stats.nvlink.size(); ++rank) {
      nb::cast<nb::dict>(peers[rank])["transport"] = stats.nvlink[rank] ? "nvlink" : "proxy";
    }
    out["device_bytes"] = stats.device_bytes;
    out["pinned_bytes"] = stats.pinned_bytes;
    out["num_sms"] = stats.num_sms;
    if (stats.regions) out["regions"] = placed_dict(*stats.regions);
    if (stats.flags) out["flags"] = placed_dict(*stats.flags);
    if (const CourierStats& courier = stats.courier; courier.exchanges != 0) {
      const auto mean = [&](uint64_t ns) { return 1e-9 * ns / courier.exchanges; };
      nb::dict times;
      times["exchanges"] = courier.exchanges;
      times["mean_posting_seconds"] = mean(courier.posting_ns);
      times["mean_arrival_seconds"] = mean(courier.arrival_ns);
      out["courier"] = times;
    }
    return out;
  }

 private:
  int64_t group_;
  int32_t device_;
  std::shared_ptr<Member> member_;
};

// Most blocks that kernels of a shape may use on a device.
int most_blocks(int device, const MoeShape& shape) {
  nb::gil_scoped_release release;
  const OnDevice current(device);
  int blocks = 0;
  check(load_kernels(shape, &blocks), "loading kernels for " + std::to_string(shape.physical_experts()) +
                                          " experts, top_k=" + std::to_string(shape.top_k) +
                                          ", on CUDA device " + std::to_string(device) +
                                          " (they need 161 KB of shared memory a block or more)");
  return blocks;
}

// Devices whose memory a device can use.
std::vector<int> peers(int device) {
  std::vector<int> reached;
  for (int peer = 0; peer < device_count(); ++peer) {
    if (peer != device && peer_access(device, peer)) reached.push_back(peer);
  }
  return reached;
}

// Connecting allocates and waits, which a thread must not do while it captures a stream, as XLA's may be.
void connect_apart(const std::function<void(int64_t)>& connector, int64_t group) {
  std::exception_ptr thrown;
  std::thread([&] {
    try {
      connector(group);
    } catch (...) {
      thrown = std::current_exception();
    }
  }).join();
  if (thrown) std::rethrow_exception(thrown);
}

}  // namespace

NB_MODULE(_cuda, m) {
  // The connector lives as long as the process, on purpose.
  nb::set_leak_warnings(false);
  nb::class_<MemberHandle>(m, "Member")
      .def(nb::init<int64_t, int32_t, const MoeShape&, const GroupConfig&, std::vector<bool>, bool, bool, int,
                    const std::string&>(),
           nb::arg("group"), nb::arg("device"), nb::arg("shape"), nb::arg("config"), nb::kw_only(),
           nb::arg("nvlink"), nb::arg("proxies"), nb::arg("shares"), nb::arg("num_sms"),
           nb::arg("regions") = "auto")
      .def("endpoint", &MemberHandle::endpoint)
      .def("connect", &MemberHandle::connect)
      .def("publish", &MemberHandle::publish)
      .def("close", &MemberHandle::close)
      .def("fail", &MemberHandle::fail)
      .def("failure", &MemberHandle::failure)
      .def("take_data_error", &MemberHandle::take_data_error)
      .def("stats", &MemberHandle::stats);
  m.def("registrations", [] {
    nb::dict out;
    for (const auto& [name, handler] : cuda_handlers()) out[name.c_str()] = nb::capsule(handler);
    return out;
  });
  m.def("set_connector", [](nb::callable connector) {
    GpuRegistry::instance().set_connector(
        [call = python_connector(std::move(connector))](int64_t group) { connect_apart(call, group); });
  });
  m.def("set_library_search_path",
        [](std::vector<std::string> folders) { set_library_search_path(std::move(folders)); });
  m.def("device_count", &device_count);
  m.def("peers", &peers);
  m.def("flag_latency_us", &flag_latency_us, nb::arg("device"), nb::arg("peer"),
        nb::call_guard<nb::gil_scoped_release>());
  m.def("most_blocks", &most_blocks);
}

}  // namespace pplx::moe::cuda
