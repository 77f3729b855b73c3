"""Where to put experts, and how many copies of each, given how many tokens each one gets.

All ranks wait for the busiest one, and routers send some experts many times the tokens of others. With a few
slots more than experts, heavy experts get replicas and every rank about the same load. `balance` makes such a
map from counted loads, `place` brings stacked weights into its order, `imbalance` says what it is worth. A
group made with an ``expert_map`` of that shape takes any later one at run time, without recompiling:

    loads = loads.update(jax.device_get(aux.expert_loads))
    expert_map = balance(loads.values, num_ranks=8, slots_per_rank=3)
    y, aux = moe(params, x, config, ep=ep, expert_map=expert_map)

Loads are counted as spread evenly over an expert's replicas, as `ExpertParallel.dispatch` spreads tokens.

Sources: the problem and the two steps (copies by load, then packing) are those of DeepSeek's Expert
Parallelism Load Balancer, described in "DeepSeek-V3" (arXiv:2412.19437, section 3.4); the packing is Graham's
longest processing time rule (1969), followed by exchanges between the heaviest rank and light ones.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from pplx_jax.router import _check_int

Tree = TypeVar("Tree")

# Each exchange lowers the heaviest rank's load or the number of ranks that have it; a handful a rank settles.
_EXCHANGES_PER_RANK = 8
# Ranks that an exchange is tried with; bounds the work where there are thousands.
_PARTNERS = 16


def balance(
    loads: ArrayLike,
    num_ranks: int,
    slots_per_rank: int,
    *,
    num_groups: int = 1,
    num_nodes: int = 1,
) -> NDArray[np.int32]:
    """The expert that each rank's slots should host, so that the most loaded rank has little.

    First every extra slot goes to the expert with the most load a copy, then copies are packed on ranks.
    Deterministic: equal loads give equal maps, everywhere; ties go to lower numbers.

    With ``num_nodes`` above 1 ranks form that many nodes of consecutive ranks, and experts form
    ``num_groups`` groups of consecutive experts (as in group-limited routing, `pplx_jax.router.route`). Whole
    groups are then placed on nodes first, equally many on each, and all copies of an expert stay on its node:
    a token that may use few groups reaches few nodes.

    Args:
      loads: non-negative numbers [E], or [layers, E] for a map of each layer.
      num_ranks: R, at least 1.
      slots_per_rank: S, with R * S >= E; at most E of a rank's slots are used.
      num_groups: a divisor of E; only matters with num_nodes > 1.
      num_nodes: a divisor of num_ranks and of num_groups.

    Returns:
      int32 [R, S], or [layers, R, S]: every expert at least once, none twice on one rank, ascending in each
      rank, then -1 for slots that stay empty.

    Raises:
      TypeError, ValueError: an argument has a wrong type, shape or range; the message names it.
    """
    table = _checked_loads(loads)
    num_experts = table.shape[-1]
    _check_int("num_ranks", num_ranks, 1)
    _check_int("slots_per_rank", slots_per_rank, 1)
    _check_int("num_groups", num_groups, 1, num_experts)
    _check_int("num_nodes", num_nodes, 1, num_ranks)
    if num_experts % num_groups:
        raise ValueError(f"num_groups must divide the number of experts {num_experts}, got {num_groups}")
    if num_ranks % num_nodes or (num_nodes > 1 and num_groups % num_nodes):
        raise ValueError(
            f"num_nodes must divide num_ranks={num_ranks} and num_groups={num_groups}, got {num_nodes}"
        )
    if num_ranks * slots_per_rank < num_experts:
        raise ValueError(
            f"slots_per_rank must be at least {-(-num_experts // num_ranks)} to hold {num_experts} experts "
            f"on {num_ranks} ranks, got {slots_per_rank}"
        )
    if table.ndim == 2:
        return np.stack([_balance(row, num_ranks, slots_per_rank, num_groups, num_nodes) for row in table])
    return _balance(table, num_ranks, slots_per_rank, num_groups, num_nodes)


def _checked_loads(loads: ArrayLike) -> NDArray[np.float64]:
    table = np.asarray(loads)
    if table.dtype.kind not in "iuf":
        raise TypeError(f"loads must be numbers, got {table.dtype}")
    if table.ndim not in (1, 2) or table.shape[-1] == 0:
        raise ValueError(f"loads must have shape [E] or [layers, E] with E >= 1, got {table.shape}")
    if not np.isfinite(table).all() or (table < 0).any():
        raise ValueError(f"loads must be finite and not negative, got {table.min()}..{table.max()}")
    return table.astype(np.float64)


def _balance(
    loads: NDArray[np.float64], ranks: int, slots: int, num_groups: int, num_nodes: int
) -> NDArray[np.int32]:
    if num_nodes == 1:
        return _balance_ranks(loads, ranks, slots)
    group_loads = loads.reshape(num_groups, -1).sum(axis=1)
    # A group is an expert of a smaller problem without copies: its nodes are the ranks.
    of_node = _pack(group_loads, np.ones(num_groups, np.int64), num_nodes, num_groups // num_nodes)
    size = loads.size // num_groups
    parts = []
    for groups in of_node:
        experts = (groups[:, None] * size + np.arange(size)).reshape(-1)
        local = _balance_ranks(loads[experts], ranks // num_nodes, slots)
        parts.append(np.where(local < 0, -1, experts[local]))
    return np.concatenate(parts).astype(np.int32)


def _balance_ranks(loads: NDArray[np.float64], ranks: int, slots: int) -> NDArray[np.int32]:
    copies = _copies(loads, ranks, slots)
    return _pack(loads, copies, ranks, slots)


def _copies(loads: NDArray[np.float64], ranks: int, slots: int) -> NDArray[np.int64]:
    """How many copies of each expert; the largest load a copy is then as small as it can be."""
    copies = np.ones(loads.size, np.int64)
    heap = [(-load, expert) for expert, load in enumerate(loads.tolist())] if ranks > 1 else []
    heapq.heapify(heap)
    for _ in range(ranks * slots - loads.size):
        if not heap:
            break
        _, expert = heapq.heappop(heap)
        copies[expert] += 1
        if copies[expert] < ranks:
            heapq.heappush(heap, (-float(loads[expert] / copies[expert]), expert))
    return copies


def _pack(loads: NDArray[np.float64], copies: NDArray[np.int64], ranks: int, slots: int) -> NDArray[np.int32]:
    """Copies to ranks: the heaviest first, each to the least loaded rank that may take it."""
    each = loads / copies
    hosts = np.zeros((ranks, loads.size), bool)
    total = np.zeros(ranks)
    free = np.full(ranks, slots)

    def put(rank: int, expert: int, there: bool = True) -> None:
        hosts[rank, expert] = there
        total[rank] += each[expert] if there else -each[expert]
        free[rank] += -1 if there else 1

    for expert in np.argsort(-each, kind="stable").tolist():
        for _ in range(copies[expert]):
            allowed = (free > 0) & ~hosts[:, expert]
            if allowed.any():
                put(int(np.argmin(np.where(allowed, total, np.inf))), expert)
                continue
            # All room is on ranks that host this expert. A full rank that doesn't gives one of its experts to
            # a rank with room: it holds more than that rank has besides this expert, so there is one to give.
            taker = int(np.argmax(free > 0))
            giver = int(np.argmin(np.where(hosts[:, expert], np.inf, total)))
            movable = hosts[giver] & ~hosts[taker]
            moved = int(np.argmin(np.where(movable, each, np.inf)))
            put(giver, moved, False)
            put(taker, moved)
            put(giver, expert)
    for _ in range(_EXCHANGES_PER_RANK * ranks):
        if not _exchange(each, hosts, total):
            break
    table = np.full((ranks, slots), -1, np.int32)
    for rank in range(ranks):
        mine = np.flatnonzero(hosts[rank])
        table[rank, : mine.size] = mine
    return table


def _exchange(each: NDArray[np.float64], hosts: NDArray[np.bool_], total: NDArray[np.float64]) -> bool:
    """Swaps two experts between the heaviest rank and a light one if that lowers the higher load of both."""
    heavy = int(np.argmax(total))
    best, choice = total[heavy] * (1 - 1e-9), None
    for light in np.argsort(total, kind="stable")[:_PARTNERS].tolist():
        ours = np.flatnonzero(hosts[heavy] & ~hosts[light])
        theirs = np.flatnonzero(hosts[light] & ~hosts[heavy])
        if not ours.size or not theirs.size:
            continue
        moved = each[ours][:, None] - each[theirs][None, :]
        after = np.maximum(total[heavy] - moved, total[light] + moved)
        found = np.unravel_index(int(np.argmin(after)), after.shape)
        if after[found] < best:
            best, choice = after[found], (light, int(ours[found[0]]), int(theirs[found[1]]))
    if choice is None:
        return False
    light, mine, other = choice
    hosts[heavy, [mine, other]] = False, True
    hosts[light, [mine, other]] = True, False
    total[[heavy, light]] = (hosts[[heavy, light]] * each).sum(axis=1)
    return True


def imbalance(loads: ArrayLike, expert_map: ArrayLike) -> float | NDArray[np.float64]:
    """The most loaded rank's load over the mean: 1 is even, R is everything on one of R ranks.

    A step's experts take as long as the most loaded rank's, so this is also the factor that balance can gain.

    Args:
      loads: non-negative numbers [E], or [layers, E].
      expert_map: ints [R, S] as `balance` returns, -1 for empty slots; or [layers, R, S] with [layers, E]
        loads.

    Returns:
      A float, or float64 [layers]; 1 where there is no load.

    Raises:
      TypeError, ValueError: an argument has a wrong type, shape or range, or an expert with load is nowhere.
    """
    table, places = _checked_loads(loads), np.asarray(expert_map)
    if places.dtype.kind not in "iu":
        raise TypeError(f"expert_map must hold ints, got {places.dtype}")
    if places.ndim != table.ndim + 1 or places.shape[:-2] != table.shape[:-1]:
        raise ValueError(
            f"expert_map must be [R, S] for loads [E], [layers, R, S] for [layers, E]; got {places.shape} "
            f"for {table.shape}"
        )
    if places.size == 0 or places.min() < -1 or places.max() >= table.shape[-1]:
        raise ValueError(f"expert_map must hold -1 or 0..{table.shape[-1] - 1}, got shape {places.shape}")
    if table.ndim == 2:
        return np.array([_imbalance(*pair) for pair in zip(table, places, strict=True)])
    return _imbalance(table, places)


def _imbalance(loads: NDArray[np.float64], places: NDArray[Any]) -> float:
    copies = np.bincount(places[places >= 0], minlength=loads.size)
    nowhere = np.flatnonzero((copies == 0) & (loads > 0))
    if nowhere.size:
        raise ValueError(f"expert_map places no rank for expert {nowhere[0]} ({nowhere.size} in all)")
    each = np.append(loads / np.maximum(copies, 1), 0.0)
    ranks = each[places].sum(axis=1)
    mean = ranks.mean()
    return float(ranks.max() / mean) if mean > 0 else 1.0


@dataclass(frozen=True)
class MovingLoads:
    """An exponential moving mean of counted loads; a value, `update` returns the next one.

    Attributes:
      decay: from 0 (only the last count) to below 1; counts older than about 1 / (1 - decay) fade.
      total: float64 of the counts' shape, or None before the first.
      weight: what `total` must be divided by: 1 - decay ** updates, so that early means aren't too small.
    """

    decay: float = 0.9
    total: NDArray[np.float64] | None = None
    weight: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.decay, bool) or not isinstance(self.decay, (int, float)):
            raise TypeError(f"decay must be a float in [0, 1), got {self.decay!r}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {self.decay}")

    def update(self, loads: ArrayLike) -> MovingLoads:
        """The mean with one more count.

        Args:
          loads: non-negative numbers [E] or [layers, E], such as a step's ``aux.expert_loads``.
        """
        counted = _checked_loads(loads)
        before = np.zeros_like(counted) if self.total is None else self.total
        if before.shape != counted.shape:
            raise ValueError(f"loads must have shape {before.shape} like those before, got {counted.shape}")
        keep = float(self.decay)
        return replace(
            self,
            total=keep * before + (1 - keep) * counted,
            weight=keep * self.weight + (1 - keep),
        )

    @property
    def values(self) -> NDArray[np.float64]:
        """The mean, of the counts' shape. Raises ValueError before the first `update`."""
        if self.total is None:
            raise ValueError("no loads yet: call update first")
        return self.total / self.weight


