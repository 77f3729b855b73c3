"""Arguments of :class:`pplx_jax.TransferEngine` that need more than a look."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pplx_jax.engine_types import Nic, Region, typed


def nic_list(nics: Sequence[Nic | str] | None, bind_address: str) -> list[tuple[str, str]]:
    """``nics=`` as the C++ side has it: a name and an address each."""
    if nics is None:
        return []
    typed("nics", nics, Sequence, "a list")
    if isinstance(nics, str) or not 1 <= len(nics) <= 8:
        raise ValueError(f"nics: must be a list of 1 to 8, is {nics!r}")
    chosen = []
    for index, nic in enumerate(nics):
        one = Nic(nic) if isinstance(nic, str) else nic
        typed(f"nics[{index}]", one, Nic, "a Nic or a name")
        chosen.append((one.name, one.bind_address or bind_address))
    return chosen


def as_array(array: Any) -> tuple[npt.NDArray[Any], bool]:
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
