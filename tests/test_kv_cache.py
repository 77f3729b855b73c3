"""examples/kv_cache.py: pages layer by layer, a decode process that joins later, cancellation."""

import importlib.util
import os
import pathlib
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from engine_fixtures import make

from pplx_jax.engine import SimOptions

PATH = pathlib.Path(__file__).parent.parent / "examples" / "kv_cache.py"
spec = importlib.util.spec_from_file_location("kv_cache", PATH)
kv_cache = importlib.util.module_from_spec(spec)
sys.modules["kv_cache"] = kv_cache
spec.loader.exec_module(kv_cache)

SHAPE = kv_cache.CacheShape(layers=3, pages=16, page_bytes=1024)


@pytest.mark.parametrize("fabric", ["local", "sim", "tcp", "nics", "efa_like"])
def test_layers_arrive_in_their_pages(fabric):
    with make(fabric) as one, make(fabric) as other:
        prefill = kv_cache.Prefill(one, SHAPE)
        decode = kv_cache.Decode(other, one.address, SHAPE)

        def serve():
            for _ in range(3):
                seed, order = prefill.accept(timeout=20)
                prefill.run(seed, order)
                prefill.finish(order)

        thread = threading.Thread(target=serve)
        thread.start()
        decode.cache.array[:] = 0
        # Three requests under way at once, into pages that nobody else gets.
        places = [decode.request(number, seed=40 + number, pages=4) for number in range(3)]
        assert len({page for place in places for page in place}) == 12
        for number in range(3):
            for layer in range(SHAPE.layers):
                got = decode.wait_layer(number, layer, timeout=20)
                for index in range(4):
                    wanted = kv_cache.page_of(40 + number, layer, index, SHAPE.page_bytes)
                    np.testing.assert_array_equal(got[index], wanted)
        thread.join(20)
        assert not thread.is_alive()
        untouched = sorted(set(range(16)) - {page for place in places for page in place})
        assert not decode.cache.array[:, untouched].any()


def test_a_dropped_request_takes_its_pages_back():
    # A queue of two, and a target that is slow: nearly everything waits, and so can be taken back.
    sim = SimOptions(seed=5, max_delay=400, queue_depth=2)
    with make("sim", sim=sim) as one, make("sim", sim=sim) as other:
        prefill = kv_cache.Prefill(one, SHAPE)
        decode = kv_cache.Decode(other, one.address, SHAPE)
        decode.cache.array[:] = 0
        place = decode.request(0, seed=1, pages=8)
        seed, order = prefill.accept(timeout=20)
        prefill.run(seed, order)
        taken = []
        thread = threading.Thread(target=lambda: taken.append(decode.cancel(0)))
        thread.start()
        prefill.finish(order)
        while thread.is_alive():
            prefill.poll()
            thread.join(0.01)
        assert taken[0] > 0
        assert order.cancelled
        # Nothing is written any more: the pages are decode's to use.
        decode.cache.array[:, place] = 7
        for _ in range(200):
            other.stats()
        thread.join(0.1)
        assert (decode.cache.array[:, place] == 7).all()
        assert len(decode._free) == SHAPE.pages
        assert one.stats()["cancelled"] > 0
        # And the two go on with another request.
        decode.request(1, seed=2, pages=4)
        seed, order = prefill.accept(timeout=20)
        prefill.run(seed, order)
        got = decode.wait_layer(1, 2, timeout=20)
        np.testing.assert_array_equal(got[3], kv_cache.page_of(2, 2, 3, SHAPE.page_bytes))


def test_immediates_do_not_run_out():
    with make("local") as one, make("local") as other:
        prefill = kv_cache.Prefill(one, SHAPE)
        decode = kv_cache.Decode(other, one.address, SHAPE)
        # There is room for 65536 values: as if so many requests had gone before that ten are left.
        for imm in range(2**30, 2**30 + 65536 - 10):
            other.imm_counter(imm)
        for number in range(12):
            decode.request(number, seed=number, pages=2)
            seed, order = prefill.accept(timeout=20)
            prefill.run(seed, order)
            prefill.finish(order)
            got = decode.wait_layer(number, 2, timeout=20)
            np.testing.assert_array_equal(got[1], kv_cache.page_of(number, 2, 1, SHAPE.page_bytes))
            decode.release(number)
        assert other.stats()["unknown_immediates"] == 0
        assert len(decode._free) == SHAPE.pages
        assert not prefill._orders


def cancel(prefill, decode, request):
    """What decode is told, while prefill answers."""
    told = []
    thread = threading.Thread(target=lambda: told.append(decode.cancel(request)))
    thread.start()
    deadline = time.monotonic() + 20
    while thread.is_alive() and time.monotonic() < deadline:
        prefill.poll()
        thread.join(0.01)
    return told


def test_a_request_may_be_dropped_before_it_begins_and_after_its_end():
    with make("local") as one, make("local") as other:
        prefill = kv_cache.Prefill(one, SHAPE)
        decode = kv_cache.Decode(other, one.address, SHAPE)
        decode.request(0, seed=1, pages=8)
        assert cancel(prefill, decode, 0) == [0]
        decode.request(1, seed=2, pages=8)
        seed, order = prefill.accept(timeout=20)
        assert seed == 2
        prefill.run(seed, order)
        prefill.finish(order)
        assert cancel(prefill, decode, 1) == [0]
        assert len(decode._free) == SHAPE.pages


def test_caches_of_other_shapes_are_refused():
    with make("local") as one, make("local") as other:
        prefill = kv_cache.Prefill(one, SHAPE)
        decode = kv_cache.Decode(other, one.address, kv_cache.CacheShape(layers=2, pages=16, page_bytes=1024))
        decode.request(0, seed=1, pages=1)
        with pytest.raises(ValueError, match="cache has 32768 bytes, not 49152"):
            prefill.accept(timeout=20)
        with pytest.raises(MemoryError, match="16 pages wanted, 15 are free"):
            decode.request(1, seed=1, pages=16)


@pytest.mark.multiprocess
@pytest.mark.parametrize("fabric", ["tcp", "shm"])
def test_two_processes(fabric):
    done = subprocess.run(
        [sys.executable, str(PATH), "--fabric", fabric, "--layers", "3", "--pages", "16"],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is here and right") == 3
    assert "request 1 dropped" in done.stdout
