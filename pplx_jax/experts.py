"""The experts of a Mixture-of-Experts layer: parameters, and products on rows grouped by expert."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from pplx_jax.grouped_gemm import Implementation, grouped_gemm

Initializer: TypeAlias = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "tanh": jnp.tanh,
    "identity": lambda x: x,
}


def default_init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """LeCun's: truncated normal of variance 1 / in, for matrices [in, out] and stacks [..., in, out]."""
    # Without batch_axis JAX would count stacked experts as inputs, and make each sqrt(E) times too small.
    stacked = tuple(range(len(shape) - 2))
    init = jax.nn.initializers.variance_scaling(
        1.0, "fan_in", "truncated_normal", in_axis=-2, out_axis=-1, batch_axis=stacked
    )
    return init(key, shape, dtype)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("up", "down", "gate", "up_bias", "down_bias", "gate_bias"),
    meta_fields=(),
)
@dataclass(frozen=True)
class ExpertParams:
    """Weights of the experts, or without the leading E of a dense (shared) expert. Any float dtype.

    Attributes:
      up: [E, H, I].
      down: [E, I, H].
      gate: [E, H, I], or None: then the expert is down(act(up(x))) in place of down(act(gate(x)) * up(x)).
      up_bias, gate_bias: [E, I] or None.
      down_bias: [E, H] or None.
    """

    up: jax.Array
    down: jax.Array
    gate: jax.Array | None = None
    up_bias: jax.Array | None = None
    down_bias: jax.Array | None = None
    gate_bias: jax.Array | None = None


def init_experts(
    key: jax.Array,
    sizes: tuple[int, ...],
    hidden: int,
    intermediate: int,
    *,
    gated: bool = True,
    use_bias: bool = False,
    dtype: Any = jnp.float32,
    init: Initializer = default_init,
) -> ExpertParams:
    """Random experts of leading shape ``sizes``: (E,), or () for a dense expert. Biases start at zero."""
    up, gate, down = jax.random.split(key, 3)
    bias = partial(jnp.zeros, dtype=dtype)
    return ExpertParams(
        up=init(up, (*sizes, hidden, intermediate), dtype),
        down=init(down, (*sizes, intermediate, hidden), dtype),
        gate=init(gate, (*sizes, hidden, intermediate), dtype) if gated else None,
        up_bias=bias((*sizes, intermediate)) if use_bias else None,
        down_bias=bias((*sizes, hidden)) if use_bias else None,
        gate_bias=bias((*sizes, intermediate)) if use_bias and gated else None,
    )


def _row_bias(bias: jax.Array, group_sizes: jax.Array, rows: int) -> jax.Array:
    """The bias [G, N] of each row's group, [rows, N]; zero, and without gradient, past the last group."""
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(rows, dtype=ends.dtype)
    group = jnp.searchsorted(ends, row, side="right")
    return jnp.where((row < ends[-1])[:, None], bias[jnp.minimum(group, bias.shape[0] - 1)], 0)


def apply_experts(
    params: ExpertParams,
    tokens: jax.Array,
    group_sizes: jax.Array | None,
    *,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.silu,
    gemm: Implementation = "auto",
) -> jax.Array:
    """Applies each group's expert to its rows; computes in tokens' dtype.

    Args:
      params: G stacked experts, or one dense expert when group_sizes is None.
      tokens: [M, H], grouped by expert.
      group_sizes: int32 [G], rows of each expert, or None.
      activation: elementwise function.
      gemm: what multiplies, see `grouped_gemm`.

    Returns:
      [M, H]; rows past the last group are zero.
    """

    def linear(x: jax.Array, weights: jax.Array, bias: jax.Array | None) -> jax.Array:
        weights = weights.astype(x.dtype)
        if group_sizes is None:
            y = jnp.dot(x, weights, preferred_element_type=jnp.float32).astype(x.dtype)
            return y if bias is None else y + bias.astype(x.dtype)
        y = grouped_gemm(x, weights, group_sizes, implementation=gemm)
        return y if bias is None else y + _row_bias(bias.astype(x.dtype), group_sizes, x.shape[0])

    inner = linear(tokens, params.up, params.up_bias)
    if params.gate is None:
        inner = activation(inner)
    else:
        inner = activation(linear(tokens, params.gate, params.gate_bias)) * inner
    return linear(inner, params.down, params.down_bias)
