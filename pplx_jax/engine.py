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
import os
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Literal, Self

from pplx_jax import _core, environment
from pplx_jax.engine_arguments import nic_list
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
from pplx_jax.engine_one_sided import OneSided, running_future
from pplx_jax.engine_types import (
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


class TransferEngine(OneSided):
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
        core = _core.Engine(
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
        super().__init__(core)
        self._address = Address(core.address)
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

    # -- two-sided

    def send(self, address: Address, payload: bytes | bytearray | memoryview) -> Future[None]:
        """Send a message of at most :attr:`max_message` bytes, for the peer's :meth:`recv`."""
        typed("address", address, Address, "an Address")
        if not isinstance(payload, bytes | bytearray | memoryview):
            raise TypeError(f"payload: must be bytes, is {type(payload).__name__}")
        data = bytes(payload)
        if len(data) > self.max_message:
            raise ValueError(f"payload: at most {self.max_message} bytes can be sent, has {len(data)}")
        future = running_future()
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
        future = running_future()
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
            self._forget_opened()

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
            self._forget_opened()
        self._core.close()


# Engines whose threads complete futures must stop before the interpreter does.
_live: weakref.WeakSet[TransferEngine] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for engine in list(_live):
        with contextlib.suppress(Exception):
            engine.close()
