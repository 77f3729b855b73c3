"""What operations of a :class:`pplx_jax.TransferEngine` take and hand out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from pplx_jax import _core
from pplx_jax.engine_types import (
    Address,
    PoolDescriptor,
    Region,
    RegionDescriptor,
    RemoteRegion,
    integer,
    timeout_of,
)


class Transfer(Future[None]):
    """A one-sided operation under way: a ``concurrent.futures.Future`` that is done when it is over.

    It raises the typed error of a failure.
    """

    def __init__(self, engine: _core.Engine) -> None:
        super().__init__()
        self._engine = engine
        self._id = engine.new_id()
        self.set_running_or_notify_cancel()

    def cancel(self) -> bool:
        """Take back what the NIC does not have yet.

        Returns:
            True if something was taken back: the future raises :class:`CancelledError` as soon as the parts
            that had begun are over. False if all had begun: it ends as usual. Either way memory may be
            reused only when the future is done.
        """
        return not self.done() and self._engine.cancel(self._id) > 0


@dataclasses.dataclass(frozen=True)
class Pages:
    """Pages of a region, in bytes: page i begins at ``offset + indices[i] * stride``.

    Attributes:
        indices: page numbers, in order; None for 0, 1, 2, ...
        offset: where page 0 begins.
        stride: from one page to the next; 0 for the length of a page.
    """

    indices: Sequence[int] | npt.NDArray[np.integer[Any]] | None = None
    offset: int = 0
    stride: int = 0

    def _checked(self, name: str) -> tuple[int, int, list[int] | None]:
        indices = None
        if self.indices is not None:
            numbers = np.asarray(self.indices)
            if numbers.size and (numbers.dtype.kind not in "iu" or numbers.ndim != 1):
                raise TypeError(f"{name}.indices: must be a list of integers")
            if numbers.size and int(numbers.min()) < 0:
                raise ValueError(f"{name}.indices: must not be negative, has {int(numbers.min())}")
            indices = [int(number) for number in numbers]
        return (
            integer(f"{name}.offset", self.offset, 0, 2**63),
            integer(f"{name}.stride", self.stride, 0, 2**63),
            indices,
        )


class GroupRegions:
    """A region of each member of a group, resolved once by :meth:`TransferEngine.open_group`."""

    def __init__(self, core: _core.GroupRegions, sizes: Sequence[int], engine: object) -> None:
        self._core = core
        self._sizes = tuple(sizes)
        self._engine = engine

    def __len__(self) -> int:
        return len(self._sizes)


@dataclasses.dataclass(frozen=True)
class PreparedWrite:
    """A write that a :class:`WatchWord` posts; see :meth:`TransferEngine.write`."""

    region: Region
    remote: RegionDescriptor | RemoteRegion
    length: int
    src_offset: int = 0
    dst_offset: int = 0
    imm: int | None = None


class WatchWord:
    """A 64-bit word that somebody increments, a CPU or a GPU, and that the engine watches until
    :meth:`close`.

    A writer finishes all data first and then increments the word with release semantics, a GPU at system
    scope.
    """

    def __init__(self, core: _core.WatchWord) -> None:
        self._core = core

    @property
    def address(self) -> int:
        """Where the word lies."""
        return self._core.address

    @property
    def value(self) -> int:
        """The word now."""
        return self._core.value

    @property
    def seen(self) -> int:
        """The value that the engine has acted on."""
        return self._core.seen

    @property
    def posted(self) -> int:
        """Prepared writes posted so far; their sources are free when this equals :attr:`completed`."""
        return self._core.posted

    @property
    def completed(self) -> int:
        """Prepared writes that are over, well or not."""
        return self._core.completed

    def increment(self, by: int = 1) -> None:
        """Add to the word, with release semantics."""
        self._core.increment(integer("by", by, 0, 2**20))

    def check(self) -> None:
        """Raise the first error of a prepared write, or of the word itself."""
        self._core.check()

    def close(self) -> None:
        """Watch the word no more."""
        self._core.close()


class RemotePool:
    """A peer's receive pool, resolved by :meth:`TransferEngine.open_pool`."""

    def __init__(self, core: _core.RemotePool, engine: object) -> None:
        self._core = core
        self._engine = engine

    @property
    def buffer_bytes(self) -> int:
        """The longest message."""
        return self._core.buffer_bytes


class PoolMessage:
    """A message in a buffer of a :class:`ReceivePool`, the reader's until :meth:`release`.

    A context manager, which releases.
    """

    def __init__(self, pool: ReceivePool, sender: Address, buffer: int, nbytes: int) -> None:
        self._pool: ReceivePool | None = pool
        self._buffer = buffer
        self.sender = sender
        self.nbytes = nbytes

    @property
    def array(self) -> npt.NDArray[np.uint8]:
        """The bytes, in place."""
        if self._pool is None:
            raise ValueError("PoolMessage.array: the buffer was released")
        return self._pool._bytes(self._buffer, self.nbytes)

    def release(self) -> None:
        """Give the buffer back. Idempotent; arrays of it must not be read after this."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool._core.release(self._buffer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


class ReceivePool:
    """Buffers that peers' messages go into, made by :meth:`TransferEngine.receive_pool`.

    A message that finds no free buffer waits at its sender. When more than ``max_waiting`` wait, the next is
    refused, and its sender gets a ``FabricError``. A sender that gives up returns its buffer. One that dies
    with it, or whose write fails, costs that buffer after twice the engine's timeout (:attr:`lost`): it might
    still be written. When all are lost senders are refused, and a new pool is needed.
    """

    def __init__(self, core: _core.ReceivePool, buffer_bytes: int) -> None:
        self._core = core
        self._region = core.region
        self._memory = self._region.view()
        self.buffer_bytes = buffer_bytes

    @property
    def descriptor(self) -> PoolDescriptor:
        """What a sender needs."""
        return PoolDescriptor(self._core.descriptor)

    @property
    def buffers(self) -> int:
        """The number of buffers."""
        return self._core.buffers

    @property
    def free(self) -> int:
        """Buffers that nobody has."""
        return self._core.free_buffers

    @property
    def waiting(self) -> int:
        """Messages that wait for a buffer, at their senders."""
        return self._core.waiting

    @property
    def lost(self) -> int:
        """Buffers that are used no more, as those who were to fill them have fallen silent."""
        return self._core.lost

    def recv(self, timeout: float | None = None) -> PoolMessage:
        """Return the next message.

        Raises:
            TimeoutError: none came within ``timeout`` seconds.
            FabricError: all buffers are lost, so that none can come.
            GroupClosedError: the engine was closed.
        """
        sender, buffer, nbytes = self._core.recv(timeout_of(timeout))
        return PoolMessage(self, Address(sender), buffer, nbytes)

    def _bytes(self, buffer: int, nbytes: int) -> npt.NDArray[np.uint8]:
        start = buffer * self.buffer_bytes
        return self._memory[start : start + nbytes]
