// The four exchanges on host memory: what the CPU platform's custom calls run. Knows nothing of XLA.
#pragma once

#include <cstdint>
#include <optional>

#include "proxy/moe/exchange_group.h"
#include "xla_ffi/exchange_args.h"
#include "xla_ffi/layout.h"
#include "xla_ffi/losses.h"

namespace pplx::moe {

// One call of a handler.
struct Call {
  ExchangeGroup& group;
  const MoeShape& shape;
  CallSite site;
  int64_t run;               // tells executions of a program apart
  Losses* losses = nullptr;  // where dispatch counts what absent ranks cost

  int32_t tokens() const { return static_cast<int32_t>(site.tokens); }
  int32_t rounds() const { return shape.rounds(tokens()); }
};

// What a send hands to its recv; never 0. A transposed recv takes 0 for a send whose recv has no derivative:
// then nothing is exchanged and the results are zero.
using Ticket = uint64_t;

// Each takes part in its exchanges and writes every output. On failure outputs are poisoned (NaN, counts
// and ok 0) and nothing is thrown but for a ticket that is not under way; an error to hand to XLA is
// returned: one that happened in an earlier execution, or invalid arguments. Halves go in one round.
std::optional<Error> dispatch(const Call& call, const DispatchSend& send, const DispatchRecv& recv);
std::optional<Error> dispatch_send(const Call& call, const DispatchSend& send, Ticket& ticket);
std::optional<Error> dispatch_recv(const Call& call, const DispatchRecv& recv, Ticket ticket);

std::optional<Error> combine(const Call& call, const CombineSend& send, const CombineRecv& recv);
std::optional<Error> combine_send(const Call& call, const CombineSend& send, Ticket& ticket);
std::optional<Error> combine_recv(const Call& call, const CombineRecv& recv, Ticket ticket);

std::optional<Error> combine_transpose(const Call& call, const CombineTransposeSend& send,
                                       const CombineTransposeRecv& recv);
std::optional<Error> combine_transpose_send(const Call& call, const CombineTransposeSend& send,
                                            Ticket& ticket);
std::optional<Error> combine_transpose_recv(const Call& call, const CombineTransposeRecv& recv,
                                            Ticket ticket);

std::optional<Error> dispatch_transpose(const Call& call, const DispatchTransposeSend& send,
                                        const DispatchTransposeRecv& recv);
std::optional<Error> dispatch_transpose_send(const Call& call, const DispatchTransposeSend& send,
                                             Ticket& ticket);
std::optional<Error> dispatch_transpose_recv(const Call& call, const DispatchTransposeRecv& recv,
                                             Ticket ticket);

}  // namespace pplx::moe
