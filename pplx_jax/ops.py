"""The custom calls and their derivative rules: pure functions of arrays and a static ``Call``.

dispatch and combine are each other's transpose. Every call also returns ``order``, a float32 zero that XLA
cannot know to be zero: it carries the ordering of ``after=`` into the backward pass, reversed.

The halves (send and recv apart) are in ``halves.py``.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.custom_batching
import jax.export
import jax.numpy as jnp
import numpy as np

from pplx_jax import _core, compat, gpu
from pplx_jax.config import SCALE_BLOCK

for _name, _handler in _core.registrations().items():
    jax.ffi.register_ffi_target(_name, _handler, platform="cpu")
if (_cuda := gpu.extension()) is not None:
    for _name, _handler in _cuda.registrations().items():
        jax.ffi.register_ffi_target(_name, _handler, platform="CUDA")

#: Operands that only order: float32 or integer arrays of at most one element.
After: TypeAlias = tuple[jax.Array, ...]
#: Name, shape and dtype of custom calls' results.
Results: TypeAlias = list[tuple[tuple[int, ...], Any]]

I32, F32 = np.dtype(np.int32), np.dtype(np.float32)


def export_checks() -> list[jax.export.DisabledSafetyCheck]:
    """For ``jax.export.export(..., disabled_checks=...)``: lets it accept programs with our custom calls.

    An exported program runs in any process that has imported ``pplx_jax`` and made an equal group.
    """
    return [jax.export.DisabledSafetyCheck.custom_call(name) for name in _core.registrations()]


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
    token_dtype: str = ""
    """Of dispatched tokens; "" for dtype."""
    scales: int = 0
    """Scales a dispatched row."""
    scale_dtype: str = ""

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


class Tokens(NamedTuple):
    """Operands of a dispatch. ``scales`` is None unless ``x`` is quantised already."""

    x: jax.Array
    scales: jax.Array | None
    weights: jax.Array
    indices: jax.Array
    num_tokens: jax.Array
    expert_map: jax.Array


class Dispatched(NamedTuple):
    """Results of a dispatch. ``values`` is differentiable; where tokens are quantised it is what ``tokens``
    and ``scales`` stand for, otherwise these are None."""

    values: jax.Array
    row_weights: jax.Array
    order: jax.Array
    tokens: jax.Array | None
    scales: jax.Array | None
    group_sizes: jax.Array
    num_rows: jax.Array
    num_dropped: jax.Array
    route: RouteArrays


def exchange(target: str, results: Results, operands: list[jax.Array], **attributes: Any) -> list[jax.Array]:
    """The custom call ``target``; under vmap, one call after the other."""

    # Not ffi_call's own sequential method: it keeps the types of the unbatched call, which do not vary over
    # the axis that vmap's spmd_axis_name adds.
    def call(*operands: jax.Array) -> tuple[jax.Array, ...]:
        axes = frozenset[str]().union(*(compat.varying_axes(a) for a in operands))
        alike = [compat.to_varying(a, axes) for a in operands]
        types = [compat.result_type(alike, shape, dtype) for shape, dtype in results]
        outputs: list[jax.Array] = list(jax.ffi.ffi_call(target, types)(*alike, **attributes))
        return tuple(outputs)

    return list(jax.custom_batching.sequential_vmap(call)(*operands))


class Bits(NamedTuple):
    """An int32 array's bits as float32."""

    bits: jax.Array


def carry(tree: Any) -> Any:
    """``tree`` with its integers as ``Bits``, for custom_vjp: the zero cotangents of integers, float0, lack
    the axis that vmap's spmd_axis_name adds."""
    return jax.tree.map(lambda a: Bits(jax.lax.bitcast_convert_type(a, F32)) if a.dtype == I32 else a, tree)


def uncarry(tree: Any) -> Any:
    """Undoes ``carry``."""
    return jax.tree.map(
        lambda a: jax.lax.bitcast_convert_type(a.bits, I32) if isinstance(a, Bits) else a,
        tree,
        is_leaf=lambda node: isinstance(node, Bits),
    )


def after_cotangents(after: After, order: jax.Array) -> tuple[Any, ...]:
    """Cotangents of ``after``: zero, but computed by the transposed exchange, so that whatever the operand
    came from runs its own backward exchange after it."""
    return tuple(
        None if isinstance(a, Bits) else jnp.broadcast_to(order, a.shape).astype(a.dtype) for a in after
    )


