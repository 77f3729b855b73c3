"""A Mixture-of-Experts layer as a pure function, dense or over an expert-parallel group.

`moe` is the whole layer on global arrays. Given a `pplx_jax.ExpertParallel` it opens its own
``jax.shard_map`` over all axes of the group's mesh: tokens are sharded over the group's axes and the data
axes, experts' weights over the group's axes, everything else is replicated. Without a group it is plain JAX
and serves as the reference.

Collectives in the compiled program, besides the exchange: one all-reduce a layer (losses, loads, status) and,
in the backward pass, the all-reduces of the gradients of replicated parameters. Two shapes cost more, as JAX
can't shard them evenly: a number of experts that the ranks don't divide (its parameters are stored
replicated, and their gradients all-reduced) and a number of tokens that the token shards don't divide
(outputs are gathered).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pplx_jax import router
from pplx_jax.experts import (
    ACTIVATIONS,
    ExpertParams,
    Initializer,
    apply_experts,
    default_init,
    init_experts,
)

if TYPE_CHECKING:
    from pplx_jax.expert_parallel import ExpertParallel

# Mesh axes of these names shard tokens besides the group's own, unless MoEConfig.data_axes says otherwise.
DATA_AXES = ("dp", "data", "batch", "replica", "fsdp")


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


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("load_balance_loss", "z_loss", "expert_loads", "num_dropped", "ok"),
    meta_fields=(),
)
@dataclass(frozen=True)
class MoEAux:
    """What a layer reports besides its output; over all ranks' tokens and the same on all ranks.

    Attributes:
      load_balance_loss: float32 [], see `pplx_jax.router.load_balancing_loss`. Differentiable.
      z_loss: float32 [], see `pplx_jax.router.z_loss`. Differentiable.
      expert_loads: int32 [E], choices that fell on each expert, before any drop.
      num_dropped: int32 [], (token, expert) pairs that found no room (groups with on_overflow="drop").
      ok: int32 [], 1, or 0 if the exchange failed on any rank: the outputs are then NaN.
    """

    load_balance_loss: jax.Array
    z_loss: jax.Array
    expert_loads: jax.Array
    num_dropped: jax.Array
    ok: jax.Array


@dataclass(frozen=True)
class MoEConfig:
    """How the layer computes; hashable. Sizes follow from the parameters.

    Attributes:
      top_k: experts a token.
      score_fn, num_groups, top_groups, normalize, scale: see `pplx_jax.router.route`.
      activation: a name from `ACTIVATIONS` or an elementwise function.
      dtype: what the experts compute in; None for the tokens' dtype. Products accumulate in float32.
      data_axes: mesh axes that shard tokens besides the group's own; None for those named in `DATA_AXES`.
    """

    top_k: int
    score_fn: router.ScoreFn = "softmax"
    num_groups: int = 1
    top_groups: int = 1
    normalize: bool = True
    scale: float = 1.0
    activation: str | Callable[[jax.Array], jax.Array] = "silu"
    dtype: Any = None
    data_axes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        router._check_int("top_k", self.top_k, 1)
        if isinstance(self.activation, str):
            if self.activation not in ACTIVATIONS:
                names = ", ".join(map(repr, ACTIVATIONS))
                raise ValueError(f"activation must be a function or one of {names}, got {self.activation!r}")
        elif not callable(self.activation):
            raise TypeError(f"activation must be a name or a function, got {type(self.activation).__name__}")
        if self.dtype is not None:
            check_float_dtype("dtype", self.dtype)
            object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        if self.data_axes is not None and not isinstance(self.data_axes, tuple):
            raise TypeError(f"data_axes must be a tuple of mesh axis names, got {self.data_axes!r}")

    @property
    def activation_fn(self) -> Callable[[jax.Array], jax.Array]:
        """The elementwise function that `activation` names or is."""
        return ACTIVATIONS[self.activation] if isinstance(self.activation, str) else self.activation


def check_float_dtype(name: str, dtype: Any) -> None:
    """Raises TypeError, naming the argument, unless dtype is a floating-point dtype."""
    try:
        floating = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise TypeError(f"{name} must be a floating-point dtype, got {dtype!r}")


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


def _dense_exchange(
    params: ExpertParams, x: jax.Array, indices: jax.Array, weights: jax.Array, config: MoEConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """sum_k weights[:, k] * expert[indices[:, k]](x) without a group; also ok = 1 and nothing dropped."""
    tokens, top_k = indices.shape
    num_experts = params.up.shape[0]
    # A choice of -1 sorts behind all experts, past the last group.
    flat = jnp.where(indices < 0, num_experts, indices).reshape(-1)
    order = jnp.argsort(flat, stable=True)
    group_sizes = router.expert_loads(indices, num_experts)
    rows = apply_experts(params, x[order // top_k], group_sizes, activation=config.activation_fn)
    rows = rows[jnp.argsort(order, stable=True)].reshape(tokens, top_k, x.shape[1])
    y = jnp.sum(jnp.where(indices < 0, 0.0, weights)[..., None] * rows.astype(jnp.float32), axis=1)
    return y.astype(x.dtype), jnp.int32(1), jnp.int32(0)


def _group_exchange(
    params: ExpertParams,
    x: jax.Array,
    indices: jax.Array,
    weights: jax.Array,
    config: MoEConfig,
    ep: ExpertParallel,
    name: str,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same over the group, inside shard_map; params are this rank's experts."""
    batch, way_back = ep.dispatch(x.astype(ep.config.dtype), indices, weights, name=name)
    rows = apply_experts(
        params, batch.tokens.astype(x.dtype), batch.group_sizes, activation=config.activation_fn
    )
    y = ep.combine(rows.astype(ep.config.dtype), way_back)
    return y.astype(x.dtype), batch.ok, batch.num_dropped


