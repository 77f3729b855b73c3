"""Checks of what dispatch and combine are given, before anything moves."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from pplx_jax import compat, ops
from pplx_jax.results import Route, order_operands

if TYPE_CHECKING:
    from pplx_jax.expert_parallel import ExpertParallel


def describe(x: Any) -> str:
    """Dtype and shape."""
    return f"{jnp.result_type(x).name}{list(jnp.shape(x))}"


def tokens(
    ep: ExpertParallel,
    x: Any,
    indices: Any,
    weights: Any,
    scales: Any,
    num_tokens: Any,
    expert_map: Any,
    after: Any,
) -> tuple[ops.Tokens, ops.After]:
    """Checks the arguments of a dispatch."""
    config = ep.config
    x, indices, weights = jnp.asarray(x), jnp.asarray(indices), jnp.asarray(weights)
    if x.ndim != 2 or x.shape[1] != config.hidden:
        raise ValueError(f"x must be [T, {config.hidden}], got {describe(x)}")
    tokens = x.shape[0]
    if scales is None:
        if x.dtype != config.dtype:
            raise TypeError(f"x must be {config.dtype.name} (the config's dtype), got {describe(x)}")
    else:
        x, scales = _quantized(ep, x, jnp.asarray(scales))
    if tokens > config.max_tokens:
        raise ValueError(f"x has {tokens} tokens, max_tokens is {config.max_tokens}")
    for what, array, dtype in (("indices", indices, np.int32), ("weights", weights, np.float32)):
        if array.shape != (tokens, config.top_k):
            raise ValueError(f"{what} must be [{tokens}, {config.top_k}], got {describe(array)}")
        if array.dtype != dtype:
            raise TypeError(f"{what} must be {np.dtype(dtype).name}, got {describe(array)}")
    count = jnp.asarray(tokens if num_tokens is None else num_tokens)
    if count.shape != () or not jnp.issubdtype(count.dtype, jnp.integer):
        raise TypeError(f"num_tokens must be an integer scalar, got {describe(count)}")
    table = jnp.asarray(ep.expert_map if expert_map is None else expert_map)
    if table.size != ep.expert_map.size or table.shape not in (
        (table.size,),
        (ep.num_ranks, ep.experts_per_rank),
    ):
        raise ValueError(
            f"expert_map must be [{ep.num_ranks}, {ep.experts_per_rank}] or flat, like the group's "
            f"own, got {describe(table)}"
        )
    if not jnp.issubdtype(table.dtype, jnp.integer):
        raise TypeError(f"expert_map must hold integers, got {describe(table)}")
    _require_sharded(ep, x)
    operands = ops.Tokens(
        x, scales, weights, indices, count.astype(jnp.int32), table.reshape(-1).astype(jnp.int32)
    )
    checked: tuple[ops.Tokens, ops.After] = varying(ep, (operands, order_operands(after)))
    return checked


def _quantized(ep: ExpertParallel, x: jax.Array, scales: jax.Array) -> tuple[jax.Array, jax.Array]:
    config = ep.config
    if config.quant is None or config.scale_dtype is None:
        raise ValueError('scales: the config has quant=None; make it with quant="fp8" or "fp8_ue8m0"')
    for what, array, dtype, columns in (
        ("x", x, config.token_dtype, config.hidden),
        ("scales", scales, config.scale_dtype, config.num_scales),
    ):
        if array.shape != (x.shape[0], columns):
            raise ValueError(
                f"{what} must be [{x.shape[0]}, {columns}] (with scales=), got {describe(array)}"
            )
        if array.dtype != dtype:
            raise TypeError(f"{what} must be {dtype.name} (with scales=), got {describe(array)}")
    why = (
        "dispatch with scales= has no derivative in x and scales: pass unquantised tokens, which "
        "dispatch quantises itself with straight-through gradients, or use jax.lax.stop_gradient"
    )
    return ops.not_differentiable(why, x), ops.not_differentiable(why, scales)


def rows(ep: ExpertParallel, y: Any, route: Any, weighted: Any) -> tuple[ops.Rows, ops.Call]:
    """Checks the arguments of a combine."""
    if not isinstance(route, Route):
        raise TypeError(f"route must come from dispatch, got {type(route).__name__}")
    if route.call.group != ep.group_id:
        raise ValueError("route comes from another group's dispatch")
    if not isinstance(weighted, bool):
        raise TypeError(f"weighted must be a bool, got {weighted!r}")
    y = jnp.asarray(y)
    shape: tuple[int, ...] = (route.call.rows, ep.config.hidden)
    if ep.config.layout == "padded":
        experts = ep.experts_per_rank
        shape = (experts, route.call.rows // experts, ep.config.hidden)
    if y.shape != shape:
        raise ValueError(f"y must be {list(shape)}, got {describe(y)}")
    if y.dtype != ep.config.dtype:
        raise TypeError(f"y must be {ep.config.dtype.name}, got {describe(y)}")
    rows = ops.Rows(y.reshape(-1, ep.config.hidden), route.weights, route.arrays, route.group_sizes)
    return rows, dataclasses.replace(route.call, weighted=weighted)


def accumulated(ep: ExpertParallel, accumulate: Any, route: ops.RouteArrays) -> jax.Array | None:
    """``accumulate=`` of a combine, checked."""
    if accumulate is None:
        return None
    accumulate = jnp.asarray(accumulate)
    assert isinstance(accumulate, jax.Array)
    shape = (route.home.shape[0], ep.config.hidden)
    if accumulate.shape != shape:
        raise ValueError(f"accumulate must be {list(shape)}, got {describe(accumulate)}")
    if accumulate.dtype != ep.config.dtype:
        raise TypeError(f"accumulate must be {ep.config.dtype.name}, got {describe(accumulate)}")
    return accumulate


def require_sent(ep: ExpertParallel, sent: Any, kind: type[Any], operation: str) -> None:
    """What a recv is given must come from a send of its kind and group."""
    if not isinstance(sent, kind):
        raise TypeError(f"sent must come from {operation}_send, got {type(sent).__name__}")
    if sent.call.group != ep.group_id:
        raise ValueError(f"sent comes from another group's {operation}_send")


def _require_sharded(ep: ExpertParallel, x: jax.Array) -> None:
    """Refuses tokens that JAX knows to be the same on all ranks of an axis."""
    _require_manual(ep)
    if not compat.checks_replication(x, ep.axes):
        return
    same = [a for a in ep.axes if ep.mesh.shape[a] > 1 and a not in compat.varying_axes(x)]
    if same:
        raise ValueError(
            f"x is replicated over axis {same[0]!r} of the group: every rank there would send the same "
            f"{x.shape[0]} tokens. Shard them with in_specs=P({ep.axis!r}), or slice inside: "
            f"n = x.shape[0] // jax.lax.axis_size({same[0]!r}); "
            f"x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index({same[0]!r}) * n, n)"
        )


def _require_manual(ep: ExpertParallel) -> None:
    """Refuses to run where not every axis of the mesh is manual."""
    bound = compat.bound_axes()
    missing = [axis for axis in ep.axes if axis not in bound]
    if missing:
        raise ValueError(
            "dispatch and combine work per shard: call them inside jax.shard_map over the mesh, with "
            f"axis {missing[0]!r} manual (manual here: {sorted(bound) or 'none'})"
        )
    for axis in ep.axes:
        size = jax.lax.axis_size(axis)
        if size != ep.mesh.shape[axis]:
            raise ValueError(f"axis {axis!r} has size {size} here, {ep.mesh.shape[axis]} in the group's mesh")
    partial = [a for a in ep.mesh.axis_names if a not in bound and ep.mesh.shape[a] > 1]
    if partial:
        raise ValueError(
            f"dispatch and combine need every axis of the mesh manual, {partial[0]!r} is not: leave out "
            "axis_names= of jax.shard_map, or name all axes there, and shard over the others by in_specs"
        )


def varying(ep: ExpertParallel, operands: Any) -> Any:
    """Every operand varying over the group's axes and those of the others: JAX then sums the gradient
    of what was replicated."""
    _require_manual(ep)
    leaves = jax.tree.leaves(operands)
    if not compat.checks_replication(leaves[0], ep.axes):
        return operands
    axes = frozenset(ep.axes).union(*(compat.varying_axes(leaf) for leaf in leaves))
    return jax.tree.map(lambda leaf: compat.to_varying(leaf, axes), operands)
