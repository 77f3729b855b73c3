"""The Python TransferEngine: messages, groups, waits, closing, two processes."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import jax
import numpy as np
import pytest
from engine_fixtures import make

from pplx_jax.engine import (
    ScatterEntry,
    SimOptions,
    TransferEngine,
)
from pplx_jax.errors import GroupClosedError, PplxError
from pplx_jax.errors import TimeoutError as PplxTimeoutError

pytestmark = pytest.mark.smoke

# ---- messages, groups --------------------------------------------------------------------------------------


def test_messages(pair):
    left, right = pair
    left.send(right.address, b"hello").result(10)
    assert right.recv() == (left.address, b"hello")
    big = os.urandom(left.max_message)
    right.send(left.address, memoryview(big))
    assert left.recv(10) == (right.address, big)
    left.send(left.address, b"").result(10)
    assert left.recv(10) == (left.address, b"")
    with pytest.raises(ValueError, match=r"payload: at most \d+ bytes can be sent"):
        left.send(right.address, big + b"x")


def test_barrier(pair):
    left, right = pair
    addresses = [left.address, right.address]
    groups = [engine.peer_group(addresses, 4) for engine in pair]
    assert [(group.rank, group.size, len(group)) for group in groups] == [(0, 2, 2), (1, 2, 2)]
    entered = []

    def late():
        for round_ in range(3):
            time.sleep(0.05)
            entered.append(round_)
            right.barrier(groups[1])

    thread = threading.Thread(target=late)
    thread.start()
    for round_ in range(3):
        left.barrier(groups[0])
        assert round_ in entered
    thread.join()


def test_barrier_timeout(pair):
    left, right = pair
    addresses = [left.address, right.address]
    group = left.peer_group(addresses, 9)
    start = time.monotonic()
    with pytest.raises(PplxTimeoutError):
        left.barrier(group, timeout=0.2)
    assert time.monotonic() - start < 5


# ---- waiting, closing --------------------------------------------------------------------------------------


def test_waits_time_out(pair):
    left, _ = pair
    start = time.monotonic()
    with pytest.raises(PplxTimeoutError, match=r"imm_counter\(8\)\.wait\(2\): 0 arrived within 0\.2 s"):
        left.imm_counter(8).wait(2, timeout=0.2)
    with pytest.raises(TimeoutError, match=r"recv\(\): no message arrived within 0\.1 s"):
        left.recv(timeout=0.1)
    assert 0.3 <= time.monotonic() - start < 5
    with pytest.raises(PplxTimeoutError, match="within 0 s"):
        left.recv(timeout=0)


def test_the_engines_timeout_is_the_default():
    with TransferEngine("local", timeout=0.15) as engine, pytest.raises(PplxTimeoutError, match=r"0\.15 s"):
        engine.recv()


def test_waits_release_the_gil(pair):
    _, right = pair
    counter = right.imm_counter(1)
    thread = threading.Thread(target=counter.wait, args=(1,), daemon=True)
    thread.start()
    begin = time.monotonic()
    assert sum(range(100_000)) > 0
    assert time.monotonic() - begin < 5
    target = right.empty(1)
    right.write(right.empty(1), target.descriptor, imm=1)
    thread.join(20)
    assert not thread.is_alive()


def test_close(pair):
    left, right = pair
    source, target = left.empty(8), right.empty(8)
    remote = left.open(target.descriptor)
    counter = left.imm_counter(1)
    errors = []

    def wait():
        try:
            counter.wait(1)
        except PplxError as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.1)
    assert not left.closed
    left.close()
    left.close()
    assert left.closed
    thread.join(20)
    assert [type(error) for error in errors] == [GroupClosedError]
    for call in (
        lambda: left.write(source, remote),
        lambda: left.write(source, target.descriptor),
        lambda: left.scatter(source, [ScatterEntry(remote, 1)]),
        lambda: left.send(right.address, b"x"),
        lambda: left.recv(1),
        lambda: counter.wait(1, 1),
        lambda: left.empty(8),
        lambda: left.register(bytearray(8)),
        lambda: left.imm_counter(3).wait(1),
    ):
        with pytest.raises(GroupClosedError):
            call()
    assert "closed" in repr(left)
    source.array[:] = 1  # the memory is still there


def test_close_fails_what_is_outstanding():
    with make("sim", sim=SimOptions(seed=0, max_delay=1_000_000_000)) as engine:
        target = engine.empty(8)
        future = engine.write(engine.empty(8), target.descriptor, imm=1)
        engine.close()
        # Either it had completed locally or it fails; it is never left pending.
        assert future.exception(10) is None or isinstance(future.exception(), GroupClosedError)


def test_close_from_a_callback():
    engine = TransferEngine("local")
    closed = threading.Event()

    def close(_):
        engine.close()
        closed.set()

    target = engine.empty(8)
    engine.write(engine.empty(8), target.descriptor).add_done_callback(close)
    assert closed.wait(20)
    assert engine.closed


@pytest.mark.multiprocess
@pytest.mark.parametrize("fabric", ["local", "tcp", "shm"])
@pytest.mark.parametrize("blocked", ["engine.recv()", "engine.imm_counter(1).wait(1)", "barrier()"])
def test_ctrl_c(fabric, blocked):
    script = textwrap.dedent(f"""
        import signal
        from pplx_jax.engine import TransferEngine

        signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
        with TransferEngine("{fabric}", timeout=60) as engine, TransferEngine("{fabric}") as other:
            group = engine.peer_group([engine.address, other.address], 1)
            barrier = lambda: engine.barrier(group)
            print("ready", flush=True)
            {blocked}
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=50)  # the wait's own is 60
    finally:
        process.kill()
    assert "KeyboardInterrupt" in errors
    assert process.returncode not in (0, -signal.SIGABRT, -signal.SIGSEGV)


@pytest.mark.multiprocess
def test_the_interpreter_ends_with_engines_open():
    script = textwrap.dedent("""
        from pplx_jax.engine import TransferEngine

        engine = TransferEngine("tcp")
        source, target = engine.empty(1 << 20), engine.empty(1 << 20)
        futures = [engine.write(source, target.descriptor, imm=1) for _ in range(50)]
        print("end", flush=True)
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


# ---- between processes -------------------------------------------------------------------------------------

_kept = {}


def open_engine(fabric):
    _kept["engine"] = TransferEngine(fabric, endpoints=2)
    _kept["inbox"] = _kept["engine"].empty((2, 1000), np.float32)
    return _kept["engine"].address, _kept["inbox"].descriptor


def exchange(peers):
    engine, inbox = _kept["engine"], _kept["inbox"]
    rank = jax.process_index()
    group = engine.peer_group([address for address, _ in peers], 1)
    engine.barrier(group)
    source = engine.empty(1000, np.float32)
    source.array[:] = np.arange(1000) + 1000 * rank
    entries = [ScatterEntry(descriptor, 4000, dst_offset=4000 * rank) for _, descriptor in peers]
    engine.scatter(source, entries, imm=6).result(20)
    engine.imm_counter(6).wait(len(peers))
    total = float(inbox.array.sum())
    engine.barrier(group)
    engine.close()
    return total


@pytest.mark.multiprocess
@pytest.mark.parametrize("fabric", ["tcp", "shm"])
def test_two_processes(processes, fabric):
    pool = processes.pool(2)
    peers = pool.run(open_engine, fabric)
    assert pool.run(exchange, peers) == [float(np.arange(2000).sum())] * 2
