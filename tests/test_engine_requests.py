"""The Python TransferEngine: reads, pages, groups' regions, cancellation, watch words, pools, statistics,
timeline."""

import ctypes
import json
import threading
import time

import numpy as np
import pytest

from pplx_jax.engine import (
    GroupEntry,
    Pages,
    PoolDescriptor,
    PreparedWrite,
    SimOptions,
    TransferEngine,
)
from pplx_jax.errors import CancelledError, FabricError, GroupClosedError

pytestmark = pytest.mark.smoke


def test_read(pair):
    left, right = pair
    here, there = left.empty(1000), right.empty(1000)
    there.array[:] = np.arange(1000) % 251
    left.read(here, there.descriptor, length=500, dst_offset=100, src_offset=300).result(20)
    np.testing.assert_array_equal(here.array[100:600], there.array[300:800])
    assert not here.array[:100].any()
    assert not here.array[600:].any()
    with pytest.raises(ValueError, match="region: is read-only"):
        left.read(left.register(b"abc"), there.descriptor)
    with pytest.raises(ValueError, match="900 bytes at src_offset 200 are not in the remote region"):
        left.read(here, there.descriptor, length=900, src_offset=200)


@pytest.mark.parametrize("group", [0, 1, 3])
def test_paged_write(pair, group):
    left, right = pair
    source, target = left.empty((10, 64)), right.empty((20, 64))
    source.array[:] = np.arange(10)[:, None] + 1
    order, places = [3, 1, 4, 0, 9], [19, 2, 7, 8, 5]
    left.paged_write(source, target.descriptor, 64, Pages(order), Pages(places), imm=5, group=group).result(
        20
    )
    right.imm_counter(5).wait({0: 1, 1: 5, 3: 2}[group])
    np.testing.assert_array_equal(target.array[places, 0], np.array(order) + 1)
    assert (target.array.any(axis=1).nonzero()[0] == sorted(places)).all()


def test_paged_write_with_strides(engine):
    source, target = engine.empty((8, 100)), engine.empty(3000)
    source.array[:] = np.arange(8)[:, None] + 1
    engine.paged_write(source, target.descriptor, 50, Pages(offset=50, stride=100), Pages([4, 2]), 2).result(
        10
    )
    np.testing.assert_array_equal(target.array[200:250], 1)
    np.testing.assert_array_equal(target.array[100:150], 2)


def test_bad_pages(engine):
    source, target = engine.empty(100), engine.empty(100)
    write = engine.paged_write
    with pytest.raises(ValueError, match="count: is needed"):
        write(source, target.descriptor, 10, Pages(), Pages())
    with pytest.raises(ValueError, match="page 10 is outside of the source region of 100 bytes"):
        write(source, target.descriptor, 10, Pages([10]), Pages([0]))
    with pytest.raises(ValueError, match="2 indices for 1 pages"):
        write(source, target.descriptor, 10, Pages([1]), Pages([0, 1]))
    with pytest.raises(ValueError, match="must not be negative, has -1"):
        write(source, target.descriptor, 10, Pages([-1]), Pages([0]))
    with pytest.raises(TypeError, match=r"src_pages\.indices: must be a list of integers"):
        write(source, target.descriptor, 10, Pages([0.5]), Pages([0]))
    with pytest.raises(TypeError, match="dst_pages: must be Pages"):
        write(source, target.descriptor, 10, Pages([0]), [0])


def test_scatter_to_a_group(pair):
    left, right = pair
    addresses = [right.address, left.address]
    group = left.peer_group(addresses, 3)
    at_right, at_left, source = right.empty(100), left.empty(100), left.empty(100)
    source.array[:] = np.arange(100)
    targets = left.open_group(group, [at_right.descriptor, at_left.descriptor])
    assert len(targets) == 2
    left.scatter_group(source, targets, [GroupEntry(0, 10), GroupEntry(1, 20, 50, 30)], imm=2).result(20)
    right.imm_counter(2).wait(1)
    left.imm_counter(2).wait(1)
    np.testing.assert_array_equal(at_right.array[:10], np.arange(10))
    np.testing.assert_array_equal(at_left.array[30:50], np.arange(50, 70))
    with pytest.raises(ValueError, match=r"entries\[0\]\.rank: must be in 0\.\.1"):
        left.scatter_group(source, targets, [GroupEntry(2, 10)])
    with pytest.raises(ValueError, match="descriptor 0 is not of that member"):
        left.open_group(group, [at_left.descriptor, at_right.descriptor])


def test_cancel():
    sim = SimOptions(seed=1, max_delay=300, queue_depth=4)
    with TransferEngine("sim", sim=sim) as left, TransferEngine("sim", sim=sim) as right:
        source, target = left.empty(100_000), right.empty(100_000)
        first = left.write(source, target.descriptor, length=10, imm=1)
        pages = left.paged_write(
            source, target.descriptor, 1000, Pages(range(0, 100, 2)), Pages(range(0, 100, 2)), imm=2
        )
        assert pages.cancel()
        with pytest.raises(CancelledError, match="taken back before it had begun"):
            pages.result(20)
        assert not pages.cancel()
        assert not first.cancel()
        first.result(20)
        right.imm_counter(1).wait(1)
        assert right.imm_counter(2).value == 0


