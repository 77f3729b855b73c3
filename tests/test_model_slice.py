"""The benchmark of a model's slice, on two CPU devices with tiny sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pplx_jax

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

# XLA:CPU has no ragged_all_to_all: one of all-gathered operands, so that the baseline is tried here too.
RAGGED = """
import sys

import jax
import jax.numpy as jnp


def ragged_all_to_all(operand, output, offsets, sizes, output_offsets, received, *, axis_name):
    me = jax.lax.axis_index(axis_name)
    gather = lambda a: jax.lax.all_gather(a, axis_name)
    everybodys = gather(operand), gather(offsets), gather(sizes), gather(output_offsets)
    row = jnp.arange(len(output))
    for source in range(len(received)):
        rows, start, size, to = (a[source] for a in everybodys)
        at = row - to[me]
        mine = (at >= 0) & (at < size[me])
        moved = rows[jnp.clip(start[me] + at, 0, len(rows) - 1)]
        output = jnp.where(mine[:, None], moved, output)
    return output


jax.lax.ragged_all_to_all = ragged_all_to_all
import model_slice_gpu

sys.exit(model_slice_gpu.main(sys.argv[1:]))
"""


def run(*command, timeout=300):
    return subprocess.run(
        [sys.executable, *command],
        cwd=BENCHMARKS,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
            "PYTHONPATH": os.pathsep.join([str(Path(pplx_jax.__file__).parents[1]), *sys.path]),
        },
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def test_every_contender_decodes_the_same(tmp_path):
    found = tmp_path / "found.json"
    arguments = ["--small", "--tokens", "4", "--context", "64", "--turns", "1", "--layers", "1"]
    arguments += ["--only", "bf16,ragged,fp8-overlapped"]
    result = run("-c", RAGGED, *arguments, "--json", str(found))
    assert result.returncode == 0, result.stdout + result.stderr
    rows = {row["contender"]: row for row in json.loads(found.read_text())["rows"]}
    assert set(rows) == {"bf16", "ragged", "fp8-overlapped"}
    for name, row in rows.items():
        # The sums' order differs, and float8 rounds: a token may change where two are alike.
        assert row["agree"] >= (0.5 if "fp8" in name else 1.0), row
        parts = ("step_ms", "attention", "experts", "dispatch", "combine", "shared")
        assert all(row[part] > 0 for part in parts), row


@pytest.mark.parametrize(
    "arguments, what",
    [
        (["--small", "--context", "16"], "--context must be at least"),
        (["--only", "bf17"], "--only knows"),
        ([], "no GPU here"),
    ],
)
def test_arguments(arguments, what):
    result = run("model_slice_gpu.py", *arguments)
    assert result.returncode == 2
    assert what in result.stderr


def test_what_a_dump_says(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import model_slice

    assert model_slice.captured(tmp_path) is None
    (tmp_path / "module.thunk_sequence.txt").write_text("000: kKernel\tone\n" * 9)
    after = """001: kCommandBuffer\t
  000: kKernel    \tfusion
  000: kCustomCall\tdispatch
002: kAllGather\tall-gather
003: kWhile\t
  004: kKernel\tbody
"""
    (tmp_path / "module.thunk_sequence_after_thunk_passes.txt").write_text(after)
    found = model_slice.captured(tmp_path)
    assert found == {"inside": 2, "outside": {"AllGather": 1, "While": 1, "Kernel": 1}}
