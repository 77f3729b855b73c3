"""Finding each other: ranks that are late, give up and try again, or are killed and started anew."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import pytest
from moe_oracle import Case, sharded
from test_multiprocess import check_rows, error_of, group, on_mesh

from pplx_jax import bootstrap, compat, errors

# ---- groups ------------------------------------------------------------------------------------------------


def exchanges(ep):
    case = Case(ep, 8, 1)
    check_rows(jax.jit(sharded(ep))(*(on_mesh(ep, a) for a in case.args)), case.expected())
    ep.check()


def comes_late(name, late):
    """Both try six times; what the tries gave, and whether a new group works after them."""
    if jax.process_index() == 1:
        time.sleep(late)
    patience = dict(fabric="tcp", timeout=2.0, stall_timeout=2.0 / 3)  # three times that to connect
    tries = []
    for _ in range(6):
        ep = group(name, **patience)
        tries.append(error_of(ep.connect)[:2])
        if tries[-1][0] == "nothing":
            break
        ep.close()
    ep.close()
    with group(name, fabric="tcp") as ep:
        exchanges(ep)
    return tries


@pytest.mark.multiprocess
def test_a_rank_that_is_late_is_met_by_retrying(processes):
    first, second = processes.run(comes_late, 2, "late", 3.4)
    assert [kind for kind, _ in first[:-1]] == ["TimeoutError"] * (len(first) - 1)
    assert first[0][0] == "TimeoutError"
    assert first[-1][0] == second[-1][0] == "nothing", (first, second)
    assert len(second) == 1, "rank 0 was there when it came"
    assert "process 1 did not reach stage 'meeting' of connecting group 'late' within 2 s" in first[0][1]


def retries(seed):
    """Gives up and tries again after a while, until an exchange works: how often."""
    draw = random.Random(1000 * seed + jax.process_index())
    deadline = time.monotonic() + 60
    tries = 0
    while True:
        tries += 1
        patience = draw.uniform(0.2, 3.0)
        ep = group("retries", fabric="tcp", timeout=3.0, stall_timeout=patience / 3 if tries < 4 else 20)
        try:
            ep.connect()
            if tries >= 4:
                exchanges(ep)
                ep.close()
                return tries
        except errors.PplxError:
            assert time.monotonic() < deadline
        ep.close()
        time.sleep(draw.uniform(0, 1.5))


@pytest.mark.multiprocess
@pytest.mark.parametrize("seed", range(2))
def test_ranks_that_give_up_at_random_meet(processes, seed):
    """Also where some have connected and closed again while others gave up."""
    assert all(tries >= 4 for tries in processes.run(retries, 3, seed))


# ---- processes that are killed in it -----------------------------------------------------------------------

_STAGES = ("hello", "endpoints")
#: Having published its number; having published a stage; with all but the last word said. After that it is a
#: dead rank of a connected group.
_DEATHS = ("meeting", "endpoints", "connected/barrier")


def attempt(address: str, process: int, end_at: str, patience: float) -> None:
    """A process's whole life: connects, or kills itself at ``end_at``."""
    jax.distributed.initialize(address, 2, process, initialization_timeout=100)
    while True:
        boot = bootstrap.Bootstrap("killed", process, (0, 1), patience, "these two")
        exchange, wait = boot.exchange, boot._wait

        def dying_exchange(stage: str, value: bytes) -> Any:
            if stage == end_at == "connected/barrier":
                os.kill(os.getpid(), signal.SIGKILL)
            return exchange(stage, value)  # noqa: B023 - called in this turn of the loop

        def dying_wait(key: str, of: int, stage: str, *args: Any, **options: Any) -> bytes:
            if stage == end_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return wait(key, of, stage, *args, **options)  # noqa: B023

        boot.exchange, boot._wait = dying_exchange, dying_wait  # type: ignore[method-assign]
        try:
            boot.meet()
            while True:
                try:
                    told = [boot.exchange_json(stage, [os.getpid(), stage]) for stage in _STAGES]
                    boot.finish()
                    break
                except bootstrap.BegunAnewError as begun:
                    boot.meet_again(begun)
        except errors.TimeoutError:
            continue
        print(json.dumps([boot.connection, told]), flush=True)
        os._exit(0)


