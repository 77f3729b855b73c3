"""Which NICs a device's engine opens: those that are asked for, else those nearest to it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from pplx_jax import environment
from pplx_jax.errors import FabricError
from pplx_jax.topology import Device, Topology, discover, normal_pci

MAX_NICS = 8  # kMaxNics of the engine
_AMAZON = 0x1D0F
_RDMA = ("verbs", "efa", "efa-direct")
_SYSFS = Path("/sys/class/infiniband")


@dataclasses.dataclass(frozen=True)
class Chosen:
    """``names`` as ``EngineConfig.nic`` takes them, "" for the first that fits; ``why`` is for people."""

    names: tuple[str, ...]
    why: str


def check(nics: Sequence[str] | None) -> tuple[str, ...] | None:
    """``nics=`` of a group.

    Raises:
      TypeError, ValueError: it is no list of 1 to 8 distinct names.
    """
    if nics is None:
        return None
    if isinstance(nics, str) or not all(isinstance(name, str) for name in nics):
        raise TypeError(f"nics must be a list of names, got {nics!r}")
    names = tuple(nics)
    if not 1 <= len(names) <= MAX_NICS or len(set(names)) != len(names) or "" in names:
        raise ValueError(f"nics must be 1 to {MAX_NICS} distinct names, got {nics!r}")
    return names


def usable(fabric: str, nic: Device) -> bool:
    """Whether a fabric can use this RDMA device: it is of the right kind, and a port of it is up."""
    if not nic.name or (nic.vendor == _AMAZON) != (fabric != "verbs"):
        return False
    states = list(_SYSFS.glob(f"{nic.name}/ports/*/state"))
    return not states or any("ACTIVE" in state.read_text() for state in states)


def choose(
    fabric: str,
    number: int,
    *,
    wanted: tuple[str, ...] | None = None,
    pci: str | None = None,
    topology: Topology | None = None,
) -> Chosen:
    """The NICs of one device.

    Args:
      fabric: the fabric's name.
      number: of the device among those that share out NICs where nothing else tells them apart.
      wanted: what the caller asks for; before it comes nothing.
      pci: bus id of the device if it is a GPU; None for CPUs.
      topology: this machine; None looks.
    """
    if wanted is not None:
        return Chosen(wanted, "nics=")
    if named := environment.nics():
        return Chosen((named[number % len(named)],), "PPLX_NICS")
    if fabric not in _RDMA:
        return Chosen(("",), f"fabric {fabric} has no NICs to choose from")
    try:
        seen = topology or discover()
    except FabricError as error:
        return Chosen(("",), f"the first that fits, as nothing is known of nearness: {error}")
    if pci is not None:
        return _of_gpu(fabric, seen, pci)
    return _of_cpu(fabric, seen, number)


def _of_gpu(fabric: str, seen: Topology, pci: str) -> Chosen:
    gpu = seen.gpu(pci)
    if gpu is None:
        return Chosen(("",), f"the first that fits: {seen.source} shows no GPU {normal_pci(pci)}")
    placement = seen.placements[gpu]
    names = tuple(seen.nics[nic].name for nic in placement.nics if usable(fabric, seen.nics[nic]))
    if not names:
        return Chosen(
            ("",), f"the first that fits: none near GPU {seen.gpus[gpu].pci} is for {fabric}, and up"
        )
    shared = ", shared with other GPUs" if placement.shared else ""
    return Chosen(names[:MAX_NICS], f"nearest to GPU {seen.gpus[gpu].pci} ({placement.distance}{shared})")


def _of_cpu(fabric: str, seen: Topology, number: int) -> Chosen:
    """One of those nearest to the cores that this process may use."""
    cores = os.sched_getaffinity(0)
    near = {nic: len(cores.intersection(nic.cpus)) for nic in seen.nics if usable(fabric, nic)}
    if not near:
        return Chosen(("",), f"the first that fits: {seen.source} shows none for {fabric} that is up")
    nearest = [nic for nic, common in near.items() if common == max(near.values())]
    return Chosen((nearest[number % len(nearest)].name,), "nearest to this process's cores")
