#!/usr/bin/env python3
"""Run by the Python of a bare environment, outside of the source tree: does the installed wheel work there?

Needs nothing but the wheel and its dependencies: no compiler, no headers, and no libfabric.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import pplx_jax
import pplx_jax.models
import pplx_jax.testing

RANKS, TOKENS, HIDDEN, EXPERTS, TOP_K = 4, 16, 32, 8, 2


def exchange() -> None:
    """A layer whose expert e is a matrix of its own, and its gradient, against NumPy."""
    mesh = Mesh(np.array(jax.devices()), ("ep",))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(RANKS * TOKENS, HIDDEN)).astype(np.float32)
    w = rng.normal(size=(EXPERTS, HIDDEN, HIDDEN)).astype(np.float32) / 8
    indices = np.argsort(rng.random((len(x), EXPERTS)), axis=1)[:, :TOP_K].astype(np.int32)
    weights = rng.random((len(x), TOP_K)).astype(np.float32)
    expected = sum(weights[:, k, None] * np.einsum("th,thk->tk", x, w[indices[:, k]]) for k in range(TOP_K))
    with pplx_jax.ExpertParallel(
        mesh, num_experts=EXPERTS, top_k=TOP_K, hidden=HIDDEN, max_tokens=TOKENS, dtype=jnp.float32
    ) as ep:

        def moe(x: jax.Array, indices: jax.Array, weights: jax.Array, w: jax.Array) -> jax.Array:
            batch, route = ep.dispatch(x, indices, weights)
            return ep.combine(jax.lax.ragged_dot(batch.tokens, w, batch.group_sizes), route)

        layer = jax.shard_map(moe, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
        out, gradient = jax.jit(
            jax.value_and_grad(lambda x: (layer(x, indices, weights, w) ** 2).sum() / 2, has_aux=False)
        )(x)
        np.testing.assert_allclose(out, (expected**2).sum() / 2, rtol=1e-4)
        slope = sum(
            weights[:, k, None] * np.einsum("tk,thk->th", expected, w[indices[:, k]]) for k in range(TOP_K)
        )
        np.testing.assert_allclose(gradient, slope, rtol=1e-3, atol=1e-3)


def engine() -> str:
    """libfabric is opened at run time: with it tcp works, without it the error says what to install."""
    try:
        with pplx_jax.TransferEngine("tcp") as tcp:
            region = tcp.empty(16)
            tcp.write(region, region.descriptor, length=8, dst_offset=8, imm=1).result(5)
            tcp.imm_counter(1).wait(1)
            return tcp.fabric_name
    except pplx_jax.FabricError as error:
        if "libfabric was not found" not in str(error) or "apt-get install" not in str(error):
            raise
        return "no libfabric here, and the error says so"


def main() -> None:
    """Everything; raises at the first thing that is wrong."""
    package = Path(pplx_jax.__file__).resolve()
    assert package.is_relative_to(Path(sys.prefix).resolve()), f"{package} is not the installed package"
    assert not list(package.parent.parent.glob("pplx_jax*.libs")), "the wheel carries libraries"
    exchange()
    print(f"pplx-jax {pplx_jax.__version__}, jax {jax.__version__}: dispatch and combine work; {engine()}")


if __name__ == "__main__":
    main()
