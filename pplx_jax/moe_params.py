"""Parameters of a Mixture-of-Experts layer: what they are, random ones, and whether given ones fit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pplx_jax import router
from pplx_jax.experts import ExpertParams, Initializer, default_init, init_experts
from pplx_jax.moe_config import check_float_dtype


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("router", "experts", "router_bias", "selection_bias", "shared"),
    meta_fields=(),
)
@dataclass(frozen=True)
class MoEParams:
    """Parameters of the layer.

    Attributes:
      router: [H, E], used in float32.
      experts: the E routed experts.
      router_bias: [E] added to the logits, or None.
      selection_bias: [E] added to the scores for the selection only, or None; has no gradient.
      shared: the dense expert that every token passes through, or None.
    """

    router: jax.Array
    experts: ExpertParams
    router_bias: jax.Array | None = None
    selection_bias: jax.Array | None = None
    shared: ExpertParams | None = None


def init_params(
    key: jax.Array,
    hidden: int,
    intermediate: int,
    num_experts: int,
    *,
    shared_experts: int = 0,
    gated: bool = True,
    use_bias: bool = False,
    router_bias: bool = False,
    selection_bias: bool = False,
    dtype: Any = jnp.float32,
    init: Initializer = default_init,
) -> MoEParams:
    """Random parameters of a layer; the router and its biases are float32 whatever ``dtype``.

    Args:
      key: a PRNG key; the same key gives the same values under any sharding.
      hidden, intermediate, num_experts: H, I and E, each at least 1.
      shared_experts: n > 0 adds a dense expert of width n * intermediate.
      gated, use_bias: see `ExpertParams`.
      router_bias, selection_bias: see `MoEParams`; both start at zero.
      dtype: of the experts' weights.
      init: initializer (key, shape, dtype) of every weight matrix; its last two axes are (in, out).
    """
    for name, value, low in (
        ("hidden", hidden, 1),
        ("intermediate", intermediate, 1),
        ("num_experts", num_experts, 1),
        ("shared_experts", shared_experts, 0),
    ):
        router._check_int(name, value, low)
    check_float_dtype("dtype", dtype)
    keys = jax.random.split(key, 3)
    make = partial(init_experts, gated=gated, use_bias=use_bias, dtype=dtype, init=init)
    return MoEParams(
        router=init(keys[0], (hidden, num_experts), jnp.float32),
        experts=make(keys[1], (num_experts,), hidden, intermediate),
        router_bias=jnp.zeros((num_experts,), jnp.float32) if router_bias else None,
        selection_bias=jnp.zeros((num_experts,), jnp.float32) if selection_bias else None,
        shared=make(keys[2], (), hidden, intermediate * shared_experts) if shared_experts else None,
    )


def check_params(params: MoEParams, *, slots: int | None = None) -> tuple[int, int]:
    """Checks shapes and dtypes against each other; returns (hidden, num_experts).

    Args:
      params: of any type; the message says what is wrong with it.
      slots: stacked experts a leaf of params.experts has, if not one for each expert.
    """
    if not isinstance(params, MoEParams):
        raise TypeError(f"params must be a MoEParams, got {type(params).__name__}")
    if params.router.ndim != 2:
        raise ValueError(f"params.router must have shape [H, E], got {tuple(params.router.shape)}")
    hidden, experts = params.router.shape
    stacked = experts if slots is None else slots
    _check_expert_params("params.experts", params.experts, (stacked,), hidden)
    if params.shared is not None:
        _check_expert_params("params.shared", params.shared, (), hidden)
    for name in ("router_bias", "selection_bias"):
        value = getattr(params, name)
        if value is not None and tuple(value.shape) != (experts,):
            raise ValueError(f"params.{name} must have shape [{experts}], got {tuple(value.shape)}")
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"params{jax.tree_util.keystr(path)} must be floating point, got {leaf.dtype}")
    return hidden, experts


def _check_expert_params(name: str, params: ExpertParams, sizes: tuple[int, ...], hidden: int) -> None:
    if not isinstance(params, ExpertParams):
        raise TypeError(f"{name} must be an ExpertParams, got {type(params).__name__}")
    if params.up.ndim != len(sizes) + 2:
        raise ValueError(f"{name}.up must have {len(sizes) + 2} axes, got shape {tuple(params.up.shape)}")
    width = params.up.shape[-1]
    wanted = {
        "up": (*sizes, hidden, width),
        "gate": (*sizes, hidden, width),
        "down": (*sizes, width, hidden),
        "up_bias": (*sizes, width),
        "gate_bias": (*sizes, width),
        "down_bias": (*sizes, hidden),
    }
    for field, shape in wanted.items():
        value = getattr(params, field)
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(f"{name}.{field} must have shape {shape}, got {tuple(value.shape)}")
    if params.gate is None and params.gate_bias is not None:
        raise ValueError(f"{name}.gate_bias must be None where {name}.gate is None")


def check_logical_axes(logical_axes: Any, expert_sharding: Any = None) -> None:
    """Raises TypeError or ValueError unless these are three names, and given in place of mesh axes."""
    if not (
        isinstance(logical_axes, tuple)
        and len(logical_axes) == 3
        and all(isinstance(name, str) for name in logical_axes)
    ):
        raise TypeError(f"logical_axes must be three names, of (experts, H, I), got {logical_axes!r}")
    if expert_sharding is not None:
        raise ValueError(f"give logical_axes or expert_sharding, not both; got {expert_sharding!r}")
