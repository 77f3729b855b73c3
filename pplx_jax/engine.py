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
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from pplx_jax import _core, environment
from pplx_jax.engine_arguments import as_array, nic_list
from pplx_jax.engine_handles import (
    GroupRegions,
    Pages,
    PoolMessage,
    PreparedWrite,
    ReceivePool,
    RemotePool,
    Transfer,
    WatchWord,
)
from pplx_jax.engine_types import (
    MAX_USER_IMMEDIATE,
    Address,
    GroupEntry,
    ImmCounter,
    Nic,
    PeerGroup,
    PoolDescriptor,
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
from pplx_jax.verbs import VerbsOptions

__all__ = [
    "Address",
    "GroupEntry",
    "GroupRegions",
    "ImmCounter",
    "Nic",
    "Pages",
    "PeerGroup",
    "PoolDescriptor",
    "PoolMessage",
    "PreparedWrite",
    "ReceivePool",
    "Region",
    "RegionDescriptor",
    "RemotePool",
    "RemoteRegion",
    "ScatterEntry",
    "SimOptions",
    "Transfer",
    "TransferEngine",
    "VerbsOptions",
    "WatchWord",
]

_OPEN_CACHE = 1024


# ---- the engine --------------------------------------------------------------------------------------------


class TransferEngine:
    """A process's end of a fabric.

    Args:
        fabric: ``"local"`` (engines of one process, plain copies), ``"sim"`` (engines of one process,
            disordered by ``sim``), ``"tcp"``, ``"shm"``, ``"verbs"`` (RoCE and InfiniBand, by libibverbs),
            or any libfabric provider with RDM endpoints and RMA (``"tcp;ofi_rxm"``, ``"efa"``, ...).
        endpoints: endpoints a peer, at most 64; more than one sprays writes, which then arrive in any order.
        bind_address: IP address that the socket providers listen on; ``None`` for that of
            ``PPLX_SOCKET_IFNAME``, or else for loopback only. With ``"verbs"``, that of the GID to use.
        timeout: seconds that any wait may take unless it says otherwise; ``None`` for 30, or what
            ``PPLX_TIMEOUT`` says.
        sim: what ``"sim"`` does to traffic.
        verbs: how ``"verbs"`` uses its NIC.
        nics: up to 8 NICs that share the traffic, names of libfabric domains or :class:`Nic`; None for the
            first that
            ``PPLX_NICS`` names. Engines may have different numbers of them.
        job: engines with different tokens refuse each other; None for that of ``PPLX_JOB``, or else none. It
            keeps jobs apart that reach each other by mistake; it is no defence against anybody who listens on
            the network.
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
        verbs: VerbsOptions | None = None,
        nics: Sequence[Nic | str] | None = None,
        cpu: int | Literal["auto"] | None = "auto",
        job: str | None = None,
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
        if verbs is not None:
            typed("verbs", verbs, VerbsOptions, "VerbsOptions or None")
            if fabric != "verbs":
                raise ValueError(f"verbs: has a meaning for fabric='verbs' only, fabric is {fabric!r}")
        if job is not None:
            typed("job", job, str, "a string or None")
        environment.check()
        # Of verbs an address chooses the GID; that of the sockets' interface need not be one of the NIC's.
        address = bind_address or (fabric != "verbs" and environment.socket_address()) or ""
        set_library_search_path()
        self._process = os.getpid()
        self._timeout = environment.timeout() if timeout is None else seconds("timeout", timeout)
        self._core = _core.Engine(
            fabric=fabric,
            endpoints=integer("endpoints", endpoints, 1, 64),
            bind_address=address,
            nic=next(iter(environment.nics()), ""),
            nics=nic_list(nics, address),
            cpu=core_number(cpu),
            timeout=self._timeout,
            sim=dataclasses.asdict(sim or SimOptions()),
            verbs=dataclasses.asdict(verbs or VerbsOptions()),
            job=environment.job() if job is None else job,
        )
        self._address = Address(self._core.address)
        self._lock = threading.Lock()  # guards _opened and _forgotten
        self._opened: dict[RegionDescriptor, RemoteRegion] = {}
        self._forgotten = 0  # how many times peers were removed
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
        view, writable = as_array(array)
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
    ) -> Transfer:
        """Write bytes of a region into a peer's region.

        Args:
            region: the source. It must not be changed before the future is done, nor after it has failed
                with ``TimeoutError`` or ``PeerError``: the provider may send it late, until the engine is
                closed. Dropping it is safe: it is kept as long as that.
            remote: the target.
            length: bytes; the rest of the source by default.
            src_offset: where to start in the source, in bytes.
            dst_offset: where to start in the target, in bytes.
            imm: an immediate, 0..2**31 - 1, which the peer counts once all bytes are visible there.

        Returns:
            A future that is done when the source may be changed again, which doesn't say that the peer has
            seen the bytes: the peer's counter does. :meth:`Transfer.cancel` takes it back while it has not
            begun.
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
        immediate = checked_immediate(imm)
        future = Transfer(self._core)
        self._core.write(source._core, start, target._core, offset, size, immediate, future, future._id)
        return future

    def read(
        self,
        region: Region,
        remote: RegionDescriptor | RemoteRegion,
        length: int | None = None,
        dst_offset: int = 0,
        src_offset: int = 0,
    ) -> Transfer:
        """Read bytes of a peer's region into a region of this engine; the peer takes no notice.

        Args:
            region: where the bytes go; writable. They are there when the future is done. After a
                ``TimeoutError`` or ``PeerError`` they may come late, until the engine is closed, to this
                memory, which is kept as long as that.
            remote: the source.
            length: bytes; the rest of the target by default.
            dst_offset: where to start in the target, in bytes.
            src_offset: where to start in the source, in bytes.

        Raises:
            FabricError: the provider cannot read.
        """
        target = self._own(region)
        if not target.writable:
            raise ValueError("region: is read-only, bytes cannot be read into it")
        start = integer("dst_offset", dst_offset, 0, target.nbytes)
        size = (
            target.nbytes - start if length is None else integer("length", length, 0, target.nbytes - start)
        )
        source = self._resolve("remote", remote)
        offset = integer("src_offset", src_offset, 0, source.nbytes)
        if size > source.nbytes - offset:
            raise ValueError(
                f"length: {size} bytes at src_offset {offset} are not in the remote region of "
                f"{source.nbytes} bytes"
            )
        future = Transfer(self._core)
        self._core.read(target._core, start, source._core, offset, size, future, future._id)
        return future

    def paged_write(
        self,
        region: Region,
        remote: RegionDescriptor | RemoteRegion,
        page_bytes: int,
        src_pages: Pages,
        dst_pages: Pages,
        count: int | None = None,
        imm: int | None = None,
        group: int = 0,
    ) -> Transfer:
        """Write pages of a region to pages of a peer's region.

        Args:
            region: the source. Its pages must not be changed before the future is done.
            remote: the target.
            page_bytes: bytes of each page.
            src_pages: which pages, and where they lie.
            dst_pages: where they go, one for one.
            count: the number of pages; needed where neither side lists indices.
            imm: an immediate, which the peer counts once for every group of pages, when all bytes of the
                group are
                visible there.
            group: pages a group, in the order of the lists; the last may have fewer. 0: one group of all.
        """
        source = self._own(region)
        typed("src_pages", src_pages, Pages, "Pages")
        typed("dst_pages", dst_pages, Pages, "Pages")
        lists = [pages.indices for pages in (src_pages, dst_pages) if pages.indices is not None]
        if count is None:
            if not lists:
                raise ValueError("count: is needed where neither src_pages nor dst_pages has indices")
            count = len(lists[0])
        pages = integer("count", count, 0, 2**40)
        size = integer("page_bytes", page_bytes, 1, 2**62)
        ours, theirs = src_pages._checked("src_pages"), dst_pages._checked("dst_pages")
        target = self._resolve("remote", remote)
        immediate = checked_immediate(imm)
        groups = integer("group", group, 0, 2**40)
        future = Transfer(self._core)
        self._core.paged_write(
            source._core, ours, target._core, theirs, pages, size, immediate, groups, future, future._id
        )
        return future

    def open_group(self, group: PeerGroup, descriptors: Sequence[RegionDescriptor]) -> GroupRegions:
        """Resolve a region of each member of a group, in the order of their ranks, for
        :meth:`scatter_group`."""
        self._own_group(group)
        for index, descriptor in enumerate(descriptors):
            typed(f"descriptors[{index}]", descriptor, RegionDescriptor, "a RegionDescriptor")
        sizes = [self._resolve("descriptors", descriptor).nbytes for descriptor in descriptors]
        core = self._core.open_group(group._core, [bytes(descriptor) for descriptor in descriptors])
        return GroupRegions(core, sizes, self._core)

    def scatter_group(
        self, region: Region, targets: GroupRegions, entries: Iterable[GroupEntry], imm: int | None = None
    ) -> Future[None]:
        """Write parts of one region to members of a group, each with the same immediate; see
        :meth:`scatter`."""
        source = self._own(region)
        typed("targets", targets, GroupRegions, "GroupRegions")
        if targets._engine is not self._core:
            raise ValueError("targets: were opened by another engine")
        converted = []
        for index, entry in enumerate(entries):
            name = f"entries[{index}]"
            typed(name, entry, GroupEntry, "a GroupEntry")
            rank = integer(f"{name}.rank", entry.rank, 0, len(targets) - 1)
            start = integer(f"{name}.src_offset", entry.src_offset, 0, source.nbytes)
            size = integer(f"{name}.length", entry.length, 0, source.nbytes - start)
            offset = integer(f"{name}.dst_offset", entry.dst_offset, 0, targets._sizes[rank])
            integer(f"{name}.length", size, 0, targets._sizes[rank] - offset)
            converted.append((rank, start, offset, size))
        immediate = checked_immediate(imm)
        future = _running_future()
        if converted:
            self._core.scatter_group(source._core, targets._core, converted, immediate, future)
        else:
            future.set_result(None)
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

        Raises:
            ValueError: 65536 values are in use, that is arrived or asked for, and not released. Arrivals of
                further ones are dropped and counted in ``stats()["unknown_immediates"]``.
        """
        return ImmCounter(self._core.imm_counter(integer("imm", imm, 0, MAX_USER_IMMEDIATE)))

    def release_immediate(self, imm: int) -> None:
        """Forget an immediate value, when all its arrivals have been counted: others may take its place.

        Programs that use a value only once, say for a request, must release it. Counters that are left keep
        what they have counted, and waits for more raise ``GroupClosedError``. An arrival after this counts
        from 0 again. A value that is not in use is left alone.
        """
        self._core.release_immediate(integer("imm", imm, 0, MAX_USER_IMMEDIATE))

    def watch_word(
        self,
        writes: Sequence[PreparedWrite] = (),
        callback: Callable[[int], object] | None = None,
        address: int | None = None,
        keepalive: object = None,
    ) -> WatchWord:
        """Watch a 64-bit word that somebody else increments.

        Args:
            writes: posted once for every increment, without Python. Sources must not change while
                ``posted != completed``.
            callback: called with the word's value, on a thread of the engine; increments that follow each
                other
                fast are told together. It must not wait for the engine.
            address: of an existing word, aligned to 8 bytes, in memory that the CPU reads: for a GPU's
                writer pinned and
                mapped. None: the engine makes one.
            keepalive: what owns the memory at ``address``.

        Raises:
            ValueError: the address is not aligned, or a write does not fit its regions.
        """
        if callback is not None and not callable(callback):
            raise TypeError(f"callback: must be callable, is {type(callback).__name__}")
        word = 0 if address is None else integer("address", address, 1, 2**64 - 1)
        prepared = []
        for index, write in enumerate(writes):
            name = f"writes[{index}]"
            typed(name, write, PreparedWrite, "a PreparedWrite")
            source = self._own(write.region)
            target = self._resolve(f"{name}.remote", write.remote)
            start = integer(f"{name}.src_offset", write.src_offset, 0, source.nbytes)
            offset = integer(f"{name}.dst_offset", write.dst_offset, 0, target.nbytes)
            size = integer(
                f"{name}.length", write.length, 0, min(source.nbytes - start, target.nbytes - offset)
            )
            prepared.append((source._core, start, target._core, offset, size, checked_immediate(write.imm)))
        return WatchWord(_core.WatchWord(self._core, word, keepalive, prepared, callback))

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

    def receive_pool(self, buffer_bytes: int, buffers: int, max_waiting: int = 1024) -> ReceivePool:
        """Make buffers for messages of any length up to ``buffer_bytes``.

        Args:
            buffer_bytes: the longest message.
            buffers: their number: so many messages are here at a time, unread ones and those being read.
            max_waiting: messages that may wait for a buffer, at their senders; one more is refused.
        """
        size = integer("buffer_bytes", buffer_bytes, 1, 2**40)
        count = integer("buffers", buffers, 1, 2**20)
        waiting = integer("max_waiting", max_waiting, 0, 2**20)
        return ReceivePool(_core.ReceivePool(self._core, None, size, count, waiting), size)

    def open_pool(self, descriptor: PoolDescriptor) -> RemotePool:
        """Connect to a receive pool's owner and resolve the descriptor."""
        typed("descriptor", descriptor, PoolDescriptor, "a PoolDescriptor")
        return RemotePool(self._core.open_pool(bytes(descriptor)), self._core)

    def send_to_pool(
        self, pool: RemotePool, region: Region, length: int | None = None, src_offset: int = 0
    ) -> Future[None]:
        """Send bytes of a region into a buffer of a peer's receive pool.

        The future is done when they are there. It raises ``FabricError`` where the pool refused, as too many
        messages wait or all its buffers are lost, and ``TimeoutError`` where no buffer came free within the
        engine's timeout.
        """
        typed("pool", pool, RemotePool, "a RemotePool")
        if pool._engine is not self._core:
            raise ValueError("pool: was opened by another engine")
        source = self._own(region)
        start = integer("src_offset", src_offset, 0, source.nbytes)
        limit = min(source.nbytes - start, pool.buffer_bytes)
        size = source.nbytes - start if length is None else integer("length", length, 0, limit)
        if size > limit:
            raise ValueError(f"length: a buffer of the pool takes {pool.buffer_bytes} bytes, has {size}")
        future = _running_future()
        self._core.send_to_pool(pool._core, source._core, start, size, future)
        return future

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
        self._own_group(group)
        self._core.barrier(group._core, timeout_of(timeout))

    # -- the rest

    def stats(self) -> dict[str, Any]:
        """Return counts since the engine was made: writes, bytes, messages, immediates, errors, polls.

        ``worker_core`` is the core that the worker thread is pinned to, -1 if it is not; ``registrations``
        are the regions that are registered now. ``nics`` and
        ``peers`` are lists of dicts, with bytes and operations as they were posted (parts of split ones
        count one each), those ``outstanding`` with the provider and ``queued`` for it, and ``error``, why it
        is used no more. A NIC's ``latency_buckets[b]`` counts operations that took less than 2**b and at
        least 2**(b-1) nanoseconds, of one in 64; ``latency_p50`` and ``latency_p99`` are bounds from it in
        seconds.
        """
        return self._core.stats()

    def remove_nic(self, index: int) -> None:
        """Take a NIC out, as if it had failed: its traffic goes over the others.

        Raises:
            ValueError: it is the last one that works.
        """
        self._core.remove_nic(integer("index", index, 0, 7))

    def remove_peer(self, address: Address) -> bool:
        """Forget a peer that has gone, in jobs whose peers come and go.

        What is under way to it fails with ``PeerError``, and so does what is later sent to remote regions,
        groups and pools of it that were opened before. The peer is not told: what it may write here it may
        still write, until its regions are dropped. A descriptor of it that is opened later meets it anew
        (over verbs ``PeerError`` for the first milliseconds).

        Returns:
            False if nothing was known of that address.
        """
        typed("address", address, Address, "an Address")
        try:
            return self._core.remove_peer(bytes(address))
        finally:
            with self._lock:
                self._opened.clear()
                self._forgotten += 1

    def start_timeline(self, events: int = 65536) -> None:
        """Record what the engine does: the latest ``events`` operations, arrivals and waits, 48 bytes
        each."""
        self._core.start_timeline(integer("events", events, 1, 2**26))

    def stop_timeline(self) -> None:
        """Stop recording; :meth:`timeline` still has what was recorded."""
        self._core.stop_timeline()

    def timeline(self) -> str:
        """Return what was recorded as Chrome-trace JSON, for https://ui.perfetto.dev or chrome://tracing."""
        return self._core.timeline()

    def close(self) -> None:
        """Stop: outstanding operations and waits fail with :class:`GroupClosedError`. Idempotent.

        Memory of live regions stays valid, but is no longer registered.
        """
        if os.getpid() == self._process:
            with self._lock:
                self._opened.clear()
        self._core.close()

    def _own_group(self, group: PeerGroup) -> None:
        typed("group", group, PeerGroup, "a PeerGroup")
        if group._engine is not self._core:
            raise ValueError("group: was made by another engine")

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
            forgotten = self._forgotten
            found = self.open(remote)
            with self._lock:
                if forgotten != self._forgotten:
                    return found  # it may be of a peer that was removed meanwhile
                self._opened[remote] = found
                while len(self._opened) > _OPEN_CACHE:
                    del self._opened[next(iter(self._opened))]  # the oldest
        return found


def _running_future() -> Future[None]:
    future: Future[None] = Future()
    future.set_running_or_notify_cancel()  # the NIC cannot take a write back
    return future


# Engines whose threads complete futures must stop before the interpreter does.
_live: weakref.WeakSet[TransferEngine] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for engine in list(_live):
        with contextlib.suppress(Exception):
            engine.close()
