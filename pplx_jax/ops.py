"""The custom calls and their derivative rules: pure functions of arrays and a static ``Call``.

dispatch and combine are each other's transpose. Every call also returns ``order``, a float32 zero that XLA
cannot know to be zero: it carries the ordering of ``after=`` into the backward pass, reversed.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from pplx_jax import _core, compat

for _name, _handler in _core.registrations().items():
    jax.ffi.register_ffi_target(_name, _handler, platform="cpu")

#: Operands that only order: float32 or integer arrays of at most one element.
After: TypeAlias = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static about one call site; part of the HLO, equal on all ranks."""

    group: int
    tag: int
    site: str
    hidden: int
    dtype: str
    rows: int
    """M"""
    experts_per_rank: int
    slots: int
    """R * T"""
    entries: int
    """Most experts of a token on one rank."""
    messages: int
    """rounds * R"""
    weighted: bool = True

    def attributes(self) -> dict[str, Any]:
        """Attributes of every custom call."""
        return {"group": np.int64(self.group), "tag": np.int64(self.tag), "site": self.site}


class RouteArrays(NamedTuple):
    """Integer arrays of a route; docs/protocol.md, section "Route"."""

    home: jax.Array
    source_slots: jax.Array
    slot_start: jax.Array
    slot_rows: jax.Array
    ok: jax.Array


class Dispatched(NamedTuple):
    """Results of the dispatch call."""

    tokens: jax.Array
    row_weights: jax.Array
    order: jax.Array
    group_sizes: jax.Array
    num_rows: jax.Array
    num_dropped: jax.Array
    route: RouteArrays


def _exchange(
    target: str, results: list[tuple[tuple[int, ...], Any]], operands: list[jax.Array], **attributes: Any
) -> list[jax.Array]:
    types = [compat.result_type(operands, shape, dtype) for shape, dtype in results]
    # Sequential: one call after the other for the elements of a vmapped axis.
    call = jax.ffi.ffi_call(target, types, vmap_method="sequential")
    return list(call(*operands, **attributes))


def _after_cotangents(after: After, order: jax.Array) -> tuple[Any, ...]:
    # Zero, but computed by the transposed exchange: whatever the operand came from runs its own backward
    # exchange after it.
    return tuple(
        jnp.broadcast_to(order, a.shape).astype(a.dtype)
        if jnp.issubdtype(a.dtype, jnp.floating)
        else compat.zero_cotangent(a)
        for a in after
    )


# --- dispatch --------------------------------------------------------------------------------------------


def _dispatch_call(
    call: Call,
    x: jax.Array,
    weights: jax.Array,
    indices: jax.Array,
    num_tokens: jax.Array,
    expert_map: jax.Array,
    after: After,
) -> Dispatched:
    i32, f32 = np.dtype(np.int32), np.dtype(np.float32)
    tokens, row_weights, group_sizes, num_rows, num_dropped, ok, home, *rest, order = _exchange(
        "pplx_dispatch",
        [
            ((call.rows, call.hidden), x.dtype),
            ((call.rows,), f32),
            ((call.experts_per_rank,), i32),
            ((), i32),
            ((), i32),
            ((), i32),
            (indices.shape, i32),
            ((call.messages,), i32),
            ((call.slots + 1,), i32),
            ((call.slots * call.entries,), i32),
            ((), f32),
        ],
        [x, indices, weights, num_tokens, expert_map, *after],
        **call.attributes(),
    )
    route = RouteArrays(home, rest[0], rest[1], rest[2], ok)
    return Dispatched(tokens, row_weights, order, group_sizes, num_rows, num_dropped, route)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def dispatch(
    call: Call,
    x: jax.Array,
    weights: jax.Array,
    indices: jax.Array,
    num_tokens: jax.Array,
    expert_map: jax.Array,
    after: After,
) -> Dispatched:
    """Tokens to their experts. Differentiable in ``x`` and ``weights``."""
    return _dispatch_call(call, x, weights, indices, num_tokens, expert_map, after)


def _dispatch_fwd(
    call: Call,
    x: jax.Array,
    weights: jax.Array,
    indices: jax.Array,
    num_tokens: jax.Array,
    expert_map: jax.Array,
    after: After,
) -> tuple[Dispatched, tuple[Any, ...]]:
    out = _dispatch_call(call, x, weights, indices, num_tokens, expert_map, after)
    return out, (out.route, indices, num_tokens, expert_map, after)


