"""The middle of an MoE layer: tokens to their experts and back, dense or over a group, maybe overlapped."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pplx_jax import router
from pplx_jax.experts import ExpertParams, apply_experts
from pplx_jax.moe_config import MoEConfig
from pplx_jax.remat import named_residuals

if TYPE_CHECKING:
    from pplx_jax.expert_parallel import Batch, ExpertParallel


@dataclass(frozen=True)
class Exchanged:
    """What came home.

    Attributes:
      y: [T, H], the routed experts' part, of the tokens' dtype.
      ok: int32 [], 1, or 0 if this rank's exchange failed.
      dropped: int32 [], pairs that found no room on this rank.
      shared: [T, H], what the shared expert made meanwhile, if it was given.
    """

    y: jax.Array
    ok: jax.Array
    dropped: jax.Array
    shared: jax.Array | None = None


@dataclass(frozen=True)
class Shared:
    """A dense expert and its tokens.

    Attributes:
      params: without a leading axis.
      x: [T, H].
    """

    params: ExpertParams
    x: jax.Array

    def apply(self, config: MoEConfig) -> jax.Array:
        """[T, H]."""
        return apply_experts(self.params, self.x, None, activation=config.activation_fn)


def dense_experts(
    params: ExpertParams, x: jax.Array, indices: jax.Array, weights: jax.Array, config: MoEConfig
) -> Exchanged:
    """sum_k weights[:, k] * expert[indices[:, k]](x) without a group; a choice of -1 adds nothing."""
    tokens, top_k = indices.shape
    num_experts = params.up.shape[0]
    # A choice of -1 sorts behind all experts, past the last group.
    flat = jnp.where(indices < 0, num_experts, indices).reshape(-1)
    order = jnp.argsort(flat, stable=True)
    group_sizes = router.expert_loads(indices, num_experts)
    rows = checkpoint_name(x[order // top_k], "moe_dispatched")
    rows = apply_experts(params, rows, group_sizes, activation=config.activation_fn, gemm=config.grouped_gemm)
    rows = rows[jnp.argsort(order, stable=True)].reshape(tokens, top_k, x.shape[1])
    y = jnp.sum(jnp.where(indices < 0, 0.0, weights)[..., None] * rows.astype(jnp.float32), axis=1)
    return Exchanged(checkpoint_name(y.astype(x.dtype), "moe_combined"), jnp.int32(1), jnp.int32(0))


def group_experts(
    params: ExpertParams,
    x: jax.Array,
    indices: jax.Array,
    weights: jax.Array,
    expert_map: jax.Array | None,
    *,
    ep: ExpertParallel,
    config: MoEConfig,
    name: str,
    shared: Shared | None = None,
) -> Exchanged:
    """The same over a group, inside ``jax.shard_map``.

    Args:
      params: this rank's experts.
      x, indices, weights: this shard's tokens [T, H] and where they go [T, K].
      expert_map: in place of the group's own, or None.
      ep: the group.
      config: of the layer.
      name: of the call site.
      shared: what to compute between dispatch's send and its recv.
    """
    tokens = (x.astype(ep.config.dtype), indices, weights, expert_map)
    meanwhile = None
    if shared is None:
        batch, way_back = _dispatched(ep, tokens, name)
    else:
        batch, way_back, meanwhile = _overlapped(ep, tokens, name, shared, config)
    rows, sizes = _grouped(batch, ep)
    rows = apply_experts(
        params, rows.astype(x.dtype), sizes, activation=config.activation_fn, gemm=config.grouped_gemm
    )
    rows = rows.astype(ep.config.dtype).reshape(batch.values.shape)
    y = checkpoint_name(ep.combine(rows, way_back), "moe_combined")
    return Exchanged(y.astype(x.dtype), batch.ok, batch.num_dropped, meanwhile)


def overlaps(config: MoEConfig, ep: ExpertParallel, tokens: int) -> bool:
    """Whether a layer of so many tokens computes its shared expert between the halves of dispatch.

    Halves go in one round: a step of more tokens than the group's ``chunk`` isn't cut in two.
    """
    return config.overlap_shared and tokens <= (ep.config.chunk or tokens)


def _differentiable(batch: Batch) -> Batch:
    # What is quantised has no derivative, not even a zero one.
    return replace(batch, tokens=batch.values, scales=None)


def _dispatched(ep: ExpertParallel, tokens: tuple[Any, ...], name: str) -> Any:
    def dispatch(x: jax.Array, indices: jax.Array, weights: jax.Array, expert_map: jax.Array | None) -> Any:
        batch, route = ep.dispatch(x, indices, weights, expert_map=expert_map, name=name)
        return _differentiable(batch), route

    return named_residuals(dispatch, "moe_dispatched")(*tokens)


def _overlapped(
    ep: ExpertParallel, tokens: tuple[Any, ...], name: str, shared: Shared, config: MoEConfig
) -> Any:
    """Batch, route and the shared expert's output. Backward, the transposed halves enclose its backward."""

    def send(x: jax.Array, indices: jax.Array, weights: jax.Array, expert_map: jax.Array | None) -> Any:
        return ep.dispatch_send(x, indices, weights, expert_map=expert_map, name=name)

    def recv(sent: Any) -> Any:
        batch, route = ep.dispatch_recv(sent)
        return _differentiable(batch), route

    sent = named_residuals(send, "moe_dispatched")(*tokens)
    # The shared expert waits for the send to be enqueued, the recv for the shared expert.
    ticket, x = jax.lax.optimization_barrier((sent.ticket, shared.x))
    ticket, y = jax.lax.optimization_barrier((ticket, Shared(shared.params, x).apply(config)))
    batch, route = named_residuals(recv, "moe_dispatched")(replace(sent, ticket=ticket))
    return batch, route, y


def _grouped(batch: Batch, ep: ExpertParallel) -> tuple[jax.Array, jax.Array]:
    """The batch's rows [M, H] and how many belong to each expert, in either layout."""
    if ep.config.layout == "ragged":
        return batch.values, batch.group_sizes
    values = batch.values
    rows, hidden = values.shape[1:]
    if not ep.config.zero_tail:
        # What an expert's unused rows hold would meet zero cotangents in its weights' gradient.
        used = jnp.arange(rows) < batch.group_sizes[:, None]
        values = jnp.where(used[..., None], values, 0)
    return values.reshape(-1, hidden), jnp.full_like(batch.group_sizes, rows)
