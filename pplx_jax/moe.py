"""A Mixture-of-Experts layer as a pure function, dense or over an expert-parallel group.

`moe` is the whole layer on global arrays. Given a `pplx_jax.ExpertParallel` it opens its own
``jax.shard_map`` over all axes of the group's mesh: tokens are sharded over the group's axes and the data
axes, experts' weights over the group's axes and, if the mesh has them, fsdp and tp axes
(`pplx_jax.moe_sharding`); everything else is replicated. Without a group it is plain JAX and serves as the
reference.

Collectives in the compiled program, besides the exchange: one all-reduce a layer (losses, loads, status) and,
in the backward pass, the all-reduces of the gradients of replicated parameters. With fsdp axes each of the
experts' matrices is all-gathered before use and its gradient reduce-scattered. With tp axes every tp rank
exchanges the same tokens with its own slice of the group, applies its part of every expert, and an all-reduce
of [T, H] adds up what combine brought home: before combine it would be [M, H], at least top_k times as many
rows, and as many as could arrive instead of as many as did. The backward pass adds up the gradient of the
[T, H] tokens likewise.

Two shapes cost more, as JAX can't shard them evenly: a number of experts that the ranks don't divide (its
parameters are stored replicated, and their gradients all-reduced) and a number of tokens that the token
shards don't divide (outputs are gathered).

For `jax.checkpoint` policies, what dispatch returns carries the name "moe_dispatched" (with all that the
backward exchanges need, so that saving it saves exchanging again), what combine returns "moe_combined", and
gathered weights "moe_gathered".
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from pplx_jax import compat, router
from pplx_jax.experts import ExpertParams
from pplx_jax.moe_config import MoEConfig
from pplx_jax.moe_exchange import Shared, dense_experts, group_experts, overlaps
from pplx_jax.moe_params import MoEParams, check_params, init_params
from pplx_jax.moe_sharding import (
    DATA_AXES,
    Layout,
    expert_axis,
    gather_fsdp,
    group_axes,
    layout_of,
    own_experts,
    reshard,
    token_axes,
)

if TYPE_CHECKING:
    from pplx_jax.expert_parallel import ExpertParallel

__all__ = [
    "DATA_AXES",
    "Layout",
    "MoEAux",
    "MoEConfig",
    "MoEParams",
    "expert_axis",
    "group_axes",
    "init_params",
    "layout_of",
    "moe",
    "token_axes",
]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("load_balance_loss", "z_loss", "expert_loads", "num_dropped", "ok", "routing"),
    meta_fields=(),
)
@dataclass(frozen=True)
class MoEAux:
    """What a layer reports besides its output; over all ranks' tokens and, but for routing, the same on all.

    Attributes:
      load_balance_loss: float32 [], see `pplx_jax.router.load_balancing_loss`. Differentiable.
      z_loss: float32 [], see `pplx_jax.router.z_loss`. Differentiable.
      expert_loads: int32 [E], choices that fell on each expert, before any drop.
      num_dropped: int32 [], (token, expert) pairs that found no room (groups with on_overflow="drop").
      ok: int32 [], 1, or 0 if the exchange failed on any rank: the outputs are then NaN.
      routing: where tokens went, sharded like them, if `moe` was asked to return it; else None.
    """

    load_balance_loss: jax.Array
    z_loss: jax.Array
    expert_loads: jax.Array
    num_dropped: jax.Array
    ok: jax.Array
    routing: router.SavedRouting | None = None


@partial(jax.tree_util.register_dataclass, data_fields=("x", "mask", "routing", "expert_map"), meta_fields=())
@dataclass(frozen=True)
class _Inputs:
    """What comes in besides parameters: x [..., H], mask [...], routing [..., K] by token, one expert_map."""

    x: jax.Array
    mask: jax.Array | None
    routing: router.SavedRouting | None
    expert_map: jax.Array | None

    def flat(self) -> _Inputs:
        """With one token axis."""
        tokens = math.prod(self.x.shape[:-1])
        return replace(
            self,
            x=self.x.reshape(tokens, self.x.shape[-1]),
            mask=None if self.mask is None else self.mask.reshape(tokens),
            routing=jax.tree.map(lambda a: a.reshape(tokens, a.shape[-1]), self.routing),
        )


@dataclass(frozen=True)
class _Static:
    """What is known when tracing."""

    config: MoEConfig
    ep: ExpertParallel | None
    layout: Layout | None
    shared_layout: Layout | None
    name: str
    return_routing: bool

    @property
    def group_layout(self) -> Layout:
        """The layout, where there is a group."""
        assert self.layout is not None
        return self.layout


def _route(params: MoEParams, inputs: _Inputs, config: MoEConfig) -> tuple[jax.Array, router.Routing]:
    """The logits [T, E] and the routing, computed or given, with -1 for tokens that take no part."""
    # HIGHEST: a router rounded to TF32 or bfloat16 would choose other experts on other hardware.
    logits = jnp.dot(
        inputs.x.astype(jnp.float32), params.router.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    if params.router_bias is not None:
        logits = logits + params.router_bias.astype(jnp.float32)
    scoring: dict[str, Any] = {
        "score_fn": config.score_fn,
        "normalize": config.normalize,
        "scale": config.scale,
    }
    if inputs.routing is not None:
        routing = router.replay(logits, inputs.routing, **scoring)
    else:
        routing = router.route(
            logits,
            top_k=config.top_k,
            bias=params.selection_bias,
            num_groups=config.num_groups,
            top_groups=config.top_groups,
            **scoring,
        )
    if inputs.mask is not None:
        routing = routing._replace(indices=jnp.where(inputs.mask[:, None], routing.indices, -1))
    return logits, routing


def _layer(params: MoEParams, inputs: _Inputs, static: _Static) -> tuple[jax.Array, MoEAux]:
    """The layer on flat inputs: all tokens without a group, else this shard's, inside shard_map."""
    config, x = static.config, inputs.x
    logits, routing = _route(params, inputs, config)
    sums = router.router_sums(logits, routing, mask=inputs.mask)
    compute = x if config.dtype is None else x.astype(config.dtype)
    if static.ep is None:
        found = dense_experts(params.experts, compute, routing.indices, routing.weights, config)
        y, ok, dropped = found.y, found.ok, found.dropped
        if params.shared is not None:
            y = y + Shared(params.shared, compute).apply(config)
    else:
        y, ok, dropped = _group_layer(params, inputs, compute, routing, static)
        sums, ok, dropped = _sum_over_ranks(sums, ok, dropped, static.group_layout)
    aux = MoEAux(
        load_balance_loss=router.balance_from_sums(sums),
        z_loss=router.z_from_sums(sums),
        expert_loads=sums.loads,
        num_dropped=dropped,
        ok=ok,
        routing=router.SavedRouting(routing.indices, routing.weights) if static.return_routing else None,
    )
    return y.astype(x.dtype), aux


