// What the CPU handlers have in common: attributes, finding the group.
#pragma once

#include <exception>
#include <string>
#include <string_view>

#include "xla_ffi/call_frame.h"
#include "xla_ffi/call_site.h"
#include "xla_ffi/cpu_exchange.h"
#include "xla_ffi/registry.h"

namespace pplx::moe {

// Attributes and context that every exchange carries.
struct Frame {
  int64_t group;
  int64_t tag;
  std::string_view site;
  ffi::RunId run_id;
  int32_t device;
};

// Finds the group and runs `body(call)`; every exception becomes an FFI error.
template <typename Body>
ffi::Error run(Kind kind, const Frame& frame, int64_t tokens, Body&& body) {
  try {
    const auto member = Registry::instance().get(frame.group, frame.device);
    const MoeShape& shape = member->shape;
    require(tokens <= shape.max_tokens, "more tokens than max_tokens");
    const Call call{.group = member->group,
                    .shape = shape,
                    .site = call_site(shape, kind, static_cast<uint64_t>(frame.tag), tokens, frame.site),
                    .run = frame.run_id.run_id,
                    .losses = &member->losses};
    if (const auto error = body(call)) return to_ffi(*error);
    return ffi::Error::Success();
  } catch (const Error& error) {
    return to_ffi(error);
  } catch (const std::exception& error) {
    return ffi::Error(ffi::ErrorCode::kInternal, std::string("FabricError: ") + error.what());
  }
}

#define PPLX_EXCHANGE()               \
  ffi::Ffi::Bind()                    \
      .Attr<int64_t>("group")         \
      .Attr<int64_t>("tag")           \
      .Attr<std::string_view>("site") \
      .Ctx<ffi::RunId>()              \
      .Ctx<ffi::DeviceOrdinal>()

}  // namespace pplx::moe