def test_watch_word(pair):
    left, right = pair
    source, target = left.empty(16), right.empty(16)
    source.array[:] = 3
    told, all_told = [], threading.Event()

    def callback(value):
        told.append(value)
        if value == 5:
            all_told.set()

    writes = [
        PreparedWrite(source, target.descriptor, 8, imm=1),
        PreparedWrite(source, target.descriptor, 0, imm=2),
    ]
    word = left.watch_word(writes, callback)
    word.increment()
    right.imm_counter(1).wait(1)
    assert (target.array[:8] == 3).all()
    word.increment(4)
    right.imm_counter(1).wait(5)
    right.imm_counter(2).wait(5)
    assert all_told.wait(20)
    assert told == sorted(told)
    assert (word.value, word.seen, word.posted) == (5, 5, 10)
    deadline = time.monotonic() + 20
    while word.completed != 10 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert word.completed == 10
    word.check()
    word.close()
    with pytest.raises(GroupClosedError):
        word.increment()


def test_a_word_of_ones_own(engine):
    memory = np.zeros(2, np.uint64)
    seen = threading.Event()
    word = engine.watch_word(callback=lambda _: seen.set(), address=memory.ctypes.data, keepalive=memory)
    assert word.address == memory.ctypes.data
    memory[0] = 1
    assert seen.wait(20)
    memory[0] = 0
    deadline = time.monotonic() + 20

    def check():
        while time.monotonic() < deadline:
            word.check()

    with pytest.raises(ValueError, match="a watch word went from 1 to 0"):
        check()
    with pytest.raises(ValueError, match="aligned to 8 bytes"):
        engine.watch_word(address=memory.ctypes.data + ctypes.sizeof(ctypes.c_uint32), keepalive=memory)


def test_receive_pool(pair):
    left, right = pair
    pool = right.receive_pool(buffer_bytes=5000, buffers=2)
    assert (pool.buffers, pool.free, pool.waiting, pool.lost) == (2, 2, 0, 0)
    remote = left.open_pool(PoolDescriptor(bytes(pool.descriptor)))
    source = left.empty((10, 5000))
    source.array[:] = np.arange(10)[:, None]
    sent = [left.send_to_pool(remote, source, 100 + row, row * 5000) for row in range(10)]
    rows = []
    for _ in range(10):
        with pool.recv(20) as message:
            assert message.sender == left.address
            row = message.nbytes - 100
            assert (message.array == row).all()
            rows.append(row)
        with pytest.raises(ValueError, match="was released"):
            _ = message.array
    assert sorted(rows) == list(range(10))
    for future in sent:
        future.result(20)
    with pytest.raises(TimeoutError, match="no message arrived within"):
        pool.recv(0.05)
    with pytest.raises(ValueError, match="takes 5000 bytes"):
        left.send_to_pool(remote, source)


def test_a_full_pool_refuses(engine):
    pool = engine.receive_pool(8, 1, max_waiting=1)
    remote, source = engine.open_pool(pool.descriptor), engine.empty(8)
    sent = [engine.send_to_pool(remote, source) for _ in range(3)]
    with pytest.raises(FabricError, match="1 messages wait for a buffer already"):
        sent[2].result(20)
    pool.recv(20).release()
    pool.recv(20).release()
    sent[0].result(20)
    sent[1].result(20)


def test_immediates_are_released(pair):
    left, right = pair
    source, target = left.empty(8), right.empty(8)
    for _ in range(2):
        left.write(source, target.descriptor, imm=5).result(20)
        counter = right.imm_counter(5)
        counter.wait(1)
        assert counter.value == 1
        right.release_immediate(5)
        right.release_immediate(5)
    with pytest.raises(GroupClosedError, match="released"):
        counter.wait(2)
    assert counter.value == 1
    for wrong in (-1, 2**31):
        with pytest.raises(ValueError, match="imm"):
            right.release_immediate(wrong)


def test_statistics_by_nic_and_peer(pair):
    left, right = pair
    source, target = left.empty(1000), right.empty(1000)
    for _ in range(200):
        left.write(source, target.descriptor, imm=1)
    right.imm_counter(1).wait(200)
    deadline = time.monotonic() + 20
    while left.stats()["peers"][0]["outstanding"] and time.monotonic() < deadline:
        time.sleep(0.01)
    stats = left.stats()
    assert sum(nic["write_bytes"] for nic in stats["nics"]) == 200_000
    assert [peer["writes"] for peer in stats["peers"]] == [200]
    for nic in stats["nics"]:
        assert nic["error"] == ""
        assert 0 < nic["deepest"] <= nic["queue_depth"]
        assert 0 < sum(nic["latency_buckets"]) <= 200
        assert 0 < nic["latency_p50"] <= nic["latency_p99"] < 20


def test_timeline(pair):
    left, right = pair
    source, target = left.empty(1000), right.empty(1000)
    assert not [event for event in json.loads(left.timeline())["traceEvents"] if event["ph"] != "M"]
    left.start_timeline(1000)
    right.start_timeline(8)
    for _ in range(20):
        left.write(source, target.descriptor, imm=9).result(20)
    right.imm_counter(9).wait(20)
    left.stop_timeline()
    left.write(source, target.descriptor, imm=9).result(20)
    events = json.loads(left.timeline())["traceEvents"]
    begins = [event for event in events if event["ph"] == "b" and event["name"] == "write"]
    ends = {event["id"]: event["ts"] for event in events if event["ph"] == "e"}
    assert len(begins) == 20
    for event in begins:
        assert event["args"]["bytes"] == 1000
        assert event["args"]["imm"] == 9
        assert ends[event["id"]] >= event["ts"]
    arrived = [event for event in json.loads(right.timeline())["traceEvents"] if event["ph"] == "i"]
    assert 1 <= len(arrived) <= 8
    with pytest.raises(ValueError, match="events: must be in"):
        left.start_timeline(0)
