"""Every environment variable that the package reads, parsed here and nowhere else.

A value that makes no sense raises a ``ValueError`` that names the variable. The variables are read when a
group or an engine is made, so that setting them in ``os.environ`` before that counts.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable

from pplx_jax.fabric import Fabric
from pplx_jax.interfaces import interfaces, select

DEFAULT_TIMEOUT = 30.0
LOG_LEVELS = ("debug", "info", "warn", "error", "off")
GPU_REGIONS = ("auto", "device", "pinned")


@dataclasses.dataclass(frozen=True)
class Variable:
    """What the guide's table says of one variable."""

    name: str
    meaning: str
    default: str


VARIABLES = (
    Variable(
        "PPLX_FABRIC",
        'What `fabric="auto"` becomes: `local`, `shm`, `tcp`, `sim` or a libfabric provider, with options as '
        "in `pplx_jax.fabric`. Must be equal on all ranks of a group",
        "`local` in one process, `shm` on one host, else `tcp`",
    ),
    Variable(
        "PPLX_SOCKET_IFNAME",
        "The network interface whose address `tcp` listens on: prefixes of names, separated by commas; "
        "`=eth0` for exactly that one; `^docker,veth` for any but those",
        "the interface towards the coordinator; loopback where all ranks are on one host",
    ),
    Variable(
        "PPLX_NICS",
        "NICs (RDMA devices, libfabric domains) to open, separated by commas, for fabrics other than `shm`: "
        "this process's first device uses the first, and so on, from the start again where there are fewer",
        "of groups on `verbs` and `efa` those nearest to each device, else the first that the provider "
        "offers",
    ),
    Variable(
        "PPLX_JOB",
        "A token of the job: engines and groups with different ones refuse each other. It keeps jobs apart "
        "that reach each other by mistake, and is no defence against whoever listens on the network",
        "none; groups have one of their own",
    ),
    Variable(
        "PPLX_LIBFABRIC",
        "The libfabric to load, a path or a name for the dynamic loader; no other is tried",
        "`/opt/amazon/efa`, the system's, then one of a Python wheel",
    ),
    Variable(
        "PPLX_CORES",
        "Cores that engines' worker threads are pinned to, numbers and ranges, as `8-15,40`: each takes one "
        "that no other has, where the process may use eight or more",
        "the cores nearest to the GPU or NIC, where hwloc knows them",
    ),
    Variable(
        "PPLX_TOPOLOGY",
        "An hwloc XML file (`lstopo FILE.xml`) that says what this machine is like, for containers that "
        "hide it",
        "what hwloc finds",
    ),
    Variable(
        "PPLX_HWLOC",
        "The hwloc to load, a path or a name for the dynamic loader; no other is tried",
        "the system's `libhwloc.so.15`; without one, nearness is unknown",
    ),
    Variable(
        "PPLX_GPU_REGIONS",
        "Where messages of GPUs lie that go by the host: `device`, in GPU memory, which NICs must reach; "
        "`pinned`, in host memory; `auto`, in GPU memory where it can be. Ranks may differ",
        "`auto`",
    ),
    Variable(
        "PPLX_GDRCOPY",
        "The library of GDRCopy to load, a path or a name for the dynamic loader, no other is tried; `off`: "
        "none. Through it the host tells GPUs what has arrived",
        "the system's `libgdrapi.so.2`; without one, through pinned memory",
    ),
    Variable(
        "PPLX_TIMEOUT",
        "Seconds: the default of `timeout=` of `ExpertParallel` and `TransferEngine`",
        "30",
    ),
    Variable(
        "PPLX_LOG_LEVEL",
        "What is logged to stderr: `debug`, `info`, `warn`, `error` or `off`. Read once, at the first line",
        "`warn`",
    ),
)


def _get(name: str) -> str | None:
    """The value, None where it is unset or empty."""
    return os.environ.get(name, "").strip() or None


def _file(name: str, what: str) -> str | None:
    path = _get(name)
    if path is not None and "/" in path and not os.path.isfile(path):  # noqa: PTH113 - as given
        raise ValueError(f"{name}: there is no file {path!r}; give the path of {what}")
    return path


def fabric() -> Fabric | None:
    """PPLX_FABRIC, which must not be "auto" again."""
    text = _get("PPLX_FABRIC")
    if text is None:
        return None
    try:
        parsed = Fabric.parse(text)
    except ValueError as error:
        raise ValueError(f"PPLX_FABRIC: {error}") from error
    return None if parsed.name == "auto" else parsed


