"""Four processes share a model's experts: what transformers computes, and each reads its own experts only."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from models_hf import TOLERANCE, build, compute, difference

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]


def load_and_generate(folder, axes, tokens, new):
    """On a rank: the logits, greedy and drawn continuations, and what was read."""
    import jax
    from jax.sharding import Mesh

    from pplx_jax import models

    mesh = Mesh(np.array(jax.devices()).reshape(tuple(axes.values())), tuple(axes))
    seen = []
    model = models.from_pretrained(folder, mesh=mesh, name=Path(folder).name, progress=seen.append)
    assert model.placement.ep is not None
    with model.placement.ep:
        logits = np.asarray(model(tokens))
        greedy = np.asarray(models.generate(model, tokens, max_new_tokens=new, prefill_chunk=16))
        drawn = np.asarray(
            models.generate(model, tokens, max_new_tokens=2, prefill_chunk=16, temperature=0.7, seed=3)
        )
        shape = model.layers[-1].moe.experts.up[...].addressable_shards[0].data.shape
    return logits, greedy, drawn, seen[-1].bytes_read, shape


@pytest.mark.parametrize(
    "variant, axes",
    [
        ("deepseek_v3", {"ep": 4}),
        ("qwen3_moe", {"ep": 4}),
        ("mixtral", {"ep": 2, "tp": 2}),
    ],
)
def test_four_processes(processes, tmp_path_factory, variant, axes):
    from pplx_jax.models.checkpoint import DTYPES, Checkpoint

    folder = tmp_path_factory.mktemp(f"four-{variant}")
    reference = compute(build(variant, folder), folder)
    new = reference.continuation.shape[1]
    results = processes.run(load_and_generate, 4, str(folder), axes, reference.tokens, new, timeout=240)
    with Checkpoint(folder) as checkpoint:
        sizes = {
            name: math.prod(info.shape) * DTYPES[info.dtype].itemsize
            for name, info in checkpoint.tensors.items()
        }
    routed = sum(size for name, size in sizes.items() if ".experts." in name)
    others = sum(sizes.values()) - routed
    for logits, greedy, drawn, read, shape in results:
        assert difference(logits, reference.logits) < TOLERANCE
        np.testing.assert_array_equal(greedy, reference.continuation)
        np.testing.assert_array_equal(drawn, results[0][2])
        # Its own experts and no others; of tp's parts those rows whose columns are too short to be read alone
        # are read as a whole.
        assert read <= others + routed // axes["ep"]
        if "tp" in axes:
            assert read < 0.85 * (others + routed // axes["ep"])
        else:
            assert read == others + routed // axes["ep"]
        assert shape[0] * axes["ep"] == {"deepseek_v3": 16, "qwen3_moe": 8, "mixtral": 8}[variant]