def place(experts: Tree, expert_map: ArrayLike | jax.Array) -> Tree:
    """Stacked experts in the order of a map's slots: row s is expert ``expert_map.reshape(-1)[s]``.

    Works under jit, with a map that is a runtime array. Differentiable in the weights: the gradient of an
    expert with several replicas is the sum of theirs, so training through `place` is training the one expert.

    Args:
      experts: arrays [E, ...] in any pytree, such as `ExpertParams`.
      expert_map: ints [R, S] or [R * S]; a slot of -1 gets zeros.

    Returns:
      The same tree with arrays [R * S, ...], for ``moe(..., expert_map=expert_map, placed=True)``.

    Raises:
      TypeError, ValueError: the map doesn't hold ints, or arrays differ in E.
    """
    slots = jnp.asarray(expert_map)
    if not jnp.issubdtype(slots.dtype, jnp.integer):
        raise TypeError(f"expert_map must hold ints, got {slots.dtype}")
    sizes = {leaf.shape[:1] for leaf in jax.tree.leaves(experts)}
    if len(sizes) > 1 or () in sizes:
        raise ValueError(f"experts must be arrays [E, ...] with one E, got leading axes {sorted(sizes)}")
    return take_experts(experts, slots.reshape(-1))


def take_experts(experts: Tree, slots: jax.Array) -> Tree:
    """Rows ``slots`` of arrays [E, ...], zeros where that is negative."""

    def take(weights: jax.Array) -> jax.Array:
        # Negative numbers would count from the end; one past it is out of range and filled.
        wanted = jnp.where(slots < 0, weights.shape[0], slots)
        return jnp.take(weights, wanted, axis=0, mode="fill", fill_value=0)

    taken: Tree = jax.tree.map(take, experts)
    return taken


__all__ = ["MovingLoads", "balance", "imbalance", "place", "take_experts"]
