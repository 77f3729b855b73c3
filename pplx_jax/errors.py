"""Typed errors. Inside ``jit`` they arrive as ``jax.errors.JaxRuntimeError`` whose text names the type;
``ExpertParallel.check()``, ``with ExpertParallel(...)`` and the ``TransferEngine`` raise them as they are."""

from __future__ import annotations

import builtins
import concurrent.futures


class PplxError(Exception):
    """Base of everything this package raises besides ``ValueError`` and ``TypeError`` for bad arguments.

    Attributes:
      rank: the rank of the group that is held responsible, as ``ExpertParallel.check()`` knows it; None
        where nobody is, or on GPUs.
    """

    rank: int | None = None


class FabricError(PplxError):
    """A library, provider or NIC is missing or refused an operation; or a forked child uses what its parent
    made."""


class PeerError(PplxError):
    """A peer died, fell silent, aborted or broke the protocol. The group is finished: close and reopen it."""


class TimeoutError(PplxError, builtins.TimeoutError):
    """A deadline passed; the text says who was waited for, at which exchange."""


class GroupClosedError(PplxError):
    """The group or engine is closed. An equal ``ExpertParallel`` revives compiled programs."""


class MismatchError(PplxError):
    """Two ranks reached different exchanges, or were configured differently. The text names both."""


class CancelledError(PplxError, concurrent.futures.CancelledError):
    """An operation was taken back by its caller before all of it had begun."""


class RoutingError(PplxError):
    """The data is wrong: an expert id out of range, a duplicate, more rows than ``rows=``. The group stays
    usable after ``check()``."""


_BY_NAME: dict[str, type[Exception]] = {
    "ValueError": ValueError,
    **{
        cls.__name__: cls
        for cls in (
            FabricError,
            PeerError,
            TimeoutError,
            GroupClosedError,
            MismatchError,
            RoutingError,
            CancelledError,
        )
    },
}


def make_error(name: str, text: str, rank: int | None = None) -> Exception:
    """The exception for an error kind's name, as the C++ side reports it."""
    error = _BY_NAME.get(name, FabricError)(text)
    if isinstance(error, PplxError):
        error.rank = rank
    return error
