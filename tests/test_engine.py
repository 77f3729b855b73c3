"""The Python TransferEngine: writes, memory, values."""

import concurrent.futures
import gc
import pickle
import threading

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from engine_fixtures import FABRICS, make

from pplx_jax.engine import (
    Address,
    RegionDescriptor,
    ScatterEntry,
    SimOptions,
    TransferEngine,
)
from pplx_jax.errors import PplxError

pytestmark = pytest.mark.smoke

# ---- writes ------------------------------------------------------------------------------------------------


def test_write_arrives_before_its_immediate(pair):
    left, right = pair
    source = left.empty((3, 5), np.float32)
    target = right.empty(200, np.uint8)
    source.array[:] = np.arange(15).reshape(3, 5)
    future = left.write(source, target.descriptor, length=40, src_offset=8, dst_offset=100, imm=17)
    assert isinstance(future, concurrent.futures.Future)
    counter = right.imm_counter(17)
    counter.wait(1)
    assert counter.value == 1
    assert counter.imm == 17
    np.testing.assert_array_equal(target.array[100:140].view(np.float32), np.arange(2, 12))
    assert not target.array[:100].any()
    assert not target.array[140:].any()
    assert future.result(10) is None


def test_many_writes_are_counted(pair):
    left, right = pair
    count, size = 200, 96
    source = left.empty((count, size), np.uint8)
    target = right.empty((count, size), np.uint8)
    source.array[:] = np.random.default_rng(0).integers(0, 256, (count, size), np.uint8)
    remote = left.open(target.descriptor)
    assert remote.nbytes == count * size
    futures = [left.write(source, remote, size, row * size, row * size, imm=row % 2) for row in range(count)]
    right.imm_counter(0).wait(count // 2)
    right.imm_counter(1).wait(count // 2)
    np.testing.assert_array_equal(target.array, source.array)
    done = concurrent.futures.wait(futures, timeout=20)
    assert not done.not_done
    assert all(future.exception() is None for future in futures)
    assert left.stats()["writes"] == count
    assert left.stats()["write_bytes"] == count * size
    assert right.stats()["immediates"] == count


def test_write_of_nothing_carries_its_immediate(pair):
    left, right = pair
    source, target = left.empty(8), right.empty(8)
    left.write(source, target.descriptor, length=0, imm=3).result(10)
    right.imm_counter(3).wait(1)


def test_spray():
    with TransferEngine("tcp", endpoints=4) as left, TransferEngine("tcp", endpoints=4) as right:
        source, target = left.empty(1 << 20), right.empty(1 << 20)
        source.array[:] = np.random.default_rng(1).integers(0, 256, 1 << 20, np.uint8)
        piece = 1 << 14
        for start in range(0, 1 << 20, piece):
            left.write(source, target.descriptor, piece, start, start, imm=1)
        right.imm_counter(1).wait(64)
        np.testing.assert_array_equal(source.array, target.array)


def test_scatter(pair):
    left, right = pair
    source = left.empty(64)
    source.array[:] = np.arange(64)
    targets = [right.empty(32), left.empty(32), right.empty(16)]
    entries = [
        ScatterEntry(targets[0].descriptor, 16, src_offset=0, dst_offset=8),
        ScatterEntry(left.open(targets[1].descriptor), 32, src_offset=32),
        ScatterEntry(targets[2].descriptor, 0),
    ]
    left.scatter(source, entries, imm=5).result(10)
    right.imm_counter(5).wait(2)
    left.imm_counter(5).wait(1)
    np.testing.assert_array_equal(targets[0].array[8:24], np.arange(16))
    np.testing.assert_array_equal(targets[1].array, np.arange(32, 64))
    assert left.scatter(source, []).result(1) is None


def test_futures_call_back_and_the_callback_may_use_the_engine(pair):
    left, right = pair
    source, target = left.empty(8), right.empty(8)
    finished = threading.Event()

    def again(_):
        left.write(source, target.descriptor, imm=2).add_done_callback(lambda _: finished.set())

    left.write(source, target.descriptor, imm=2).add_done_callback(again)
    assert finished.wait(20)
    right.imm_counter(2).wait(2)


def test_threads_share_an_engine(pair):
    left, right = pair
    target = right.empty((4, 64))
    descriptor = target.descriptor

    def work(row):
        source = left.empty(64)
        source.array[:] = row + 1
        for _ in range(50):
            left.write(source, descriptor, dst_offset=64 * row, imm=row).result(20)

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        waiting = [threads.submit(work, row) for row in range(4)]
        for row in range(4):
            right.imm_counter(row).wait(50)
        for result in waiting:
            result.result()
    np.testing.assert_array_equal(target.array, np.repeat(np.arange(1, 5), 64).reshape(4, 64))


# ---- memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make_source",
    [
        lambda: np.arange(16, dtype=np.uint8),
        lambda: bytes(range(16)),
        lambda: bytearray(range(16)),
        lambda: memoryview(bytes(range(16))),
        lambda: jnp.arange(16, dtype=jnp.uint8),
    ],
    ids=["numpy", "bytes", "bytearray", "memoryview", "jax"],
)
def test_sources(engine, make_source):
    target = engine.empty(16)
    region = engine.register(make_source())
    gc.collect()
    engine.write(region, target.descriptor, imm=0).result(10)
    np.testing.assert_array_equal(target.array, np.arange(16))


def test_registered_numpy_memory_is_used_in_place(pair):
    left, right = pair
    array = np.zeros((2, 4), np.int64)
    region = right.register(array)
    assert region.array is array
    source = left.register(np.arange(8))
    left.write(source, region.descriptor, imm=0)
    right.imm_counter(0).wait(1)
    np.testing.assert_array_equal(array, np.arange(8).reshape(2, 4))


def test_bfloat16(engine):
    array = np.arange(8).astype(ml_dtypes.bfloat16)
    target = engine.empty(8, jnp.bfloat16)
    assert target.array.dtype == ml_dtypes.bfloat16
    engine.write(engine.register(array), target.descriptor).result(10)
    np.testing.assert_array_equal(target.array, array)
    engine.write(engine.register(jnp.ones(8, jnp.bfloat16)), target.descriptor).result(10)
    assert (target.array == 1).all()


def test_readonly_regions_are_sources_only(engine):
    frozen = np.arange(4)
    frozen.flags.writeable = False
    for source in (b"abcd", jnp.arange(4), frozen):
        region = engine.register(source)
        assert not region.writable
        with pytest.raises(ValueError, match=r"region\.descriptor: the region is read-only"):
            _ = region.descriptor


def test_views_keep_memory_alive():
    engine = TransferEngine("local")
    view = engine.empty((4, 4), np.float32).array
    view[:] = 7
    row = view[2]
    del view
    engine.close()
    del engine
    gc.collect()
    assert (row == 7).all()
    row[:] = 8


def test_a_buffer_is_held_while_registered(engine):
    data = bytearray(16)
    region = engine.register(data)
    with pytest.raises(BufferError):
        data.extend(b"more")
    del region
    gc.collect()
    data.extend(b"more")


def test_a_region_lives_until_its_writes_are_done():
    with make("sim", sim=SimOptions(seed=1, reorder=True, max_delay=200)) as engine:
        target = engine.empty(1 << 16)
        for index in range(20):
            source = engine.empty(1 << 16)
            source.array[:] = index
            engine.write(source, target.descriptor, imm=1)
            del source
            gc.collect()
        engine.imm_counter(1).wait(20)
        assert target.array.max() < 20


def test_regions_of_nothing_are_refused(engine):
    with pytest.raises(ValueError, match=r"shape: must take .*\(0, 4\) of float32 takes 0"):
        engine.empty((0, 4), np.float32)
    with pytest.raises(ValueError, match=r"array: must hold at least one byte, has shape \(0,\)"):
        engine.register(np.zeros(0))


# ---- values ------------------------------------------------------------------------------------------------


def test_addresses_and_descriptors_are_values(pair):
    left, right = pair
    for value, other in (
        (left.address, right.address),
        (left.empty(8).descriptor, right.empty(8).descriptor),
    ):
        copy = pickle.loads(pickle.dumps(value))
        assert copy == value
        assert hash(copy) == hash(value)
        assert type(value)(bytes(value)) == value
        assert value != other
        assert value != bytes(value)
        with pytest.raises(AttributeError, match="immutable"):
            value._bytes = b""
    assert Address(b"x") != RegionDescriptor(b"x")


@pytest.mark.parametrize("fabric", FABRICS)
def test_mangled_descriptors_are_refused(fabric):
    with make(fabric) as engine:
        good = bytes(engine.empty(8).descriptor)
        assert engine.open(RegionDescriptor(good)).nbytes == 8
        for bad in (b"", good[:-1], good + b"x", bytes(len(good)), b"\xff" * len(good)):
            with pytest.raises((ValueError, PplxError)):
                engine.open(RegionDescriptor(bad))
