"""Memory of a :class:`pplx_jax.TransferEngine`, and the one-sided operations on it: what it is built on."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import numpy.typing as npt

from pplx_jax import _core
from pplx_jax.engine_arguments import as_array
from pplx_jax.engine_handles import GroupRegions, Pages, PreparedWrite, Transfer, WatchWord
from pplx_jax.engine_types import (
    MAX_USER_IMMEDIATE,
    GroupEntry,
    ImmCounter,
    PeerGroup,
    Region,
    RegionDescriptor,
    RemoteRegion,
    ScatterEntry,
    checked_immediate,
    integer,
    typed,
)

_OPEN_CACHE = 1024


class OneSided:
    """What :class:`TransferEngine` does with regions, its own and its peers'.

    Not for use by itself: it neither makes nor closes the core.
    """

    def __init__(self, core: _core.Engine) -> None:
        self._core = core
        self._lock = threading.Lock()  # guards _opened and _forgotten
        self._opened: dict[RegionDescriptor, RemoteRegion] = {}
        self._forgotten = 0  # how many times _opened was cleared

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
        future = running_future()
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
        future = running_future()
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

    def _forget_opened(self) -> None:
        with self._lock:
            self._opened.clear()
            self._forgotten += 1


def running_future() -> Future[None]:
    """Return a future for the core to complete."""
    future: Future[None] = Future()
    future.set_running_or_notify_cancel()  # the NIC cannot take a write back
    return future
