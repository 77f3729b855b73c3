"""Environment variables: parsed, checked, named in errors, agreed on by the ranks; and network interfaces."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from moe_oracle import Case, make_mesh, same_bits, sharded

from pplx_jax import ExpertParallel, FabricError, TransferEngine, bootstrap, environment
from pplx_jax.fabric import Fabric
from pplx_jax.interfaces import Interface, interfaces, select

SMALL = dict(num_experts=6, top_k=2, hidden=16, max_tokens=8, dtype="float32")
GUIDE = Path(__file__).parent.parent / "docs" / "guide.md"


def group(ranks=2, **options):
    return ExpertParallel(make_mesh(ranks), **SMALL | options)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("PPLX_FABRIC", "tcp:lanes=3", "fabric option 'lanes=3'"),
        ("PPLX_FABRIC", ":endpoints=2", "no name"),
        ("PPLX_TIMEOUT", "soon", "number of seconds > 0, is 'soon'"),
        ("PPLX_TIMEOUT", "-1", "number of seconds > 0"),
        ("PPLX_TIMEOUT", "nan", "number of seconds > 0"),
        ("PPLX_LOG_LEVEL", "verbose", "one of debug, info, warn, error, off, is 'verbose'"),
        ("PPLX_LIBFABRIC", "/nowhere/libfabric.so.1", "no file '/nowhere/libfabric.so.1'"),
        ("PPLX_NICS", "a,,b", "distinct names"),
        ("PPLX_NICS", "a,a", "distinct names"),
        ("PPLX_CORES", "1,x", "ranges of cores such as"),
        ("PPLX_CORES", "5-3", "ranges of cores such as"),
        ("PPLX_TOPOLOGY", "/no/such.xml", "there is no file"),
        ("PPLX_HWLOC", "/no/such.so", "there is no file"),
        ("PPLX_GDRCOPY", "/no/such.so", "there is no file '/no/such.so'; give the path of .*, or off"),
        ("PPLX_GPU_REGIONS", "hbm", "one of auto, device, pinned, is 'hbm'"),
        ("PPLX_SOCKET_IFNAME", "^", "names separated by commas"),
        ("PPLX_SOCKET_IFNAME", "eth,", "names separated by commas"),
        ("PPLX_SOCKET_IFNAME", "nosuch", r"fits 'nosuch'; there are .*lo \(127\.0\.0\.1\)"),
        ("PPLX_SOCKET_IFNAME", "=l", "fits '=l'"),
    ],
)
def test_bad_values(monkeypatch, name, value, says):
    monkeypatch.setenv(name, value)
    for make in (group, TransferEngine):
        with pytest.raises(ValueError, match=f"^{name}: .*{says}"):
            make()


def test_empty_is_unset(monkeypatch):
    for variable, parse in zip(environment.VARIABLES, environment.PARSERS, strict=True):
        monkeypatch.delenv(variable.name, raising=False)
        unset = parse()
        monkeypatch.setenv(variable.name, "  ")
        assert parse() == unset


def test_nothing_else_is_read():
    """Every PPLX_ variable that the sources read is in the table."""
    root = Path(environment.__file__).parent
    read = set()
    sources = ("proxy/**/*.cc", "xla_ffi/*.cc", "xla_ffi/cuda/*.cc")
    for path in (*root.glob("*.py"), *(path for pattern in sources for path in root.parent.glob(pattern))):
        read |= set(re.findall(r'(?:_get|getenv|environ\.get|environ\[)\W*"?(PPLX_\w+)"', path.read_text()))
    assert read == {variable.name for variable in environment.VARIABLES}


def test_the_guides_table():
    rows = re.findall(r"^\| `(PPLX_\w+)` \| (.+) \| (.+) \|$", GUIDE.read_text(), re.MULTILINE)
    assert rows == [(v.name, v.meaning, v.default) for v in environment.VARIABLES]


def test_fabric_and_timeout(monkeypatch):
    monkeypatch.setenv("PPLX_FABRIC", "sim:seed=3")
    monkeypatch.setenv("PPLX_TIMEOUT", "7.5")
    with group(name="from the environment") as ep:
        case = Case(ep, 8, 1)
        same_bits(jax.jit(sharded(ep))(*case.args), case.expected())
        assert ep.stats()["fabric"].startswith("sim")
        assert ep._membership._timeout == 7.5
    with group(name="explicit", fabric="local", timeout=9) as ep:
        ep.connect()
        assert ep.stats()["fabric"] == "local"
        assert ep._membership._timeout == 9
    monkeypatch.setenv("PPLX_TIMEOUT", "0.25")
    with TransferEngine() as engine, pytest.raises(TimeoutError, match=r"within 0\.25 s"):
        engine.imm_counter(1).wait(1)


def test_a_fabric_as_text():
    for text in ("tcp", "shm:endpoints=4", "sim:max_delay=8,max_pieces=3,reorder=1,seed=7,stall_every=0"):
        assert str(Fabric.parse(text)) == text


def lists(name, *addresses, up=True, loopback=False):
    return Interface(name, addresses, up=up, loopback=loopback)


INTERFACES = [
    lists("lo", "127.0.0.1", loopback=True),
    lists("docker0", "172.17.0.1"),
    lists("eth0"),
    lists("eth1", "10.0.0.1", up=False),
    lists("eth10", "10.0.0.10"),
    lists("ib0", "10.1.0.1"),
]


@pytest.mark.parametrize(
    ("pattern", "chosen"),
    [
        ("eth", "eth10"),
        ("eth1", "eth10"),
        ("=eth1", None),
        ("ib,eth", "eth10"),
        ("lo", "lo"),
        ("^docker", "eth10"),
        ("^docker,eth", "ib0"),
        ("^docker,eth,ib", None),
        ("wlan", None),
    ],
)
def test_selection(pattern, chosen):
    found = select(pattern, INTERFACES)
    assert (found.name if found else None) == chosen


def test_interfaces_of_this_host():
    found = {one.name: one for one in interfaces()}
    assert set(found) == {name for _, name in socket.if_nameindex()}
    assert found["lo"].loopback
    assert "127.0.0.1" in found["lo"].addresses
    assert found["lo"].mtu > 1000


def test_the_interface_is_bound(monkeypatch):
    usable = [one for one in interfaces() if one.up and one.addresses and not one.loopback]
    if not usable:
        pytest.skip("this machine has no interface besides loopback")
    monkeypatch.setenv("PPLX_SOCKET_IFNAME", f"={usable[0].name}")
    assert environment.socket_address() == usable[0].addresses[0]
    with TransferEngine("tcp") as engine:
        assert socket.inet_aton(usable[0].addresses[0]) in bytes(engine.address)


def test_the_address_on_the_coordinators_own_host(monkeypatch):
    """The name of a host often resolves to loopback there, which no other host reaches."""
    lo = Interface("lo", ("127.0.0.1",), up=True, loopback=True)
    card = Interface("eth0", ("10.1.2.3",), up=True, loopback=False)
    monkeypatch.setattr(bootstrap, "interfaces", lambda: [lo, card])
    assert bootstrap.address_towards("127.0.1.1:1234") == "10.1.2.3"
    monkeypatch.setattr(bootstrap, "interfaces", lambda: [lo])
    with pytest.raises(FabricError, match="is loopback, which no other host reaches"):
        bootstrap.address_towards("localhost:1234")


def test_nics(monkeypatch):
    monkeypatch.setenv("PPLX_NICS", "lo")
    with TransferEngine("tcp") as engine:
        assert "libfabric" in engine.fabric_name
    monkeypatch.setenv("PPLX_NICS", "mlx5_9")
    with pytest.raises(FabricError, match=r"no NIC 'mlx5_9' \(PPLX_NICS\).*it has .*lo"):
        TransferEngine("tcp")
    with TransferEngine("shm"), TransferEngine("local"):  # they have none
        pass


def disagreeing(values):
    os.environ["PPLX_FABRIC"] = values[jax.process_index()]
    try:
        ep = ExpertParallel(make_mesh(2), name="disagreeing", timeout=20, **SMALL)
        try:
            ep.connect()
            return "", ep.stats()["fabric"]
        except Exception as error:
            return type(error).__name__, str(error)
        finally:
            ep.close()
    finally:
        del os.environ["PPLX_FABRIC"]


@pytest.mark.multiprocess
def test_ranks_agree_on_the_fabric(processes):
    for _, fabric in processes.run(disagreeing, 2, ["tcp:endpoints=2", "tcp:endpoints=2"]):
        assert fabric.startswith("libfabric:")
        assert fabric.endswith("x2")
    for name, text in processes.run(disagreeing, 2, ["shm", "tcp"]):
        assert name == "MismatchError"
        host = socket.gethostname()
        assert text.count(host) == 2
        assert "PPLX_FABRIC=shm" in text
        assert "PPLX_FABRIC=tcp" in text
    for name, text in processes.run(disagreeing, 2, ["local", "local"]):
        assert name == "ValueError"
        assert "PPLX_FABRIC=local" in text


LOGGED = """
import os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax
sys.path.insert(0, {tests!r})
from test_environment import *
with group(name="logged group") as ep:
    case = Case(ep, 8, 1)
    step = jax.jit(sharded(ep))
    step(*case.args).block_until_ready()
    case.indices[:] = 5000  # a data error
    try:
        step(*case.args).block_until_ready()
        ep.check()
    except Exception as error:
        print(type(error).__name__)
