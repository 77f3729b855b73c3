// Operands and results of the exchanges' halves, as the call frame gives them: host or device pointers.
#pragma once

#include <cstdint>

namespace pplx::moe {

// What combine and the derivatives need to know about a dispatch; arrays of the `route` pytree.
// Sizes: T tokens, R ranks, N = R * T slots, P = N * entries() pairs, M rows.
struct Route {
  int32_t* home;          // [T, K] physical experts of this rank's tokens, kNotRouted or kPastEnd
  int32_t* source_slots;  // [rounds, R] slots received
  int32_t* slot_start;    // [N + 1] first pair of each slot, in (round, source, slot) order
  int32_t* slot_rows;     // [P] row of each pair, -1 where dropped
  int32_t* ok;            // [] 1, or 0 when the dispatch failed
  int64_t rows;           // M
};

// Each exchange has a sending half, which waits for no message of its own, and a receiving half.

struct DispatchSend {
  const void* x;              // [T, H], quantised already where scales is given
  const void* scales;         // [T, scales()], or null
  const int32_t* indices;     // [T, K]
  const float* weights;       // [T, K]
  const int32_t* num_tokens;  // []
  const int32_t* expert_map;  // [R * experts_per_rank] logical expert on each physical one, -1: none
  int32_t* home;              // out, of the route
};

struct DispatchRecv {
  void* tokens;          // out [M, H]
  void* scales;          // out [M, scales()]
  float* row_weights;    // out [M]
  int32_t* group_sizes;  // out [experts_per_rank]
  int32_t* num_rows;     // out []
  int32_t* num_dropped;  // out []
  Route route;           // out, but for home
};

struct CombineSend {
  const void* y;             // [M, H]
  const float* row_weights;  // [M], or null: unweighted
  Route route;
};

struct CombineRecv {
  const int32_t* home;
  const void* accumulate;  // [T, H], or null
  void* out;               // out [T, H]
};

struct CombineTransposeSend {
  const void* d_out;  // [T, H]
  Route route;
};

struct CombineTransposeRecv {
  const void* y;             // [M, H], null when unweighted
  const float* row_weights;  // [M], null when unweighted
  Route route;
  const int32_t* group_sizes;  // [experts_per_rank]
  void* d_y;                   // out [M, H]
  float* d_row_weights;        // out [M]
};

struct DispatchTransposeSend {
  const void* d_tokens;        // [M, H]
  const float* d_row_weights;  // [M]
  Route route;
};

struct DispatchTransposeRecv {
  const int32_t* home;
  void* d_x;         // out [T, H]
  float* d_weights;  // out [T, K]
};

}  // namespace pplx::moe