@pytest.mark.multiprocess
def test_a_process_that_was_killed_and_started_anew_is_met():
    """What it had published is still there; it knows nothing of that, and rank 0 nothing of its death."""
    from pplx_jax.testing.pool import ProcessPool

    with ProcessPool(1)._reserve_address() as address:
        assert address is not None
        before = jax.config.jax_enable_recoverability
        jax.config.update("jax_enable_recoverability", True)
        try:
            service = compat.coordination_service(address, 2)
        finally:
            jax.config.update("jax_enable_recoverability", before)
        running: list[subprocess.Popen[str]] = []

        def start(process: int, end_at: str, patience: float) -> subprocess.Popen[str]:
            code = f"import test_connect as t; t.attempt({address!r}, {process}, {end_at!r}, {patience})"
            env = {**os.environ, "JAX_ENABLE_RECOVERABILITY": "1", "JAX_PLATFORMS": "cpu"}
            env["PYTHONPATH"] = f"{Path(__file__).parent}:{env.get('PYTHONPATH', '')}"
            command = [sys.executable, "-c", "import jax; " + code]
            running.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
            return running[-1]

        try:
            stays = start(0, "", 300.0)
            for stage in _DEATHS:
                assert start(1, stage, 300.0).wait(120) == -signal.SIGKILL, stage
            last = start(1, "", 300.0)
            said = [json.loads(one.communicate(timeout=120)[0]) for one in (stays, last)]
        finally:
            for one in running:
                one.kill()
                one.wait()
        del service
    assert said[0] == said[1]
    for stage, told in zip(_STAGES, said[0][1], strict=True):
        assert told == {"0": [stays.pid, stage], "1": [last.pid, stage]}


_TWO_JOBS = """
import socket
import jax
from pplx_jax import bootstrap, compat

for _ in range(2):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    jax.distributed.initialize(f"127.0.0.1:{port}", 1, 0)
    print(bootstrap.job_secret(20).hex())
    print(compat.coordination_client().key_value_try_get_bytes("pplx_jax/secret").hex())
    jax.distributed.shutdown()
"""


def test_another_coordination_service_has_another_secret():
    """In a process that shuts jax.distributed down and initialises it again."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", _TWO_JOBS]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=True)
    first, kept, second, again = done.stdout.split()
    assert first == kept != second == again


# ---- many attempts, in one process -------------------------------------------------------------------------


class Store:
    """The coordination service's store, where everything takes a while."""

    def __init__(self, seed: int) -> None:
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._draw = random.Random(seed)
        self.pending: list[str] = []  # gets that timed out: the service keeps them until the key is set
        self.polls = 0
        self.gone = False

    def _pause(self) -> None:
        time.sleep(self._draw.choice((0.0, 0.0, 0.001, 0.004)))

    def key_value_set_bytes(self, key: str, value: bytes, allow_overwrite: bool = False) -> None:
        self._pause()
        with self._changed:
            assert allow_overwrite or key not in self._values
            self._values[key] = value
            self._changed.notify_all()

    def key_value_delete(self, key: str) -> None:
        self._pause()
        with self._changed:
            self._values.pop(key, None)

    def key_value_try_get_bytes(self, key: str) -> bytes:
        self._pause()
        with self._changed:
            self.polls += 1
            if self.gone:
                raise RuntimeError("UNAVAILABLE: connection refused")
            if key not in self._values:
                raise RuntimeError(f"NOT_FOUND: {key}")
            return self._values[key]

    def key_value_dir_get_bytes(self, key: str) -> list[tuple[str, bytes]]:
        self._pause()
        with self._changed:
            return [(k, v) for k, v in self._values.items() if k.startswith(key + "/")]

    def blocking_key_value_get_bytes(self, key: str, timeout_in_ms: int) -> bytes:
        self._pause()
        with self._changed:
            if self._changed.wait_for(lambda: key in self._values, timeout_in_ms / 1000):
                return self._values[key]
            self.pending.append(key)
        raise RuntimeError(f"DEADLINE_EXCEEDED: {key}")

    def left(self) -> set[str]:
        return set(self._values)


@pytest.fixture
def store(monkeypatch):
    made = Store(0)
    monkeypatch.setattr(compat, "coordination_client", lambda: made)
    monkeypatch.setattr(bootstrap, "_BLOCKING", 0.05)
    return made


def boot_of(process, timeout, **options):
    return bootstrap.Bootstrap("waits", process, (0, 1), timeout, "these two", **options)


