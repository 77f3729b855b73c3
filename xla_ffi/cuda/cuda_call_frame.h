// What the CUDA handlers have in common: attributes, finding the group, what a launch returned.
#pragma once

#include <exception>
#include <string>
#include <string_view>

#include "xla_ffi/call_frame.h"
#include "xla_ffi/cuda/device.h"
#include "xla_ffi/cuda/kernels.h"
#include "xla_ffi/cuda/member.h"

namespace pplx::moe::cuda {

// Attributes and context that every exchange carries.
struct Frame {
  int64_t group;
  int64_t tag;
  std::string_view site;
  int32_t device;
  cudaStream_t stream;
  float* order = nullptr;  // out [], where the call has it
};

// Floats of a ticket.
inline constexpr int kTicketDigits = 4;

inline float* ticket_data(const F32& ticket) {
  require_count(ticket, kTicketDigits, "ticket");
  return ticket.typed_data();
}

// Finds the group and runs `body(call)`, which enqueues; every exception becomes an FFI error.
template <typename Body>
ffi::Error run(Kind kind, const Frame& frame, int64_t tokens, Body&& body) {
  try {
    const auto member = GpuRegistry::instance().get(frame.group, frame.device);
    require(tokens <= member->shape().max_tokens, "more tokens than max_tokens");
    KernelCall call = member->call(kind, static_cast<uint64_t>(frame.tag), frame.site, tokens);
    call.stream = frame.stream;
    call.order = frame.order;
    const cudaError_t status = body(call);
    if (status == cudaSuccess) return ffi::Error::Success();
    return to_ffi(Error(ErrorKind::kFabric,
                        "group '" + member->name() + "': launching " + std::string(kind_name(kind)) + " '" +
                            std::string(frame.site) + "' on CUDA device " + std::to_string(frame.device) +
                            " failed with " + error_text(status)));
  } catch (const Error& error) {
    return to_ffi(error);
  } catch (const std::exception& error) {
    return ffi::Error(ffi::ErrorCode::kInternal, std::string("FabricError: ") + error.what());
  }
}

// The same for a half, which goes in one round.
template <typename Body>
ffi::Error run_half(Kind kind, const Frame& frame, int64_t tokens, Body&& body) {
  return run(kind, frame, tokens, [&](KernelCall& call) {
    require(call.shape.rounds(call.tokens) == 1, "send and recv apart need chunk >= tokens");
    return body(call);
  });
}

#define PPLX_EXCHANGE()                         \
  ffi::Ffi::Bind()                              \
      .Attr<int64_t>("group")                   \
      .Attr<int64_t>("tag")                     \
      .Attr<std::string_view>("site")           \
      .Ctx<ffi::PlatformStream<cudaStream_t>>() \
      .Ctx<ffi::DeviceOrdinal>()

// Handlers only enqueue, so XLA may record them into a CUDA graph.
#define PPLX_HANDLER(name, impl, binding) \
  XLA_FFI_DEFINE_HANDLER(name, impl, binding, {ffi::Traits::kCmdBufferCompatible})

}  // namespace pplx::moe::cuda
