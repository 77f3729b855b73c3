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
def generate(
    path: Annotated[Path, typer.Argument(help="Folder of a Hugging Face checkpoint.")],
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    tokens: Annotated[str | None, typer.Option(help="The prompt as tokens, such as 1,15,7.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Answer the prompt, by the checkpoint's chat template.")
    ] = False,
    mesh: Annotated[str, typer.Option(help="Axes among dp, ep and tp, such as ep=4,tp=2.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=0, help="Tokens to add.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Candidates make up this much of the probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    dtype: Annotated[str | None, typer.Option(help="Such as bfloat16; the checkpoint's by default.")] = None,
    prefill_chunk: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the prompt at a time; by default as memory allows.")
    ] = None,
    fabric: Annotated[str, typer.Option(help="auto, tcp, shm, or another fabric.")] = "auto",
    stats: Annotated[bool, typer.Option("--stats", help="Show what dispatch and combine did.")] = False,
    coordinator: Annotated[
        str | None, typer.Option(help="host:port of process 0, without a launcher.")
    ] = None,
    num_processes: Annotated[int | None, typer.Option(min=1, help="With --coordinator.")] = None,
    process_id: Annotated[int | None, typer.Option(min=0, help="With --coordinator.")] = None,
) -> None:
    """Continue a text with a model whose experts lie on several devices, hosts or processes.

    Under SLURM or Open MPI, or with --coordinator, processes join each other. Otherwise it runs on this
    host's devices; on CPU it starts a process for each device of the mesh.
    """
    from pplx_jax import generate_command as implementation

    if (prompt is None) == (tokens is None):
        raise typer.BadParameter("give either --prompt or --tokens")
    if chat and prompt is None:
        raise typer.BadParameter("--chat needs --prompt")
    job = None
    if coordinator is not None:
        if num_processes is None or process_id is None:
            raise typer.BadParameter("--coordinator needs --num-processes and --process-id")
        job = implementation.Job(coordinator, num_processes, process_id)
    try:
        numbers = None if tokens is None else implementation.parse_tokens(tokens)
        axes = implementation.parse_mesh(mesh)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    options = implementation.Options(
        path=str(path),
        prompt=prompt,
        tokens=numbers,
        chat=chat,
        mesh=axes,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        prefill_chunk=prefill_chunk,
        dtype=dtype,
        fabric=fabric,
        stats=stats,
    )
    try:
        status = implementation.run(options, job)
    except RuntimeError as error:
        typer.echo(f"generate: {error}", err=True)
        status = 1
    except BaseException:
        implementation.leave(1)
        raise
    implementation.leave(status)
    raise typer.Exit(status)


@app.command()
def plan(
    config: Annotated[str, typer.Argument(help="Such as kimi-k2, or the path of a config.json.")],
    hosts: Annotated[int, typer.Option(min=1, help="Hosts.")] = 1,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of a host.")] = 8,
    memory: Annotated[float, typer.Option(help="GB of a GPU.")] = 141.0,
    tp: Annotated[int, typer.Option(min=1, help="GPUs that share attention and every expert.")] = 1,
    dp: Annotated[int, typer.Option(min=1, help="Copies of the whole.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Sequences that a rank decodes at a time.")] = 128,
    context: Annotated[int, typer.Option(min=1, help="Cached tokens of a sequence.")] = 4096,
    weights: Annotated[
        str | None, typer.Option(help="float8 or bfloat16; the checkpoint's by default.")
    ] = None,
    dispatch: Annotated[str, typer.Option(help="float8 or bfloat16: what tokens travel in.")] = "float8",
    network: Annotated[float, typer.Option(help="Gbit/s of the network for each GPU.")] = 400.0,
    nvlink: Annotated[float, typer.Option(help="GB/s from a GPU to others of its host.")] = 450.0,
    hbm: Annotated[float, typer.Option(help="GB/s of a GPU's memory.")] = 4800.0,
    tflops: Annotated[float, typer.Option(help="TFLOP/s of a GPU in bfloat16.")] = 989.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Show how a model lies on hosts, what memory it takes, and what bounds decoding; nothing is measured."""
    from pplx_jax import plan as implementation

    if dispatch not in ("float8", "bfloat16"):
        raise typer.BadParameter(f"dispatch must be float8 or bfloat16, got {dispatch!r}")
    try:
        cluster = implementation.Cluster(
            hosts=hosts,
            gpus=gpus,
            memory=memory,
            tp=tp,
            dp=dp,
            batch=batch,
            context=context,
            quant=dispatch == "float8",
            hbm=hbm,
            nvlink=nvlink,
            network=network,
            tflops=tflops,
        )
        implementation.run(config, cluster, weights=weights, json_output=as_json)
    except ValueError as error:
        typer.echo(f"plan: {error}", err=True)
        raise typer.Exit(1) from error


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
