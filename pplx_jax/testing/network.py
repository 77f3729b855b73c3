"""Hosts with addresses of their own on one machine: network namespaces joined by veth pairs and bridges.

Nothing of it has a name outside of the process that made it. A namespace lives as long as a process or a
descriptor is in it, and takes its interfaces along: also after ``kill -9`` nothing is left to remove but
processes, for which see :func:`remove_leftovers`.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

__all__ = ["Host", "Network", "remove_leftovers"]

T = TypeVar("T")

# <sched.h> and <sys/mount.h>
_CLONE_FS, _CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWIPC, _CLONE_NEWNET = (
    0x200,
    0x20000,
    0x4000000,
    0x8000000,
    0x40000000,
)
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 0x40000
_NAMESPACES = {"net": _CLONE_NEWNET, "uts": _CLONE_NEWUTS, "ipc": _CLONE_NEWIPC, "mnt": _CLONE_NEWNS}
_MAX_HOSTS, _MAX_NICS = 64, 16
_IP_TIMEOUT = 30.0  # seconds that a batch of ip(8)'s commands may take
_MARK = "_PPLX_TESTING_PARENT"


@dataclasses.dataclass(frozen=True)
class Host:
    """A host's name, which is what ``gethostname`` returns there, and its addresses, one a NIC."""

    name: str
    addresses: tuple[str, ...]

    @property
    def address(self) -> str:
        """The first NIC's address."""
        return self.addresses[0]


