// XLA FFI handlers of the exchanges' halves: send posts and returns a ticket, recv waits.
//
// A ticket travels as four float32 of 16 bits each: floats have cotangents, so that the backward pass hands
// the transposed exchange's ticket from recv's derivative to send's.
#include "xla_ffi/cuda/cuda_call_frame.h"
#include "xla_ffi/cuda/handlers.h"

namespace pplx::moe::cuda {
namespace {

ffi::Error dispatch_send_impl(int64_t group, int64_t tag, std::string_view site, cudaStream_t stream,
                              int32_t device, bool scaled, Any x, Int indices, F32 weights, Int num_tokens,
                              Int expert_map, ffi::RemainingArgs rest, Out<F32> ticket, Out<Int> home) {
  const TokenBuffers in{x, indices, weights, num_tokens, expert_map, rest, scaled};
  return run_half(Kind::kDispatch, {group, tag, site, device, stream}, x.dimensions()[0],
                  [&](KernelCall& call) {
                    return dispatch_send(call, in.view(call.shape, *home), ticket_data(*ticket));
                  });
}

ffi::Error dispatch_recv_impl(int64_t group, int64_t tag, std::string_view site, cudaStream_t stream,
                              int32_t device, F32 ticket, Int home, ffi::RemainingArgs /*after*/,
                              Out<Any> tokens, Out<F32> row_weights, Out<Int> group_sizes, Out<Int> num_rows,
                              Out<Int> num_dropped, Out<Int> ok, Out<Int> source_slots, Out<Int> slot_start,
                              Out<Int> slot_rows, Out<F32> order, ffi::RemainingRets scales) {
  const DispatchedBuffers out{*tokens,   *row_weights, *group_sizes,
                              *num_rows, *num_dropped, {home, *source_slots, *slot_start, *slot_rows, *ok},
                              scales};
  return run_half(
      Kind::kDispatch, {group, tag, site, device, stream, order->typed_data()}, home.dimensions()[0],
      [&](KernelCall& call) { return dispatch_recv(call, out.view(call.shape), ticket_data(ticket)); });
}

ffi::Error combine_send_impl(int64_t group, int64_t tag, std::string_view site, cudaStream_t stream,
                             int32_t device, bool weighted, Any y, F32 row_weights, Int home,
                             Int source_slots, Int slot_start, Int slot_rows, Int ok,
                             ffi::RemainingArgs /*after*/, Out<F32> ticket) {
  return run_half(Kind::kCombine, {group, tag, site, device, stream}, home.dimensions()[0],
                  [&](KernelCall& call) {
                    const int64_t rows = y.dimensions()[0];
                    require_rows(y, call.shape, rows, "y");
                    require_count(row_weights, rows, "row weights");
                    const RouteBuffers route{home, source_slots, slot_start, slot_rows, ok};
                    return combine_send(call,
                                        {.y = y.untyped_data(),
                                         .row_weights = weighted ? row_weights.typed_data() : nullptr,
                                         .route = route.view(call.shape, rows)},
                                        ticket_data(*ticket));
                  });
}

ffi::Error combine_recv_impl(int64_t group, int64_t tag, std::string_view site, cudaStream_t stream,
                             int32_t device, bool accumulates, F32 ticket, Int home, Any accumulate,
                             ffi::RemainingArgs /*after*/, Out<Any> out, Out<F32> order) {
  const int64_t count = home.dimensions()[0];
  return run_half(Kind::kCombine, {group, tag, site, device, stream, order->typed_data()}, count,
                  [&](KernelCall& call) {
                    require_count(home, count * call.shape.top_k, "route.home");
                    require_rows(*out, call.shape, count, "combined tokens");
                    if (accumulates) require_rows(accumulate, call.shape, count, "accumulate");
                    return combine_recv(call,
                                        {.home = home.typed_data(),
                                         .accumulate = accumulates ? accumulate.untyped_data() : nullptr,
                                         .out = out->untyped_data()},
                                        ticket_data(ticket));
                  });
}

ffi::Error combine_transpose_send_impl(int64_t group, int64_t tag, std::string_view site, cudaStream_t stream,
                                       int32_t device, int64_t rows, Any d_out, Int home, Int source_slots,
                                       Int slot_start, Int slot_rows, Int ok, ffi::RemainingArgs /*after*/,
                                       Out<F32> ticket) {
  const int64_t count = home.dimensions()[0];
  return run_half(Kind::kCombineTranspose, {group, tag, site, device, stream}, count, [&](KernelCall& call) {
    require_rows(d_out, call.shape, count, "cotangent");
    const RouteBuffers route{home, source_slots, slot_start, slot_rows, ok};
    return combine_transpose_send(
        call, {.d_out = d_out.untyped_data(), .route = route.view(call.shape, rows)}, ticket_data(*ticket));
  });
}

ffi::Error combine_transpose_recv_impl(int64_t group, int64_t tag, std::string_view site, cudaStream_t stream,
                                       int32_t device, bool weighted, F32 ticket, Any y, F32 row_weights,
                                       Int home, Int source_slots, Int slot_start, Int slot_rows, Int ok,
                                       Int group_sizes, ffi::RemainingArgs /*after*/, Out<Any> d_y,
                                       Out<F32> d_row_weights, Out<F32> order) {
  const int64_t count = home.dimensions()[0];
  return run_half(Kind::kCombineTranspose, {group, tag, site, device, stream, order->typed_data()}, count,
                  [&](KernelCall& call) {
                    const int64_t rows = d_y->dimensions()[0];
                    require_rows(*d_y, call.shape, rows, "cotangent of y");
                    if (weighted) require_rows(y, call.shape, rows, "y");
                    require_count(row_weights, rows, "row weights");
                    require_count(group_sizes, call.shape.experts_per_rank, "group sizes");
                    const RouteBuffers route{home, source_slots, slot_start, slot_rows, ok};
                    return combine_transpose_recv(
                        call,
                        {.y = weighted ? y.untyped_data() : nullptr,
                         .row_weights = weighted ? row_weights.typed_data() : nullptr,
                         .route = route.view(call.shape, rows),
                         .group_sizes = group_sizes.typed_data(),
                         .d_y = d_y->untyped_data(),
                         .d_row_weights = d_row_weights->typed_data()},
                        ticket_data(ticket));
                  });
}

ffi::Error dispatch_transpose_send_impl(int64_t group, int64_t tag, std::string_view site,
                                        cudaStream_t stream, int32_t device, Any d_tokens, F32 d_row_weights,
                                        Int home, Int source_slots, Int slot_start, Int slot_rows, Int ok,
                                        ffi::RemainingArgs /*after*/, Out<F32> ticket) {
  const int64_t count = home.dimensions()[0];
  return run_half(Kind::kDispatchTranspose, {group, tag, site, device, stream}, count, [&](KernelCall& call) {
    const int64_t rows = d_tokens.dimensions()[0];
    require_rows(d_tokens, call.shape, rows, "cotangent of tokens");
    require_count(d_row_weights, rows, "cotangent of weights");
    const RouteBuffers route{home, source_slots, slot_start, slot_rows, ok};
    return dispatch_transpose_send(call,
                                   {.d_tokens = d_tokens.untyped_data(),
                                    .d_row_weights = d_row_weights.typed_data(),
                                    .route = route.view(call.shape, rows)},
                                   ticket_data(*ticket));
  });
}

ffi::Error dispatch_transpose_recv_impl(int64_t group, int64_t tag, std::string_view site,
                                        cudaStream_t stream, int32_t device, F32 ticket, Int home,
                                        ffi::RemainingArgs /*after*/, Out<Any> d_x, Out<F32> d_weights,
                                        Out<F32> order) {
  const int64_t count = home.dimensions()[0];
  return run_half(
      Kind::kDispatchTranspose, {group, tag, site, device, stream, order->typed_data()}, count,
      [&](KernelCall& call) {
        require_rows(*d_x, call.shape, count, "cotangent of x");
        require_count(*d_weights, count * call.shape.top_k, "cotangent of router weights");
        require_count(home, count * call.shape.top_k, "route.home");
        return dispatch_transpose_recv(
            call,
            {.home = home.typed_data(), .d_x = d_x->untyped_data(), .d_weights = d_weights->typed_data()},
            ticket_data(ticket));
      });
}

PPLX_HANDLER(kDispatchSend, dispatch_send_impl, PPLX_EXCHANGE().PPLX_TOKENS().Ret<F32>().Ret<Int>());

PPLX_HANDLER(kDispatchRecv, dispatch_recv_impl,
             PPLX_EXCHANGE().Arg<F32>().Arg<Int>().RemainingArgs().PPLX_DISPATCHED().PPLX_RECEIVED());

PPLX_HANDLER(
    kCombineSend, combine_send_impl,
    PPLX_EXCHANGE().Attr<bool>("weighted").Arg<Any>().Arg<F32>().PPLX_ROUTE().RemainingArgs().Ret<F32>());

PPLX_HANDLER(kCombineRecv, combine_recv_impl,
             PPLX_EXCHANGE()
                 .Attr<bool>("accumulates")
                 .Arg<F32>()
                 .Arg<Int>()
                 .Arg<Any>()
                 .RemainingArgs()
                 .Ret<Any>()
                 .Ret<F32>());

PPLX_HANDLER(kCombineTransposeSend, combine_transpose_send_impl,
             PPLX_EXCHANGE().Attr<int64_t>("rows").Arg<Any>().PPLX_ROUTE().RemainingArgs().Ret<F32>());

PPLX_HANDLER(kCombineTransposeRecv, combine_transpose_recv_impl,
             PPLX_EXCHANGE()
                 .Attr<bool>("weighted")
                 .Arg<F32>()
                 .Arg<Any>()
                 .Arg<F32>()
                 .PPLX_ROUTE()
                 .Arg<Int>()
                 .RemainingArgs()
                 .Ret<Any>()
                 .Ret<F32>()
                 .Ret<F32>());

PPLX_HANDLER(kDispatchTransposeSend, dispatch_transpose_send_impl,
             PPLX_EXCHANGE().Arg<Any>().Arg<F32>().PPLX_ROUTE().RemainingArgs().Ret<F32>());

PPLX_HANDLER(kDispatchTransposeRecv, dispatch_transpose_recv_impl,
             PPLX_EXCHANGE().Arg<F32>().Arg<Int>().RemainingArgs().Ret<Any>().Ret<F32>().Ret<F32>());

}  // namespace

std::map<std::string, void*> cuda_half_handlers() {
  return {{"pplx_dispatch_send", reinterpret_cast<void*>(+kDispatchSend)},
          {"pplx_dispatch_recv", reinterpret_cast<void*>(+kDispatchRecv)},
          {"pplx_combine_send", reinterpret_cast<void*>(+kCombineSend)},
          {"pplx_combine_recv", reinterpret_cast<void*>(+kCombineRecv)},
          {"pplx_combine_transpose_send", reinterpret_cast<void*>(+kCombineTransposeSend)},
          {"pplx_combine_transpose_recv", reinterpret_cast<void*>(+kCombineTransposeRecv)},
          {"pplx_dispatch_transpose_send", reinterpret_cast<void*>(+kDispatchTransposeSend)},
          {"pplx_dispatch_transpose_recv", reinterpret_cast<void*>(+kDispatchTransposeRecv)}};
}

}  // namespace pplx::moe::cuda
