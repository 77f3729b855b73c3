"""Four processes, or hosts of a SLURM job, share a model's experts; each reads its own only."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from models_hf import TOLERANCE, build, chunked, compute, difference

from pplx_jax.testing import HostPool

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]


def load_and_generate(folder, axes, tokens, new, draw):
    """On a rank: logits in one go, in chunks and step by step, continuations, and what was read."""
    import jax
    from jax.sharding import Mesh

    from pplx_jax import models

    mesh = Mesh(np.array(jax.devices()).reshape(tuple(axes.values())), tuple(axes))
    seen = []
    model = models.from_pretrained(folder, mesh=mesh, name=Path(folder).name, progress=seen.append)
    assert model.placement.ep is not None
    with model.placement.ep:
        logits = [np.asarray(model(tokens)), chunked(model, tokens, 16), chunked(model, tokens[:, :9], 1)]
        greedy = np.asarray(models.generate(model, tokens, max_new_tokens=new, prefill_chunk=16))
        drawn = None
        if draw:
            found = models.generate(model, tokens[:, :1], max_new_tokens=4, temperature=0.7, seed=3)
            drawn = np.asarray(found)
        shape = model.layers[-1].moe.experts.up[...].addressable_shards[0].data.shape
    return logits, greedy, drawn, seen[-1].bytes_read, shape


def one_group_overflows():
    """Two processes, each a group of two ranks, where four rows at one rank are too many: what each raises
    when the first one's tokens have both their experts on one rank, and the tokens of a step after it."""
    import jax
    from jax.sharding import Mesh
    from test_models_generation import CONFIG
    from test_multiprocess import error_of

    from pplx_jax import models

    def load(devices, name):
        mesh = Mesh(np.array(devices).reshape(-1, 2), ("dp", "ep"))
        return models.from_config(CONFIG, mesh=mesh, dtype="float32", name=name, exchange={"rows": 3})

    def run(model, tokens):
        return lambda: np.asarray(models.generate(model, np.array(tokens)[:, None], max_new_tokens=1))

    alone = load(jax.local_devices(), f"alone {jax.process_index()}")
    with alone.placement.ep:
        kinds = [error_of(run(alone, [token, token]))[0] for token in range(CONFIG.vocab_size)]
    bad, good = kinds.index("RoutingError"), kinds.index("nothing")
    model = load(jax.devices(), "one of two")
    mixed = [bad, bad, good, good]
    with model.placement.ep:
        told = [error_of(f)[:2] for f in (run(model, mixed), lambda: model(np.array(mixed)[:, None]))]
        return told, run(model, [good] * 4)()


def test_all_processes_hear_of_one_groups_overflow(processes):
    (first, after), (second, same) = processes.run(one_group_overflows, 2, devices_per_process=2)
    assert [kind for kind, _ in first] == ["RoutingError"] * 2
    assert [kind for kind, _ in second] == ["PplxError"] * 2
    assert all("another group" in text for _, text in second)
    np.testing.assert_array_equal(after, same)
    assert (after >= 0).all()


@pytest.mark.parametrize(
    "variant, axes, launch",
    [
        ("deepseek_v3", {"ep": 4}, "processes"),
        ("qwen3_moe", {"ep": 4}, "processes"),
        ("kimi_k2", {"ep": 2, "tp": 2}, "processes"),
        ("mixtral", {"ep": 2, "tp": 2}, "slurm"),
    ],
)
def test_four_processes(processes, tmp_path_factory, variant, axes, launch):
    from pplx_jax.models.checkpoint import DTYPES, Checkpoint

    folder = tmp_path_factory.mktemp(f"four-{variant}")
    reference = compute(build(variant, folder), folder)
    new = reference.continuation.shape[1]
    arguments = (str(folder), axes, reference.tokens, new, launch == "slurm")
    if launch == "slurm":
        # Hosts of their own where this machine can have them; ranks meet by srun's variables.
        with HostPool(4, launch="slurm", timeout=240) as pool:
            results = pool.run(load_and_generate, *arguments)
    else:
        results = processes.run(load_and_generate, 4, *arguments, timeout=240)
    with Checkpoint(folder) as checkpoint:
        sizes = {
            name: math.prod(info.shape) * DTYPES[info.dtype].itemsize
            for name, info in checkpoint.tensors.items()
        }
    routed = sum(size for name, size in sizes.items() if ".experts." in name)
    others = sum(sizes.values()) - routed
    for logits, greedy, drawn, read, shape in results:
        for found in logits:
            # The last is shorter.
            assert difference(found, reference.logits[:, : found.shape[1]]) < TOLERANCE
        np.testing.assert_array_equal(greedy, reference.continuation)
        if drawn is not None:
            np.testing.assert_array_equal(drawn, results[0][2])
            assert drawn.shape == (len(reference.tokens), 4)
        # Its own experts and no others; of tp's parts those rows whose columns are too short to be read alone
        # are read as a whole.
        assert read <= others + routed // axes["ep"]
        if "tp" in axes:
            assert read < 0.85 * (others + routed // axes["ep"])
        else:
            assert read == others + routed // axes["ep"]
        assert shape[0] * axes["ep"] == {"qwen3_moe": 8, "mixtral": 8}.get(variant, 16)
