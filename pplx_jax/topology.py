"""What is near what on this machine: GPUs, RDMA devices (NICs), cores and the PCIe bridges between them.

hwloc finds it, which is loaded at run time; without it everything works, and nothing is known to be near
anything. ``PPLX_TOPOLOGY`` names an hwloc XML file to read instead of the machine. Which NICs and cores a GPU
uses: `proxy/topology/placement.h`.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
from typing import Any

from pplx_jax import _core, environment

__all__ = ["Device", "Placement", "Topology", "cuda_attributes", "discover"]

# <cuda.h>, CUdevice_attribute
_CUDA_ATTRIBUTES = {
    "gpudirect_rdma": 116,
    "gpudirect_flush": 117,
    "gpudirect_writes_ordering": 118,
    "dma_buf": 124,
}


@dataclasses.dataclass(frozen=True)
class Device:
    """A GPU or a NIC.

    ``pci`` is its bus id (``"0000:3b:00.0"``); ``name`` an RDMA device's (``"mlx5_0"``), ``interface`` that
    of the network interface on it; both empty where there is none. ``numa_node`` is None where it is unknown,
    or several; ``cpus`` are the nearest hardware threads.
    """

    pci: str
    name: str
    interface: str
    vendor: int
    device: int
    numa_node: int | None
    cpus: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Placement:
    """What a GPU uses.

    ``nics`` are indices into :attr:`Topology.nics`, nearest first, ``distance`` that of the farthest as
    nvidia-smi names it (``PIX``, ``PXB``, ``PHB``, ``NODE``, ``SYS``), ``shared`` whether other GPUs use them
    too. ``cores`` is its share of the nearest cores, a hardware thread each.
    """

    nics: tuple[int, ...]
    distance: str
    shared: bool
    cores: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Topology:
    """A machine. ``placements`` are by GPU; ``distances`` has a row a GPU and a column a NIC."""

    source: str
    num_cores: int
    gpus: tuple[Device, ...]
    nics: tuple[Device, ...]
    distances: tuple[tuple[str, ...], ...]
    placements: tuple[Placement, ...]

    def gpu(self, pci: str) -> int | None:
        """The index of the GPU with this bus id, in any of the usual spellings; None: there is none."""
        wanted = normal_pci(pci)
        return next((i for i, gpu in enumerate(self.gpus) if gpu.pci == wanted), None)


def normal_pci(text: str) -> str:
    """``00000000:3B:00.0`` (nvidia-smi) and ``3b:00.0`` (lspci) as ``0000:3b:00.0``."""
    domain, _, rest = text.strip().lower().rpartition(":")
    domain, _, bus = domain.rpartition(":")
    return f"{int(domain or '0', 16):04x}:{bus}:{rest}"


def discover(xml: str | None = None) -> Topology:
    """Looks at this machine, or reads an hwloc XML file: ``xml``, or else what PPLX_TOPOLOGY names.

    Raises:
      FabricError: hwloc cannot be loaded, or cannot read the file.
    """
    environment.hwloc()
    found = _core.topology(xml or environment.topology() or "")
    return Topology(
        source=found["source"],
        num_cores=len(found["cores"]),
        gpus=tuple(_device(one) for one in found["gpus"]),
        nics=tuple(_device(one) for one in found["nics"]),
        distances=tuple(tuple(row) for row in found["distances"]),
        placements=tuple(
            Placement(tuple(one["nics"]), one["distance"], one["shared"], tuple(one["cores"]))
            for one in found["placements"]
        ),
    )


def _device(one: dict[str, Any]) -> Device:
    node = one["numa_node"]
    return Device(**{**one, "numa_node": None if node < 0 else node, "cpus": tuple(one["cpus"])})


def cuda_attributes() -> list[dict[str, Any]]:
    """What the CUDA driver says of each visible GPU: ``pci``, ``dma_buf``, ``gpudirect_rdma``, ...

    Makes no context. Empty where there is no driver.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    devices = []
    for ordinal in range(count.value):
        device, value, pci = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(32)
        if cuda.cuDeviceGet(ctypes.byref(device), ordinal) != 0:
            continue
        entry: dict[str, Any] = {"device": ordinal}
        with contextlib.suppress(ValueError):
            if cuda.cuDeviceGetPCIBusId(pci, len(pci), device) == 0:
                entry["pci"] = normal_pci(pci.value.decode())
        for name, number in _CUDA_ATTRIBUTES.items():
            if cuda.cuDeviceGetAttribute(ctypes.byref(value), number, device) == 0:
                entry[name] = value.value
        devices.append(entry)
    return devices
