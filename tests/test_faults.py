"""Faults of real processes at stages of a training step, as docs/reliability.md has them in a table.

By default each fault at one or two stages, so that every stage has its turn; ``PPLX_FAULTS=all`` runs them
all (ten minutes), and ``python tests/faults.py`` writes the table.
"""

from __future__ import annotations

import os

import faults
import pytest
from faults import FAULTS, KILLS, STAGES

pytestmark = pytest.mark.multiprocess

_ALL = os.environ.get("PPLX_FAULTS") == "all"
_SOME = {
    "kill": ("dispatch, not sent", "combine transpose, sent", "combine, blocking"),
    "kill shm": ("combine, sent",),
    "stop": ("dispatch transpose, not sent", "dispatch, blocking"),
    "pause": ("combine, not sent", "dispatch transpose, sent"),
    "sockets": ("combine transpose, not sent", "combine transpose, blocking"),
    "unplug": ("dispatch, sent", "dispatch transpose, blocking"),
}
_seen: dict[tuple[str, str], str] = {}


def test_every_stage_has_its_turn():
    assert {stage for stages in _SOME.values() for stage in stages} == set(STAGES)
    assert set(_SOME) == set(FAULTS)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_others_raise_close_and_begin_anew(fault, hosts):
    stages = STAGES if _ALL else _SOME[fault]
    if fault in KILLS:
        results = faults.run_kills(fault, stages)
    else:
        pool = hosts.pool(faults.RANKS)
        if fault == "unplug" and not pool.network.isolated:
            pytest.skip(pool.network.why)
        results = faults.run(pool, fault, stages)
    for result in results:
        assert result.problem() == "", (result.stage, result.seen)
        _seen[fault, result.stage] = result.outcome()


def test_the_documented_table():
    documented = faults.read_table(faults.DOCUMENT.read_text())
    assert set(documented) == {(fault, stage) for fault in FAULTS for stage in STAGES}
    for (fault, stage), cell in documented.items():
        outcome, seconds = faults.parse_cell(cell)
        assert (seconds is None) == (fault == "pause"), (fault, stage)
        assert seconds is None or seconds <= faults.DEADLINE, (fault, stage)
        ran = _seen.get((fault, stage), outcome)  # in this session
        assert outcome == ran, f"{fault}, {stage}: run python tests/faults.py"


def test_tcp_and_shm_need_no_locked_memory(processes):
    assert processes.run(faults.without_locked_memory, 2, ["tcp", "shm"]) == ["works"] * 2