def _dispatch_bwd(call: Call, residuals: tuple[Any, ...], cotangents: Dispatched) -> tuple[Any, ...]:
    route, indices, num_tokens, expert_map, after = residuals
    # cotangents.order is an operand only to order: exchanges that came after this one come before it now.
    d_x, d_weights, order = _exchange(
        "pplx_dispatch_transpose",
        [
            ((route.home.shape[0], call.hidden), cotangents.tokens.dtype),
            (route.home.shape, np.dtype(np.float32)),
            ((), np.dtype(np.float32)),
        ],
        [cotangents.tokens, cotangents.row_weights, *route, cotangents.order],
        **call.attributes(),
    )
    zeros = tuple(compat.zero_cotangent(a) for a in (indices, num_tokens, expert_map))
    return (d_x, d_weights, *zeros, _after_cotangents(after, order))


dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


# --- combine ---------------------------------------------------------------------------------------------


def _combine_call(
    call: Call,
    y: jax.Array,
    row_weights: jax.Array,
    accumulate: jax.Array | None,
    route: RouteArrays,
    after: After,
) -> tuple[jax.Array, jax.Array]:
    out, order = _exchange(
        "pplx_combine",
        [((route.home.shape[0], call.hidden), y.dtype), ((), np.dtype(np.float32))],
        [y, row_weights, *route, route.ok if accumulate is None else accumulate, *after],
        weighted=call.weighted,
        accumulates=accumulate is not None,
        **call.attributes(),
    )
    return out, order


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def combine(
    call: Call,
    y: jax.Array,
    row_weights: jax.Array,
    accumulate: jax.Array | None,
    route: RouteArrays,
    group_sizes: jax.Array,
    after: After,
) -> tuple[jax.Array, jax.Array]:
    """Experts' outputs home, summed. Differentiable in ``y``, ``row_weights`` and ``accumulate``."""
    del group_sizes  # the derivative needs them
    return _combine_call(call, y, row_weights, accumulate, route, after)


def _combine_fwd(
    call: Call,
    y: jax.Array,
    row_weights: jax.Array,
    accumulate: jax.Array | None,
    route: RouteArrays,
    group_sizes: jax.Array,
    after: After,
) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
    out = _combine_call(call, y, row_weights, accumulate, route, after)
    saved = y if call.weighted else None
    return out, (saved, row_weights, accumulate is not None, route, group_sizes, after)


def _combine_bwd(
    call: Call, residuals: tuple[Any, ...], cotangents: tuple[jax.Array, jax.Array]
) -> tuple[Any, ...]:
    y, row_weights, accumulated, route, group_sizes, after = residuals
    d_out, d_order = cotangents
    d_y, d_row_weights, order = _exchange(
        "pplx_combine_transpose",
        [
            ((call.rows, call.hidden), d_out.dtype),
            ((call.rows,), np.dtype(np.float32)),
            ((), np.dtype(np.float32)),
        ],
        [d_out, route.ok if y is None else y, row_weights, *route, group_sizes, d_order],
        weighted=call.weighted,
        **call.attributes(),
    )
    d_accumulate = None
    if accumulated:
        # Rows at and past num_tokens come out zero whatever is accumulated.
        past_end = route.home[:, :1] == _PAST_END
        d_accumulate = jnp.where(past_end, jnp.zeros_like(d_out), d_out)
    zeros = RouteArrays(*(compat.zero_cotangent(a) for a in route))
    return (
        d_y,
        d_row_weights,
        d_accumulate,
        zeros,
        compat.zero_cotangent(group_sizes),
        _after_cotangents(after, order),
    )


_PAST_END = -2  # layout.h: kPastEnd
combine.defvjp(_combine_fwd, _combine_bwd)


# --- ordering --------------------------------------------------------------------------------------------


def tie(values: list[jax.Array], after: list[jax.Array]) -> list[jax.Array]:
    """``values``, unchanged but available only after ``after``; XLA sees through an optimization barrier on
    CPU, not through this. A value that varies over fewer axes than ``after`` stays as it is: the call would
    change its type."""
    axes = frozenset[str]().union(*(compat.varying_axes(x) for x in after))
    tied = [i for i, value in enumerate(values) if compat.varying_axes(value) >= axes]
    if not tied or not after:
        return values
    call = jax.ffi.ffi_call(
        "pplx_tie",
        [compat.result_type([values[i]], values[i].shape, values[i].dtype) for i in tied],
        vmap_method="sequential",
        input_output_aliases={i: i for i in range(len(tied))},
    )
    results = list(values)
    for i, result in zip(tied, call(*(values[i] for i in tied), *after), strict=True):
        results[i] = result
    return results
