// XLA FFI handlers of the CUDA platform: call frame in, kernels out. No logic of their own.
#include "xla_ffi/cuda/handlers.h"

#include "xla_ffi/cuda/cuda_call_frame.h"

namespace pplx::moe::cuda {
namespace {

ffi::Error dispatch_impl(int64_t group, int64_t tag, std::string_view site, cudaStream_t stream,
                         int32_t device, bool scaled, Any x, Int indices, F32 weights, Int num_tokens,
                         Int expert_map, ffi::RemainingArgs rest, Out<Any> tokens, Out<F32> row_weights,
                         Out<Int> group_sizes, Out<Int> num_rows, Out<Int> num_dropped, Out<Int> ok,
                         Out<Int> home, Out<Int> source_slots, Out<Int> slot_start, Out<Int> slot_rows,
                         Out<F32> order, ffi::RemainingRets scales) {
  const TokenBuffers in{x, indices, weights, num_tokens, expert_map, rest, scaled};
  const DispatchedBuffers out{*tokens,   *row_weights, *group_sizes,
                              *num_rows, *num_dropped, {*home, *source_slots, *slot_start, *slot_rows, *ok},
                              scales};
  return run(
      Kind::kDispatch, {group, tag, site, device, stream, order->typed_data()}, x.dimensions()[0],
      [&](KernelCall& call) { return dispatch(call, in.view(call.shape, *home), out.view(call.shape)); });
}

ffi::Error combine_impl(int64_t group, int64_t tag, std::string_view site, cudaStream_t stream,
                        int32_t device, bool weighted, bool accumulates, Any y, F32 row_weights, Int home,
                        Int source_slots, Int slot_start, Int slot_rows, Int ok, Any accumulate,
                        ffi::RemainingArgs /*after*/, Out<Any> out, Out<F32> order) {
  const int64_t count = home.dimensions()[0];
  return run(Kind::kCombine, {group, tag, site, device, stream, order->typed_data()}, count,
             [&](KernelCall& call) {
               const int64_t rows = y.dimensions()[0];
               require_rows(y, call.shape, rows, "y");
               require_rows(*out, call.shape, count, "combined tokens");
               if (accumulates) require_rows(accumulate, call.shape, count, "accumulate");
               require_count(row_weights, rows, "row weights");
               const RouteBuffers route{home, source_slots, slot_start, slot_rows, ok};
               return combine(call,
                              {.y = y.untyped_data(),
                               .row_weights = weighted ? row_weights.typed_data() : nullptr,
                               .route = route.view(call.shape, rows)},
                              {.home = home.typed_data(),
                               .accumulate = accumulates ? accumulate.untyped_data() : nullptr,
                               .out = out->untyped_data()});
             });
}

ffi::Error combine_transpose_impl(int64_t group, int64_t tag, std::string_view site, cudaStream_t stream,
                                  int32_t device, bool weighted, Any d_out, Any y, F32 row_weights, Int home,
                                  Int source_slots, Int slot_start, Int slot_rows, Int ok, Int group_sizes,
                                  ffi::RemainingArgs /*after*/, Out<Any> d_y, Out<F32> d_row_weights,
                                  Out<F32> order) {
  const int64_t count = home.dimensions()[0];
  return run(Kind::kCombineTranspose, {group, tag, site, device, stream, order->typed_data()}, count,
             [&](KernelCall& call) {
               const int64_t rows = d_y->dimensions()[0];
               require_rows(d_out, call.shape, count, "cotangent");
               require_rows(*d_y, call.shape, rows, "cotangent of y");
               if (weighted) require_rows(y, call.shape, rows, "y");
               require_count(row_weights, rows, "row weights");
               require_count(group_sizes, call.shape.experts_per_rank, "group sizes");
               const Route route =
                   RouteBuffers{home, source_slots, slot_start, slot_rows, ok}.view(call.shape, rows);
               return combine_transpose(call, {.d_out = d_out.untyped_data(), .route = route},
                                        {.y = weighted ? y.untyped_data() : nullptr,
                                         .row_weights = weighted ? row_weights.typed_data() : nullptr,
                                         .route = route,
                                         .group_sizes = group_sizes.typed_data(),
                                         .d_y = d_y->untyped_data(),
                                         .d_row_weights = d_row_weights->typed_data()});
             });
}

ffi::Error dispatch_transpose_impl(int64_t group, int64_t tag, std::string_view site, cudaStream_t stream,
                                   int32_t device, Any d_tokens, F32 d_row_weights, Int home,
                                   Int source_slots, Int slot_start, Int slot_rows, Int ok,
                                   ffi::RemainingArgs /*after*/, Out<Any> d_x, Out<F32> d_weights,
                                   Out<F32> order) {
  const int64_t count = home.dimensions()[0];
  return run(
      Kind::kDispatchTranspose, {group, tag, site, device, stream, order->typed_data()}, count,
      [&](KernelCall& call) {
        const int64_t rows = d_tokens.dimensions()[0];
        require_rows(d_tokens, call.shape, rows, "cotangent of tokens");
        require_rows(*d_x, call.shape, count, "cotangent of x");
        require_count(d_row_weights, rows, "cotangent of weights");
        require_count(*d_weights, count * call.shape.top_k, "cotangent of router weights");
        const RouteBuffers route{home, source_slots, slot_start, slot_rows, ok};
        return dispatch_transpose(
            call,
            {.d_tokens = d_tokens.untyped_data(),
             .d_row_weights = d_row_weights.typed_data(),
             .route = route.view(call.shape, rows)},
            {.home = home.typed_data(), .d_x = d_x->untyped_data(), .d_weights = d_weights->typed_data()});
      });
}

PPLX_HANDLER(kDispatchHandler, dispatch_impl,
             PPLX_EXCHANGE().PPLX_TOKENS().PPLX_DISPATCHED().Ret<Int>().PPLX_RECEIVED());

PPLX_HANDLER(kCombineHandler, combine_impl,
             PPLX_EXCHANGE()
                 .Attr<bool>("weighted")
                 .Attr<bool>("accumulates")
                 .Arg<Any>()
                 .Arg<F32>()
                 .PPLX_ROUTE()
                 .Arg<Any>()
                 .RemainingArgs()
                 .Ret<Any>()
                 .Ret<F32>());

PPLX_HANDLER(kCombineTransposeHandler, combine_transpose_impl,
             PPLX_EXCHANGE()
                 .Attr<bool>("weighted")
                 .Arg<Any>()
                 .Arg<Any>()
                 .Arg<F32>()
                 .PPLX_ROUTE()
                 .Arg<Int>()
                 .RemainingArgs()
                 .Ret<Any>()
                 .Ret<F32>()
                 .Ret<F32>());

PPLX_HANDLER(
    kDispatchTransposeHandler, dispatch_transpose_impl,
    PPLX_EXCHANGE().Arg<Any>().Arg<F32>().PPLX_ROUTE().RemainingArgs().Ret<Any>().Ret<F32>().Ret<F32>());

ffi::Error tie_impl(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  for (size_t i = 0; i < rets.size(); ++i) {
    auto in = args.get<Any>(i);
    auto out = rets.get<Any>(i);
    if (in.has_error() || out.has_error()) return ffi::Error::InvalidArgument("tie: an operand is missing");
    if ((*out)->untyped_data() == in->untyped_data() || in->size_bytes() == 0) continue;
    const cudaError_t status = cudaMemcpyAsync((*out)->untyped_data(), in->untyped_data(), in->size_bytes(),
                                               cudaMemcpyDeviceToDevice, stream);
    if (status != cudaSuccess) {
      return ffi::Error(ffi::ErrorCode::kInternal,
                        "FabricError: tie: copying failed with " + error_text(status));
    }
  }
  return ffi::Error::Success();
}

PPLX_HANDLER(kTieHandler, tie_impl,
             ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>().RemainingArgs().RemainingRets());

}  // namespace

std::map<std::string, void*> cuda_handlers() {
  std::map<std::string, void*> handlers = cuda_half_handlers();
  handlers.insert({{"pplx_dispatch", reinterpret_cast<void*>(+kDispatchHandler)},
                   {"pplx_combine", reinterpret_cast<void*>(+kCombineHandler)},
                   {"pplx_combine_transpose", reinterpret_cast<void*>(+kCombineTransposeHandler)},
                   {"pplx_dispatch_transpose", reinterpret_cast<void*>(+kDispatchTransposeHandler)},
                   {"pplx_tie", reinterpret_cast<void*>(+kTieHandler)}});
  return handlers;
}

}  // namespace pplx::moe::cuda