"""


def run_logged(level):
    env = dict(os.environ, PPLX_LOG_LEVEL=level, JAX_PLATFORMS="cpu")
    code = LOGGED.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert "RoutingError" in done.stdout, done.stderr
    return [line for line in done.stderr.splitlines() if "group=" in line]


def fields(line):
    """key=value pairs of a line."""
    pairs = re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|\S+)', line.partition("] ")[2])
    return {key: value.strip('"') for key, value in pairs}


@pytest.mark.multiprocess
def test_log_lines_have_fields():
    lines = [fields(line) for line in run_logged("info")]
    assert {line["group"] for line in lines} == {"logged group"}
    assert {line["rank"] for line in lines} == {"0", "1"}
    events = {event: [line for line in lines if line["event"] == event] for event in ("connected", "closed")}
    assert [line["ranks"] for line in events["connected"]] == ["2", "2"]
    assert all(line["fabric"] == "local" for line in events["connected"])
    assert len(events["closed"]) == 2
    errors = [line for line in lines if line["event"] == "data_error"]
    assert errors
    # The latest that had begun: exchanges 0 and 1 were the good step's.
    assert {line["exchange"] for line in errors} <= {"1", "2", "3"}
    assert all(line["error"] == "RoutingError" and "5000" in line["message"] for line in errors[:1])


@pytest.mark.multiprocess
def test_log_levels():
    assert {fields(line)["event"] for line in run_logged("warn")} == {"data_error"}
    assert run_logged("off") == []
