"""What a forked child may do with what its parent has: get an error at once, close it, and end."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from moe_oracle import Case, make_mesh, sharded

from pplx_jax import ExpertParallel, FabricError, TransferEngine

pytestmark = [pytest.mark.multiprocess, pytest.mark.filterwarnings("ignore:.*fork.*")]
SMALL = dict(num_experts=6, top_k=2, hidden=16, max_tokens=8, dtype="float32")


def in_child(body, limit=20.0):
    """What ``body`` returns in a forked child, and its exit status; the child is killed after ``limit``."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(int(limit))  # nothing may hang
        try:
            os.write(send, pickle.dumps(body()))
        finally:
            os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as stream:
        data = stream.read()
    _, status = os.waitpid(child, 0)
    assert status == 0, f"the child ended with {status}"
    return pickle.loads(data)


def error_of(function):
    began = time.monotonic()
    try:
        result = function()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - began
    return "nothing", repr(result), time.monotonic() - began


def use(engine, imm):
    region = engine.empty(16)
    region.array[:8] = range(8)
    engine.write(region, region.descriptor, length=8, dst_offset=8, imm=imm).result(5)
    engine.imm_counter(imm).wait(1)
    assert region.array[8:].tolist() == list(range(8))


@pytest.mark.parametrize("fabric", ["local", "tcp", "shm"])
def test_an_engine(fabric):
    with TransferEngine(fabric) as engine:
        use(engine, 1)
        region = engine.empty(16)
        counter = engine.imm_counter(2)
        group = engine.peer_group([engine.address], 1)

        def child():
            errors = [
                error_of(call)
                for call in (
                    lambda: engine.write(region, region.descriptor, imm=2),
                    lambda: engine.empty(8),
                    lambda: engine.register(np.zeros(8)),
                    lambda: engine.open(region.descriptor),
                    lambda: engine.send(engine.address, b"x"),
                    lambda: engine.recv(5),
                    lambda: engine.imm_counter(3),
                    lambda: counter.wait(1, 5),
                    lambda: engine.barrier(group, 5),
                )
            ]
            return errors, error_of(engine.close)

        errors, closing = in_child(child)
        for name, text, took in errors:
            assert name == "FabricError", text
            assert f"belongs to process {os.getpid()}" in text
            assert "spawn" in text
            assert took < 1
        assert closing[0] == "nothing"
        # The parent's endpoints are as they were: it still reaches itself, and others reach it.
        use(engine, 4)
        with TransferEngine(fabric) as other:
            use(other, 5)
            source = other.empty(8)
            other.write(source, region.descriptor, length=8, imm=6).result(5)
            engine.imm_counter(6).wait(1)


def test_a_group():
    with ExpertParallel(make_mesh(1), name="forked", **SMALL) as ep:
        case = Case(ep, 8, 1)
        step = jax.jit(sharded(ep))
        before = np.asarray(step(*case.args))

        def child():
            return [
                error_of(call)
                for call in (
                    ep.check,
                    ep.connect,
                    ep.stats,
                    lambda: jax.eval_shape(sharded(ep), *case.args),
                    # One device: XLA runs the program on this thread, so that the handler is reached.
                    lambda: step(*case.args).block_until_ready(),
                    ep.close,
                )
            ]

        *errors, closing = in_child(child)
        for name, text, took in errors:
            assert name in ("FabricError", "JaxRuntimeError", "ValueError"), text
            assert f"belongs to process {os.getpid()}" in text
            assert took < 5
        assert closing[0] == "nothing"
        np.testing.assert_array_equal(np.asarray(step(*case.args)), before)
        ep.check()


def test_names_are_free_in_a_child():
    with ExpertParallel(make_mesh(1), name="taken", **SMALL) as ep:
        ep.connect()

        def child():
            other = ExpertParallel(make_mesh(1), name="taken", **SMALL)
            other.connect()
            state = other.stats()["state"]
            other.close()
            return state

        assert in_child(child) == "connected"
        assert ep.stats()["state"] == "connected"


SCRIPT = """
import os, signal, sys, time
import pplx_jax
engine = pplx_jax.TransferEngine({fabric!r})
region = engine.empty(64)
engine.write(region, region.descriptor, length=8, imm=1).result(5)
child = os.fork()
if child == 0:
    signal.alarm(20)
    if {end!r} == "exit":
        print("the child's last words")
        sys.exit(3)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == (3 if {end!r} == "exit" else -signal.SIGTERM), status
# shm's endpoints are files: unloading libfabric removes them, and so do its signal handlers.
with pplx_jax.TransferEngine({fabric!r}) as other:
    source = other.empty(8)
    other.write(source, region.descriptor, length=8, imm=2).result(5)
    engine.imm_counter(2).wait(1)
print("the parent is well")
"""


@pytest.mark.parametrize("end", ["exit", "terminated"])
@pytest.mark.parametrize("fabric", ["tcp", "shm"])
def test_how_a_child_ends(fabric, end):
    """Through exit(), which runs handlers and unloads libraries, or by a signal; in a process without JAX's
    backends, as those crash when a forked child exits."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT.format(fabric=fabric, end=end)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 0, done.stderr
    assert "the parent is well" in done.stdout
    assert ("the child's last words" in done.stdout) == (end == "exit")


def test_a_child_cannot_use_the_parents_libfabric():
    with TransferEngine("tcp"):

        def child():
            return error_of(lambda: TransferEngine("tcp")), error_of(lambda: use(TransferEngine("local"), 1))

        refused, alone = in_child(child)
    assert refused[0] == "FabricError"
    assert "libfabric" in refused[1]
    assert alone[0] == "nothing"


def job(queue):
    engine = TransferEngine("tcp")
    use(engine, 1)
    engine.close()
    queue.put("done")


def test_multiprocessing():
    """fork ends well while the parent has an engine; spawn can use engines of its own."""
    with TransferEngine("tcp") as engine:
        forked = multiprocessing.get_context("fork").Process(target=time.sleep, args=(0.01,))
        forked.start()
        forked.join(20)
        assert forked.exitcode == 0
        use(engine, 1)
        spawn = multiprocessing.get_context("spawn")
        queue = spawn.Queue()
        fresh = spawn.Process(target=job, args=(queue,))
        fresh.start()
        assert queue.get(timeout=60) == "done"
        fresh.join(20)
        assert fresh.exitcode == 0


def test_the_parents_error_is_unchanged():
    engine = TransferEngine("local")
    engine.close()
    with pytest.raises(Exception, match="closed") as caught:
        engine.empty(8)
    assert not isinstance(caught.value, FabricError)
