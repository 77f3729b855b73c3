"""The Python TransferEngine: memory, writes, immediates, messages, barriers, errors."""

import concurrent.futures
import gc
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pplx_jax.engine import (
    Address,
    RegionDescriptor,
    ScatterEntry,
    SimOptions,
    TransferEngine,
)
from pplx_jax.errors import FabricError, GroupClosedError, PplxError
from pplx_jax.errors import TimeoutError as PplxTimeoutError

pytestmark = pytest.mark.smoke

FABRICS = ["local", "sim", "tcp", "shm"]


def make(fabric, **options):
    if fabric == "sim":
        options.setdefault("sim", SimOptions(seed=3, reorder=True, max_delay=5, max_pieces=4))
    return TransferEngine(fabric, **options)


@pytest.fixture(params=FABRICS)
def pair(request):
    with make(request.param) as left, make(request.param) as right:
        yield left, right


@pytest.fixture
def engine():
    with TransferEngine("local") as made:
        yield made


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
        _, errors = process.communicate(timeout=20)
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


# ---- bad arguments -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "fabric: must be a string, is int", {"fabric": 3}),
        (ValueError, "fabric: must not be empty", {"fabric": ""}),
        (FabricError, "nonsense", {"fabric": "nonsense"}),
        (ValueError, r"endpoints: must be in 1\.\.64, is 0", {"endpoints": 0}),
        (TypeError, r"endpoints: must be an integer, is 1\.5", {"endpoints": 1.5}),
        (TypeError, "bind_address: must be an IP address or None, is int", {"bind_address": 1}),
        (ValueError, "timeout: must be a finite number of seconds", {"timeout": -1}),
        (ValueError, "timeout: must be a finite", {"timeout": float("nan")}),
        (TypeError, "timeout: must be a number of seconds, is '3'", {"timeout": "3"}),
        (TypeError, "sim: must be SimOptions or None, is dict", {"sim": {}}),
        (ValueError, "sim: has a meaning for fabric='sim' only", {"sim": SimOptions()}),
        (ValueError, r"cpu: must be in 0", {"cpu": -2}),
        (ValueError, r"cpu: must be a core's number, 'auto' or None", {"cpu": "all"}),
    ],
)
def test_bad_engine_arguments(error, match, arguments):
    with pytest.raises(error, match=match):
        TransferEngine(**arguments)


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (ValueError, {"seed": -1}),
        (ValueError, {"max_pieces": 0}),
        (TypeError, {"reorder": 1}),
        (TypeError, {"network": 1}),
        (ValueError, {"max_delay": 2**32}),
    ],
)
def test_bad_sim_options(error, arguments):
    with pytest.raises(error, match=f"SimOptions.{next(iter(arguments))}"):
        SimOptions(**arguments)


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "region: must be a Region, is bytes", {"region": b""}),
        (TypeError, "remote: must be a RegionDescriptor or a RemoteRegion, is bytes", {"remote": b""}),
        (ValueError, r"length: must be in 0\.\.8, is 9", {"length": 9}),
        (ValueError, r"length: must be in 0\.\.5, is 6", {"length": 6, "src_offset": 3}),
        (ValueError, r"src_offset: must be in 0\.\.8, is 9", {"src_offset": 9}),
        (ValueError, r"dst_offset: must be in 0\.\.8, is -1", {"dst_offset": -1}),
        (ValueError, "length: 8 bytes at dst_offset 1 do not fit", {"dst_offset": 1}),
        (ValueError, r"imm: must be in 0\.\.2147483647, is 2147483648", {"imm": 2**31}),
        (TypeError, "imm: must be an integer, is True", {"imm": True}),
    ],
)
def test_bad_write_arguments(engine, error, match, arguments):
    good = {"region": engine.empty(8), "remote": engine.empty(8).descriptor}
    with pytest.raises(error, match=match):
        engine.write(**(good | arguments))


def test_bad_arguments(engine):
    with TransferEngine("local") as other:
        with pytest.raises(ValueError, match="region: is registered with another engine"):
            engine.write(other.empty(8), engine.empty(8).descriptor)
        with pytest.raises(ValueError, match="remote: was opened by another engine"):
            engine.write(engine.empty(8), other.open(engine.empty(8).descriptor))
        with pytest.raises(ValueError, match="own address is not among"):
            engine.peer_group([other.address], 1)
        with pytest.raises(ValueError, match="group: was made by another engine"):
            engine.barrier(other.peer_group([other.address], 1))
    with pytest.raises(ValueError, match="appears twice"):
        engine.peer_group([engine.address, engine.address], 1)
    with pytest.raises(TypeError, match=r"addresses\[0\]: must be an Address"):
        engine.peer_group([b""], 1)
    with pytest.raises(ValueError, match="id: must be in"):
        engine.peer_group([engine.address], -1)
    with pytest.raises(TypeError, match="group: must be a PeerGroup"):
        engine.barrier(1)
    with pytest.raises(TypeError, match="address: must be an Address, is bytes"):
        engine.send(b"", b"")
    with pytest.raises(TypeError, match="payload: must be bytes, is str"):
        engine.send(engine.address, "text")
    with pytest.raises(ValueError, match="timeout"):
        engine.recv(timeout=-1)
    with pytest.raises(ValueError, match="n: must be in"):
        engine.imm_counter(1).wait(-1)
    with pytest.raises(ValueError, match="imm: must be in"):
        engine.imm_counter(2**31)
    with pytest.raises(TypeError, match=r"entries\[0\]: must be a ScatterEntry"):
        engine.scatter(engine.empty(8), [1])
    with pytest.raises(ValueError, match=r"entries\[0\]\.length: 8 bytes at dst_offset 4"):
        engine.scatter(engine.empty(8), [ScatterEntry(engine.empty(8).descriptor, 8, dst_offset=4)])
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(engine)


def test_bad_arrays(engine):
    with pytest.raises(ValueError, match="array: must be C-contiguous"):
        engine.register(np.zeros((4, 4))[:, ::2])
    with pytest.raises(TypeError, match="array: must hold plain data"):
        engine.register(np.array([object()]))
    with pytest.raises(TypeError, match=r"array: must be a NumPy array, a jax\.Array or have the buffer"):
        engine.register([1, 2])
    with pytest.raises(TypeError, match="is a Region already"):
        engine.register(engine.empty(4))
    with pytest.raises(ValueError, match="shape: must be in"):
        engine.empty(-1)
    with pytest.raises(TypeError, match="dtype: must hold plain data"):
        engine.empty(1, object)
    with pytest.raises(TypeError, match="tracer"):
        jax.jit(lambda x: engine.register(x))(jnp.ones(4))
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    with pytest.raises(ValueError, match=r"array: a jax\.Array must be on one device, is on 2"):
        engine.register(jax.device_put(jnp.ones(4), sharding))