def _layer(
    params: MoEParams,
    x: jax.Array,
    mask: jax.Array | None,
    config: MoEConfig,
    ep: ExpertParallel | None,
    axes: tuple[str, ...],
    name: str,
) -> tuple[jax.Array, MoEAux]:
    """The layer on x [T, H] and mask [T]: all tokens without a group, else this shard's, inside shard_map."""
    # HIGHEST: a router rounded to TF32 or bfloat16 would choose other experts on other hardware.
    logits = jnp.dot(
        x.astype(jnp.float32), params.router.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    if params.router_bias is not None:
        logits = logits + params.router_bias.astype(jnp.float32)
    routing = router.route(
        logits,
        top_k=config.top_k,
        score_fn=config.score_fn,
        bias=params.selection_bias,
        num_groups=config.num_groups,
        top_groups=config.top_groups,
        normalize=config.normalize,
        scale=config.scale,
    )
    sums = router.router_sums(logits, routing, mask=mask)
    indices = routing.indices if mask is None else jnp.where(mask[:, None], routing.indices, -1)
    compute = x if config.dtype is None else x.astype(config.dtype)
    if ep is None:
        y, ok, dropped = _dense_exchange(params.experts, compute, indices, routing.weights, config)
    else:
        experts = _own_experts(params.experts, ep, params.router.shape[1])
        y, ok, dropped = _group_exchange(experts, compute, indices, routing.weights, config, ep, name)
        sums, (failed, dropped) = router.sum_over_ranks(sums, axes, counts=(1 - ok, dropped))
        ok = (failed == 0).astype(jnp.int32)
    if params.shared is not None:
        y = y + apply_experts(params.shared, compute, None, activation=config.activation_fn)
    aux = MoEAux(
        load_balance_loss=router.balance_from_sums(sums),
        z_loss=router.z_from_sums(sums),
        expert_loads=sums.loads,
        num_dropped=dropped,
        ok=ok,
    )
    return y.astype(x.dtype), aux


def group_axes(ep: ExpertParallel) -> tuple[str, ...]:
    """The mesh axes of the group, as a tuple."""
    return (ep.axis,) if isinstance(ep.axis, str) else tuple(ep.axis)


def token_axes(ep: ExpertParallel, data_axes: tuple[str, ...] | None = None) -> tuple[str, ...]:
    """The mesh axes over which `moe` shards tokens, in the mesh's order: the group's and the data axes."""
    names = tuple(ep.mesh.axis_names)
    for axis in data_axes or ():
        if axis not in names:
            raise ValueError(f"data_axes must name axes of the group's mesh {names}, got {axis!r}")
    wanted = {*group_axes(ep), *(DATA_AXES if data_axes is None else data_axes)}
    return tuple(name for name in names if name in wanted)


def expert_axis(ep: ExpertParallel, num_experts: int) -> tuple[str, ...] | None:
    """How `moe` wants the experts' leading axis sharded: over the group's axes, or None (replicated).

    Replicated where the ranks don't divide E, or an expert_map places experts elsewhere than in order.
    """
    return group_axes(ep) if np.array_equal(ep.expert_map, np.arange(num_experts)) else None


def _own_experts(params: ExpertParams, ep: ExpertParallel, num_experts: int) -> ExpertParams:
    """This rank's experts, inside shard_map; a slot without an expert holds zeros and gets no rows."""
    if expert_axis(ep, num_experts) is not None:
        return params  # shard_map has cut them already
    table = np.where(ep.expert_map < 0, num_experts, ep.expert_map).reshape(ep.num_ranks, -1)
    slots = jnp.asarray(table)[jax.lax.axis_index(group_axes(ep))]
    own: ExpertParams = jax.tree.map(lambda w: jnp.take(w, slots, axis=0, mode="fill", fill_value=0), params)
    return own


def _check_params(params: MoEParams) -> tuple[int, int]:
    """Checks shapes and dtypes against each other; returns (hidden, num_experts)."""
    if not isinstance(params, MoEParams):
        raise TypeError(f"params must be a MoEParams, got {type(params).__name__}")
    if params.router.ndim != 2:
        raise ValueError(f"params.router must have shape [H, E], got {tuple(params.router.shape)}")
    hidden, experts = params.router.shape
    _check_expert_params("params.experts", params.experts, (experts,), hidden)
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


def _check_group(ep: ExpertParallel, hidden: int, experts: int, config: MoEConfig) -> None:
    if not (hasattr(ep, "dispatch") and hasattr(ep, "combine") and hasattr(ep, "config")):
        raise TypeError(f"ep must be a pplx_jax.ExpertParallel or None, got {type(ep).__name__}")
    for name, have, want in (
        ("hidden", ep.config.hidden, hidden),
        ("num_experts", ep.config.num_experts, experts),
        ("top_k", ep.config.top_k, config.top_k),
    ):
        if have != want:
            raise ValueError(f"ep was made for {name}={have}, but the layer has {name}={want}")


def moe(
    params: MoEParams,
    x: jax.Array,
    config: MoEConfig,
    *,
    ep: ExpertParallel | None = None,
    mask: jax.Array | None = None,
    name: str = "",
) -> tuple[jax.Array, MoEAux]:
    """The layer: y = sum over a token's k experts of weight_k * expert_k(x), plus shared(x) if there is one.

    With a group, call it on global arrays outside any shard_map, under jit; each of the token shards then
    holds ceil(tokens / shards) tokens, at most the group's max_tokens. x may be sharded in any way; sharding
    its first axis over `token_axes` moves nothing. Differentiable in x and in all parameters but
    selection_bias.

    Args:
      params: the layer's parameters, global arrays.
      x: floating [..., H].
      config: see `MoEConfig`.
      ep: the expert-parallel group, or None for dense JAX on whatever x is placed.
      mask: bool [...] (x's shape without H), False for tokens that take no part: they reach no expert, count
        in no loss, and get only the shared expert's output. None: all take part.
      name: of this call site, for the exchange's errors and to tell calls of equal shape apart; the group's
        name if empty.

    Returns:
      (y, aux): y of x's shape and dtype, aux a `MoEAux`.

    Raises:
      TypeError, ValueError: an argument has a wrong type, shape or range; the message names it. Failures of
        the exchange itself show as aux.ok = 0 and as the group's own errors.
    """
    hidden, experts = _check_params(params)
    if not isinstance(config, MoEConfig):
        raise TypeError(f"config must be a MoEConfig, got {type(config).__name__}")
    router.check_routing_options(
        experts, config.top_k, config.score_fn, config.num_groups, config.top_groups, config.scale
    )
    if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be a floating-point array, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.ndim < 1 or x.shape[-1] != hidden:
        raise ValueError(f"x must have shape [..., {hidden}] (params.router's H), got {tuple(x.shape)}")
    if mask is not None:
        if tuple(mask.shape) != tuple(x.shape[:-1]):
            raise ValueError(f"mask must have shape {tuple(x.shape[:-1])}, got {tuple(mask.shape)}")
        if mask.dtype != jnp.bool_:
            raise TypeError(f"mask must be bool, got {mask.dtype}")
    if ep is None:
        flat_mask = None if mask is None else mask.reshape(-1)
        y, aux = _layer(params, x.reshape(-1, hidden), flat_mask, config, None, (), "")
        return y.reshape(x.shape), aux
    _check_group(ep, hidden, experts, config)
    return _sharded(params, x, mask, config, ep, name)


def _reshard(tree: Any, mesh: Any, specs: Any) -> Any:
    """Moves arrays to specs where the mesh has explicit axes, as shard_map doesn't do it by itself there."""
    if AxisType.Explicit not in mesh.axis_types:
        return tree
    return jax.tree.map(
        lambda spec, leaves: jax.tree.map(
            lambda a: jax.sharding.reshard(a, NamedSharding(mesh, spec)), leaves
        ),
        specs,
        tree,
        is_leaf=lambda spec: isinstance(spec, P),
    )


def _sharded(
    params: MoEParams,
    x: jax.Array,
    mask: jax.Array | None,
    config: MoEConfig,
    ep: ExpertParallel,
    name: str,
) -> tuple[jax.Array, MoEAux]:
    axes = token_axes(ep, config.data_axes)
    shards = math.prod(ep.mesh.shape[a] for a in axes)
    hidden = x.shape[-1]
    tokens = math.prod(x.shape[:-1])
    local = -(-tokens // shards)
    if local > ep.config.max_tokens:
        raise ValueError(
            f"x holds {tokens} tokens, {local} on each of {shards} token shards, but ep was made for "
            f"max_tokens={ep.config.max_tokens}"
        )
    given = jax.typeof(x)
    # Sharding the leading axis as it is, and flattening each shard inside, leaves the partitioner nothing to
    # move. Where that axis doesn't divide, tokens are flattened and padded first.
    if x.ndim < 2 or x.shape[0] % shards:
        x, mask = _reshard((x, mask), ep.mesh, P())
        padding = local * shards - tokens
        x = jnp.pad(x.reshape(tokens, hidden), ((0, padding), (0, 0)))
        if mask is not None:
            mask = jnp.pad(mask.reshape(tokens), (0, padding))
        elif padding:
            mask = jnp.arange(tokens + padding) < tokens

    def shard(params: MoEParams, x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, MoEAux]:
        flat_mask = None if mask is None else mask.reshape(-1)
        y, aux = _layer(params, x.reshape(-1, hidden), flat_mask, config, ep, axes, name)
        return y.reshape(x.shape), aux

    whole: MoEParams = jax.tree.map(lambda _: P(), params)
    split = P(expert_axis(ep, params.router.shape[1]))
    specs = (replace(whole, experts=jax.tree.map(lambda _: split, params.experts)), P(axes), P(axes))
    mapped = jax.shard_map(shard, mesh=ep.mesh, in_specs=specs, out_specs=(P(axes), P()), check_vma=True)
    y, aux = mapped(*_reshard((params, x, mask), ep.mesh, specs))
    if y.shape != given.shape:
        y = _reshard(y, ep.mesh, P()).reshape(-1, hidden)[:tokens].reshape(given.shape)
    return _reshard(y, ep.mesh, given.sharding.spec), aux
