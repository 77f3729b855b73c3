"""Groups on NVIDIA GPUs: the extension that holds their kernels, and which ranks reach which over NVLink."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import jax

from pplx_jax import environment, plugins, topology
from pplx_jax.engine_types import library_folders
from pplx_jax.errors import FabricError

if TYPE_CHECKING:
    from pplx_jax import _core, _cuda

#: Multiprocessors that a kernel takes unless ``num_sms`` says otherwise; others are for what runs beside it.
DEFAULT_SMS = 64
#: What to do where kernels are missing.
GET_KERNELS = (
    "make an editable install from a clone (`pip install -e .`) with nvcc on PATH or in CUDACXX, or build "
    "and install the plugin pplx-jax-cuda13 (or -cuda12, whichever CUDA your jax has; docs/wheels.md); a "
    "regular `pip install .` has no kernels"
)


@functools.cache
def extension() -> Any | None:
    """The module with CUDA kernels: a plugin's, else the one that was built beside ``_core``, else None."""
    for plugin in plugins.discover():
        if plugin.problem is None and plugin.platform == "CUDA" and plugin.extension:
            return importlib.import_module(plugin.extension)
    try:
        return importlib.import_module("pplx_jax._cuda")
    except ImportError:
        return None


def is_gpu(device: jax.Device) -> bool:
    """Whether a group that has this device needs kernels."""
    return device.platform in ("gpu", "cuda")


def require() -> Any:
    """The extension, for a group whose devices are GPUs."""
    found = extension()
    if found is None:
        problems = [f"{plugin.name}: {plugin.problem}" for plugin in plugins.discover() if plugin.problem]
        raise FabricError(
            f"JAX runs on GPUs here, but pplx_jax has no CUDA kernels: {GET_KERNELS}"
            + "".join(f"; plugin {problem}" for problem in problems)
        )
    found.set_library_search_path(library_folders())
    return found


@functools.cache
def _bus_ids() -> dict[int, str]:
    return {one["device"]: one.get("pci", "") for one in topology.cuda_attributes()}


def pci(device: jax.Device) -> str:
    """Its PCI bus id, as :mod:`pplx_jax.topology` spells it; empty where the driver does not say."""
    return _bus_ids().get(ordinal(device), "")


def ordinal(device: jax.Device) -> int:
    """The number of a local GPU among those that this process sees, as CUDA and XLA count them."""
    return int(cast("int", device.local_hardware_id))


@dataclasses.dataclass(frozen=True)
class Options:
    """What ``ExpertParallel`` was told about GPUs; equal on all ranks of a group."""

    nvlink: bool = True
    node_size: int | None = None
    num_sms: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.nvlink, bool):
            raise TypeError(f"nvlink must be True or False, got {self.nvlink!r}")
        for name in ("node_size", "num_sms"):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int or None, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def sms(self, most: int) -> int:
        """Blocks of a kernel, where the least able of the group's devices runs ``most`` at a time."""
        if self.num_sms is None:
            return min(DEFAULT_SMS, most)
        if self.num_sms > most:
            raise ValueError(
                f"num_sms={self.num_sms}, but a GPU of the group runs at most {most} of these kernels' "
                "blocks at a time: lower it"
            )
        return self.num_sms


@dataclasses.dataclass(frozen=True)
class Topology:
    """Where the ranks of one slice are: ``hosts`` and ``processes`` by rank."""

    hosts: tuple[str, ...]
    processes: tuple[int, ...]
    options: Options

    @classmethod
    def of(cls, devices: Sequence[jax.Device], hosts: Mapping[int, str], options: Options) -> Topology:
        """Of a slice's devices in rank order; ``hosts`` by process."""
        processes = tuple(device.process_index for device in devices)
        return cls(tuple(hosts[process] for process in processes), processes, options)

    def nvlink(self, a: int, b: int) -> bool:
        """Whether kernels of rank ``a`` write into ``b``'s memory themselves, and the other way round."""
        if a == b:
            return True
        node = self.options.node_size or len(self.hosts)
        return self.options.nvlink and self.hosts[a] == self.hosts[b] and a // node == b // node

    def arguments(self, rank: int, most_sms: int) -> dict[str, Any]:
        """What the extension's ``Member`` is told."""
        ranks = range(len(self.hosts))
        reached = [self.nvlink(rank, other) for other in ranks]
        return {
            "nvlink": reached,
            "proxies": not all(self.nvlink(a, b) for a in ranks for b in ranks),
            "shares": any(
                reached[other] and self.processes[other] != self.processes[rank] for other in ranks
            ),
            "num_sms": self.options.sms(most_sms),
        }


def open_member(
    group: int, device: jax.Device, shape: _core.MoeShape, config: _core.GroupConfig, **arguments: Any
) -> _cuda.Member:
    """One GPU's membership in a group."""
    found = require()
    regions = environment.gpu_regions()
    return cast(
        "_cuda.Member", found.Member(group, ordinal(device), shape, config, **arguments, regions=regions)
    )
