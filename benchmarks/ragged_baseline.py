"""dispatch and combine as a JAX program does them without this package: sort by expert, all_gather of the
counts, ``jax.lax.ragged_all_to_all``, sort again at the receiver; the whole way back for combine."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pplx_jax import ExpertParallel, compat
from pplx_jax.results import Batch


class Plan(NamedTuple):
    order: jax.Array  # [T * K] of the pairs, by expert
    rows: jax.Array  # [M] where each of the received rows goes, by expert
    counts: jax.Array  # [R, R] pairs from source to destination


def _before(counts: jax.Array, axis: int) -> jax.Array:
    return jnp.cumsum(counts, axis) - counts


def dispatch(x: jax.Array, indices: jax.Array, experts: int, ranks: int) -> tuple[jax.Array, jax.Array, Plan]:
    """Rows of this rank's experts [R * T * K, H] by expert, how many each has, and what combine needs."""
    me, local = jax.lax.axis_index("ep"), experts // ranks
    chosen = indices.reshape(-1)
    most = ranks * chosen.size
    order = jnp.argsort(chosen, stable=True)
    mine = jnp.bincount(chosen, length=experts).astype(jnp.int32)
    everybodys = jax.lax.all_gather(mine, "ep")
    counts = everybodys.reshape(ranks, ranks, local).sum(-1)
    rows = jax.lax.ragged_all_to_all(
        x[order // indices.shape[1]],
        jnp.zeros((most, x.shape[1]), x.dtype),
        _before(counts[me], 0),
        counts[me],
        _before(counts, 0)[me],
        counts[:, me],
        axis_name="ep",
    )
    here = jax.lax.dynamic_slice_in_dim(everybodys, me * local, local, 1)
    numbers = jnp.tile(jnp.arange(local), ranks)
    expert = jnp.repeat(numbers, here.reshape(-1), total_repeat_length=most)
    expert = jnp.where(jnp.arange(most) < counts[:, me].sum(), expert, local)
    by_expert = jnp.argsort(expert, stable=True)
    return rows[by_expert], here.sum(0), Plan(order, by_expert, counts)


def combine(y: jax.Array, weights: jax.Array, plan: Plan) -> jax.Array:
    """[T, H]: each token's rows, weighted and summed in float32."""
    me = jax.lax.axis_index("ep")
    rows = jnp.zeros_like(y).at[plan.rows].set(y)
    back = jax.lax.ragged_all_to_all(
        rows,
        jnp.zeros((weights.size, y.shape[1]), y.dtype),
        _before(plan.counts[:, me], 0),
        plan.counts[:, me],
        _before(plan.counts, 1)[:, me],
        plan.counts[me],
        axis_name="ep",
    )
    terms = jnp.zeros_like(back).at[plan.order].set(back).reshape(*weights.shape, -1)
    return jnp.einsum("tkh,tk->th", terms.astype(jnp.float32), weights).astype(y.dtype)


class Group(ExpertParallel):
    """Takes a group's place in a model: the same arguments, nothing of the exchange. Forward only."""

    def dispatch(self, x: Any, indices: Any, weights: Any, **_: Any) -> Any:
        """The batch, and what `combine` wants back."""
        experts, ranks = self.config.num_experts, self.num_ranks

        def unchecked(x: jax.Array, indices: jax.Array, weights: jax.Array) -> Any:
            rows, sizes, plan = dispatch(x, indices, experts, ranks)
            batch = Batch(
                tokens=rows,
                weights=jnp.zeros(len(rows), jnp.float32),
                group_sizes=sizes,
                num_rows=sizes.sum(),
                num_dropped=jnp.int32(0),
                ok=jnp.int32(1),
                values=rows,
            )
            return batch, (plan, weights)

        return compat.as_unchecked(unchecked, x, indices, weights)

    def combine(self, y: Any, route: Any, **_: Any) -> Any:
        """Tokens' sums."""
        plan, weights = route
        return compat.as_unchecked(lambda y, w, *plan: combine(y, w, Plan(*plan)), y, weights, *plan)
