"""Hours in minutes: training steps, groups that are closed and opened again, memory that is registered and
given back, in several processes; whether memory, descriptors, threads and registrations stay what they are.

    python tests/soak.py --minutes 30

Prints what was seen and exits with 1 where something grew. docs/reliability.md has figures.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
if __name__ == "__main__":  # where the package may not be installed; tests have one that is
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from pplx_jax.testing import ProcessPool  # noqa: E402 - starts no JAX

#: Steps after which ranks agree on going on, and after how many such blocks a group is closed and made anew.
BLOCK, REOPEN = 200, 5
#: Memory of a process may end this much above where it was after the first quarter: allocators breathe.
SLACK_MIB, SLACK_PART = 4.0, 0.01
SHAPE = dict(num_experts=16, top_k=4, hidden=256, max_tokens=64, chunk=32, dtype="bfloat16")


@dataclasses.dataclass
class Sample:
    """A process at some time."""

    seconds: float
    steps: int
    groups: int
    """Connected so far."""
    mib: float
    """Resident memory."""
    descriptors: int
    threads: int
    registrations: int
    """Of the TransferEngine beside the groups, and of the group that is open."""


def _sample(began: float, steps: int, groups: int, engine: Any, ep: Any) -> Sample:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for later is not what is leaked
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Sample(
        time.monotonic() - began,
        steps,
        groups,
        pages * os.sysconf("SC_PAGESIZE") / 2**20,
        len(list(Path("/proc/self/fd").iterdir())),
        len(list(Path("/proc/self/task").iterdir())),
        engine.stats()["registrations"] + sum(rank["registrations"] for rank in ep.stats()["ranks"]),
    )


def _go_on(block: int, deadline: float) -> bool:
    """The same on all ranks: what rank 0 says."""
    import jax

    from pplx_jax import compat

    client = compat.coordination_client()
    assert client is not None
    key = f"soak/{block}"
    if jax.process_index() == 0:
        client.key_value_set_bytes(key, b"on" if time.monotonic() < deadline else b"end")
        if block > 1:
            client.key_value_delete(f"soak/{block - 2}")  # read by all: they have been at the block after it
    return client.blocking_key_value_get_bytes(key, 120_000) == b"on"


def soak(minutes: float, fabric: str) -> list[Sample]:
    """On a rank: samples, one a block of steps."""
    import jax
    import numpy as np
    from moe_oracle import Case, make_mesh, sharded
    from test_multiprocess import on_mesh

    from pplx_jax import ExpertParallel
    from pplx_jax.engine import TransferEngine

    mesh = make_mesh(jax.device_count())

    def group() -> ExpertParallel:
        return ExpertParallel(mesh, name="soak", fabric=fabric, **SHAPE)

    ep = group()
    function = sharded(ep)
    step = jax.jit(jax.grad(lambda *a: (function(*a).astype(np.float32) ** 2).sum(), argnums=(0, 2)))
    inputs = []
    for seed, skew in enumerate(["uniform", "zipf", "all to one", "holes", "nothing", "ragged"]):
        inputs.append([on_mesh(ep, a) for a in Case(ep, 64, seed, skew).args])
    began, deadline = time.monotonic(), time.monotonic() + 60 * minutes
    samples: list[Sample] = []
    steps = block = 0
    groups = 1
    with TransferEngine(fabric) as engine:
        kept = engine.empty(4096)
        while _go_on(block, deadline):
            for number in range(BLOCK):
                jax.block_until_ready(step(*inputs[number % len(inputs)]))
                if number % 20 == 0:  # registered, written to, given back
                    region = engine.empty(1 << 16)
                    engine.write(kept, region.descriptor, imm=7).result(60)
                    del region
            steps += BLOCK
            block += 1
            ep.check()
            if block % REOPEN == 0:
                ep.close()
                ep = group()
                ep.connect()
                groups += 1
            samples.append(_sample(began, steps, groups, engine, ep))
    ep.close()
    return samples


def verdict(samples: list[Sample]) -> list[str]:
    """What has grown between the second quarter and the last one."""
    quarter = max(1, len(samples) // 4)
    early, late = samples[quarter : 2 * quarter], samples[-quarter:]
    grown = []
    before, after = (statistics.median(s.mib for s in part) for part in (early, late))
    if after - before > max(SLACK_MIB, SLACK_PART * before):
        grown.append(f"memory from {before:.1f} to {after:.1f} MiB")
    for name in ("descriptors", "threads", "registrations"):
        most = max(getattr(s, name) for s in early)
        least = min(getattr(s, name) for s in late)  # connections come and go by one or two
        if least > most:
            grown.append(f"{name} from {most} to {least}")
    return grown


def main() -> None:
    """Runs it and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--fabric", default="tcp")
    options = parser.parse_args()
    with ProcessPool(options.ranks) as pool:
        results = pool.run(soak, options.minutes, options.fabric, timeout=60 * options.minutes + 300)
    failed = False
    print(f"{options.ranks} ranks, {options.fabric}, {results[0][-1].seconds / 60:.1f} minutes")
    print("rank  at s   steps  groups  memory MiB  descriptors  threads  registrations")
    for rank, samples in enumerate(results):
        for at in sorted({0, len(samples) // 4, len(samples) // 2, len(samples) - 1}):
            s = samples[at]
            print(
                f"{rank:4}  {s.seconds:5.0f}  {s.steps:6}  {s.groups:6}  {s.mib:10.1f}  {s.descriptors:11}  "
                f"{s.threads:7}  {s.registrations:13}"
            )
        for what in verdict(samples):
            failed = True
            print(f"rank {rank}: {what}")
    print("something grew" if failed else "flat")
    sys.exit(failed)


if __name__ == "__main__":
    import soak as module  # under its importable name, as ranks know it

    module.main()
