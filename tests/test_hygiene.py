"""What a closed group or engine leaves in its process: nothing. And what of it stays in the coordination
service's key-value store."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import pytest
from moe_oracle import Case, make_mesh, sharded
from test_multiprocess import check_rows, on_mesh

from pplx_jax import ExpertParallel, compat
from pplx_jax.engine import TransferEngine

TIMES = 4
SMALL = dict(num_experts=10, top_k=3, hidden=16, max_tokens=8, dtype="float32")


def descriptors() -> Counter[str]:
    """Open descriptors of this process by kind."""
    found: Counter[str] = Counter()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(entry)  # noqa: PTH115 - relative names are not paths
        except OSError:
            continue
        found[re.sub(r"\d+", "N", target)] += 1
    return found


def threads() -> Counter[str]:
    """Threads of this process by name."""
    found: Counter[str] = Counter()
    for task in Path("/proc/self/task").iterdir():
        try:
            found[(task / "comm").read_text().strip()] += 1
        except OSError:
            continue
    return found


def left(before: tuple[Counter[str], Counter[str]]) -> tuple[Counter[str], Counter[str]]:
    """Descriptors and threads that were not there before."""
    return descriptors() - before[0], threads() - before[1]


def check_left(found: tuple[Counter[str], Counter[str]]) -> None:
    """What must not be left by ``TIMES`` groups or engines."""
    open_files, running = found
    assert not open_files
    assert not [name for name in running if name.startswith("pplx")]
    # XLA starts threads of its own when it likes, but not with every group.
    assert running.total() < TIMES, running


def steps_of_groups(ranks: int, fabric: str) -> tuple[Counter[str], Counter[str]]:
    """Groups one after the other, with a step each; what is there after them that was not after the first."""
    before = Counter[str](), Counter[str]()
    step = None
    for number in range(1 + TIMES):
        with ExpertParallel(make_mesh(ranks), name="hygiene", fabric=fabric, **SMALL) as ep:
            case = Case(ep, 8, 1)
            step = step or jax.jit(sharded(ep))  # compiled once: the groups are equal
            check_rows(step(*(on_mesh(ep, a) for a in case.args)), case.expected())
        if number == 0:  # libraries keep what they make once
            before = descriptors(), threads()
    return left(before)


def keys() -> set[str]:
    """Our keys in the coordination service's store."""
    client: Any = compat.coordination_client()
    return {str(key) for key, _ in client.key_value_dir_get_bytes("pplx_jax")}


def of_processes(fabric: str) -> tuple[Counter[str], Counter[str], set[str]]:
    # Groups of other tests that failed to connect leave theirs: somebody may not have read them yet.
    before = keys()
    found = steps_of_groups(jax.device_count(), fabric)
    return *found, keys() - before


@pytest.mark.multiprocess
@pytest.mark.parametrize("fabric", ["tcp", "shm"])
def test_closed_groups_of_processes_leave_nothing(processes, fabric):
    for *found, new in processes.run(of_processes, 2, fabric):
        check_left(found)
        # Addresses and keys of memory are taken back once everybody has them.
        assert any("barrier" in key for key in new)
        assert not [key for key in new if "/endpoints/" in key or "/hello/" in key]


@pytest.mark.parametrize("fabric", ["local", "sim:seed=1", "shm", "tcp"])
def test_a_closed_group_leaves_nothing(fabric):
    check_left(steps_of_groups(4, fabric))


@pytest.mark.parametrize("fabric", ["local", "shm", "tcp"])
def test_a_closed_engine_leaves_nothing(fabric):
    def once() -> None:
        with TransferEngine(fabric) as one, TransferEngine(fabric) as two:
            source, target = one.empty(1000), two.empty(1000)
            one.write(source, target.descriptor, imm=1).result(20)
            two.imm_counter(1).wait(1)
            assert one.stats()["registrations"] == two.stats()["registrations"] == 1

    once()
    before = descriptors(), threads()
    for _ in range(TIMES):
        once()
    check_left(left(before))


def test_regions_that_nobody_holds_are_unregistered():
    with TransferEngine("tcp") as engine:
        for _ in range(50):
            kept = engine.empty(100)
        assert engine.stats()["registrations"] == 1
        del kept
        assert engine.stats()["registrations"] == 0


def test_a_group_tells_what_it_has_registered():
    with ExpertParallel(make_mesh(2), name="registered", **SMALL) as ep:
        ep.connect()
        assert [rank["registrations"] > 0 for rank in ep.stats()["ranks"]] == [True, True]


def test_what_is_there_is_seen():
    # That the tests above could tell.
    before = descriptors(), threads()
    deadline = time.monotonic() + 20
    with TransferEngine("tcp"):
        while "pplx-engine" not in left(before)[1] and time.monotonic() < deadline:
            time.sleep(0.01)  # a thread names itself
        found, running = left(before)
    assert any("socket" in name for name in found)
    assert "pplx-engine" in running
