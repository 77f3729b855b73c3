"""What exchanges return, as pytrees."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from pplx_jax import ops

if TYPE_CHECKING:
    from pplx_jax.expert_parallel import ExpertParallel


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Tokens of this rank's experts. M rows, H hidden, EL experts a rank."""

    tokens: jax.Array
    """[M, H], the config's ``token_dtype``: rows of one expert after another, within it by (source rank,
    token). In the padded layout [EL, rows, H]. Quantised tokens have no derivative: see ``values``."""
    weights: jax.Array
    """float32 [M] or [EL, rows]: each row's router weight; 0 in padding."""
    group_sizes: jax.Array
    """int32 [EL]: rows of each expert, as ``jax.lax.ragged_dot`` wants them."""
    num_rows: jax.Array
    """int32 []: rows that hold a token."""
    num_dropped: jax.Array
    """int32 []: (token, expert) pairs dropped here by ``on_overflow="drop"``."""
    ok: jax.Array
    """int32 []: 1, or 0 when this exchange failed; then floats are NaN and the counts are 0."""
    values: jax.Array
    """Like ``tokens`` in the config's ``dtype`` and differentiable: where tokens are quantised, what they
    stand for (straight through: the gradient is that of unquantised tokens), otherwise ``tokens``."""
    scales: jax.Array | None = None
    """The config's ``scale_dtype`` [M, S] or [EL, rows, S], one for each 128 values; None without
    quantisation."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Route:
    """What ``combine`` and the derivatives need to know of a ``dispatch``: a pytree of arrays, opaque."""

    arrays: ops.RouteArrays
    weights: jax.Array
    group_sizes: jax.Array
    call: ops.Call = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SentDispatch:
    """A dispatch between its send and its recv; opaque. Receive it exactly once."""

    ticket: jax.Array
    home: jax.Array
    call: ops.Call = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SentCombine:
    """A combine between its send and its recv; opaque. Receive it exactly once."""

    ticket: jax.Array
    arrays: ops.RouteArrays
    call: ops.Call = dataclasses.field(metadata={"static": True})


_ORDERING = (Batch, Route, SentDispatch, SentCombine)


def order_operands(after: Any) -> ops.After:
    """One small operand for each array, route or batch in ``after``."""
    operands = []
    for item in jax.tree.leaves(after, is_leaf=lambda node: isinstance(node, _ORDERING)):
        if isinstance(item, (Batch, Route)):
            item = item.weights
        elif isinstance(item, (SentDispatch, SentCombine)):
            item = item.ticket
        array = jnp.asarray(item)
        if array.size:
            operands.append(array.reshape(-1)[:1])
    return tuple(operands)


def batch_of(ep: ExpertParallel, call: ops.Call, out: ops.Dispatched) -> tuple[Batch, Route]:
    """Names results, in the shapes of the layout."""

    def shaped(rows: jax.Array) -> jax.Array:
        if ep.config.layout == "ragged":
            return rows
        return rows.reshape(ep.experts_per_rank, -1, *rows.shape[1:])

    values = shaped(out.values)
    tokens, scales = values, None
    if out.tokens is not None and out.scales is not None:
        why = (
            "batch.tokens and batch.scales of quantised tokens have no derivative: use batch.values (and "
            "don't return them from a function with a custom derivative, which makes zeros for them)"
        )
        tokens = shaped(ops.not_differentiable(why, out.tokens))
        scales = shaped(ops.not_differentiable(why, out.scales))
    batch = Batch(
        tokens=tokens,
        weights=shaped(out.row_weights),
        group_sizes=out.group_sizes,
        num_rows=out.num_rows,
        num_dropped=out.num_dropped,
        ok=out.route.ok,
        values=values,
        scales=scales,
    )
    return batch, Route(out.route, out.row_weights, out.group_sizes, call)


def empty_batch(ep: ExpertParallel, call: ops.Call, tokens: ops.Tokens) -> tuple[Batch, Route]:
    """Results where T is 0 on every rank, and nothing is exchanged; they vary as the operands do."""
    nothing = tokens.num_tokens * 0
    zero = jnp.sum(tokens.x.astype(jnp.float32)) + jnp.sum(tokens.weights)

    def zeros(dtype: Any, *shape: int) -> jax.Array:
        return jnp.broadcast_to(zero, shape).astype(dtype)

    def ints(*shape: int) -> jax.Array:
        return jnp.broadcast_to(nothing, shape)

    arrays = ops.RouteArrays(tokens.indices, ints(call.messages), ints(1), tokens.indices[:, 0], nothing + 1)
    out = ops.Dispatched(
        values=zeros(call.dtype, call.rows, call.hidden),
        row_weights=zeros(jnp.float32, call.rows),
        order=zero,
        tokens=zeros(call.token_dtype, call.rows, call.hidden) if call.scales else None,
        scales=zeros(call.scale_dtype, call.rows, call.scales) if call.scales else None,
        group_sizes=ints(call.experts_per_rank),
        num_rows=nothing,
        num_dropped=nothing,
        route=arrays,
    )
    return batch_of(ep, call, out)