def _in_thread(work: Callable[[], T]) -> T:
    """Namespaces belong to threads; this one, and what it entered, ends with the work."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(work).result()


def _system(name: str, *arguments: Any) -> None:
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    if function(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    _system(
        "mount",
        source.encode(),
        target.encode(),
        kind.encode() if kind else None,
        ctypes.c_ulong(flags),
        data.encode(),
    )


def _ip() -> str | None:
    return shutil.which("ip", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class _Namespaces:
    """What a host sees of its own: descriptors that keep the namespaces alive, by kind."""

    def __init__(self, kinds: Sequence[str], prepare: Callable[[], None]) -> None:
        def make() -> dict[str, int]:
            _system("unshare", sum(_NAMESPACES[kind] for kind in kinds))
            prepare()
            return {
                kind: os.open(f"/proc/thread-self/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC) for kind in kinds
            }

        self.descriptors = _in_thread(make)

    def run(self, work: Callable[[], T]) -> T:
        """Call it inside, in a thread of its own. Processes that it starts stay inside."""

        def inside() -> T:
            if "mnt" in self.descriptors:  # threads share their root and working directory otherwise
                _system("unshare", _CLONE_FS)
            folder = Path.cwd()
            for kind, descriptor in self.descriptors.items():
                _system("setns", descriptor, _NAMESPACES[kind])
            with contextlib.suppress(OSError):  # entering a mount namespace leads to its root
                os.chdir(folder)
            return work()

        return _in_thread(inside)

    def ip(self, *lines: str) -> None:
        """Run commands of ip(8) inside."""
        command = _ip()
        if command is None:
            raise OSError("the command ip is missing: install iproute2")
        try:
            done = self.run(
                lambda: subprocess.run(
                    [command, "-batch", "-"],
                    input="\n".join(lines),
                    capture_output=True,
                    text=True,
                    timeout=_IP_TIMEOUT,
                )
            )
        except subprocess.TimeoutExpired as error:
            raise OSError(
                f"ip: not done within {_IP_TIMEOUT:g} s, is the machine overloaded? It was told: "
                + "; ".join(lines)
            ) from error
        if done.returncode != 0:
            raise OSError(f"ip: {done.stderr.strip() or done.stdout.strip()}")

    def close(self) -> None:
        for descriptor in self.descriptors.values():
            os.close(descriptor)
        self.descriptors = {}


class Network:
    """``num_hosts`` hosts, each with ``nics`` interfaces; interface k of all hosts is on switch k.

    Host i is ``node<i>`` with the addresses ``198.18.<k>.<i + 1>`` on ``eth<k>`` (a range set aside for
    tests, RFC 2544); all hosts know each other's names. Each has a network, a host name, a /dev/shm and a
    /sys of its own; files and process ids are shared. They reach each other only: neither this machine nor
    anything outside.

    That takes root, ip(8) and a kernel with namespaces, veth and bridges. Without, the hosts are plain
    processes of this machine, all on loopback: ``isolated`` is False and ``why`` says why.

    Args:
        num_hosts: 1 to 64.
        nics: interfaces of each host, 1 to 16.
        isolate: True raises where hosts cannot be isolated, False never isolates, None does what it can.

    Raises:
        OSError: ``isolate`` is True, and something is missing; the message says what.
    """

    def __init__(self, num_hosts: int, nics: int = 1, *, isolate: bool | None = None) -> None:
        for name, value, most in (("num_hosts", num_hosts, _MAX_HOSTS), ("nics", nics, _MAX_NICS)):
            if not isinstance(value, int) or not 1 <= value <= most:
                raise ValueError(f"{name}: must be an integer from 1 to {most}, is {value!r}")
        self.why = ""
        self._switch: _Namespaces | None = None
        self._inside: list[_Namespaces] = []
        self._closed = False
        self.hosts = [
            Host(f"node{host}", tuple(f"198.18.{nic}.{host + 1}" for nic in range(nics)))
            for host in range(num_hosts)
        ]
        try:
            if isolate is False:
                raise OSError("isolate=False was asked for")
            self._isolate()
        except OSError as error:
            self.close()
            self._closed = False
            if isolate:
                raise OSError(f"hosts cannot be isolated: {error}") from error
            self.why = f"the hosts are plain processes on loopback: {error}"
            self.hosts = [Host(f"node{host}", ("127.0.0.1",)) for host in range(num_hosts)]

    @property
    def isolated(self) -> bool:
        """Whether each host has a network of its own."""
        return self._switch is not None

    @property
    def coordinator_address(self) -> str:
        """Where a coordination service may listen that is on none of the hosts."""
        return "198.18.0.254" if self.isolated else "127.0.0.1"

    def popen(self, host: int | None, command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """:class:`subprocess.Popen` on a host; None: beside them, where ``coordinator_address`` is."""
        where = self._switch if host is None or not self.isolated else self._inside[host]
        if where is None:
            return subprocess.Popen(command, **options)
        return where.run(lambda: subprocess.Popen(command, **options))

    def unplug(self, host: int, nic: int = 0) -> None:
        """Pull the cable of a host's interface: it loses its carrier and keeps its address.

        Raises:
            RuntimeError: the hosts are not isolated.
        """
        self._port(host, nic, "down")

    def plug(self, host: int, nic: int = 0) -> None:
        """Put the cable back."""
        self._port(host, nic, "up")

    @contextlib.contextmanager
    def unplugged(self, host: int, nic: int = 0) -> Iterator[None]:
        """A context in which the cable is out."""
        self.unplug(host, nic)
        try:
            yield
        finally:
            self.plug(host, nic)

    def close(self) -> None:
        """Let go of the hosts: what still runs there keeps them until it ends. Idempotent."""
        self._closed = True
        for one in (*self._inside, self._switch):
            if one is not None:
                one.close()
        self._inside, self._switch = [], None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- internals

    def _port(self, host: int, nic: int, state: str) -> None:
        if self._closed:
            raise RuntimeError("the network is closed")
        if self._switch is None:
            raise RuntimeError(f"there is no cable to pull: {self.why}")
        if not (0 <= host < len(self.hosts) and 0 <= nic < len(self.hosts[host].addresses)):
            raise ValueError(f"host, nic: there is no NIC {nic} of host {host}")
        self._switch.ip(f"link set h{host}n{nic} {state}")

    def _isolate(self) -> None:
        if os.geteuid() != 0:
            raise OSError("that takes root")
        if _ip() is None:
            raise OSError("the command ip is missing: install iproute2")
        nics = range(len(self.hosts[0].addresses))
        self._switch = switch = _Namespaces(["net"], lambda: None)
        switch.ip(
            "link set lo up",
            *(f"link add sw{nic} type bridge" for nic in nics),
            *(f"link set sw{nic} up" for nic in nics),
            f"address add {self.coordinator_address}/24 dev sw0",
        )
        names = "127.0.0.1 localhost\n" + "".join(f"{host.address} {host.name}\n" for host in self.hosts)
        with tempfile.NamedTemporaryFile("w", prefix="hosts-") as table:
            table.write(names)
            table.flush()
            Path(table.name).chmod(0o644)
            for host in self.hosts:
                self._inside.append(_Namespaces(list(_NAMESPACES), _prepare(host.name, table.name)))
        for index, (host, inside) in enumerate(zip(self.hosts, self._inside, strict=True)):
            # By path: it has no name. Ours to open as long as the descriptor is.
            place = f"/proc/{os.getpid()}/fd/{inside.descriptors['net']}"
            switch.ip(
                *(f"link add h{index}n{nic} type veth peer name eth{nic} netns {place}" for nic in nics),
                *(f"link set h{index}n{nic} master sw{nic} up" for nic in nics),
            )
            inside.ip(
                "link set lo up",
                *(f"address add {host.addresses[nic]}/24 dev eth{nic}" for nic in nics),
                *(f"link set eth{nic} up" for nic in nics),
            )


def _prepare(name: str, table: str) -> Callable[[], None]:
    """Within a host's new namespaces: its name, and the files that belong to a host."""

    def prepare() -> None:
        encoded = name.encode()
        _system("sethostname", encoded, ctypes.c_size_t(len(encoded)))
        _mount("none", "/", None, _MS_REC | _MS_PRIVATE)  # what follows stays in here
        _mount("shm", "/dev/shm", "tmpfs", 0, "mode=1777")
        _mount(table, "/etc/hosts", None, _MS_BIND)
        with contextlib.suppress(OSError):  # forbidden, maybe: then /sys shows others' interfaces
            _mount("sysfs", "/sys", "sysfs", 0)

    return prepare


# ---- what killed runs leave --------------------------------------------------------------------------------


def _started(pid: int) -> str | None:
    """When a process started, in the kernel's ticks; None where there is none, or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def mark() -> dict[str, str]:
    """The variable by which :func:`remove_leftovers` knows what this process has started."""
    return {_MARK: f"{os.getpid()}:{_started(os.getpid())}"}


def remove_leftovers() -> list[int]:
    """Kill what test runs that are gone have started; returns the process ids.

    Ranks end with the process that started them; what they started themselves may not, after a ``kill -9``.
    It is known by a variable of its environment that names a process that no longer runs.
    """
    killed = []
    for folder in Path("/proc").glob("[0-9]*"):
        pid = int(folder.name)
        with contextlib.suppress(OSError):
            for entry in (folder / "environ").read_bytes().split(b"\0"):
                name, _, value = entry.decode(errors="replace").partition("=")
                if name != _MARK or pid == os.getpid():
                    continue
                parent, _, started = value.partition(":")
                if parent.isdecimal() and _started(int(parent)) != started:
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
    return killed
