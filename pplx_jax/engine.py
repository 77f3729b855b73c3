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
import math
import os
import sys
import threading
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from pplx_jax import _core, environment
from pplx_jax.engine_types import (
    MAX_USER_IMMEDIATE,
    Address,
    ImmCounter,
    PeerGroup,
    Region,
    RegionDescriptor,
    RemoteRegion,
    ScatterEntry,
    SimOptions,
    checked_immediate,
    core_number,
    integer,
    seconds,
    set_library_search_path,
    timeout_of,
    typed,
)

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

_OPEN_CACHE = 1024


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
        typed("fabric", fabric, str, "a string")
        if not fabric:
            raise ValueError("fabric: must not be empty; for example 'local', 'sim', 'tcp', 'shm', 'efa'")
        if bind_address is not None:
            typed("bind_address", bind_address, str, "an IP address or None")
        if sim is not None:
            typed("sim", sim, SimOptions, "SimOptions or None")
            if fabric != "sim":
                raise ValueError(f"sim: has a meaning for fabric='sim' only, fabric is {fabric!r}")
        environment.check()
        set_library_search_path()
        self._process = os.getpid()
        self._core = _core.Engine(
            fabric=fabric,
            endpoints=integer("endpoints", endpoints, 1, 64),
            bind_address=bind_address or environment.socket_address() or "",
            nic=next(iter(environment.nics()), ""),
            cpu=core_number(cpu),
            timeout=environment.timeout() if timeout is None else seconds("timeout", timeout),
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
        sizes = tuple(integer("shape", size, 0, 2**62) for size in sizes)
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
        typed("descriptor", descriptor, RegionDescriptor, "a RegionDescriptor")
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
        start = integer("src_offset", src_offset, 0, source.nbytes)
        size = (
            source.nbytes - start if length is None else integer("length", length, 0, source.nbytes - start)
        )
        target = self._resolve("remote", remote)
        offset = integer("dst_offset", dst_offset, 0, target.nbytes)
        if size > target.nbytes - offset:
            raise ValueError(
                f"length: {size} bytes at dst_offset {offset} do not fit the remote region of "
                f"{target.nbytes} bytes"
            )
        future = _running_future()
        self._core.write(source._core, start, target._core, offset, size, checked_immediate(imm), future)
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
            typed(name, entry, ScatterEntry, "a ScatterEntry")
            start = integer(f"{name}.src_offset", entry.src_offset, 0, source.nbytes)
            size = integer(f"{name}.length", entry.length, 0, source.nbytes - start)
            target = self._resolve(f"{name}.remote", entry.remote)
            offset = integer(f"{name}.dst_offset", entry.dst_offset, 0, target.nbytes)
            if size > target.nbytes - offset:
                raise ValueError(
                    f"{name}.length: {size} bytes at dst_offset {offset} do not fit the remote region of "
                    f"{target.nbytes} bytes"
                )
            converted.append((start, target._core, offset, size))
        immediate = checked_immediate(imm)
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
        return ImmCounter(self._core.imm_counter(integer("imm", imm, 0, MAX_USER_IMMEDIATE)))

    # -- two-sided

    def send(self, address: Address, payload: bytes | bytearray | memoryview) -> Future[None]:
        """Send a message of at most :attr:`max_message` bytes, for the peer's :meth:`recv`."""
        typed("address", address, Address, "an Address")
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
        sender, payload = self._core.recv(timeout_of(timeout))
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
            typed(f"addresses[{index}]", address, Address, "an Address")
        if self._address not in members:
            raise ValueError("addresses: this engine's own address is not among them")
        if len(set(members)) != len(members):
            raise ValueError("addresses: an address appears twice")
        number = integer("id", id, 0, 2**32 - 1)
        return PeerGroup(self._core.peer_group([bytes(address) for address in members], number), self._core)

    def barrier(self, group: PeerGroup, timeout: float | None = None) -> None:
        """Block until every member of the group has entered its barrier.

        Raises:
            TimeoutError: one did not within ``timeout`` seconds; the text names it.
        """
        typed("group", group, PeerGroup, "a PeerGroup")
        if group._engine is not self._core:
            raise ValueError("group: was made by another engine")
        self._core.barrier(group._core, timeout_of(timeout))

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
        typed("region", region, Region, "a Region")
        if region._engine is not self._core:
            raise ValueError("region: is registered with another engine")
        return region

    def _resolve(self, name: str, remote: RegionDescriptor | RemoteRegion) -> RemoteRegion:
        if isinstance(remote, RemoteRegion):
            if remote._engine is not self._core:
                raise ValueError(f"{name}: was opened by another engine")
            return remote
        typed(name, remote, RegionDescriptor, "a RegionDescriptor or a RemoteRegion")
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