def together(*functions):
    threads = [threading.Thread(target=function, daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)


def test_a_long_wait_leaves_one_get_pending(store):
    with pytest.raises(errors.TimeoutError, match=r"process 1 did not reach stage 'meeting'.*within 1 s"):
        boot_of(0, 1.0).meet()
    assert len(store.pending) == 1
    assert store.polls > 3


def test_a_wait_ends_with_the_service(store):
    threading.Timer(0.3, setattr, (store, "gone", True)).start()
    began = time.monotonic()
    with pytest.raises(errors.TimeoutError, match="UNAVAILABLE"):
        boot_of(0, 60.0).meet()
    assert time.monotonic() - began < 10


def test_who_falls_silent_after_it_came_is_given_up_soon(store):
    """The others may come late; once they have said hello there is nothing that takes them long."""
    boots = [boot_of(process, 60.0, stage_timeout=0.4) for process in (0, 1)]
    together(*(boot.meet for boot in boots))
    late = threading.Timer(1.0, boots[1].exchange, ("hello", b""))  # later than the stages after it may be
    late.start()
    assert set(boots[0].exchange("hello", b"")) == {0, 1}
    late.join(30)
    began = time.monotonic()
    with pytest.raises(errors.TimeoutError, match=r"stage 'endpoints'.*within 0\.4 s"):
        boots[0].exchange("endpoints", b"")
    assert time.monotonic() - began < 10


def closes_meanwhile():
    """In rank 0, whose peer never comes: seconds that close() took, and what connect() gave."""
    if jax.process_index() == 1:
        return None
    ep = group("closed meanwhile", fabric="tcp", timeout=5.0)  # and a stall_timeout of minutes
    told: list[Any] = []
    thread = threading.Thread(target=lambda: told.append(error_of(ep.connect)[:2]), daemon=True)
    thread.start()
    time.sleep(1.5)
    began = time.monotonic()
    ep.close()
    took = time.monotonic() - began
    thread.join(5)
    return took, told


@pytest.mark.multiprocess
def test_closing_ends_a_wait_for_others(processes):
    (took, told), _ = processes.run(closes_meanwhile, 2)
    assert took < 7
    assert told[0][0] == "GroupClosedError"
    assert "was closed while it connected" in told[0][1]


@pytest.mark.parametrize("seed", range(4))
def test_attempts_never_mix_and_come_to_an_end(monkeypatch, seed):
    """Processes, here threads, connect several times, giving up at any place: all that a connection's name
    gives comes from the attempts that it names, and when they have patience they all connect."""
    store = Store(seed)
    monkeypatch.setattr(compat, "coordination_client", lambda: store)
    monkeypatch.setattr(bootstrap, "_BLOCKING", 0.03)  # impatient ones look for others that begin anew, too
    processes = (0, 2, 5)
    impatient = 8
    done: dict[int, list[tuple[str, Any]]] = {process: [] for process in processes}
    wrong: list[str] = []

    def live(process: int) -> None:
        draw = random.Random(100 * seed + process)
        tries = 0
        while True:
            tries += 1
            patience = draw.uniform(0.01, 0.4) if tries <= impatient else 20.0
            boot = bootstrap.Bootstrap("many", process, processes, patience, "threads")
            mine = f"{process} {tries}"
            try:
                boot.meet()
                while True:
                    try:
                        told = [boot.exchange(stage, mine.encode()) for stage in ("hello", "endpoints")]
                        boot.finish()
                        break
                    except bootstrap.BegunAnewError as begun:
                        boot.meet_again(begun)
            except errors.TimeoutError:
                continue
            if told[0] != told[1] or told[0][process].decode() != mine:
                wrong.append(f"{told} in {mine}")
            done[process].append((boot.connection, told[0]))
            # Of a connection with somebody who had no patience the others may never hear.
            if all(int(value.split()[1]) > impatient for value in told[0].values()):
                return

    threads = [threading.Thread(target=live, args=(process,), daemon=True) for process in processes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
    by_name: dict[str, Any] = {}
    for connection, told in (one for each in done.values() for one in each):
        assert by_name.setdefault(connection, told) == told
    assert len({connections[-1] for connections in ([c for c, _ in done[p]] for p in processes)}) == 1
    # Of the last connection what somebody may still have to read; everything before was taken back.
    last = done[processes[0]][-1][0]
    assert store.left() == {f"pplx_jax/many/{last}/connected/barrier/{p}" for p in processes}