def timeout() -> float:
    """PPLX_TIMEOUT in seconds, or the default."""
    text = _get("PPLX_TIMEOUT")
    if text is None:
        return DEFAULT_TIMEOUT
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < 1e6:
        raise ValueError(f"PPLX_TIMEOUT: must be a number of seconds > 0, is {text!r}")
    return seconds


def log_level() -> str:
    """PPLX_LOG_LEVEL; the C++ side reads the same variable."""
    level = _get("PPLX_LOG_LEVEL") or "warn"
    if level not in LOG_LEVELS:
        raise ValueError(f"PPLX_LOG_LEVEL: must be one of {', '.join(LOG_LEVELS)}, is {level!r}")
    return level


def libfabric() -> str | None:
    """PPLX_LIBFABRIC; the C++ side reads the same variable, and says why a library cannot be loaded."""
    return _file("PPLX_LIBFABRIC", "libfabric.so.1")


def cores() -> tuple[int, ...]:
    """PPLX_CORES; the C++ side reads the same variable."""
    text = _get("PPLX_CORES")
    found: list[int] = []
    for part in text.split(",") if text else ():
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part.strip())
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not low <= high < 1024:
            raise ValueError(f"PPLX_CORES: must be numbers and ranges of cores such as 8-15,40, is {text!r}")
        found += range(low, high + 1)
    return tuple(found)


def topology() -> str | None:
    """PPLX_TOPOLOGY; the C++ side reads the same variable, and says why a file is no topology."""
    return _file("PPLX_TOPOLOGY", "an hwloc XML file, as lstopo writes it")


def hwloc() -> str | None:
    """PPLX_HWLOC; the C++ side reads the same variable, and says why a library cannot be loaded."""
    return _file("PPLX_HWLOC", "libhwloc.so.15")


def gpu_regions() -> str:
    """PPLX_GPU_REGIONS, or "auto"."""
    where = _get("PPLX_GPU_REGIONS") or "auto"
    if where not in GPU_REGIONS:
        raise ValueError(f"PPLX_GPU_REGIONS: must be one of {', '.join(GPU_REGIONS)}, is {where!r}")
    return where


def gdrcopy() -> str | None:
    """PPLX_GDRCOPY; the C++ side reads the same variable, and says why a library cannot be loaded."""
    return _file("PPLX_GDRCOPY", "libgdrapi.so.2, or off")


def job() -> str:
    """PPLX_JOB."""
    return _get("PPLX_JOB") or ""


def nics() -> tuple[str, ...]:
    """PPLX_NICS; whether they exist, the provider says."""
    text = _get("PPLX_NICS")
    names = tuple(item.strip() for item in text.split(",")) if text else ()
    if "" in names or len(set(names)) != len(names):
        raise ValueError(f"PPLX_NICS: must be distinct names separated by commas, is {text!r}")
    return names


def socket_address() -> str | None:
    """The address of the interface that PPLX_SOCKET_IFNAME names; None where it is unset."""
    pattern = _get("PPLX_SOCKET_IFNAME")
    if pattern is None:
        return None
    if not all(item.strip().removeprefix("=") for item in pattern.removeprefix("^").split(",")):
        raise ValueError(
            f"PPLX_SOCKET_IFNAME: must be names separated by commas, after an optional '^', is {pattern!r}"
        )
    found = interfaces()
    chosen = select(pattern, found)
    if chosen is None:
        exist = ", ".join(
            f"{one.name} ({one.addresses[0] if one.addresses else 'no address'}{'' if one.up else ', down'})"
            for one in found
        )
        raise ValueError(
            f"PPLX_SOCKET_IFNAME: no interface that is up and has an address fits {pattern!r}; "
            f"there are {exist}"
        )
    return chosen.addresses[0]


#: One for each variable, in the order of ``VARIABLES``.
PARSERS: tuple[Callable[[], object], ...] = (
    fabric,
    socket_address,
    nics,
    job,
    libfabric,
    cores,
    topology,
    hwloc,
    gpu_regions,
    gdrcopy,
    timeout,
    log_level,
)


def check() -> None:
    """Parses all of them: a bad value is told before anything is opened."""
    for parse in PARSERS:
        parse()
