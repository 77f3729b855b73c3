"""The router of a Mixture-of-Experts layer: scores, top-k selection, auxiliary losses. Pure and in float32.

Everything here is a pure function of arrays, usable inside ``jax.shard_map`` (pass ``axis_name`` to sum over
all ranks' tokens) as well as on one device. T is the number of tokens, E of experts, K of experts a token.

Sources: top-k routing and the balancing loss, Shazeer et al. 2017 (arXiv:1701.06538) and Fedus et al. 2021,
"Switch Transformers" (arXiv:2101.03961); z loss, Zoph et al. 2022, "ST-MoE" (arXiv:2202.08906); sigmoid
scores, group-limited selection and the selection bias, DeepSeek-AI 2024, "DeepSeek-V3" (arXiv:2412.19437) and
Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing" (arXiv:2408.15664).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

ScoreFn: TypeAlias = Literal["softmax", "sigmoid"]
AxisName: TypeAlias = str | Sequence[str]
SCORE_FNS: tuple[ScoreFn, ...] = ("softmax", "sigmoid")

# Sigmoid scores may all be tiny; the sum that normalises them must not be zero.
_TINY = 1e-20


class Routing(NamedTuple):
    """Where each token goes.

    Attributes:
      indices: int32 [T, K], a token's distinct experts, best (biased) score first.
      weights: float32 [T, K], what each expert's output is multiplied by.
      probs: float32 [T, E], the unbiased scores; rows sum to 1 for softmax, each entry is in (0, 1) for
        sigmoid.
    """

    indices: jax.Array
    weights: jax.Array
    probs: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SavedRouting:
    """A routing taken from one call to be given to another; a pytree.

    Attributes:
      indices: integers [..., K], a token's distinct experts, -1 for none.
      weights: float [..., K], or None: computed anew from the scores of these experts.
    """

    indices: jax.Array
    weights: jax.Array | None = None


class RouterSums(NamedTuple):
    """Sums over tokens from which the losses follow; being sums, they add up over ranks.

    Attributes:
      probs: float32 [E], sum over tokens of the scores normalised to sum to 1 over the experts.
      z: float32 [], sum over tokens of logsumexp(logits) squared.
      loads: int32 [E], tokens per expert (each of a token's K choices counts as one).
      tokens: int32 [], number of tokens counted.
    """

    probs: jax.Array
    z: jax.Array
    loads: jax.Array
    tokens: jax.Array


def _check_int(name: str, value: Any, low: int, high: int | None = None) -> int:
    allowed = f"an int from {low} to {high}" if high is not None else f"an int of at least {low}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be {allowed}, got {value!r} of type {type(value).__name__}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be {allowed}, got {value}")
    return value


def check_routing_options(
    num_experts: int, top_k: int, score_fn: str, num_groups: int, top_groups: int, scale: float
) -> None:
    """Raises ValueError or TypeError, naming the argument, unless these options make sense together."""
    _check_int("num_experts", num_experts, 1)
    _check_int("top_k", top_k, 1, num_experts)
    if score_fn not in SCORE_FNS:
        raise ValueError(f"score_fn must be one of {', '.join(map(repr, SCORE_FNS))}, got {score_fn!r}")
    _check_int("num_groups", num_groups, 1, num_experts)
    if num_experts % num_groups:
        raise ValueError(f"num_groups must divide the number of experts {num_experts}, got {num_groups}")
    _check_int("top_groups", top_groups, 1, num_groups)
    reachable = top_groups * (num_experts // num_groups)
    if reachable < top_k:
        raise ValueError(
            f"top_groups={top_groups} of num_groups={num_groups} leave {reachable} of {num_experts} experts, "
            f"fewer than top_k={top_k}"
        )
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a finite float, got {scale!r} of type {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")


def _check_logits(logits: jax.Array) -> None:
    if not hasattr(logits, "dtype") or not hasattr(logits, "ndim"):
        raise TypeError(f"logits must be an array [T, E], got {type(logits).__name__}")
    if logits.ndim != 2 or logits.shape[1] < 1:
        raise ValueError(f"logits must have shape [T, E] with E >= 1, got {tuple(logits.shape)}")
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"logits must be floating point, got {logits.dtype}")


def _check_mask(mask: jax.Array | None, tokens: int) -> None:
    if mask is None:
        return
    if tuple(mask.shape) != (tokens,):
        raise ValueError(f"mask must have shape [{tokens}] (one entry a token), got {tuple(mask.shape)}")
    if mask.dtype != jnp.bool_:
        raise TypeError(f"mask must be bool, got {mask.dtype}")


def route(
    logits: jax.Array,
    *,
    top_k: int,
    score_fn: ScoreFn = "softmax",
    bias: jax.Array | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    normalize: bool = True,
    scale: float = 1.0,
) -> Routing:
    """Chooses each token's experts and their weights.

    Selection ranks ``score + bias``; the weights are the scores without the bias, divided by their sum over
    the chosen experts if ``normalize``, then multiplied by ``scale``. With ``num_groups > 1`` the experts
    form that many contiguous groups; a token may only use the ``top_groups`` groups whose two best biased
    scores have the largest sum. Equal scores go to the lower expert (and group) index, on every platform.

    With ``top_k=1`` and ``normalize=True`` the weight is the constant ``scale``, so the router gets no
    gradient from it: use ``normalize=False`` there (as Switch Transformers do).

    Args:
      logits: floating [T, E]; computed with in float32.
      top_k: experts a token, from 1 to E.
      score_fn: "softmax" over the experts, or an independent "sigmoid" for each.
      bias: float [E] added to the scores for the selection only, or None; gets no gradient.
      num_groups: number of groups, a divisor of E.
      top_groups: groups a token may use, from 1 to num_groups, holding at least top_k experts.
      normalize: whether a token's K weights are made to sum to ``scale``.
      scale: finite factor on the weights (DeepSeek's routed scaling factor).

    Returns:
      A Routing. Differentiable in logits through weights and probs.

    Raises:
      TypeError, ValueError: an argument has a wrong type, shape or range; the message names it.
    """
    _check_logits(logits)
    tokens, num_experts = logits.shape
    check_routing_options(num_experts, top_k, score_fn, num_groups, top_groups, scale)
    if bias is not None and tuple(bias.shape) != (num_experts,):
        raise ValueError(
            f"bias must have shape [{num_experts}] (one entry an expert), got {tuple(bias.shape)}"
        )

    scores = _scores(logits, score_fn)
    ranking = jax.lax.stop_gradient(scores)
    if bias is not None:
        ranking = ranking + jax.lax.stop_gradient(bias.astype(jnp.float32))
    if top_groups < num_groups:
        grouped = ranking.reshape(tokens, num_groups, num_experts // num_groups)
        best_two, _ = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))
        _, chosen = jax.lax.top_k(best_two.sum(axis=-1), top_groups)
        allowed = (chosen[:, :, None] == jnp.arange(num_groups)).any(axis=1)
        ranking = jnp.where(allowed[:, :, None], grouped, -jnp.inf).reshape(tokens, num_experts)
    _, indices = jax.lax.top_k(ranking, top_k)
    return Routing(indices.astype(jnp.int32), _weights(scores, indices, normalize, scale), scores)


def _scores(logits: jax.Array, score_fn: ScoreFn) -> jax.Array:
    logits = logits.astype(jnp.float32)
    return jax.nn.softmax(logits, axis=-1) if score_fn == "softmax" else jax.nn.sigmoid(logits)


def _weights(scores: jax.Array, indices: jax.Array, normalize: bool, scale: float) -> jax.Array:
    """Weights of the chosen experts, [T, K]; 0 where there is none."""
    chosen = jnp.take_along_axis(scores, jnp.maximum(indices, 0), axis=-1)
    weights = jnp.where(indices < 0, 0.0, chosen)
    if normalize:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + _TINY)
    scaled: jax.Array = weights * jnp.float32(scale)
    return scaled


def check_saved_routing(routing: Any, shape: tuple[int, ...]) -> None:
    """Raises TypeError or ValueError, naming the argument, unless routing is a SavedRouting of this shape."""
    if not isinstance(routing, SavedRouting):
        raise TypeError(f"routing must be a SavedRouting, got {type(routing).__name__}")
    fields: tuple[tuple[str, Any, Any], ...] = (
        ("indices", routing.indices, jnp.integer),
        ("weights", routing.weights, jnp.floating),
    )
    for name, value, kind in fields:
        if value is None and name == "weights":
            continue
        if not hasattr(value, "dtype") or not jnp.issubdtype(value.dtype, kind):
            wanted = "integers" if kind is jnp.integer else "floating point"
            raise TypeError(
                f"routing.{name} must be {wanted}, got {getattr(value, 'dtype', type(value).__name__)}"
            )
        if tuple(value.shape) != shape:
            raise ValueError(f"routing.{name} must have shape {shape}, got {tuple(value.shape)}")


def replay(
    logits: jax.Array,
    saved: SavedRouting,
    *,
    score_fn: ScoreFn = "softmax",
    normalize: bool = True,
    scale: float = 1.0,
) -> Routing:
    """A routing with given experts in place of the best: what `route` would return, had it chosen them.

    With ``saved.weights`` those are the weights, and no gradient reaches the logits through them. Without,
    weights follow from the logits as in `route`, and so does their gradient: the choice is a constant there,
    too, so a router whose choices are replayed learns as one that made them (routing replay in reinforcement
    learning, Ma et al. 2025, arXiv:2510.11370).

    Args:
      logits: floating [T, E]; computed with in float32.
      saved: indices [T, K], each from -1 (no expert, weight 0) to E - 1.
      score_fn, normalize, scale: see `route`.

    Returns:
      A Routing of int32 indices and float32 weights; probs are this call's scores.

    Raises:
      TypeError, ValueError: an argument has a wrong type or shape; the message names it.
    """
    _check_logits(logits)
    top_k = saved.indices.shape[-1] if getattr(saved, "indices", None) is not None else 0
    check_saved_routing(saved, (logits.shape[0], top_k))
    scores = _scores(logits, score_fn)
    indices = saved.indices.astype(jnp.int32)
    if saved.weights is None:
        weights = _weights(scores, indices, normalize, scale)
    else:
        weights = saved.weights.astype(jnp.float32)
    return Routing(indices, weights, scores)


def router_sums(logits: jax.Array, routing: Routing, *, mask: jax.Array | None = None) -> RouterSums:
    """Sums of this shard's tokens for the losses and loads.

    Args:
      logits: floating [T, E], as given to `route`.
      routing: what `route` returned for them.
      mask: bool [T], False for tokens that don't count (padding), or None.
    """
    _check_logits(logits)
    tokens, num_experts = logits.shape
    _check_mask(mask, tokens)
    valid = jnp.ones((tokens,), jnp.bool_) if mask is None else mask
    probs = routing.probs / (routing.probs.sum(axis=-1, keepdims=True) + _TINY)
    z = jax.scipy.special.logsumexp(logits.astype(jnp.float32), axis=-1) ** 2
    indices = jnp.where(valid[:, None], routing.indices, -1)
    return RouterSums(
        probs=jnp.where(valid[:, None], probs, 0.0).sum(axis=0),
        z=jnp.where(valid, z, 0.0).sum(),
        loads=expert_loads(indices, num_experts),
        tokens=valid.sum(dtype=jnp.int32),
    )


def sum_over_ranks(
    sums: RouterSums, axis_name: AxisName, *, counts: Sequence[jax.Array] = ()
) -> tuple[RouterSums, tuple[jax.Array, ...]]:
    """Adds the sums, and further counts, over the mesh axes ``axis_name`` in a single all-reduce.

    Counts travel in the float32 message as their low 12 bits and the rest, which is exact over up to 4096
    shards: a second all-reduce of integers would cost another round of latency in each layer.

    Args:
      sums: this shard's sums.
      axis_name: mesh axes over which tokens are sharded.
      counts: non-negative int32 scalars to be added up as well.

    Returns:
      The sums and the counts over all ranks, the same on every rank.
    """
    axes = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    num_experts = sums.loads.shape[0]
    ints = jnp.concatenate([sums.loads, jnp.stack([sums.tokens, *counts])])
    low, high = (ints & 0xFFF).astype(jnp.float32), (ints >> 12).astype(jnp.float32)
    total = jax.lax.psum(jnp.concatenate([sums.probs, sums.z[None], low, high]), axes)
    floats, low, high = jnp.split(total, [num_experts + 1, num_experts + 1 + ints.shape[0]])
    ints = low.astype(jnp.int32) + (high.astype(jnp.int32) << 12)
    summed = RouterSums(floats[:-1], floats[-1], ints[:num_experts], ints[num_experts])
    return summed, tuple(ints[num_experts + 1 :])


def balance_from_sums(sums: RouterSums) -> jax.Array:
    """float32 [], the balancing loss of `load_balancing_loss` from already summed quantities."""
    num_experts = sums.loads.shape[0]
    # Counts are exact in int32 and rounded once; they carry no gradient.
    fraction = sums.loads.astype(jnp.float32) / jnp.maximum(sums.loads.sum(), 1).astype(jnp.float32)
    mean_prob = sums.probs / jnp.maximum(sums.tokens, 1).astype(jnp.float32)
    loss: jax.Array = jnp.float32(num_experts) * jnp.sum(fraction * mean_prob)
    return loss


def z_from_sums(sums: RouterSums) -> jax.Array:
    """float32 [], the z loss of `z_loss` from already summed quantities."""
    return sums.z / jnp.maximum(sums.tokens, 1).astype(jnp.float32)


def load_balancing_loss(
    logits: jax.Array, routing: Routing, *, mask: jax.Array | None = None, axis_name: AxisName | None = None
) -> jax.Array:
    """Switch Transformers' balancing loss: E * sum_e f_e * p_e.

    f_e is the share of the K*T choices that fell on expert e (no gradient), p_e the mean over tokens of e's
    score, scores being normalised to sum to 1 over the experts. It is 1 when both are uniform, at most E. 0
    for no tokens.

    Args:
      logits: floating [T, E].
      routing: what `route` returned for them.
      mask: bool [T], False for tokens that don't count, or None.
      axis_name: inside shard_map, the mesh axes over which tokens are sharded: f and p are then means over
        all ranks' tokens and the result is the same on all ranks. None: this device's tokens only.

    Returns:
      float32 [].
    """
    sums = router_sums(logits, routing, mask=mask)
    return balance_from_sums(sums if axis_name is None else sum_over_ranks(sums, axis_name)[0])


def z_loss(
    logits: jax.Array, *, mask: jax.Array | None = None, axis_name: AxisName | None = None
) -> jax.Array:
    """ST-MoE's z loss: the mean over tokens of logsumexp(logits) squared. Arguments as `load_balancing_loss`.

    Returns:
      float32 [].
    """
    _check_logits(logits)
    _check_mask(mask, logits.shape[0])
    z = jax.scipy.special.logsumexp(logits.astype(jnp.float32), axis=-1) ** 2
    valid = jnp.ones(z.shape, jnp.bool_) if mask is None else mask
    total = jnp.stack([jnp.where(valid, z, 0.0).sum(), valid.sum(dtype=jnp.float32)])
    if axis_name is not None:
        total = jax.lax.psum(total, axis_name)
    return total[0] / jnp.maximum(total[1], 1.0)


def expert_loads(indices: jax.Array, num_experts: int, *, axis_name: AxisName | None = None) -> jax.Array:
    """Tokens per expert, int32 [E]; over all ranks with ``axis_name``. Entries of -1 don't count.

    Args:
      indices: int32 [T, K], each from -1 to num_experts - 1.
      num_experts: E, at least 1.
      axis_name: as in `load_balancing_loss`.
    """
    _check_int("num_experts", num_experts, 1)
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise TypeError(f"indices must be integers, got {indices.dtype}")
    loads = (indices[..., None] == jnp.arange(num_experts)).sum(
        axis=tuple(range(indices.ndim)), dtype=jnp.int32
    )
    return loads if axis_name is None else jax.lax.psum(loads, axis_name)


def update_selection_bias(bias: jax.Array, loads: jax.Array, *, speed: float = 1e-3) -> jax.Array:
    """One step of balancing without a loss: raises underloaded experts' bias, lowers the others'.

    Args:
      bias: float32 [E].
      loads: int32 [E], tokens per expert over all ranks.
      speed: the step, in units of the score.

    Returns:
      The new bias, of bias's shape and dtype.
    """
    if bias.shape != loads.shape:
        raise ValueError(f"loads must have bias's shape {tuple(bias.shape)}, got {tuple(loads.shape)}")
    load = loads.astype(jnp.float32)
    step: jax.Array = (speed * jnp.sign(load.mean() - load)).astype(bias.dtype)
    return bias + step
