"""The TransferEngine in ``asyncio`` programs.

What is awaited here never blocks the event loop: completions come from the engine's threads by
``loop.call_soon_threadsafe``. It is safe to cancel: a cancelled transfer takes back what had not begun, and
the cancellation goes on only when the rest is over, so that memory is the caller's again whenever an
``await`` returns::

    aio = AsyncEngine(engine)
    async with asyncio.timeout(1.0):
        await aio.write(region, descriptor, imm=7)
    await aio.wait(engine.imm_counter(8), 1)
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Iterable
from concurrent.futures import Future
from typing import Any

from pplx_jax.engine import TransferEngine
from pplx_jax.engine_handles import (
    GroupRegions,
    Pages,
    PoolMessage,
    ReceivePool,
    RemotePool,
    Transfer,
)
from pplx_jax.engine_types import (
    Address,
    GroupEntry,
    ImmCounter,
    PeerGroup,
    Region,
    RegionDescriptor,
    RemoteRegion,
    ScatterEntry,
    integer,
    timeout_of,
    typed,
)
from pplx_jax.errors import TimeoutError as PplxTimeoutError

__all__ = ["AsyncEngine"]


async def _settled(transfer: Future[None]) -> None:
    """Wait for a future; a cancellation is passed on to it, and goes on when it is over."""
    inner = asyncio.wrap_future(transfer)
    cancelled: asyncio.CancelledError | None = None
    while not inner.done():
        try:
            await asyncio.wait([inner])
        except asyncio.CancelledError as error:
            cancelled = error
            transfer.cancel()
    if cancelled is not None:
        if not inner.cancelled():
            inner.exception()  # it has been looked at: the cancellation says more
        raise cancelled
    inner.result()


class AsyncEngine:
    """A :class:`TransferEngine` whose operations are awaited.

    Args:
        engine: the engine, which stays the caller's to close.

    Arguments, units and errors are those of the engine's methods of the same names. Any number of tasks, and
    threads with the engine itself, may use it at a time.
    """

    def __init__(self, engine: TransferEngine) -> None:
        typed("engine", engine, TransferEngine, "a TransferEngine")
        self.engine = engine

    async def write(
        self,
        region: Region,
        remote: RegionDescriptor | RemoteRegion,
        length: int | None = None,
        src_offset: int = 0,
        dst_offset: int = 0,
        imm: int | None = None,
    ) -> None:
        """Write bytes of a region into a peer's region; see :meth:`TransferEngine.write`."""
        await _settled(self.engine.write(region, remote, length, src_offset, dst_offset, imm))

    async def read(
        self,
        region: Region,
        remote: RegionDescriptor | RemoteRegion,
        length: int | None = None,
        dst_offset: int = 0,
        src_offset: int = 0,
    ) -> None:
        """Read bytes of a peer's region; see :meth:`TransferEngine.read`."""
        await _settled(self.engine.read(region, remote, length, dst_offset, src_offset))

    async def paged_write(
        self,
        region: Region,
        remote: RegionDescriptor | RemoteRegion,
        page_bytes: int,
        src_pages: Pages,
        dst_pages: Pages,
        count: int | None = None,
        imm: int | None = None,
        group: int = 0,
    ) -> None:
        """Write pages; see :meth:`TransferEngine.paged_write`."""
        await _settled(
            self.engine.paged_write(region, remote, page_bytes, src_pages, dst_pages, count, imm, group)
        )

    async def scatter(self, region: Region, entries: Iterable[ScatterEntry], imm: int | None = None) -> None:
        """Write to many peers; see :meth:`TransferEngine.scatter`. A cancellation waits for all of it."""
        await _settled(self.engine.scatter(region, entries, imm))

    async def scatter_group(
        self, region: Region, targets: GroupRegions, entries: Iterable[GroupEntry], imm: int | None = None
    ) -> None:
        """Write to members of a group; see :meth:`TransferEngine.scatter_group`. A cancellation waits for
        all."""
        await _settled(self.engine.scatter_group(region, targets, entries, imm))

    async def send(self, address: Address, payload: bytes | bytearray | memoryview) -> None:
        """Send a message; see :meth:`TransferEngine.send`."""
        await _settled(self.engine.send(address, payload))

    async def send_to_pool(
        self, pool: RemotePool, region: Region, length: int | None = None, src_offset: int = 0
    ) -> None:
        """Send into a receive pool; see :meth:`TransferEngine.send_to_pool`. A cancellation waits for its
        end."""
        await _settled(self.engine.send_to_pool(pool, region, length, src_offset))

    async def wait(self, counter: ImmCounter, n: int, timeout: float | None = None) -> None:
        """Wait until at least ``n`` immediates arrived in all; see :meth:`ImmCounter.wait`."""
        core = self.engine._core
        transfer = Transfer(core)
        core.when(counter._core, integer("n", n, 0, 2**64 - 1), transfer, transfer._id)
        await self._within(transfer, timeout, f"imm_counter({counter.imm}).wait({n})")

    async def recv(self, timeout: float | None = None) -> tuple[Address, bytes]:
        """Return the next message and who sent it; see :meth:`TransferEngine.recv`."""
        core = self.engine._core
        limit = self._limit(timeout)
        until = time.monotonic() + limit
        while True:
            transfer = Transfer(core)
            core.when_message(transfer, transfer._id)
            await self._within(transfer, limit, "recv()", until - time.monotonic())
            try:
                return self.engine.recv(timeout=0)
            except PplxTimeoutError:
                continue  # another task or thread was faster

    async def recv_from_pool(self, pool: ReceivePool, timeout: float | None = None) -> PoolMessage:
        """Return the next message of a receive pool; see :meth:`ReceivePool.recv`."""
        until = time.monotonic() + self._limit(timeout)
        nap = 0.0
        while True:
            try:
                return pool.recv(timeout=0)
            except PplxTimeoutError:
                if time.monotonic() >= until:
                    raise
            await asyncio.sleep(nap)
            nap = min(nap + 0.0002, 0.002)

    async def barrier(self, group: PeerGroup, timeout: float | None = None) -> None:
        """Enter a group's barrier, on a thread; see :meth:`TransferEngine.barrier`.

        A cancellation leaves the barrier entered.
        """
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, functools.partial(self.engine.barrier, group, timeout))

    def _limit(self, timeout: float | None) -> float:
        given = timeout_of(timeout)
        return self.engine._timeout if given is None else given

    async def _within(
        self, transfer: Transfer, timeout: float | None, what: str, left: float | None = None
    ) -> None:
        limit = self._limit(timeout)
        try:
            async with asyncio.timeout(limit if left is None else max(0.0, left)):
                await _settled(transfer)
        except TimeoutError as error:
            if isinstance(error, PplxTimeoutError):
                raise
            raise PplxTimeoutError(f"{what}: not within {limit:g} s") from None

    def __repr__(self) -> str:
        return f"AsyncEngine({self.engine!r})"

    def __reduce__(self) -> Any:
        raise TypeError("an AsyncEngine cannot be pickled")
