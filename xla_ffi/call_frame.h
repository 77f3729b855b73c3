// What the handlers of all platforms have in common: checks of operands, bundles of buffers, errors.
#pragma once

#include <string>
#include <string_view>
#include <utility>

#include "proxy/error.h"
#include "xla/ffi/api/ffi.h"
#include "xla_ffi/exchange_args.h"
#include "xla_ffi/layout.h"

namespace pplx::moe {

namespace ffi = xla::ffi;
using F32 = ffi::Buffer<ffi::F32>;
using Int = ffi::Buffer<ffi::S32>;
using Any = ffi::AnyBuffer;
template <typename B>
using Out = ffi::Result<B>;

inline ffi::Error to_ffi(const Error& error) {
  return ffi::Error(ffi::ErrorCode::kInternal, std::string(error_name(error.kind())) + ": " + error.what());
}

inline void require(bool fits, const char* what) {
  if (!fits)
    throw Error(ErrorKind::kInvalidArgument,
                std::string("the compiled program does not fit its group: ") + what);
}

inline ffi::DataType ffi_type(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return ffi::BF16;
    case DType::kFloat16:
      return ffi::F16;
    case DType::kFloat32:
      break;
  }
  return ffi::F32;
}

inline void require_matrix(const Any& buffer, ffi::DataType type, int64_t rows, int64_t columns,
                           const char* what) {
  require(buffer.element_type() == type && buffer.dimensions().size() == 2 &&
              buffer.dimensions()[0] == rows && buffer.dimensions()[1] == columns,
          what);
}

inline void require_rows(const Any& buffer, const MoeShape& shape, int64_t rows, const char* what) {
  require_matrix(buffer, ffi_type(shape.dtype), rows, shape.hidden, what);
}

// Rows as dispatch sends them, and their scales.
inline void require_tokens(const Any& buffer, const MoeShape& shape, int64_t rows, const char* what) {
  if (shape.quant == Quant::kNone) return require_rows(buffer, shape, rows, what);
  require_matrix(buffer, ffi::F8E4M3FN, rows, shape.hidden, what);
}
inline void require_scales(const Any& buffer, const MoeShape& shape, int64_t rows, const char* what) {
  const ffi::DataType type = shape.quant == Quant::kFp8 ? ffi::F32 : ffi::F8E8M0FNU;
  require_matrix(buffer, type, rows, shape.scales(), what);
}

template <typename Buffer>
void require_count(const Buffer& buffer, int64_t count, const char* what) {
  require(buffer.element_count() == static_cast<size_t>(count), what);
}

// The arrays of a route as operands.
struct RouteBuffers {
  Int home, source_slots, slot_start, slot_rows, ok;

  Route view(const MoeShape& shape, int64_t rows) const {
    const int64_t tokens = home.dimensions()[0];
    const int64_t slots = shape.num_ranks * tokens;
    require_count(home, tokens * shape.top_k, "route.home");
    require_count(source_slots, shape.rounds(static_cast<int32_t>(tokens)) * shape.num_ranks,
                  "route.source_slots");
    require_count(slot_start, slots + 1, "route.slot_start");
    require_count(slot_rows, slots * shape.entries(), "route.slot_rows");
    require_count(ok, 1, "route.ok");
    return {.home = home.typed_data(),
            .source_slots = source_slots.typed_data(),
            .slot_start = slot_start.typed_data(),
            .slot_rows = slot_rows.typed_data(),
            .ok = ok.typed_data(),
            .rows = rows};
  }
};

// Results of a dispatch, as one bundle of buffers. Scales come only where tokens are quantised.
struct DispatchedBuffers {
  Any tokens;
  F32 row_weights;
  Int group_sizes, num_rows, num_dropped;
  RouteBuffers route;
  ffi::RemainingRets scales;

  DispatchRecv view(const MoeShape& shape) const {
    const int64_t rows = tokens.dimensions()[0];
    require_tokens(tokens, shape, rows, "tokens");
    require_count(row_weights, rows, "row weights");
    require_count(group_sizes, shape.experts_per_rank, "group sizes");
    void* scale_data = nullptr;
    if (shape.quant != Quant::kNone) {
      auto buffer = scales.get<Any>(0);
      require(!buffer.has_error(), "scales");
      require_scales(**buffer, shape, rows, "scales");
      scale_data = (**buffer).untyped_data();
    }
    return {.tokens = tokens.untyped_data(),
            .scales = scale_data,
            .row_weights = row_weights.typed_data(),
            .group_sizes = group_sizes.typed_data(),
            .num_rows = num_rows.typed_data(),
            .num_dropped = num_dropped.typed_data(),
            .route = route.view(shape, rows)};
  }
};

// Operands of a dispatch. Given scales are the first of the remaining ones.
struct TokenBuffers {
  Any x;
  Int indices;
  F32 weights;
  Int num_tokens, expert_map;
  ffi::RemainingArgs rest;
  bool scaled;

  DispatchSend view(const MoeShape& shape, const Int& home) const {
    const int64_t count = x.dimensions()[0];
    const void* scales = nullptr;
    if (scaled) {
      require(shape.quant != Quant::kNone, "scales");
      require_tokens(x, shape, count, "x");
      const auto buffer = rest.get<Any>(0);
      require(!buffer.has_error(), "scales");
      require_scales(*buffer, shape, count, "scales");
      scales = buffer->untyped_data();
    } else {
      require_rows(x, shape, count, "x");
    }
    require_count(indices, count * shape.top_k, "indices");
    require_count(weights, count * shape.top_k, "weights");
    require_count(expert_map, shape.physical_experts(), "expert_map");
    require_count(home, count * shape.top_k, "route.home");
    return {.x = x.untyped_data(),
            .scales = scales,
            .indices = indices.typed_data(),
            .weights = weights.typed_data(),
            .num_tokens = num_tokens.typed_data(),
            .expert_map = expert_map.typed_data(),
            .home = home.typed_data()};
  }
};

#define PPLX_ROUTE() Arg<Int>().Arg<Int>().Arg<Int>().Arg<Int>().Arg<Int>()
// TokenBuffers: x, indices, weights, num_tokens, expert_map and the rest.
#define PPLX_TOKENS() \
  Attr<bool>("scaled").Arg<Any>().Arg<Int>().Arg<F32>().Arg<Int>().Arg<Int>().RemainingArgs()
// Of DispatchedBuffers: tokens to route.ok, and from route.source_slots on; route.home goes between.
#define PPLX_DISPATCHED() Ret<Any>().Ret<F32>().Ret<Int>().Ret<Int>().Ret<Int>().Ret<Int>()
#define PPLX_RECEIVED() Ret<Int>().Ret<Int>().Ret<Int>().Ret<F32>().RemainingRets()

}  // namespace pplx::moe
