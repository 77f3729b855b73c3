"""Rematerialisation that keeps exchanges in order."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pplx_jax import compat, ops


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recomputed(function: Callable[..., Any], captured: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
    return function(captured, args)


def _forward(function: Callable[..., Any], *operands: Any) -> tuple[Any, tuple[Any, ...]]:
    return function(*operands), operands


def _backward(function: Callable[..., Any], operands: tuple[Any, ...], cotangents: Any) -> tuple[Any, ...]:
    leaves, tree = jax.tree.flatten(operands)
    markers = [
        ct.reshape(-1)[:1] for ct in jax.tree.leaves(cotangents) if ct.size and ct.dtype != jax.dtypes.float0
    ]
    tied = jax.tree.unflatten(tree, ops.tie([jnp.asarray(leaf) for leaf in leaves], markers))
    _, transpose = jax.vjp(function, *tied)
    gradients: tuple[Any, ...] = transpose(cotangents)
    return gradients


_recomputed.defvjp(_forward, _backward)


def moe_remat(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, recomputed in the backward pass instead of saved, with its exchanges in a fixed order.

    Under plain ``jax.checkpoint`` a recomputed dispatch depends on saved values alone, so a runtime may
    start it before or after the previous layer's backward exchanges; ranks that choose differently fail
    with a ``MismatchError``. Here the recomputation reads its arguments only once the incoming cotangent is
    there, by a real data dependency.

    Use it inside ``jax.shard_map``, on a function of one or more dispatch / experts / combine. Gradients of
    closed-over arrays are right, too.

    Args:
      function: pure; arguments and results are pytrees of arrays.
    """

    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        return _recomputed(*compat.lift_closure(function, args), args)

    return wrapped


def named_residuals(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """``function``, its results and whatever its derivative keeps carrying a name for `jax.checkpoint`.

    A policy that saves this name then has all that the backward pass needs of the function. To name the
    results alone isn't enough for one with a custom derivative: what that keeps comes from inside.

    Args:
      function: of pytrees of arrays; closes over no traced array.
      name: for policies such as ``jax.checkpoint_policies.save_only_these_names``.
    """

    def mark(tree: Any) -> Any:
        # What is both a result and kept for the derivative is named, and saved, once.
        marked: dict[int, Any] = {}
        for leaf in jax.tree.leaves(tree):
            if id(leaf) not in marked:
                marked[id(leaf)] = checkpoint_name(leaf, name)
        return jax.tree.map(lambda leaf: marked[id(leaf)], tree)

    @jax.custom_vjp
    def named(*args: Any) -> Any:
        return mark(function(*args))

    def forward(*args: Any) -> tuple[Any, Any]:
        out, transpose = mark(jax.vjp(function, *args))
        return out, transpose

    def backward(transpose: Any, cotangents: Any) -> Any:
        return transpose(cotangents)

    named.defvjp(forward, backward)
    return named
