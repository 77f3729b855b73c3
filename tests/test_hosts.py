"""Hosts on one machine: networks, launches through jax.distributed, the whole system on them, teardown."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from test_multiprocess import error_of, group, train

import pplx_jax
from pplx_jax import demo_rank
from pplx_jax.engine import TransferEngine
from pplx_jax.engine_types import Nic, ScatterEntry
from pplx_jax.testing import HostPool, Hosts, Network, ProcessFailure, remove_leftovers, slurm_environment
from pplx_jax.testing.network import _Namespaces

pytestmark = pytest.mark.multiprocess
_kept: dict[str, Any] = {}


@pytest.fixture(scope="module")
def isolated():
    with Network(1) as network:
        if not network.isolated:
            pytest.skip(network.why)


def who():
    return jax.process_index(), jax.process_count(), socket.gethostname(), sorted(Path("/dev/shm").iterdir())


def received():
    """Bytes by interface."""
    lines = Path("/proc/net/dev").read_text().splitlines()[2:]
    return {line.split(":")[0].strip(): int(line.split(":")[1].split()[0]) for line in lines}


def bind(address, port):
    with socket.create_server((address, port)):
        time.sleep(0.5)
        return address


def fails(number):
    if jax.process_index() == number:
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    time.sleep(1)
    return socket.gethostname()


def sleeps(folder=None):
    if folder is not None:
        child = subprocess.Popen(["sleep", "600"], start_new_session=True)
        Path(folder, str(os.getpid())).touch()
        Path(folder, str(child.pid)).touch()
    time.sleep(600)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def gone(pids, seconds=10):
    deadline = time.monotonic() + seconds
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(alive(pid) for pid in pids)


def interfaces():
    return {name for _, name in socket.if_nameindex()}


# ---- the network -------------------------------------------------------------------------------------------


def output(network, host, *command):
    process = network.popen(host, command, stdout=subprocess.PIPE)
    return process.communicate(timeout=30)[0].decode()


def test_hosts_have_networks_of_their_own(isolated):
    before = interfaces()
    with Network(3, nics=2) as network:
        assert [host.name for host in network.hosts] == ["node0", "node1", "node2"]
        assert network.hosts[1].addresses == ("198.18.0.2", "198.18.1.2")
        assert interfaces() == before  # nothing of it is visible outside
        table = output(network, 1, "ip", "-4", "-br", "addr")
        assert [line.split()[2] for line in table.splitlines()] == [
            "127.0.0.1/8",
            "198.18.0.2/24",
            "198.18.1.2/24",
        ]
        assert output(network, 1, "hostname") == "node1\n"
        assert output(network, 0, "getent", "hosts", "node2").split()[0] == "198.18.0.3"
        assert output(network, 2, "pwd").strip() == str(Path.cwd())
        assert output(network, 2, "ls", "/dev/shm") == ""


def test_a_cable_is_pulled(isolated):
    with Network(2, nics=2) as network:

        def state():
            return [line.split()[1] for line in output(network, 1, "ip", "-br", "link").splitlines()[1:]]

        assert state() == ["UP", "UP"]
        with network.unplugged(1, nic=1):
            assert state() == ["UP", "DOWN"]
        assert state() == ["UP", "UP"]
        with pytest.raises(ValueError, match="no NIC 2 of host 1"):
            network.unplug(1, nic=2)
    with pytest.raises(RuntimeError, match="closed"):
        network.unplug(1)


def test_plain_processes_where_hosts_cannot_be_isolated(monkeypatch):
    with Network(2, isolate=False) as network:
        assert not network.isolated
        assert [host.address for host in network.hosts] == ["127.0.0.1"] * 2
        with pytest.raises(RuntimeError, match=r"no cable to pull: .*isolate=False"):
            network.unplug(0)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with Network(2) as network:
        assert network.why == "the hosts are plain processes on loopback: that takes root"
    with pytest.raises(OSError, match="cannot be isolated: that takes root"):
        Network(2, isolate=True)


def test_an_absent_tool_is_named(monkeypatch):
    monkeypatch.setattr("pplx_jax.testing.network._ip", lambda: None)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with Network(1) as network:
        assert "install iproute2" in network.why


def test_a_tool_that_hangs_is_named(monkeypatch, tmp_path):
    stuck = tmp_path / "ip"
    stuck.write_text("#!/bin/sh\nexec sleep 60\n")
    stuck.chmod(0o755)
    namespaces = object.__new__(_Namespaces)
    namespaces.descriptors = {}
    monkeypatch.setattr("pplx_jax.testing.network._ip", lambda: str(stuck))
    monkeypatch.setattr("pplx_jax.testing.network._IP_TIMEOUT", 0.2)
    with pytest.raises(OSError, match=r"ip: not done within 0.2 s.*link set lo up"):
        namespaces.ip("link set lo up")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((0,), "num_hosts: must be an integer from 1 to 64, is 0"),
        ((65,), "num_hosts"),
        ((2, 17), "nics: must be an integer from 1 to 16, is 17"),
    ],
)
def test_bad_networks(arguments, match):
    with pytest.raises(ValueError, match=match):
        Network(*arguments)


def test_bad_launch():
    with pytest.raises(ValueError, match="launch: must be 'jax' or 'slurm', is 'mpi'"):
        HostPool(2, launch="mpi")


# ---- launches ----------------------------------------------------------------------------------------------


def test_one_process_on_each_host(hosts, isolated):
    pool = hosts.pool(2)
    assert pool.run(who) == [(rank, 2, f"node{rank}", []) for rank in range(2)]
    # The same port on both: they are addresses of different hosts.
    assert pool.run(bind, "0.0.0.0", 7777) == ["0.0.0.0"] * 2


@pytest.mark.slow
def test_slurm(isolated):
    with HostPool(2, launch="slurm", timeout=60) as pool:
        assert [found[:3] for found in pool.run(who)] == [(rank, 2, f"node{rank}") for rank in range(2)]
        run_id = pool.run("os:getenv", "SLURM_JOB_ID")
        assert run_id[0] == run_id[1]
        check_train(pool.run(train, "auto", 3))


@pytest.mark.slow
def test_slurm_on_one_node():
    with HostPool(2, launch="slurm", isolate=False, timeout=60) as pool:
        assert [found[:2] for found in pool.run(who)] == [(0, 2), (1, 2)]
        assert pool.run("os:getenv", "SLURM_LOCALID") == ["0", "1"]
        assert pool.run("os:getenv", "PPLX_FABRIC") == ["tcp"] * 2


def test_slurm_names_of_nodes():
    with Network(1, isolate=False) as network:
        assert slurm_environment(network, 0, 7)["SLURM_STEP_NODELIST"] == "localhost"
        assert slurm_environment(network, 0, 7)["SLURM_TASKS_PER_NODE"] == "1"


# ---- the system on them ------------------------------------------------------------------------------------


def check_train(results):
    # "auto" has found that these are different hosts.
    assert all("tcp" in fabric for _, fabric, _ in results)


def counted_train(*arguments):
    before = received()
    result = train(*arguments)
    after = received()
    return result, {name: after[name] - before[name] for name in before}


def test_exchange_between_hosts(hosts, isolated, processes):
    results = hosts.run(counted_train, 2, "auto", 6)
    check_train([result for result, _ in results])
    for _, traffic in results:
        assert traffic["eth0"] > 20_000
        assert traffic["lo"] < 2_000
    same = processes.run(train, 2, "shm", 6)
    assert [result[0] for result, _ in results] == [gradients for gradients, _, _ in same]


def open_engine(addresses):
    address = addresses[jax.process_index()]
    engine = _kept["engine"] = TransferEngine("tcp", bind_address=address, timeout=20)
    inbox = _kept["inbox"] = engine.empty((len(addresses), 1000), np.float32)
    return engine.address, inbox.descriptor


def exchange(peers):
    engine, inbox, rank = _kept["engine"], _kept["inbox"], jax.process_index()
    group = engine.peer_group([address for address, _ in peers], 1)
    engine.barrier(group)
    source = engine.empty(1000, np.float32)
    source.array[:] = np.arange(1000) + 1000 * rank
    entries = [ScatterEntry(descriptor, 4000, dst_offset=4000 * rank) for _, descriptor in peers]
    engine.scatter(source, entries, imm=6).result(20)
    engine.imm_counter(6).wait(len(peers))
    engine.barrier(group)
    total = float(inbox.array.sum())
    engine.close()
    return total


def test_engine_between_hosts(hosts, isolated):
    pool = hosts.pool(2)
    peers = pool.run(open_engine, [host.address for host in pool.network.hosts])
    assert pool.run(exchange, peers) == [float(np.arange(2000).sum())] * 2


def demo(config, coordinator):
    demo_rank.work(config, int(socket.gethostname().removeprefix("node")), coordinator, dense=False)


@pytest.mark.slow
def test_demo_between_hosts(isolated):
    small = dict(batch=4, window=32, hidden=32, layers=1, heads=2, intermediate=48, num_experts=4, sample=4)
    config = demo_rank.DemoConfig(processes=2, steps=4, eval_every=2, eval_batches=1, **small)
    with HostPool(2, distributed=False, timeout=180) as pool:
        outcomes = pool.run(demo, config, f"{pool.network.hosts[0].address}:7000", allow_failures=True)
    for outcome in outcomes:
        assert outcome.ok, outcome.stderr
        events = [line for line in outcome.stdout.splitlines() if line.startswith(demo_rank.EVENT_MARK)]
        assert len(events) == 5
        assert '"done"' in events[-1]


@pytest.mark.slow
def test_the_documented_example(tmp_path):
    text = (Path(__file__).parent.parent / "docs" / "testing.md").read_text()
    plugin, example = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[:2]
    (tmp_path / "conftest.py").write_text(plugin)
    (tmp_path / "test_my_moe.py").write_text(example)
    env = dict(os.environ, PYTHONPATH=str(Path(pplx_jax.__file__).parent.parent))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(tmp_path)],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert "1 passed" in done.stdout, done.stdout + done.stderr
    assert "pplx_jax hosts: " in done.stdout


# ---- faults ------------------------------------------------------------------------------------------------


def connect(name):
    _kept[name] = group(name, timeout=2.0)
    _kept[name].connect()


def wait_for_failure(name):
    """check() until it raises."""
    ep = _kept.pop(name)

    def watch():
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            ep.check()
            time.sleep(0.02)

    result = error_of(watch)
    start = time.monotonic()
    ep.close()
    return (*result, time.monotonic() - start)


def test_a_pulled_cable_is_a_dead_peer(hosts, isolated):
    pool = hosts.pool(2)
    pool.run(connect, "unplugged")
    with pool.network.unplugged(1):
        for rank, (kind, text, seconds, closing) in enumerate(pool.run(wait_for_failure, "unplugged")):
            assert kind in ("PeerError", "TimeoutError"), text
            assert f"rank {1 - rank}" in text
            assert seconds < 8
            assert closing < 5
    # The cable is back: a new group of the same processes works.
    check_train(pool.run(train, "tcp", 2))


def open_nics(addresses):
    nics = [Nic(bind_address=address) for address in addresses[socket.gethostname()]]
    engine = _kept["engine"] = TransferEngine("tcp", nics=nics, timeout=2)
    _kept["inbox"] = engine.empty(1000)
    return socket.gethostname(), _kept["inbox"].descriptor


def write_rounds(peers, most):
    """Four writes at a time, until two rounds in a row have lost none: what became of each."""
    engine = _kept["engine"]
    (descriptor,) = [descriptor for name, descriptor in peers if name != socket.gethostname()]
    rounds = []
    while len(rounds) < most and (len(rounds) < 2 or any(rounds[-1] + rounds[-2])):
        writes = [engine.write(_kept["inbox"], descriptor, 500) for _ in range(4)]
        rounds.append([error_name(write.exception(20)) for write in writes])
    (peer,) = engine.stats()["peers"]
    return rounds, peer["paths"]


def error_name(error):
    return "" if error is None else type(error).__name__


def close_engine():
    _kept.pop("engine").close()


def test_an_engine_leaves_a_nic_whose_cable_is_pulled(isolated):
    with HostPool(2, nics=2, distributed=False, timeout=60) as pool:
        peers = pool.run(open_nics, {host.name: host.addresses for host in pool.network.hosts})
        assert pool.run(write_rounds, peers, 4) == [([[""] * 4] * 2, 2)] * 2
        with pool.network.unplugged(1, nic=1):
            for rounds, paths in pool.run(write_rounds, peers, 8):
                assert {error for lost in rounds for error in lost} <= {"", "TimeoutError", "PeerError"}
                assert rounds[-2:] == [[""] * 4] * 2, rounds
                assert paths == 1
            pool.run(close_engine)


@pytest.mark.slow
def test_the_death_of_the_first_host_leaves_the_other(isolated):
    with HostPool(2, timeout=60) as pool:
        assert pool.run(fails, 0, expect_death={0: signal.SIGKILL}) == [None, "node1"]
        # The next call gets fresh ranks on the same hosts.
        assert [found[2] for found in pool.run(who)] == ["node0", "node1"]


# ---- teardown ----------------------------------------------------------------------------------------------


def test_a_deadline_ends_all(isolated):
    pool = HostPool(2, timeout=60)
    try:
        pool.run("os:getpid")
        pids = pool.pids
        with pytest.raises(ProcessFailure, match=r"rank 0 did not return in time.*rank 1 did not"):
            pool.run(sleeps, timeout=1)
        assert gone(pids)
    finally:
        pool.close()


PARENT = """
    import signal, sys, test_hosts
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells' background jobs ignore it
    from pplx_jax.testing import HostPool

    pool = HostPool(2, isolate=True, distributed=False)
    with pool:
        print(*pool.run("os:getpid"), flush=True)
        pool.run(test_hosts.sleeps, sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_of_a_killed_run(isolated, tmp_path, number):
    script = tmp_path / "parent.py"
    script.write_text(textwrap.dedent(PARENT))
    folder = tmp_path / "pids"
    folder.mkdir()
    tests = str(Path(__file__).parent)
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([tests, str(Path(tests).parent)]))
    parent = subprocess.Popen(
        [sys.executable, str(script), str(folder)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env
    )
    watchdog = threading.Timer(120, parent.kill)
    watchdog.start()
    try:
        assert parent.stdout is not None
        ranks = [int(word) for word in parent.stdout.readline().split()]
        deadline = time.monotonic() + 60
        while len(list(folder.iterdir())) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        namespaces = {Path(f"/proc/{pid}/ns/net").readlink() for pid in ranks}
        assert len(namespaces) == 2
        parent.send_signal(number)
        parent.wait(30)
    finally:
        watchdog.cancel()
        parent.kill()
        parent.stdout.close()
    everything = [int(path.name) for path in folder.iterdir()]
    assert len(everything) == 4
    assert gone(ranks)
    # What ranks had put into sessions of their own is still there until somebody looks for it.
    strays = [pid for pid in everything if alive(pid)]
    assert set(strays) <= set(remove_leftovers())
    assert gone(everything)
    for path in Path("/proc").glob("[0-9]*/ns/net"):
        with contextlib.suppress(OSError):  # ended meanwhile
            assert path.readlink() not in namespaces


def test_leftovers_are_those_of_runs_that_are_gone():
    with HostPool(1, isolate=False, distributed=False, timeout=60) as pool:
        (pid,) = pool.run("os:getpid")
        assert pid not in remove_leftovers()
        assert alive(pid)


@pytest.mark.slow
def test_pools_are_shared_by_shape():
    shared = Hosts(keep=1)
    try:
        first = shared.pool(1)
        assert shared.pool(1) is first
        assert shared.pool(1, nics=2) is not first
        with pytest.raises(ValueError, match="closed"):
            first.run("os:getpid")
    finally:
        shared.close()
