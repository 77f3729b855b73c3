// XLA FFI handlers of the CPU platform: call frame in, exchange out. No logic of their own.
#include <cstring>
#include <exception>
#include <string>

#include "xla/ffi/api/ffi.h"
#include "xla_ffi/cpu_exchange.h"
#include "xla_ffi/handlers.h"
#include "xla_ffi/registry.h"

namespace pplx::moe {
namespace {

namespace ffi = xla::ffi;
using F32 = ffi::Buffer<ffi::F32>;
using Int = ffi::Buffer<ffi::S32>;
using Any = ffi::AnyBuffer;
template <typename B>
using Out = ffi::Result<B>;

ffi::Error to_ffi(const Error& error) {
  return ffi::Error(ffi::ErrorCode::kInternal, std::string(error_name(error.kind())) + ": " + error.what());
}

// Attributes that every exchange carries.
struct Attributes {
  int64_t group;
  int64_t tag;
  std::string_view site;
};

void require(bool fits, const char* what) {
  if (!fits)
    throw Error(ErrorKind::kInvalidArgument,
                std::string("the compiled program does not fit its group: ") + what);
}

void require_rows(const Any& buffer, const MoeShape& shape, int64_t rows, const char* what) {
  const ffi::DataType expected = shape.dtype == DType::kFloat32 ? ffi::F32 : ffi::BF16;
  require(buffer.element_type() == expected && buffer.dimensions().size() == 2 &&
              buffer.dimensions()[0] == rows && buffer.dimensions()[1] == shape.hidden,
          what);
}

// Finds the group and runs `body(call)`; every exception becomes an FFI error.
template <typename Body>
ffi::Error run(Kind kind, const Attributes& attributes, int64_t tokens, ffi::RunId run_id, int32_t device,
               Body&& body) {
  try {
    const auto member = Registry::instance().get(attributes.group, device);
    const MoeShape& shape = member->shape;
    require(tokens <= shape.max_tokens, "more tokens than max_tokens");
    const Call call{.group = member->group,
                    .shape = shape,
                    .site = {.kind = kind,
                             .tag = static_cast<uint64_t>(attributes.tag),
                             .tokens = static_cast<uint32_t>(tokens),
                             .hidden = static_cast<uint32_t>(shape.hidden),
                             .dtype = static_cast<uint8_t>(shape.dtype),
                             .top_k = static_cast<uint8_t>(shape.top_k),
                             .local_experts = static_cast<uint16_t>(shape.experts_per_rank),
                             .name = attributes.site},
                    .run = run_id.run_id};
    if (const auto error = body(call)) return to_ffi(*error);
    return ffi::Error::Success();
  } catch (const Error& error) {
    return to_ffi(error);
  } catch (const std::exception& error) {
    return ffi::Error(ffi::ErrorCode::kInternal, std::string("FabricError: ") + error.what());
  }
}

// The arrays of a route as operands.
struct RouteBuffers {
  Int home, source_slots, slot_start, slot_rows, ok;