def _group_layer(
    params: MoEParams, inputs: _Inputs, compute: jax.Array, routing: router.Routing, static: _Static
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Routed and shared experts inside shard_map: (y, ok, dropped), the latter two of this shard."""
    layout, shared_layout, ep = static.group_layout, static.shared_layout, static.ep
    assert ep is not None
    experts = own_experts(params.experts, ep, layout, inputs.expert_map)
    experts = _bias_once(gather_fsdp(experts, layout, compute.dtype), layout.tp)
    # From here on each tp rank has a gradient of the tokens of its own; adding them up costs [T, H], here.
    spread = compat.to_varying(compute, layout.tp)
    shared = None
    if params.shared is not None:
        assert shared_layout is not None
        weights = _bias_once(gather_fsdp(params.shared, shared_layout, compute.dtype), shared_layout.tp)
        shared = Shared(weights, spread if shared_layout.tp else compute)
    config = static.config
    found = group_experts(
        experts,
        spread,
        routing.indices,
        routing.weights,
        inputs.expert_map,
        ep=ep,
        config=config,
        name=static.name,
        shared=shared if overlaps(config, ep, compute.shape[0]) else None,
    )
    y, beside = found.y, found.shared
    if shared is not None and beside is None:
        beside = shared.apply(config)
    if beside is not None and shared_layout is not None and shared_layout.tp:
        y, beside = y + beside, None
    if layout.tp:
        y = jax.lax.psum(y, layout.tp)
    return y if beside is None else y + beside, found.ok, found.dropped


def _bias_once(params: ExpertParams, tp: tuple[str, ...]) -> ExpertParams:
    """The partial sums of all tp ranks are added up: only the first one's has the bias."""
    if params.down_bias is None or not tp:
        return params
    first = jax.lax.axis_index(tp) == 0
    return replace(params, down_bias=jnp.where(first, params.down_bias, 0))


def _sum_over_ranks(
    sums: router.RouterSums, ok: jax.Array, dropped: jax.Array, layout: Layout
) -> tuple[router.RouterSums, jax.Array, jax.Array]:
    """Sums over all tokens, whether every rank's exchange went well, and all drops: one all-reduce."""
    if layout.tp:
        # Ranks of one tp slice count the same tokens, but each has an exchange that may fail.
        first = jax.lax.axis_index(layout.tp) == 0
        sums, dropped = jax.tree.map(lambda a: jnp.where(first, a, 0), (sums, dropped))
    axes = (*layout.tokens, *layout.tp)
    sums, (failed, dropped) = router.sum_over_ranks(sums, axes, counts=(1 - ok, dropped))
    return sums, (failed == 0).astype(jnp.int32), dropped


def _check_group(ep: ExpertParallel, hidden: int, experts: int, config: MoEConfig) -> None:
    for name, have, want in (
        ("hidden", ep.config.hidden, hidden),
        ("num_experts", ep.config.num_experts, experts),
        ("top_k", ep.config.top_k, config.top_k),
    ):
        if have != want:
            raise ValueError(f"ep was made for {name}={have}, but the layer has {name}={want}")


def _check_inputs(
    x: jax.Array, mask: jax.Array | None, routing: Any, hidden: int, experts: int, config: MoEConfig
) -> None:
    if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be a floating-point array, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.ndim < 1 or x.shape[-1] != hidden:
        raise ValueError(f"x must have shape [..., {hidden}] (params.router's H), got {tuple(x.shape)}")
    if mask is not None:
        if not hasattr(mask, "dtype"):
            raise TypeError(f"mask must be a bool array, got {type(mask).__name__}")
        if tuple(mask.shape) != tuple(x.shape[:-1]):
            raise ValueError(f"mask must have shape {tuple(x.shape[:-1])}, got {tuple(mask.shape)}")
        if mask.dtype != jnp.bool_:
            raise TypeError(f"mask must be bool, got {mask.dtype}")
    if routing is not None:
        router.check_saved_routing(routing, (*x.shape[:-1], config.top_k))


def moe(
    params: MoEParams,
    x: jax.Array,
    config: MoEConfig,
    *,
    ep: ExpertParallel | None = None,
    mask: jax.Array | None = None,
    routing: router.SavedRouting | None = None,
    return_routing: bool = False,
    expert_map: Any = None,
    placed: bool = False,
    name: str = "",
) -> tuple[jax.Array, MoEAux]:
    """The layer: y = sum over a token's k experts of weight_k * expert_k(x), plus shared(x) if there is one.

    With a group, call it on global arrays outside any shard_map, under jit; each of the token shards then
    holds ceil(tokens / shards) tokens, at most the group's max_tokens. x may be sharded in any way; sharding
    its first axis over `token_axes` moves nothing. Differentiable in x and in all parameters but
    selection_bias.

    Args:
      params: the layer's parameters, global arrays. Any sharding is right; that of `Layout.expert_specs`
        moves nothing.
      x: floating [..., H].
      config: see `MoEConfig`.
      ep: the expert-parallel group, or None for dense JAX on whatever x is placed.
      mask: bool [...] (x's shape without H), False for tokens that take no part: they reach no expert, count
        in no loss, and get only the shared expert's output. None: all take part.
      routing: where each token goes, instead of what the router would choose: a rollout's, say, so that
        training computes with the experts that generation used. Without its weights they are computed from
        this call's scores of the given experts, and the router gets their gradient; with them they are
        used as they are, `routing.weights` gets the gradient, and the router only that of the losses.
      return_routing: whether aux.routing says where tokens went (-1 where masked), in x's shape with K for H.
      expert_map: ints [R, S] or [R * S], in place of the group's own, of whose shape it must be: the expert
        that each rank's slot hosts, -1 for none, see `pplx_jax.balance`. A runtime array: a new one doesn't
        recompile. Without a group it makes no difference.
      placed: params.experts are stacked [R * S, ...], in the order of expert_map (else the group's), see
        `pplx_jax.balance.place`, and each rank holds its own; their gradients are each replica's. Otherwise
        they are [E, ...] and with a map every rank picks its own of all of them, in each call: simple, and
        right for training, but all experts pass through every rank's memory.
      name: of this call site, for the exchange's errors and to tell calls of equal shape apart; the group's
        name if empty.

    Returns:
      (y, aux): y of x's shape and dtype, aux a `MoEAux`.

    Raises:
      TypeError, ValueError: an argument has a wrong type, shape or range; the message names it. Failures of
        the exchange itself show as aux.ok = 0 and as the group's own errors.
    """
    if ep is not None and not (hasattr(ep, "dispatch") and hasattr(ep, "combine") and hasattr(ep, "config")):
        raise TypeError(f"ep must be a pplx_jax.ExpertParallel or None, got {type(ep).__name__}")
    slots = None
    if placed:
        if ep is None:
            raise ValueError("placed=True needs a group, got ep=None")
        slots = ep.num_ranks * ep.experts_per_rank
    hidden, experts = check_params(params, slots=slots)
    if not isinstance(config, MoEConfig):
        raise TypeError(f"config must be a MoEConfig, got {type(config).__name__}")
    router.check_routing_options(
        experts, config.top_k, config.score_fn, config.num_groups, config.top_groups, config.scale
    )
    _check_inputs(x, mask, routing, hidden, experts, config)
    inputs = _Inputs(x, mask, routing, None)
    static = _Static(config, None, None, None, name, return_routing)
    if ep is None:
        y, aux = _layer(params, inputs.flat(), static)
        return _unflat(y, x.shape), _with_routing(aux, lambda a: _unflat(a, x.shape))
    _check_group(ep, hidden, experts, config)
    if expert_map is not None:
        table = jnp.asarray(expert_map)
        shapes = ((ep.expert_map.size,), (ep.num_ranks, ep.experts_per_rank))
        if table.shape not in shapes or not jnp.issubdtype(table.dtype, jnp.integer):
            raise ValueError(
                f"expert_map must hold ints [{ep.num_ranks}, {ep.experts_per_rank}] like the group's own, "
                f"got {table.dtype} {list(table.shape)}"
            )
        inputs = replace(inputs, expert_map=table.reshape(-1).astype(jnp.int32))
    width = params.experts.up.shape[-1]
    layout = layout_of(
        ep,
        config,
        hidden=hidden,
        intermediate=width,
        num_experts=experts,
        placed=placed,
        mapped=expert_map is not None,
    )
    shared_layout = None
    if params.shared is not None:
        # A shared expert of a width that tp doesn't divide stays whole.
        parts = math.prod(ep.mesh.shape[a] for a in layout.tp)
        even = params.shared.up.shape[-1] % parts == 0
        shared_layout = replace(layout, tp=layout.tp if even else ())
    return _sharded(params, inputs, replace(static, ep=ep, layout=layout, shared_layout=shared_layout))


def _unflat(a: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[T, N] to [..., N] with the leading axes of shape [..., H]."""
    return a.reshape(*shape[:-1], a.shape[-1])


def _with_routing(aux: MoEAux, change: Any) -> MoEAux:
    return replace(aux, routing=jax.tree.map(change, aux.routing))


def _sharded(params: MoEParams, inputs: _Inputs, static: _Static) -> tuple[jax.Array, MoEAux]:
    ep, layout = static.ep, static.group_layout
    assert ep is not None
    axes = layout.tokens
    shards = math.prod(ep.mesh.shape[a] for a in axes)
    shape = inputs.x.shape
    tokens = math.prod(shape[:-1])
    local = -(-tokens // shards)
    if local > ep.config.max_tokens:
        raise ValueError(
            f"x holds {tokens} tokens, {local} on each of {shards} token shards, but ep was made for "
            f"max_tokens={ep.config.max_tokens}"
        )
    given = jax.typeof(inputs.x)
    # Sharding the leading axis as it is, and flattening each shard inside, leaves the partitioner nothing to
    # move. Where that axis doesn't divide, tokens are flattened and padded first.
    padded = len(shape) < 2 or shape[0] % shards != 0
    if padded:
        padding = local * shards - tokens
        flat = reshard(inputs, ep.mesh, P()).flat()

        def pad(a: jax.Array) -> jax.Array:
            return jnp.pad(a, ((0, padding), *[(0, 0)] * (a.ndim - 1)))

        mask = flat.mask
        if mask is None and padding:
            mask = jnp.ones(tokens, jnp.bool_)
        inputs = replace(
            flat,
            x=pad(flat.x),
            mask=None if mask is None else pad(mask),
            routing=jax.tree.map(pad, flat.routing),
        )

    def shard(params: MoEParams, inputs: _Inputs) -> tuple[jax.Array, MoEAux]:
        y, aux = _layer(params, inputs.flat(), static)
        return _unflat(y, inputs.x.shape), _with_routing(aux, lambda a: _unflat(a, inputs.x.shape))

    whole: MoEParams = jax.tree.map(lambda _: P(), params)
    param_specs = replace(whole, experts=layout.expert_specs(params.experts))
    if params.shared is not None and static.shared_layout is not None:
        specs = static.shared_layout.expert_specs(params.shared, stacked=False)
        param_specs = replace(param_specs, shared=specs)
    split = P(axes)
    input_specs = replace(jax.tree.map(lambda _: split, inputs), expert_map=_spec_of(inputs.expert_map))
    report = MoEAux(P(), P(), P(), P(), P(), split if static.return_routing else None)  # type: ignore[arg-type]
    mapped = jax.shard_map(
        shard,
        mesh=ep.mesh,
        in_specs=(param_specs, input_specs),
        out_specs=(split, report),
        check_vma=True,
    )
    y, aux = mapped(*reshard((params, inputs), ep.mesh, (param_specs, input_specs)))
    spec = tuple(given.sharding.spec)[: len(shape) - 1]

    def restore(a: jax.Array) -> jax.Array:
        if padded:
            a = _unflat(reshard(a, ep.mesh, P())[:tokens], shape)
        return a

    y = reshard(restore(y), ep.mesh, given.sharding.spec)
    return y, _with_routing(aux, lambda a: reshard(restore(a), ep.mesh, P(*spec)))


def _spec_of(replicated: jax.Array | None) -> Any:
    return None if replicated is None else P()
