"""Where a layer's tokens and weights lie on a mesh: axes, partition specs, the way to a rank's own experts.

An expert's matrices have three dimensions that a mesh can split: the experts (over the group), H (over fsdp
axes, gathered before use) and I (over tp axes, computed with in parts). ``up`` and ``gate`` are
[group, fsdp, tp], ``down`` is [group, tp, fsdp].
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pplx_jax.balance import take_experts
from pplx_jax.experts import ExpertParams
from pplx_jax.moe_config import AUTO, MoEConfig

if TYPE_CHECKING:
    from pplx_jax.expert_parallel import ExpertParallel

# Mesh axes of these names shard tokens besides the group's own, unless MoEConfig.data_axes says otherwise.
DATA_AXES = ("dp", "data", "batch", "replica", "fsdp")

_AUTO_NAMES = {"fsdp_axis": "fsdp", "tp_axis": "tp"}


def group_axes(ep: ExpertParallel) -> tuple[str, ...]:
    """The mesh axes of the group, as a tuple."""
    return (ep.axis,) if isinstance(ep.axis, str) else tuple(ep.axis)


def token_axes(
    ep: ExpertParallel, data_axes: tuple[str, ...] | None = None, fsdp: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """The mesh axes over which `moe` shards tokens, in the mesh's order: the group's, data and fsdp axes."""
    names = tuple(ep.mesh.axis_names)
    for axis in data_axes or ():
        if axis not in names:
            raise ValueError(f"data_axes must name axes of the group's mesh {names}, got {axis!r}")
    wanted = {*group_axes(ep), *(DATA_AXES if data_axes is None else data_axes), *fsdp}
    return tuple(name for name in names if name in wanted)


def expert_axis(ep: ExpertParallel, num_experts: int) -> tuple[str, ...] | None:
    """How `moe` wants the experts' leading axis sharded: over the group's axes, or None (replicated).

    Replicated where the ranks don't divide E, or an expert_map places experts elsewhere than in order.
    """
    return group_axes(ep) if np.array_equal(ep.expert_map, np.arange(num_experts)) else None


def _entry(axes: tuple[str, ...] | None) -> Any:
    """Axes as one entry of a PartitionSpec."""
    if not axes:
        return None
    return axes[0] if len(axes) == 1 else axes


@dataclass(frozen=True)
class Layout:
    """Mesh axes of a layer; hashable.

    Attributes:
      group: the group's.
      tokens: those that shard tokens.
      experts: those that shard the leading axis of stored experts, or None.
      fsdp: those that shard H of stored matrices, maybe none.
      tp: those that shard I, maybe none.
    """

    group: tuple[str, ...]
    tokens: tuple[str, ...]
    experts: tuple[str, ...] | None
    fsdp: tuple[str, ...] = ()
    tp: tuple[str, ...] = ()

    def expert_specs(self, params: ExpertParams, *, stacked: bool = True) -> ExpertParams:
        """Partition specs in the place of stored experts' arrays; of a dense expert's unless stacked."""
        specs: dict[str, Any] = {
            name: self.spec(name, stacked=stacked) if value is not None else None
            for name, value in vars(params).items()
        }
        return ExpertParams(**specs)

    def spec(self, name: str, *, stacked: bool = True) -> P:
        """The partition spec of one field of `ExpertParams`."""
        h, i = _entry(self.fsdp), _entry(self.tp)
        # Vectors aren't worth a gather each: their gradients are all-reduced over fsdp.
        dimensions = {"up": (h, i), "gate": (h, i), "down": (i, h), "down_bias": (None,)}
        return P(*((_entry(self.experts),) if stacked else ()), *dimensions.get(name, (i,)))

    def logical_rules(self, names: tuple[str, str, str]) -> tuple[tuple[str, Any], ...]:
        """Rules for Flax's logical axes: ``names`` of (experts, H, I) to the mesh axes of this layout."""
        values = (_entry(self.experts), _entry(self.fsdp), _entry(self.tp))
        return tuple(zip(names, values, strict=True))


