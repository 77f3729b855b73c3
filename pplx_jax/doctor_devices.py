"""The doctor's part on GPUs and NICs: what is near what, and whether they reach each other's memory."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pplx_jax import environment, topology
from pplx_jax.errors import PplxError
from pplx_jax.nics import choose, usable

Found = Callable[[Literal["error", "warning"], str, str], None]
"""Takes a problem: severity, what it is, what to do."""


def examine_topology(found: Found, *, devices: bool) -> dict[str, Any]:
    """GPUs, NICs, who uses which; ``devices``: whether this machine has any, so that not knowing matters."""
    try:
        seen = topology.discover()
    except ValueError as error:  # told already, with the other variables
        return {"error": str(error)}
    except PplxError as error:
        if devices:
            found(
                "warning",
                f"which NICs and cores are near a GPU is unknown: {str(error).splitlines()[0]}",
                "apt-get install libhwloc15, or name an hwloc XML file with PPLX_TOPOLOGY",
            )
        return {"error": str(error)}
    for gpu, placement in zip(seen.gpus, seen.placements, strict=True):
        if placement.distance == "SYS":
            found(
                "warning",
                f"GPU {gpu.pci} has no NIC on its NUMA node: its messages cross the processors",
                "run ranks on GPUs that have one (PPLX_NICS chooses NICs), or ask for another machine type",
            )
    fabric = "efa" if any(usable("efa", nic) for nic in seen.nics) else "verbs"
    opens = []
    with contextlib.suppress(ValueError):  # PPLX_NICS, told already
        opens = [choose(fabric, i, pci=gpu.pci, topology=seen) for i, gpu in enumerate(seen.gpus)]
    return {**dataclasses.asdict(seen), "opens": [dataclasses.asdict(one) for one in opens]}


def examine_gpudirect(
    report: dict[str, Any], found: Found, root: Path = Path("/"), load: Callable[[str], Any] = ctypes.CDLL
) -> dict[str, Any]:
    """Whether NICs can read and write GPU memory (dma-buf or nvidia_peermem), and GDRCopy."""
    module = next(
        (name for name in ("nvidia_peermem", "nv_peer_mem") if (root / "sys/module" / name).is_dir()), None
    )
    attributes = topology.cuda_attributes()
    dma_buf = all(one.get("dma_buf") for one in attributes) if attributes else None
    gdrcopy: dict[str, Any] = {"device": (root / "dev/gdrdrv").exists()}
    gdrcopy["module"] = _text(root / "sys/module/gdrdrv/version") or gdrcopy["device"]
    gdrcopy["library"] = False
    wanted = _wanted_gdrcopy()
    gdrcopy["off"] = wanted == "off"
    for name in () if gdrcopy["off"] else (wanted,) if wanted else ("libgdrapi.so.2", "libgdrapi.so"):
        with contextlib.suppress(OSError):
            load(name)
            gdrcopy["library"] = True
            break
    if report["gpus"] and report["rdma_devices"]:
        if module is None and not dma_buf:
            found(
                "warning",
                "NICs cannot reach GPU memory, with neither nvidia_peermem nor dma-buf: messages go through "
                "host memory",
                "modprobe nvidia_peermem, or install NVIDIA's open kernel modules, whose dma-buf needs Linux "
                "5.12",
            )
        if not (gdrcopy["off"] or (gdrcopy["device"] and gdrcopy["library"])):
            found(
                "warning",
                "GDRCopy is not there: the host tells GPUs through pinned memory, about a microsecond slower",
                "install gdrcopy (its module gdrdrv and libgdrapi.so.2)",
            )
    return {"peermem": module, "dma_buf": dma_buf, "cuda": attributes, "gdrcopy": gdrcopy}


def _wanted_gdrcopy() -> str | None:
    """PPLX_GDRCOPY; a value that makes no sense is told with the other variables."""
    with contextlib.suppress(ValueError):
        return environment.gdrcopy()
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def ranges(numbers: list[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2,5``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(f"{low}" if low == high else f"{low}-{high}" for low, high in parts)


def show_topology(report: dict[str, Any], console: Console) -> None:
    """A row a GPU, and what nobody uses."""
    seen = report["topology"]
    if "error" in seen:
        console.print(f"Topology: {escape(seen['error'].splitlines()[0])}")
    elif not seen["gpus"] and not seen["nics"]:
        console.print(
            f"Topology ({escape(seen['source'])}): {seen['num_cores']} cores, no GPU, no RDMA device."
        )
    else:
        title = f"Topology ({escape(seen['source'])}, {seen['num_cores']} cores)"
        table = Table("GPU", "NUMA", "NICs", "distance", "worker cores", title=title)
        names = [nic["name"] or nic["pci"] for nic in seen["nics"]]
        for gpu, placement in zip(seen["gpus"], seen["placements"], strict=True):
            nics = ", ".join(names[nic] for nic in placement["nics"])
            table.add_row(
                gpu["pci"],
                "" if gpu["numa_node"] is None else str(gpu["numa_node"]),
                escape(nics) or "none",
                placement["distance"] + (" (shared)" if placement["shared"] else ""),
                ranges(list(placement["cores"])),
            )
        if seen["gpus"]:
            console.print(table)
        used = {nic for placement in seen["placements"] for nic in placement["nics"]}
        free = [name for index, name in enumerate(names) if index not in used]
        if free:
            console.print(f"NICs that no GPU uses: {escape(', '.join(free))}.")
        for gpu, opened in zip(seen["gpus"], seen["opens"], strict=False):
            chosen = ", ".join(opened["names"]) or "the first that fits"
            console.print(f"A group on GPU {gpu['pci']} opens {escape(chosen)}: {escape(opened['why'])}.")
    direct = report["gpudirect"]
    dma_buf = {True: "yes", False: "no", None: "unknown"}[direct["dma_buf"]]
    copy = direct["gdrcopy"]
    state = "off" if copy["off"] else "yes" if copy["device"] and copy["library"] else "no"
    console.print(
        f"GPUDirect RDMA: dma-buf {dma_buf}, peermem {direct['peermem'] or 'no'}. GDRCopy: {state}."
    )
