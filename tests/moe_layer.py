"""What tests of the MoE layer share: meshes, groups, parameters, and the comparison with dense JAX."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

import pplx_jax
from pplx_jax.moe import MoEParams, init_params

H, INNER = 16, 12
INIT = jax.nn.initializers.normal(0.3)  # compiles faster than the default


def mesh_of(explicit: bool = False, **axes: int) -> Mesh:
    sizes = tuple(axes.values())
    kind = AxisType.Explicit if explicit else AxisType.Auto
    devices = np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes)
    return Mesh(devices, tuple(axes), axis_types=(kind,) * len(sizes))


@contextlib.contextmanager
def group(
    mesh: Mesh,
    experts: int,
    top_k: int,
    tokens: int = 32,
    axis: str | tuple[str, ...] = "ep",
    expert_map: Any = None,
    **fields: Any,
) -> Iterator[Any]:
    fields = {"hidden": H, "dtype": jnp.float32, "name": "flax-test", **fields}
    with pplx_jax.ExpertParallel(
        mesh,
        axis,
        num_experts=experts,
        top_k=top_k,
        max_tokens=tokens,
        stall_timeout=50.0,
        expert_map=expert_map,
        **fields,
    ) as ep:
        yield ep


@functools.cache
def make_params(experts: int, **options: Any) -> MoEParams:
    """Random parameters without zeros, so that each expert and each bias shows in the result."""
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), H, INNER, experts, **options))
    rng = np.random.default_rng(0)
    made: MoEParams = jax.tree.map(
        lambda a: jnp.asarray(rng.normal(scale=0.3, size=a.shape), a.dtype), shapes
    )
    return made


def assert_close(got: Any, want: Any, tolerance: float = 2e-5) -> None:
    def check(path: Any, a: Any, b: Any) -> None:
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(check, jax.device_get(got), jax.device_get(want))


def arrays(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def collectives(hlo: str) -> list[str]:
    names = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
    return re.findall(rf"= \S+ ({names})(?:-start)?\(", hlo)