def layout_of(
    ep: ExpertParallel,
    config: MoEConfig,
    *,
    hidden: int,
    intermediate: int,
    num_experts: int,
    placed: bool = False,
    mapped: bool = False,
) -> Layout:
    """The layout of a layer of these sizes on the group's mesh.

    Args:
      ep: the group.
      config: its data_axes, fsdp_axis and tp_axis.
      hidden, intermediate, num_experts: H, I and E.
      placed: whether experts are stored in the order of the group's slots.
      mapped: whether an expert_map comes at run time.

    Raises:
      ValueError: an axis isn't in the mesh, plays another part already, or doesn't divide its dimension.
    """
    group = group_axes(ep)
    fsdp = _axes(ep, "fsdp_axis", config.fsdp_axis, hidden, "hidden", {"the group": group})
    tokens = token_axes(ep, config.data_axes, fsdp)
    tp = _axes(ep, "tp_axis", config.tp_axis, intermediate, "intermediate", {"tokens": tokens})
    if placed:
        experts: tuple[str, ...] | None = group
    else:
        experts = None if mapped else expert_axis(ep, num_experts)
    return Layout(group, tokens, experts, fsdp, tp)


def _axes(
    ep: ExpertParallel,
    argument: str,
    value: str | tuple[str, ...] | None,
    size: int,
    dimension: str,
    taken: dict[str, tuple[str, ...]],
) -> tuple[str, ...]:
    """The axes that a MoEConfig argument means."""
    names = tuple(ep.mesh.axis_names)
    used = {axis: by for by, axes in taken.items() for axis in axes}
    if value == AUTO:
        name = _AUTO_NAMES[argument]
        return (name,) if name in names and name not in used and size % ep.mesh.shape[name] == 0 else ()
    axes = (value,) if isinstance(value, str) else tuple(value or ())
    parts = 1
    for axis in axes:
        if axis not in names:
            raise ValueError(f"{argument} must name axes of the group's mesh {names}, got {axis!r}")
        if axis in used:
            raise ValueError(f"{argument} must not name {axis!r}, which shards {used[axis]}")
        parts *= ep.mesh.shape[axis]
    if len(set(axes)) != len(axes):
        raise ValueError(f"{argument} must name distinct axes, got {axes}")
    if size % parts:
        raise ValueError(f"{argument}={value!r} has {parts} parts, which don't divide {dimension}={size}")
    return axes


def own_experts(
    params: ExpertParams, ep: ExpertParallel, layout: Layout, expert_map: jax.Array | None
) -> ExpertParams:
    """This rank's experts of what shard_map cut, inside it; a slot without an expert holds zeros."""
    if layout.experts is not None:
        return params
    table = jnp.asarray(ep.expert_map) if expert_map is None else expert_map
    slots = table.reshape(ep.num_ranks, -1)[jax.lax.axis_index(layout.group)]
    return take_experts(params, slots)


def gather_fsdp(params: ExpertParams, layout: Layout, dtype: Any) -> ExpertParams:
    """Matrices with all of H, inside shard_map, in ``dtype``; their gradients are reduce-scattered in it.

    They carry the name "moe_gathered": a `jax.checkpoint` policy that doesn't save it gathers them once more
    in the backward pass instead of keeping them.
    """
    if not layout.fsdp:
        return params

    def whole(weights: jax.Array | None, axis: int) -> jax.Array | None:
        if weights is None:
            return None
        gathered: jax.Array = jax.lax.all_gather(
            weights.astype(dtype), layout.fsdp, axis=weights.ndim + axis, tiled=True
        )
        return checkpoint_name(gathered, "moe_gathered")  # type: ignore[no-any-return]

    up, down = whole(params.up, -2), whole(params.down, -1)
    assert up is not None
    assert down is not None
    return replace(params, up=up, down=down, gate=whole(params.gate, -2))


def reshard(tree: Any, mesh: Any, specs: Any) -> Any:
    """Moves arrays to specs where the mesh has explicit axes, as shard_map doesn't do it by itself there."""
    explicit = {
        name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit
    }
    if not explicit:
        return tree

    def explicit_part(spec: P) -> NamedSharding:
        # A spec may not name the others; those shard_map does move.
        parts = []
        for part in spec:
            names = () if part is None else (part,) if isinstance(part, str) else part
            parts.append(tuple(name for name in names if name in explicit) or None)
        return NamedSharding(mesh, P(*parts))

    return jax.tree.map(
        lambda spec, leaves: jax.tree.map(lambda a: jax.sharding.reshard(a, explicit_part(spec)), leaves),
        specs,
        tree,
        is_leaf=lambda spec: isinstance(spec, P),
    )