def dequantize(tokens: jax.Array, scales: jax.Array, dtype: Any) -> jax.Array:
    """[..., H] float8 times a scale for each 128 of them, rounded once, to ``dtype``."""
    spread = jnp.repeat(scales.astype(F32), SCALE_BLOCK, axis=-1)[..., : tokens.shape[-1]]
    return (tokens.astype(F32) * spread).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def not_differentiable(why: str, x: jax.Array) -> jax.Array:
    """``x``; differentiating through it raises a TypeError that says ``why``."""
    del why
    return x


def _refuse(why: str, _: None, cotangent: jax.Array) -> tuple[jax.Array]:
    del cotangent
    raise TypeError(why)


not_differentiable.defvjp(lambda why, x: (x, None), _refuse)


# --- dispatch --------------------------------------------------------------------------------------------


def dispatch_operands(tokens: Tokens) -> tuple[list[jax.Array], dict[str, Any]]:
    """Operands and attributes of dispatch and its sending half."""
    operands = [tokens.x, tokens.indices, tokens.weights, tokens.num_tokens, tokens.expert_map]
    scaled = tokens.scales is not None
    return [*operands, *([] if tokens.scales is None else [tokens.scales])], {"scaled": scaled}


def dispatch_results(call: Call) -> tuple[Results, Results]:
    """Results of a dispatch before ``home`` and from ``source_slots`` on."""
    first: Results = [
        ((call.rows, call.hidden), np.dtype(call.token_dtype or call.dtype)),
        ((call.rows,), F32),
        ((call.experts_per_rank,), I32),
        ((), I32),
        ((), I32),
        ((), I32),
    ]
    last: Results = [
        ((call.messages,), I32),
        ((call.slots + 1,), I32),
        ((call.slots * call.entries,), I32),
        ((), F32),
    ]
    if call.scales:
        last.append(((call.rows, call.scales), np.dtype(call.scale_dtype)))
    return first, last


def dispatched(call: Call, first: list[jax.Array], home: jax.Array, last: list[jax.Array]) -> Dispatched:
    """Names a dispatch's results."""
    tokens, row_weights, group_sizes, num_rows, num_dropped, ok = first
    source_slots, slot_start, slot_rows, order, *rest = last
    route = RouteArrays(home, source_slots, slot_start, slot_rows, ok)
    counts = (group_sizes, num_rows, num_dropped, route)
    if not rest:
        return Dispatched(tokens, row_weights, order, None, None, *counts)
    values = dequantize(tokens, rest[0], call.dtype)
    return Dispatched(values, row_weights, order, tokens, rest[0], *counts)


def _dispatch_call(call: Call, tokens: Tokens, after: After) -> Dispatched:
    operands, attributes = dispatch_operands(tokens)
    first, last = dispatch_results(call)
    results = [*first, (tokens.indices.shape, I32), *last]
    out = exchange("pplx_dispatch", results, [*operands, *after], **attributes, **call.attributes())
    return dispatched(call, out[: len(first)], out[len(first)], out[len(first) + 1 :])


def dispatch(call: Call, tokens: Tokens, after: After) -> Dispatched:
    """Tokens to their experts. Differentiable in ``x`` and ``weights``."""
    out: Dispatched = uncarry(_dispatch(call, carry(tokens), carry(after)))
    return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dispatch(call: Call, tokens: Any, after: Any) -> Any:
    return carry(_dispatch_call(call, uncarry(tokens), uncarry(after)))


def saved_tokens(tokens: Tokens) -> Tokens:
    """What the derivative needs: shapes, and of ``x`` not even that unless it is quantised."""
    return tokens if tokens.scales is not None else tokens._replace(x=tokens.num_tokens)


def _dispatch_fwd(call: Call, tokens: Any, after: Any) -> tuple[Any, Any]:
    out = _dispatch(call, tokens, after)
    return out, (uncarry(out.route), saved_tokens(uncarry(tokens)), after)


