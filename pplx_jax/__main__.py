"""The command line: ``python -m pplx_jax`` or ``pplx-jax``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

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
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Show versions, fabrics, networks, devices and limits, and what to do about every problem.

    Exit code: 0 where nothing is an error (there may be warnings), 1 where ranks could not work here.
    """
    from pplx_jax import doctor as implementation

    report = implementation.examine()
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        implementation.show(report, Console())
    raise typer.Exit(implementation.exit_code(report))


def main() -> None:
    """Run the command line."""
    app(prog_name="pplx-jax" if Path(sys.argv[0]).name == "pplx-jax" else "python -m pplx_jax")


if __name__ == "__main__":
    main()