  Route view(const MoeShape& shape, int64_t rows) const {
    const int64_t tokens = home.dimensions()[0];
    const int64_t slots = shape.num_ranks * tokens;
    require(home.element_count() == static_cast<size_t>(tokens * shape.top_k), "route.home");
    require(source_slots.element_count() ==
                static_cast<size_t>(shape.rounds(static_cast<int32_t>(tokens)) * shape.num_ranks),
            "route.source_slots");
    require(slot_start.element_count() == static_cast<size_t>(slots + 1), "route.slot_start");
    require(slot_rows.element_count() == static_cast<size_t>(slots * shape.entries()), "route.slot_rows");
    return {.home = home.typed_data(),
            .source_slots = source_slots.typed_data(),
            .slot_start = slot_start.typed_data(),
            .slot_rows = slot_rows.typed_data(),
            .ok = ok.typed_data(),
            .rows = rows};
  }
};

ffi::Error dispatch_impl(int64_t group, int64_t tag, std::string_view site, ffi::RunId run_id, int32_t device,
                         Any x, Int indices, F32 weights, Int num_tokens, Int expert_map,
                         ffi::RemainingArgs /*after*/, Out<Any> tokens, Out<F32> row_weights,
                         Out<Int> group_sizes, Out<Int> num_rows, Out<Int> num_dropped, Out<Int> ok,
                         Out<Int> home, Out<Int> source_slots, Out<Int> slot_start, Out<Int> slot_rows,
                         Out<F32> order) {
  *order->typed_data() = 0.0F;
  const int64_t count = x.dimensions()[0];
  return run(Kind::kDispatch, {group, tag, site}, count, run_id, device, [&](const Call& call) {
    const MoeShape& shape = call.shape;
    const int64_t rows = tokens->dimensions()[0];
    require_rows(x, shape, count, "x");
    require_rows(*tokens, shape, rows, "tokens");
    require(indices.element_count() == static_cast<size_t>(count * shape.top_k), "indices");
    require(weights.element_count() == indices.element_count(), "weights");
    require(expert_map.element_count() == static_cast<size_t>(shape.physical_experts()), "expert_map");
    const RouteBuffers route{*home, *source_slots, *slot_start, *slot_rows, *ok};
    return dispatch(call, {.x = x.untyped_data(),
                           .indices = indices.typed_data(),
                           .weights = weights.typed_data(),
                           .num_tokens = *num_tokens.typed_data(),
                           .expert_map = expert_map.typed_data(),
                           .tokens = tokens->untyped_data(),
                           .row_weights = row_weights->typed_data(),
                           .group_sizes = group_sizes->typed_data(),
                           .num_rows = num_rows->typed_data(),
                           .num_dropped = num_dropped->typed_data(),
                           .route = route.view(shape, rows)});
  });
}

ffi::Error combine_impl(int64_t group, int64_t tag, std::string_view site, bool weighted, bool accumulates,
                        ffi::RunId run_id, int32_t device, Any y, F32 row_weights, Int home, Int source_slots,
                        Int slot_start, Int slot_rows, Int ok, Any accumulate, ffi::RemainingArgs /*after*/,
                        Out<Any> out, Out<F32> order) {
  *order->typed_data() = 0.0F;
  const int64_t count = home.dimensions()[0];
  return run(Kind::kCombine, {group, tag, site}, count, run_id, device, [&](const Call& call) {
    const int64_t rows = y.dimensions()[0];
    require_rows(y, call.shape, rows, "y");
    require_rows(*out, call.shape, count, "combined tokens");
    if (accumulates) require_rows(accumulate, call.shape, count, "accumulate");
    require(row_weights.element_count() == static_cast<size_t>(rows), "row weights");
    return combine(
        call, {.y = y.untyped_data(),
               .row_weights = weighted ? row_weights.typed_data() : nullptr,
               .accumulate = accumulates ? accumulate.untyped_data() : nullptr,
               .route = RouteBuffers{home, source_slots, slot_start, slot_rows, ok}.view(call.shape, rows),
               .out = out->untyped_data()});
  });
}

ffi::Error combine_transpose_impl(int64_t group, int64_t tag, std::string_view site, bool weighted,
                                  ffi::RunId run_id, int32_t device, Any d_out, Any y, F32 row_weights,
                                  Int home, Int source_slots, Int slot_start, Int slot_rows, Int ok,
                                  Int group_sizes, ffi::RemainingArgs /*after*/, Out<Any> d_y,
                                  Out<F32> d_row_weights, Out<F32> order) {
  *order->typed_data() = 0.0F;
  const int64_t count = home.dimensions()[0];
  return run(Kind::kCombineTranspose, {group, tag, site}, count, run_id, device, [&](const Call& call) {
    const int64_t rows = d_y->dimensions()[0];
    require_rows(d_out, call.shape, count, "cotangent");
    require_rows(*d_y, call.shape, rows, "cotangent of y");
    if (weighted) require_rows(y, call.shape, rows, "y");
    require(row_weights.element_count() == static_cast<size_t>(rows), "row weights");
    require(group_sizes.element_count() == static_cast<size_t>(call.shape.experts_per_rank), "group sizes");
    return combine_transpose(
        call, {.d_out = d_out.untyped_data(),
               .y = weighted ? y.untyped_data() : nullptr,
               .row_weights = weighted ? row_weights.typed_data() : nullptr,
               .route = RouteBuffers{home, source_slots, slot_start, slot_rows, ok}.view(call.shape, rows),
               .group_sizes = group_sizes.typed_data(),
               .d_y = d_y->untyped_data(),
               .d_row_weights = d_row_weights->typed_data()});
  });
}

ffi::Error dispatch_transpose_impl(int64_t group, int64_t tag, std::string_view site, ffi::RunId run_id,
                                   int32_t device, Any d_tokens, F32 d_row_weights, Int home,
                                   Int source_slots, Int slot_start, Int slot_rows, Int ok,
                                   ffi::RemainingArgs /*after*/, Out<Any> d_x, Out<F32> d_weights,
                                   Out<F32> order) {
  *order->typed_data() = 0.0F;
  const int64_t count = home.dimensions()[0];
  return run(Kind::kDispatchTranspose, {group, tag, site}, count, run_id, device, [&](const Call& call) {
    const int64_t rows = d_tokens.dimensions()[0];
    require_rows(d_tokens, call.shape, rows, "cotangent of tokens");
    require_rows(*d_x, call.shape, count, "cotangent of x");
    require(d_row_weights.element_count() == static_cast<size_t>(rows), "cotangent of weights");
    return dispatch_transpose(
        call, {.d_tokens = d_tokens.untyped_data(),
               .d_row_weights = d_row_weights.typed_data(),
               .route = RouteBuffers{home, source_slots, slot_start, slot_rows, ok}.view(call.shape, rows),
               .d_x = d_x->untyped_data(),
               .d_weights = d_weights->typed_data()});
  });
}

#define PPLX_EXCHANGE() \
  ffi::Ffi::Bind().Attr<int64_t>("group").Attr<int64_t>("tag").Attr<std::string_view>("site")

#define PPLX_ROUTE() Arg<Int>().Arg<Int>().Arg<Int>().Arg<Int>().Arg<Int>()

XLA_FFI_DEFINE_HANDLER(kDispatchHandler, dispatch_impl,
                       PPLX_EXCHANGE()
                           .Ctx<ffi::RunId>()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Arg<Any>()
                           .Arg<Int>()
                           .Arg<F32>()
                           .Arg<Int>()
                           .Arg<Int>()
                           .RemainingArgs()
                           .Ret<Any>()
                           .Ret<F32>()
                           .Ret<Int>()
                           .Ret<Int>()
                           .Ret<Int>()
                           .Ret<Int>()
                           .Ret<Int>()
                           .Ret<Int>()
                           .Ret<Int>()
                           .Ret<Int>()
                           .Ret<F32>());

XLA_FFI_DEFINE_HANDLER(kCombineHandler, combine_impl,
                       PPLX_EXCHANGE()
                           .Attr<bool>("weighted")
                           .Attr<bool>("accumulates")
                           .Ctx<ffi::RunId>()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Arg<Any>()
                           .Arg<F32>()
                           .PPLX_ROUTE()
                           .Arg<Any>()
                           .RemainingArgs()
                           .Ret<Any>()
                           .Ret<F32>());

XLA_FFI_DEFINE_HANDLER(kCombineTransposeHandler, combine_transpose_impl,
                       PPLX_EXCHANGE()
                           .Attr<bool>("weighted")
                           .Ctx<ffi::RunId>()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Arg<Any>()
                           .Arg<Any>()
                           .Arg<F32>()
                           .PPLX_ROUTE()
                           .Arg<Int>()
                           .RemainingArgs()
                           .Ret<Any>()
                           .Ret<F32>()
                           .Ret<F32>());

XLA_FFI_DEFINE_HANDLER(kDispatchTransposeHandler, dispatch_transpose_impl,
                       PPLX_EXCHANGE()
                           .Ctx<ffi::RunId>()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Arg<Any>()
                           .Arg<F32>()
                           .PPLX_ROUTE()
                           .RemainingArgs()
                           .Ret<Any>()
                           .Ret<F32>()
                           .Ret<F32>());

ffi::Error tie_impl(ffi::RemainingArgs args, ffi::RemainingRets rets) {
  for (size_t i = 0; i < rets.size(); ++i) {
    auto in = args.get<Any>(i);
    auto out = rets.get<Any>(i);
    if (in.has_error() || out.has_error()) return ffi::Error::InvalidArgument("tie: an operand is missing");
    if ((*out)->untyped_data() != in->untyped_data()) {
      std::memcpy((*out)->untyped_data(), in->untyped_data(), in->size_bytes());
    }
  }
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER(kTieHandler, tie_impl, ffi::Ffi::Bind().RemainingArgs().RemainingRets());

}  // namespace

std::map<std::string, void*> cpu_handlers() {
  return {{"pplx_dispatch", reinterpret_cast<void*>(+kDispatchHandler)},
          {"pplx_combine", reinterpret_cast<void*>(+kCombineHandler)},
          {"pplx_combine_transpose", reinterpret_cast<void*>(+kCombineTransposeHandler)},
          {"pplx_dispatch_transpose", reinterpret_cast<void*>(+kDispatchTransposeHandler)},
          {"pplx_tie", reinterpret_cast<void*>(+kTieHandler)}};
}

}  // namespace pplx::moe
