"""Rematerialisation that keeps exchanges in order."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pplx_jax import ops


def moe_remat(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, recomputed in the backward pass instead of saved, with its exchanges in a fixed order.

    Under plain ``jax.checkpoint`` a recomputed dispatch depends on saved values alone, so a runtime may
    start it before or after the previous layer's backward exchanges; ranks that choose differently fail
    with a ``MismatchError``. Here the recomputation reads its arguments only once the incoming cotangent is
    there, by a real data dependency.

    Use it inside ``jax.shard_map``, on a function of one or more dispatch / experts / combine. Everything
    differentiated must be an argument, not a closure.

    Args:
      function: pure; arguments and results are pytrees of arrays.
    """

    @jax.custom_vjp
    def wrapped(*args: Any) -> Any:
        return function(*args)

    def forward(*args: Any) -> tuple[Any, Any]:
        return function(*args), args

    def backward(args: Any, cotangents: Any) -> tuple[Any, ...]:
        leaves, tree = jax.tree.flatten(args)
        markers = [
            ct.reshape(-1)[:1]
            for ct in jax.tree.leaves(cotangents)
            if ct.size and ct.dtype != jax.dtypes.float0
        ]
        tied = jax.tree.unflatten(tree, ops.tie([jnp.asarray(leaf) for leaf in leaves], markers))
        _, transpose = jax.vjp(function, *tied)
        gradients: tuple[Any, ...] = transpose(cotangents)
        return gradients

    wrapped.defvjp(forward, backward)
    return functools.wraps(function)(wrapped)
