"""The command line: ``python -m pplx_jax`` or ``pplx-jax``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    name="pplx-jax",
    help="Expert parallelism for JAX over a portable RDMA engine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


@app.command()
def demo(
    processes: Annotated[int, typer.Option(min=1, max=64, help="Processes; each is a rank.")] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 180,
    out: Annotated[Path, typer.Option(help="Folder for the curves and the sample.")] = Path("demo_out"),
    fabric: Annotated[str, typer.Option(help="auto, tcp, shm, or another fabric.")] = "auto",
) -> None:
    """Train a small MoE transformer whose experts live in several processes."""
    from pplx_jax import demo as implementation

    ok = implementation.run(processes=processes, steps=steps, out=out, fabric=fabric)
    raise typer.Exit(0 if ok else 1)


@app.command()
def doctor() -> None:
    """Show versions, and which fabrics work here and why others do not."""
    console = Console()
    versions = Table("package", "version", title="Versions")
    versions.add_row("Python", f"{platform.python_version()} ({platform.machine()})")
    for package in ("pplx-jax", "jax", "jaxlib", "flax", "numpy"):
        try:
            versions.add_row(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            versions.add_row(package, "[red]missing[/red]")
    console.print(versions)

    usable = 0
    fabrics = Table("fabric", "state", title="Fabrics")
    for name in ("local", "sim", "tcp", "shm", "efa"):
        state, works = _probe(name)
        usable += works
        fabrics.add_row(name, f"[green]{state}[/green]" if works else f"[yellow]{state}[/yellow]")
    console.print(fabrics)

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limit = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft / 2**20:g} MiB"
    console.print(f"Cores: {len(os.sched_getaffinity(0))}. Locked memory (memlock): {limit}.")
    if soft != resource.RLIM_INFINITY and soft < 2**30:
        console.print(
            "  NICs pin what is registered with them: raise it (ulimit -l unlimited) where one is used; "
            "tcp and shm do not need that."
        )
    raise typer.Exit(0 if usable >= 2 else 1)


def _probe(fabric: str) -> tuple[str, bool]:
    """Open an engine and write through it to itself."""
    import numpy as np

    from pplx_jax.engine import TransferEngine
    from pplx_jax.errors import PplxError

    try:
        with TransferEngine(fabric, timeout=5.0) as engine:
            region = engine.empty(16, np.uint8)
            region.array[:8] = range(8)
            engine.write(region, region.descriptor, length=8, dst_offset=8, imm=1).result(5.0)
            engine.imm_counter(1).wait(1)
            if region.array[8:].tolist() != list(range(8)):
                return f"{engine.fabric_name}: wrong data arrived", False
            return f"{engine.fabric_name}: works", True
    except (PplxError, ValueError) as error:
        return str(error), False


def main() -> None:
    """Run the command line."""
    app(prog_name="pplx-jax" if Path(sys.argv[0]).name == "pplx-jax" else "python -m pplx_jax")


if __name__ == "__main__":
    main()
