"""A decode step as a model has it: dispatch, the experts' matrix products on the GPU, combine."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu import group
from jax.sharding import PartitionSpec as P
from moe_oracle import SPEC

from pplx_jax.grouped_gemm import grouped_gemm

pytestmark = pytest.mark.gpu
HIDDEN, INNER, EXPERTS, TOP_K, TOKENS = 512, 256, 16, 4, 32


def swiglu(rows, up, down, product):
    gate, value = jnp.split(product(rows, up), 2, axis=-1)
    return product((jax.nn.silu(gate.astype(jnp.float32)) * value).astype(rows.dtype), down)


def dense_step(x, indices, weights, up, down):
    """Every expert on every token, in float32."""
    x, up, down = (np.asarray(a, np.float32) for a in (x, up, down))
    gate, value = np.split(np.einsum("th,ehf->tef", x, up), 2, axis=-1)
    rows = np.einsum("tef,efh->teh", gate / (1 + np.exp(-gate)) * value, down)
    return np.einsum("tkh,tk->th", np.take_along_axis(rows, indices[:, :, None], 1), weights)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_decode_step_is_replayed(ranks, tmp_path):
    """With tokamax's grouped products, as a command buffer, 1000 times with new routing each time."""
    pytest.importorskip("tokamax", reason="needs tokamax, which brings the GPU's grouped products")
    options = {"num_experts": EXPERTS, "top_k": TOP_K, "hidden": HIDDEN, "max_tokens": TOKENS}
    with group(ranks, **options, dtype="bfloat16") as ep:

        def per_shard(x, indices, weights, up, down):
            batch, route = ep.dispatch(x, indices, weights)
            product = lambda rows, matrices: grouped_gemm(rows, matrices, batch.group_sizes)  # noqa: E731
            return ep.combine(swiglu(batch.values, up, down, product), route)

        step = jax.jit(
            jax.shard_map(per_shard, mesh=ep.mesh, in_specs=(SPEC,) * 3 + (P("ep"),) * 2, out_specs=SPEC),
            compiler_options={"xla_gpu_graph_min_graph_size": 1, "xla_dump_to": str(tmp_path)},
        )
        rng = np.random.default_rng(0)
        put = lambda array: jax.device_put(array, jax.NamedSharding(ep.mesh, SPEC))  # noqa: E731
        bfloat16 = lambda *shape: rng.normal(size=shape).astype(jnp.bfloat16)  # noqa: E731
        up = bfloat16(EXPERTS, HIDDEN, 2 * INNER) * jnp.bfloat16(HIDDEN**-0.5)
        down = bfloat16(EXPERTS, INNER, HIDDEN) * jnp.bfloat16(INNER**-0.5)
        experts = [put(up), put(down)]
        cases = []
        for _ in range(50):
            total = TOKENS * ranks
            indices = np.argsort(rng.random((total, EXPERTS)))[:, :TOP_K].astype(np.int32)
            case = bfloat16(total, HIDDEN), indices, rng.random((total, TOP_K), np.float32)
            cases.append(([put(array) for array in case], dense_step(*case, up, down)))
        compiled = step.lower(*cases[0][0], *experts).compile()
        thunks = {path.name: path.read_text() for path in tmp_path.rglob("*thunk_sequence*")}
        assert any("kCommandBuffer" in text for text in thunks.values()), sorted(tmp_path.rglob("*"))
        for start in range(0, 1000, 20):
            batch = [cases[i] for i in rng.integers(0, len(cases), 20)]
            for (_, wanted), out in zip(batch, [compiled(*args, *experts) for args, _ in batch], strict=True):
                error = np.abs(np.asarray(out, np.float32) - wanted).max() / np.abs(wanted).max()
                assert error < 0.02, (start, error)
        ep.check(sync=True)