def _dispatch_bwd(call: Call, residuals: Any, cotangents: Dispatched) -> tuple[Any, ...]:
    route, tokens, after = residuals
    # cotangents.order is an operand only to order: exchanges that came after this one come before it now.
    d_x, d_weights, order = exchange(
        "pplx_dispatch_transpose",
        transpose_results(call, route.home),
        [cotangents.values, cotangents.row_weights, *route, cotangents.order],
        **call.attributes(),
    )
    return token_cotangents(tokens, d_x, d_weights), after_cotangents(after, order)


def transpose_results(call: Call, home: jax.Array) -> Results:
    """Results of dispatch's transpose."""
    return [((home.shape[0], call.hidden), np.dtype(call.dtype)), (home.shape, F32), ((), F32)]


def token_cotangents(tokens: Tokens, d_x: jax.Array, d_weights: jax.Array) -> Tokens:
    """Cotangents of a dispatch's operands; None is JAX's word for zero."""
    zeros: dict[str, Any] = dict.fromkeys(Tokens._fields)
    return Tokens(**zeros | {"x": d_x if tokens.scales is None else None, "weights": d_weights})


_dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


# --- combine ---------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Operands of a combine."""

    y: jax.Array
    row_weights: jax.Array
    route: RouteArrays
    group_sizes: jax.Array
    """The derivative needs them."""


def _combine_call(
    call: Call, rows: Rows, accumulate: jax.Array | None, after: After
) -> tuple[jax.Array, jax.Array]:
    route = rows.route
    out, order = exchange(
        "pplx_combine",
        combine_results(call, route.home),
        [rows.y, rows.row_weights, *route, route.ok if accumulate is None else accumulate, *after],
        weighted=call.weighted,
        accumulates=accumulate is not None,
        **call.attributes(),
    )
    return out, order


def combine_results(call: Call, home: jax.Array) -> Results:
    """Results of combine."""
    return [((home.shape[0], call.hidden), np.dtype(call.dtype)), ((), F32)]


def combine(call: Call, rows: Rows, accumulate: jax.Array | None, after: After) -> jax.Array:
    """Experts' outputs home, summed. Differentiable in ``y``, ``row_weights`` and ``accumulate``."""
    out: jax.Array = _combine(call, carry(rows), accumulate, carry(after))[0]
    return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _combine(call: Call, rows: Any, accumulate: jax.Array | None, after: Any) -> tuple[jax.Array, jax.Array]:
    return _combine_call(call, uncarry(rows), accumulate, uncarry(after))


def _combine_fwd(call: Call, rows: Any, accumulate: jax.Array | None, after: Any) -> tuple[Any, Any]:
    out = _combine(call, rows, accumulate, after)
    return out, (saved_rows(call, uncarry(rows)), accumulate is not None, after)


def saved_rows(call: Call, rows: Rows) -> Rows:
    """What the derivative needs: ``y`` only where rows are weighted."""
    return rows if call.weighted else rows._replace(y=rows.route.ok)


def _combine_bwd(call: Call, residuals: Any, cotangents: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
    rows, accumulated, after = residuals
    d_out, d_order = cotangents
    d_y, d_row_weights, order = exchange(
        "pplx_combine_transpose",
        row_results(call),
        [d_out, rows.y, rows.row_weights, *rows.route, rows.group_sizes, d_order],
        weighted=call.weighted,
        **call.attributes(),
    )
    return (
        row_cotangents(d_y, d_row_weights),
        accumulate_cotangent(rows.route.home, d_out) if accumulated else None,
        after_cotangents(after, order),
    )


def row_results(call: Call) -> Results:
    """Results of combine's transpose."""
    return [((call.rows, call.hidden), np.dtype(call.dtype)), ((call.rows,), F32), ((), F32)]


def row_cotangents(d_y: jax.Array, d_row_weights: jax.Array) -> Rows:
    """Cotangents of a combine's operands."""
    zeros: dict[str, Any] = dict.fromkeys(Rows._fields)
    return Rows(**zeros | {"y": d_y, "row_weights": d_row_weights})


_PAST_END = -2  # layout.h: kPastEnd


def accumulate_cotangent(home: jax.Array, d_out: jax.Array) -> jax.Array:
    """Rows at and past num_tokens come out zero whatever is accumulated."""
    return jnp.where(home[:, :1] == _PAST_END, jnp.zeros_like(d_out), d_out)


_combine.defvjp(_combine_fwd, _combine_bwd)


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
