"""What ``python -m pplx_jax doctor`` finds out about this machine: one JSON-able dict, and how to show it.

Nothing here needs root or initialises a JAX backend. What cannot be found out is left out, and what is wrong
becomes a *problem*: what it is, and what to do.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib.metadata
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pplx_jax import _core, environment, gpu, plugins
from pplx_jax.doctor_devices import examine_gpudirect, examine_topology, ranges, show_topology
from pplx_jax.engine import TransferEngine
from pplx_jax.engine_types import set_library_search_path
from pplx_jax.errors import PplxError
from pplx_jax.interfaces import interfaces

_PACKAGES = ("pplx-jax", "jax", "jaxlib", "flax", "numpy")
_GIB = 2**30
_SHM_FILE = re.compile(r"(\d+):\d+:\d+")  # libfabric's names of shm endpoints: pid, uid, index


@dataclasses.dataclass(frozen=True)
class Problem:
    """``error``: something that pplx-jax is for does not work here. ``warning``: it may be slow, or fail
    later."""

    severity: Literal["error", "warning"]
    what: str
    fix: str


def examine() -> dict[str, Any]:
    """Look at everything. ``problems`` holds what is wrong, errors first."""
    problems: list[Problem] = []
    report: dict[str, Any] = {
        "host": socket.gethostname(),
        "versions": _versions(problems),
        "environment": _environment(problems),
        "plugins": _plugins(problems),
        "libraries": _libraries(problems),
        "fabrics": _fabrics(problems),
        "interfaces": _interfaces(problems),
        "rdma_devices": _rdma_devices(),
        "cpu": _cpu(problems),
        "gpus": _gpus(),
    }
    report["cuda"] = _cuda(report["gpus"], problems)

    def found(severity: Literal["error", "warning"], what: str, fix: str) -> None:
        problems.append(Problem(severity, what, fix))

    report["gpudirect"] = examine_gpudirect(report, found)
    report["topology"] = examine_topology(found, devices=bool(report["gpus"] or report["rdma_devices"]))
    report["limits"] = _limits(report, problems)
    problems.sort(key=lambda problem: problem.severity)
    report["problems"] = [dataclasses.asdict(problem) for problem in problems]
    return report


def exit_code(report: dict[str, Any]) -> int:
    """1 where a problem is an error, else 0."""
    return int(any(problem["severity"] == "error" for problem in report["problems"]))


# ---- software ----------------------------------------------------------------------------------------------


def _versions(problems: list[Problem]) -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": f"{platform.python_version()} ({platform.machine()})"}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
            # A source tree on PYTHONPATH has no metadata, and works.
            if package != "pplx-jax":
                problems.append(Problem("error", f"{package} is not installed", f"pip install {package}"))
    return versions


def _plugins(problems: list[Problem]) -> list[dict[str, Any]]:
    found = plugins.discover()
    problems += [
        Problem("error", f"plugin {plugin.name}: {plugin.problem}", f"pip install or uninstall {plugin.name}")
        for plugin in found
        if plugin.problem
    ]
    return [
        {"name": plugin.name, "version": plugin.version, "kernels": len(plugin.registrations)}
        for plugin in found
    ]


def _environment(problems: list[Problem]) -> dict[str, str]:
    for parse in environment.PARSERS:
        try:
            parse()
        except ValueError as error:
            problems.append(Problem("error", str(error), "correct the variable, or unset it"))
    names = [variable.name for variable in environment.VARIABLES]
    problems += [
        Problem("warning", f"{name} is set, which nothing reads", f"there are {', '.join(names)}")
        for name in sorted(os.environ)
        if name.startswith("PPLX_") and name not in names
    ]
    # Reports are pasted into tickets, and the job's token is not for those.
    shown = {name: os.environ[name] for name in names if name in os.environ}
    return shown | ({"PPLX_JOB": "set"} if shown.get("PPLX_JOB") else {})


def _libraries(problems: list[Problem]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    set_library_search_path()
    try:
        path, version = _core.libfabric()
        found["libfabric"] = {"path": path, "version": version}
    except PplxError as error:
        found["libfabric"] = {"error": str(error)}
        problems.append(
            Problem(
                "error",
                "libfabric cannot be loaded, so that ranks in several processes cannot reach each other",
                "apt-get install libfabric1, or pip install mpich (its wheel carries one), or set "
                "PPLX_LIBFABRIC",
            )
        )
    try:
        ctypes.CDLL("libibverbs.so.1")
        found["libibverbs"] = {"path": _mapped("libibverbs.so") or "libibverbs.so.1"}
    except OSError as error:
        # Only machines with RDMA NICs need it: fabric verbs, and libfabric for efa.
        found["libibverbs"] = {"error": str(error)}
    return found


def _mapped(name: str) -> str | None:
    """Path of a library that this process has loaded."""
    for line in _text("/proc/self/maps").splitlines():
        path = line.rpartition(" ")[2]
        if Path(path).name.startswith(name):
            return path
    return None


# ---- fabrics -----------------------------------------------------------------------------------------------


def _fabrics(problems: list[Problem]) -> dict[str, dict[str, Any]]:
    try:
        wanted = environment.fabric()
    except ValueError:  # told already
        wanted = None
    names = ["local", "sim", "tcp", "shm", "verbs", "efa"]
    if wanted is not None and wanted.name not in names:
        names.append(wanted.name)
    try:
        environment.check()
    except ValueError:  # stops every engine
        return {name: {"works": False, "text": "not tried: see the environment"} for name in names}
    # What PPLX_NICS names is for the fabric that is asked for; no other has such a NIC.
    states = {name: _probe(name, nics=wanted is not None and wanted.name == name) for name in names}
    if not states["local"]["works"]:
        problems.append(
            Problem("error", f"the in-process fabric fails: {states['local']['text']}", "reinstall pplx-jax")
        )
    problems += [
        Problem("error", f"fabric {name} does not work: {states[name]['text']}", _fabric_fix(name))
        for name in ("tcp", "shm")
        if not states[name]["works"] and "libfabric was not found" not in states[name]["text"]
    ]
    if wanted is not None and not states[wanted.name]["works"]:
        problems.append(
            Problem(
                "error",
                f"PPLX_FABRIC={wanted} does not work: {states[wanted.name]['text']}",
                "unset PPLX_FABRIC, or name one that works: "
                + ", ".join(name for name, state in states.items() if state["works"]),
            )
        )
    return states


def _fabric_fix(name: str) -> str:
    if name == "shm":
        return "see the size of /dev/shm below (docker: --shm-size=8g or --ipc=host), or use PPLX_FABRIC=tcp"
    return "see the network interfaces below, or choose one with PPLX_SOCKET_IFNAME"


@contextlib.contextmanager
def _without(variable: str) -> Iterator[None]:
    value = os.environ.pop(variable, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[variable] = value


def _probe(fabric: str, *, nics: bool) -> dict[str, Any]:
    """Open an engine and write through it to itself; ``nics``: on those that PPLX_NICS names."""
    import numpy as np

    try:
        with contextlib.ExitStack() as stack:
            if not nics:
                stack.enter_context(_without("PPLX_NICS"))
            engine = stack.enter_context(TransferEngine(fabric, timeout=5.0))
            region = engine.empty(16, np.uint8)
            region.array[:8] = range(8)
            engine.write(region, region.descriptor, length=8, dst_offset=8, imm=1).result(5.0)
            engine.imm_counter(1).wait(1)
            works = region.array[8:].tolist() == list(range(8))
            return {
                "works": works,
                "text": engine.fabric_name + (": works" if works else ": wrong data arrived"),
            }
    except Exception as error:  # whatever it is, it is what the user is to see
        return {"works": False, "text": str(error) or type(error).__name__}


# ---- network -----------------------------------------------------------------------------------------------


def _interfaces(problems: list[Problem]) -> list[dict[str, Any]]:
    found = interfaces()
    if not any(one.up and one.addresses and not one.loopback for one in found):
        problems.append(
            Problem(
                "warning",
                "no interface but loopback is up with an address: ranks on other hosts cannot reach this one",
                "bring one up (ip link set NAME up), or give the container a network",
            )
        )
    return [dataclasses.asdict(one) for one in found]


def _rdma_devices(root: Path = Path("/sys/class/infiniband")) -> list[dict[str, Any]]:
    devices = []
    for device in sorted(root.iterdir()) if root.is_dir() else []:
        ports = [
            {
                "port": port.name,
                "state": _text(port / "state").rpartition(": ")[2],
                "rate": _text(port / "rate"),
                "link_layer": _text(port / "link_layer"),
            }
            for port in sorted((device / "ports").glob("*"))
        ]
        devices.append(
            {
                "name": device.name,
                "driver": _link(device / "device" / "driver"),
                "pci": _link(device / "device"),
                "numa_node": _text(device / "device" / "numa_node"),
                "ports": ports,
            }
        )
    return devices


# ---- host --------------------------------------------------------------------------------------------------


def _cpu(problems: list[Problem]) -> dict[str, Any]:
    cores = sorted(os.sched_getaffinity(0))
    quota: float | None = None
    limit, _, period = _text("/sys/fs/cgroup/cpu.max").partition(" ")
    if limit.isdecimal() and period.isdecimal():
        quota = int(limit) / int(period)
        if quota < len(cores):
            problems.append(
                Problem(
                    "warning",
                    f"the container may use {quota:g} cores' time but sees {len(cores)} cores: its threads "
                    "will be stopped for milliseconds at a time",
                    "pin it to cores instead (docker: --cpuset-cpus), or raise its limit",
                )
            )
    nodes = sorted(Path("/sys/devices/system/node").glob("node[0-9]*"))
    return {
        "cores": len(cores),
        "online": os.cpu_count(),
        "affinity": ranges(cores),
        "quota": quota,
        "numa_nodes": {node.name: _text(node / "cpulist") for node in nodes},
    }


def _gpus(run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run) -> list[dict[str, str]]:
    tool = shutil.which("nvidia-smi")
    if tool:
        query = ["--query-gpu=index,name,driver_version,pci.bus_id", "--format=csv,noheader"]
        try:
            done = run([tool, *query], capture_output=True, text=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired):
            done = None
        if done is not None and done.returncode == 0:
            keys = ("index", "name", "driver", "pci")
            rows = [line.split(", ") for line in done.stdout.splitlines()]
            return [dict(zip(keys, row, strict=True)) for row in rows if len(row) == len(keys)]
    # The driver alone, as in containers without its tools.
    gpus = []
    for folder in sorted(Path("/proc/driver/nvidia/gpus").glob("*")):
        model = re.search(r"Model:\s*(.+)", _text(folder / "information"))
        gpus.append({"pci": folder.name, "name": model[1] if model else "unknown"})
    return gpus


def _cuda(gpus: list[dict[str, str]], problems: list[Problem]) -> dict[str, Any]:
    """Our kernels, and what CUDA says of the devices: it makes contexts on none of them."""
    extension = gpu.extension()
    if extension is None:
        if gpus:
            problems.append(
                Problem(
                    "warning",
                    "there are GPUs, but pplx_jax has no CUDA kernels: groups on GPUs cannot connect",
                    gpu.GET_KERNELS,
                )
            )
        return {"extension": None, "devices": 0}
    devices = int(extension.device_count())
    if gpus and not devices:
        problems.append(
            Problem(
                "warning",
                "there are GPUs, but CUDA finds none",
                "check CUDA_VISIBLE_DEVICES, and that the driver is new enough for the kernels' CUDA version",
            )
        )
    peers = {str(device): list(extension.peers(device)) for device in range(devices)}
    alone = [device for device, reached in peers.items() if devices > 1 and not reached]
    if alone:
        problems.append(
            Problem(
                "warning",
                f"GPU {', '.join(alone)} has peer access to no other GPU",
                "pass nvlink=False to ExpertParallel; `nvidia-smi topo -p2p r` and the IOMMU may say why",
            )
        )
    return {"extension": extension.__name__, "devices": devices, "peers": peers}


def _limits(report: dict[str, Any], problems: list[Problem]) -> dict[str, Any]:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    memlock = None if soft == resource.RLIM_INFINITY else soft
    if report["rdma_devices"] and memlock is not None and memlock < _GIB:
        problems.append(
            Problem(
                "error",
                f"locked memory is limited to {memlock / 2**20:g} MiB, and NICs pin what is registered",
                "ulimit -l unlimited (docker: --ulimit memlock=-1; /etc/security/limits.conf: memlock)",
            )
        )
    shm: dict[str, Any] = {"error": "/dev/shm does not exist"}
    if Path("/dev/shm").is_dir():
        usage = shutil.disk_usage("/dev/shm")
        stale = _stale_segments(Path("/dev/shm"))
        shm = {"size": usage.total, "free": usage.free, "stale": [str(path) for path in stale]}
        if usage.free < _GIB // 2:
            problems.append(
                Problem(
                    "warning",
                    f"/dev/shm has {usage.free / 2**20:.0f} MiB left of {usage.total / 2**20:.0f}; fabric "
                    "shm needs 16 MiB and more for each rank",
                    "docker: --shm-size=8g or --ipc=host; or use PPLX_FABRIC=tcp",
                )
            )
        if stale:
            size = 0
            for path in stale:
                with contextlib.suppress(OSError):  # removed meanwhile
                    size += path.stat().st_size
            problems.append(
                Problem(
                    "warning",
                    f"{len(stale)} endpoints of processes that were killed take {size / 2**20:.0f} MiB of "
                    f"/dev/shm, {stale[0]} for one",
                    "remove the files, if no other container shares this /dev/shm (--json lists them)",
                )
            )
    return {"memlock": memlock, "shm": shm}


def _stale_segments(folder: Path) -> list[Path]:
    stale = []
    for path in sorted(folder.iterdir()):
        named = _SHM_FILE.fullmatch(path.name)
        with contextlib.suppress(OSError):  # removed meanwhile
            if named and path.stat().st_uid == os.getuid() and not Path(f"/proc/{named[1]}").exists():
                stale.append(path)
    return stale


# ---- reading -----------------------------------------------------------------------------------------------


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _link(path: Path) -> str:
    return path.resolve().name if path.exists() else ""


# ---- showing -----------------------------------------------------------------------------------------------


def show(report: dict[str, Any], console: Console) -> None:
    """Print a report for people."""
    versions = Table("package", "version", title="Versions")
    for name, version in report["versions"].items():
        versions.add_row(name, version or "[yellow]not installed[/yellow]")
    for plugin in report["plugins"]:
        versions.add_row(f"plugin {plugin['name']}", f"{plugin['version']}, {plugin['kernels']} kernels")
    for name, library in report["libraries"].items():
        found = f"{library.get('version', 'found')}, {library.get('path')}"
        versions.add_row(name, escape(library.get("error", found)))
    console.print(versions)

    fabrics = Table("fabric", "state", title="Fabrics")
    for name, state in report["fabrics"].items():
        colour = "green" if state["works"] else "yellow"
        fabrics.add_row(name, f"[{colour}]{escape(state['text'])}[/{colour}]")
    console.print(fabrics)

    network = Table("interface", "addresses", "state", "MTU", "Mbit/s", "NUMA", title="Network")
    for one in report["interfaces"]:
        cells = [str(one[key]) if one[key] is not None else "" for key in ("mtu", "speed", "numa_node")]
        network.add_row(one["name"], ", ".join(one["addresses"]), "up" if one["up"] else "down", *cells)
    console.print(network)
    if report["rdma_devices"]:
        rdma = Table("RDMA device", "driver", "port", "state", "rate", "link", "NUMA", title="RDMA")
        for device in report["rdma_devices"]:
            for port in device["ports"]:
                cells = [port[key] for key in ("port", "state", "rate", "link_layer")]
                rdma.add_row(device["name"], device["driver"], *cells, device["numa_node"])
        console.print(rdma)
    else:
        console.print("RDMA devices: none.")

    cpu, limits = report["cpu"], report["limits"]
    nodes = "; ".join(f"{node}: {cores}" for node, cores in cpu["numa_nodes"].items())
    console.print(
        f"Cores: {cpu['cores']} ({cpu['affinity']}) of {cpu['online']}. NUMA: {nodes or 'unknown'}."
    )
    memlock = limits["memlock"]
    locked = "unlimited" if memlock is None else f"{memlock / 2**20:g} MiB"
    shm = limits["shm"]
    shared = shm.get("error", f"{shm.get('free', 0) / _GIB:.1f} of {shm.get('size', 0) / _GIB:.1f} GiB free")
    console.print(f"Locked memory (memlock): {locked}. /dev/shm: {shared}.")
    gpus = ", ".join(f"{gpu.get('name')} ({gpu.get('driver', gpu.get('pci'))})" for gpu in report["gpus"])
    console.print(f"GPUs: {escape(gpus) or 'none'}.")
    cuda = report["cuda"]
    reach = "; ".join(
        f"{device} reaches {ranges(peers) or 'none'}" for device, peers in cuda.get("peers", {}).items()
    )
    console.print(
        f"CUDA kernels: {cuda['extension'] or 'none'}." + (f" Peer access: {reach}." if reach else "")
    )
    show_topology(report, console)
    for name, value in report["environment"].items():
        console.print(escape(f"{name}={value}"))

    if not report["problems"]:
        console.print("[green]No problems found.[/green]")
    for problem in report["problems"]:
        colour = "red" if problem["severity"] == "error" else "yellow"
        console.print(f"[{colour}]{problem['severity']}[/{colour}]: {escape(problem['what'])}")
        console.print(f"  to do: {escape(problem['fix'])}")
