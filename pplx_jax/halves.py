"""The exchanges' halves: a send posts messages, its recv waits for everybody's.

What a send hands to its recv is a ticket, four float32. Being a float it has a cotangent, and that is the
ticket of the transposed exchange: the derivative of a recv is a send, the derivative of a send the recv for
it, so that what overlaps forward overlaps backward. A ticket whose recv nobody differentiates comes back as
zero, and then nothing is exchanged.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from pplx_jax import ops
from pplx_jax.ops import F32, I32, After, Call, Dispatched, RouteArrays, Rows, Tokens, carry, uncarry

_TICKET = ((4,), F32)


def _order(ticket: jax.Array) -> jax.Array:
    """A zero that depends on the ticket; XLA doesn't fold x - x of floats."""
    return ticket[0] - ticket[0]


# --- dispatch --------------------------------------------------------------------------------------------


def _dispatch_send_call(call: Call, tokens: Tokens, after: After) -> tuple[jax.Array, jax.Array]:
    operands, attributes = ops.dispatch_operands(tokens)
    ticket, home = ops.exchange(
        "pplx_dispatch_send",
        [_TICKET, (tokens.indices.shape, I32)],
        [*operands, *after],
        **attributes,
        **call.attributes(),
    )
    return ticket, home


def dispatch_send(call: Call, tokens: Tokens, after: After) -> tuple[jax.Array, jax.Array]:
    """Posts tokens to their experts; returns the ticket and ``route.home``."""
    ticket, home = uncarry(_dispatch_send(call, carry(tokens), carry(after)))
    return ticket, home


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dispatch_send(call: Call, tokens: Any, after: Any) -> Any:
    return carry(_dispatch_send_call(call, uncarry(tokens), uncarry(after)))


def _dispatch_send_fwd(call: Call, tokens: Any, after: Any) -> tuple[Any, Any]:
    ticket, home = _dispatch_send(call, tokens, after)
    return (ticket, home), (uncarry(home), ops.saved_tokens(uncarry(tokens)), after)


def _dispatch_send_bwd(call: Call, residuals: Any, cotangents: tuple[jax.Array, Any]) -> tuple[Any, ...]:
    home, tokens, after = residuals
    d_x, d_weights, order = ops.exchange(
        "pplx_dispatch_transpose_recv",
        ops.transpose_results(call, home),
        [cotangents[0], home],
        **call.attributes(),
    )
    return ops.token_cotangents(tokens, d_x, d_weights), ops.after_cotangents(after, order)


_dispatch_send.defvjp(_dispatch_send_fwd, _dispatch_send_bwd)


def _dispatch_recv_call(call: Call, ticket: jax.Array, home: jax.Array, after: After) -> Dispatched:
    first, last = ops.dispatch_results(call)
    out = ops.exchange("pplx_dispatch_recv", [*first, *last], [ticket, home, *after], **call.attributes())
    return ops.dispatched(call, out[: len(first)], home, out[len(first) :])


def dispatch_recv(call: Call, ticket: jax.Array, home: jax.Array, after: After) -> Dispatched:
    """Waits for everybody's tokens."""
    out: Dispatched = uncarry(_dispatch_recv(call, ticket, carry(home), carry(after)))
    return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dispatch_recv(call: Call, ticket: jax.Array, home: Any, after: Any) -> Any:
    return carry(_dispatch_recv_call(call, ticket, uncarry(home), uncarry(after)))


def _dispatch_recv_fwd(call: Call, ticket: jax.Array, home: Any, after: Any) -> tuple[Any, Any]:
    out = _dispatch_recv(call, ticket, home, after)
    return out, (uncarry(out.route), after)


def _dispatch_recv_bwd(call: Call, residuals: Any, cotangents: Dispatched) -> tuple[Any, ...]:
    route, after = residuals
    (ticket,) = ops.exchange(
        "pplx_dispatch_transpose_send",
        [_TICKET],
        [cotangents.values, cotangents.row_weights, *route, cotangents.order],
        **call.attributes(),
    )
    return ticket, None, ops.after_cotangents(after, _order(ticket))


_dispatch_recv.defvjp(_dispatch_recv_fwd, _dispatch_recv_bwd)


# --- combine ---------------------------------------------------------------------------------------------


def _combine_send_call(call: Call, rows: Rows, after: After) -> jax.Array:
    (ticket,) = ops.exchange(
        "pplx_combine_send",
        [_TICKET],
        [rows.y, rows.row_weights, *rows.route, *after],
        weighted=call.weighted,
        **call.attributes(),
    )
    return ticket


def combine_send(call: Call, rows: Rows, after: After) -> jax.Array:
    """Reduces and posts the experts' outputs; returns the ticket."""
    ticket: jax.Array = _combine_send(call, carry(rows), carry(after))
    return ticket


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _combine_send(call: Call, rows: Any, after: Any) -> jax.Array:
    return _combine_send_call(call, uncarry(rows), uncarry(after))


def _combine_send_fwd(call: Call, rows: Any, after: Any) -> tuple[jax.Array, Any]:
    return _combine_send(call, rows, after), (ops.saved_rows(call, uncarry(rows)), after)


def _combine_send_bwd(call: Call, residuals: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    rows, after = residuals
    d_y, d_row_weights, order = ops.exchange(
        "pplx_combine_transpose_recv",
        ops.row_results(call),
        [cotangent, rows.y, rows.row_weights, *rows.route, rows.group_sizes],
        weighted=call.weighted,
        **call.attributes(),
    )
    return ops.row_cotangents(d_y, d_row_weights), ops.after_cotangents(after, order)


_combine_send.defvjp(_combine_send_fwd, _combine_send_bwd)


def _combine_recv_call(
    call: Call, ticket: jax.Array, route: RouteArrays, accumulate: jax.Array | None, after: After
) -> tuple[jax.Array, jax.Array]:
    out, order = ops.exchange(
        "pplx_combine_recv",
        ops.combine_results(call, route.home),
        [ticket, route.home, route.ok if accumulate is None else accumulate, *after],
        accumulates=accumulate is not None,
        **call.attributes(),
    )
    return out, order


def combine_recv(
    call: Call, ticket: jax.Array, route: RouteArrays, accumulate: jax.Array | None, after: After
) -> jax.Array:
    """Waits for everybody's rows and sums them."""
    out: jax.Array = _combine_recv(call, ticket, carry(route), accumulate, carry(after))[0]
    return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _combine_recv(
    call: Call, ticket: jax.Array, route: Any, accumulate: jax.Array | None, after: Any
) -> tuple[jax.Array, jax.Array]:
    return _combine_recv_call(call, ticket, uncarry(route), accumulate, uncarry(after))


def _combine_recv_fwd(
    call: Call, ticket: jax.Array, route: Any, accumulate: jax.Array | None, after: Any
) -> tuple[Any, Any]:
    out = _combine_recv(call, ticket, route, accumulate, after)
    return out, (uncarry(route), accumulate is not None, after)


def _combine_recv_bwd(call: Call, residuals: Any, cotangents: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
    route, accumulated, after = residuals
    d_out, d_order = cotangents
    (ticket,) = ops.exchange(
        "pplx_combine_transpose_send",
        [_TICKET],
        [d_out, *route, d_order],
        rows=np.int64(call.rows),
        **call.attributes(),
    )
    return (
        ticket,
        None,
        ops.accumulate_cotangent(route.home, d_out) if accumulated else None,
        ops.after_cotangents(after, _order(ticket)),
    )


_combine_recv.defvjp(_combine_recv_fwd, _combine_recv_bwd)
