"""``python -m pplx_jax generate``: continue a text with a model whose experts lie on several devices.

Three ways to run it: in a job that a launcher started (SLURM, Open MPI, or ``--coordinator``), every process
joins through ``jax.distributed``; else where JAX has as many devices as the mesh, in this process; else, on
CPU, in as many processes as the mesh has devices, started here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from pplx_jax.demo import _child_environment, _free_port
from pplx_jax.demo_rank import die_with_parent
from pplx_jax.errors import FabricError, PplxError

if TYPE_CHECKING:
    import numpy as np

    from pplx_jax.models.decoder import Decoder, LayerReport
    from pplx_jax.models.loading import LoadProgress

# Seconds that the others get to end once a process has failed.
_GRACE = 5.0


@dataclasses.dataclass(frozen=True)
class Options:
    """What to do.

    Attributes:
      path: folder of the checkpoint.
      prompt: the text to continue; or None, and ``tokens`` are given.
      tokens: the prompt as tokens.
      chat: whether ``prompt`` is a message to answer, by the checkpoint's chat template.
      mesh: axes and their sizes, in order; empty: one device.
      max_new_tokens, temperature, top_p, seed, prefill_chunk: see `pplx_jax.models.generate`.
      dtype: see `pplx_jax.models.from_pretrained`; None: the checkpoint's.
      fabric: see `pplx_jax.ExpertParallel`.
      stats: whether to show what the exchanges did.
    """

    path: str
    prompt: str | None = None
    tokens: tuple[int, ...] | None = None
    chat: bool = False
    mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    prefill_chunk: int | None = None
    dtype: str | None = None
    fabric: str = "auto"
    stats: bool = False


@dataclasses.dataclass(frozen=True)
class Job:
    """How this process belongs to others, for `jax.distributed.initialize`; None: it finds out itself."""

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


def parse_mesh(text: str) -> dict[str, int]:
    """ "ep=4,tp=2" as axes and sizes.

    Raises:
      ValueError: it reads otherwise.
    """
    axes: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"\s*([a-z]+)\s*=\s*([1-9][0-9]*)\s*", part)
        if match is None or match[1] in axes:
            raise ValueError(f"mesh must read like ep=4 or dp=2,ep=4, got {text!r}")
        axes[match[1]] = int(match[2])
    return axes


def parse_tokens(text: str) -> tuple[int, ...]:
    """ "1,15,7" as numbers.

    Raises:
      ValueError: it reads otherwise.
    """
    if re.fullmatch(r"\s*[0-9]+\s*(,\s*[0-9]+\s*)*", text) is None:
        raise ValueError(f"tokens must be numbers such as 1,15,7, got {text!r}")
    return tuple(int(part) for part in text.split(","))


def launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher that ``jax.distributed`` knows started this process as one of several."""

    def several(count: str, *others: str) -> bool:
        number = environment.get(count, "")
        return number.isdecimal() and int(number) > 1 and all(name in environment for name in others)

    return (
        "JAX_COORDINATOR_ADDRESS" in environment
        or several("SLURM_NTASKS", "SLURM_JOB_ID", "SLURM_PROCID", "SLURM_STEP_NODELIST")
        or several("OMPI_COMM_WORLD_SIZE", "OMPI_MCA_orte_hnp_uri")
    )


def run(options: Options, job: Job | None = None) -> int:
    """Does it; returns the exit status.

    Args:
      options: what to do.
      job: the job that this process is of, or None: what the environment says.
    """
    if job is None and launched():
        job = Job()
    if job is None:
        needed = math.prod(options.mesh.values())
        if needed > 1 and not _has_devices(needed):
            return _spawn(options, needed)
    return _guarded(options, job)


def leave(status: int) -> None:
    """Ends this process at once if it failed as one of a job; otherwise does nothing.

    JAX's exit handlers would wait minutes for processes that don't know yet; without them the coordinator
    tells the others.
    """
    if status and "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
        # Whoever read them may be gone, or they closed: that must not keep the process.
        with contextlib.suppress(OSError, ValueError):
            if sys.exc_info()[1] is not None:
                traceback.print_exc()
            sys.stderr.flush()
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(status)


def _has_devices(needed: int) -> bool:
    """Whether JAX has as many here; raises RuntimeError where it has accelerators, but fewer."""
    import jax

    devices = jax.devices()
    if len(devices) >= needed:
        return True
    if devices[0].platform != "cpu":
        raise RuntimeError(
            f"the mesh has {needed} devices, JAX finds {len(devices)} here: make it smaller, or start "
            f"a process for each device on more hosts (docs/deploy.md)"
        )
    return False


def _guarded(options: Options, job: Job | None) -> int:
    """Runs in this process; what the user can do something about is said in a line."""
    try:
        work(options, job)
    except FabricError as error:
        print(
            f"generate: {error}; `python -m pplx_jax doctor` shows which fabrics work here",
            file=sys.stderr,
            flush=True,
        )
        return 1
    except (PplxError, ValueError, TypeError, RuntimeError, OSError) as error:
        print(f"generate: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def _spawn(options: Options, count: int) -> int:
    """One process for each device of the mesh; the first one's output is ours."""
    port = _free_port()
    children: list[subprocess.Popen[bytes]] = []
    logs: list[IO[bytes]] = []
    try:
        for rank in range(count):
            job = Job(f"127.0.0.1:{port}", count, rank)
            work = json.dumps({"options": dataclasses.asdict(options), "job": dataclasses.asdict(job)})
            logs.append(tempfile.TemporaryFile())  # noqa: SIM115 - closed below
            children.append(
                subprocess.Popen(
                    [sys.executable, "-m", "pplx_jax.generate_command", work],
                    stdin=subprocess.PIPE,
                    stdout=None if rank == 0 else subprocess.DEVNULL,
                    stderr=None if rank == 0 else logs[-1],
                    env=_child_environment(),
                )
            )
        return _wait(children, logs)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
            child.wait()
            if child.stdin is not None:
                child.stdin.close()
        for log in logs:
            log.close()


def _wait(children: list[subprocess.Popen[bytes]], logs: list[IO[bytes]]) -> int:
    deadline: float | None = None
    while any(child.poll() is None for child in children):
        if deadline is None and any(child.poll() for child in children):
            deadline = time.monotonic() + _GRACE
        if deadline is not None and time.monotonic() > deadline:
            break
        time.sleep(0.05)
    failed = [rank for rank, child in enumerate(children) if child.poll()]
    for rank in failed:
        logs[rank].seek(0)
        tail = logs[rank].read()[-4000:].decode(errors="replace").rstrip()
        status = children[rank].returncode
        if rank != 0 and 0 not in failed:
            print(f"generate: process {rank} ended with status {status}:\n{tail}", file=sys.stderr)
    return 1 if failed or deadline is not None else 0


def work(options: Options, job: Job | None) -> None:
    """Loads the model and continues the text; the first process writes it to standard output.

    Raises:
      ModelError, RuntimeError, OSError: what failed.
    """
    import jax

    if job is not None:
        if os.environ.get("JAX_PLATFORMS") == "cpu":
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            job.coordinator, num_processes=job.num_processes, process_id=job.process_id
        )
    import numpy as np
    from jax.sharding import Mesh

    from pplx_jax.models import from_pretrained
    from pplx_jax.models.generation import check_options, check_prompt
    from pplx_jax.models.loading import read_config
    from pplx_jax.models.tokenizer import TextStream, chat_tokens, load_tokenizer

    first = jax.process_index() == 0
    console = Console(stderr=True, quiet=not first, highlight=False)
    # Everything that can be wrong, before minutes of loading.
    check_options(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        prefill_chunk=options.prefill_chunk,
    )
    tokenizer = None
    if options.prompt is not None:
        tokenizer = load_tokenizer(options.path)
        if options.chat:
            prompt = chat_tokens(options.path, options.prompt)
        else:
            prompt = tokenizer.encode(options.prompt)
    else:
        prompt = list(options.tokens or ())
    config = read_config(options.path)[1]
    check_prompt(config, np.asarray([prompt], np.int64), options.max_new_tokens)
    mesh = None
    if options.mesh:
        devices = np.array(jax.devices())
        needed = math.prod(options.mesh.values())
        if needed > devices.size or (job is not None and needed != devices.size):
            raise RuntimeError(f"the mesh has {needed} devices and the job {devices.size}: make them equal")
        mesh = Mesh(devices[:needed].reshape(tuple(options.mesh.values())), tuple(options.mesh))
    elif job is not None and jax.process_count() > 1:
        raise RuntimeError(
            f"a job of {jax.process_count()} processes needs --mesh, such as ep={jax.device_count()}"
        )
    if first and tokenizer is not None and options.prompt and not options.chat:
        print(options.prompt, end="", flush=True)
    extra: dict[str, Any] = {}
    if mesh is not None:
        extra["exchange"] = {"fabric": options.fabric}
    with _LoadingBar(console) as bar:
        model = from_pretrained(options.path, mesh=mesh, dtype=options.dtype, progress=bar.update, **extra)
    stream = TextStream(tokenizer, prompt) if tokenizer is not None else None

    def show(token: int) -> None:
        if first:
            print(stream.add(token) if stream is not None else f"{token} ", end="", flush=True)

    ep = model.placement.ep
    # As a context manager, it gives an execution's error its type.
    with contextlib.nullcontext() if ep is None else ep:
        if ep is not None:
            ep.connect()  # here errors have their types
        seen = _continue(model, np.asarray([prompt], np.int64), options, show)
        if first:
            print(stream.end() if stream is not None else "", flush=True)
        console.print(seen.summary())
        if options.stats:
            console.print(*seen.tables(model))
    if job is not None:
        jax.distributed.shutdown()


class _LoadingBar:
    """Progress of loading, on the console."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("loading"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._task = self._progress.add_task("", total=None, note="")

    def __enter__(self) -> _LoadingBar:
        return self

    def update(self, seen: LoadProgress) -> None:
        # Not before there is something to load: what is wrong until then is said without a bar.
        self._progress.start()
        note = f"{_bytes(seen.bytes_read)} read, {seen.path}"
        self._progress.update(self._task, total=seen.total, completed=seen.done, note=note)

    def __exit__(self, *error: object) -> None:
        self._progress.stop()


class _Seen:
    """What a generation did."""

    def __init__(self) -> None:
        from pplx_jax.models.generation import Progress

        self.progress = Progress()
        self.steps = 0
        self.sums: list[dict[str, Any]] = []

    def add(self, reports: list[LayerReport]) -> None:
        import numpy as np

        self.steps += 1
        if not self.sums:
            self.sums = [{"loads": 0, "copies": 0, "dropped": 0, "failed": 0} for _ in reports]
        for total, report in zip(self.sums, reports, strict=True):
            total["loads"] = total["loads"] + np.asarray(report.loads).astype(np.int64)
            total["copies"] += int(report.copies)
            total["dropped"] += int(report.dropped)
            total["failed"] += 1 - int(report.ok)

    def summary(self) -> str:
        p = self.progress
        rate = (p.new_tokens - 1) / p.decode_seconds if p.new_tokens > 1 and p.decode_seconds > 0 else 0.0
        return (
            f"{p.prompt_tokens} tokens of prompt in {p.prefill_seconds:.2f} s, {p.new_tokens} new ones; "
            f"{rate:.1f} tokens/s after the first (compilation included)"
        )

    def tables(self, model: Decoder) -> list[Table]:
        ranks = model.placement.size("ep")
        row = _row_bytes(model)
        layers = Table(
            title=f"dispatch and combine, {self.steps} programs on {ranks} ranks", title_justify="left"
        )
        for name in (
            "layer",
            "choices",
            "rows sent",
            "rows saved",
            *(("dispatched", "combined") if row else ()),
            "busiest expert",
            "busiest rank",
            "dropped",
            "failed",
        ):
            layers.add_column(name, justify="right")
        moe = [layer for layer in range(model.config.num_hidden_layers) if model.config.is_moe(layer)]
        for layer, total in zip(moe, self.sums, strict=False):
            loads = total["loads"]
            choices = int(loads.sum())
            by_rank = loads.reshape(ranks, -1).sum(axis=1)
            layers.add_row(
                str(layer),
                str(choices),
                str(total["copies"]),
                f"{1 - total['copies'] / max(choices, 1):.0%}",
                *(_bytes(total["copies"] * size) for size in row),
                f"{loads.max() / max(loads.mean(), 1e-9):.1f} x mean",
                f"{by_rank.max() / max(by_rank.mean(), 1e-9):.2f} x mean",
                str(total["dropped"]),
                str(total["failed"]),
            )
        found = [layers]
        if model.placement.ep is not None:
            found.append(_peer_table(model.placement.ep.stats()))
        return found


def _row_bytes(model: Decoder) -> tuple[int, ...]:
    """Of a row that dispatch sends, and of one that combine does; nothing without a group."""
    if model.placement.ep is None:
        return ()
    config = model.placement.ep.config
    scales = config.num_scales * config.scale_dtype.itemsize if config.scale_dtype else 0
    return (
        config.hidden * config.token_dtype.itemsize + scales,
        config.hidden * config.combine_dtype.itemsize,
    )


def _peer_table(stats: dict[str, Any]) -> Table:
    waits = any("longest_wait_seconds" in peer for own in stats["ranks"] for peer in own["peers"])
    note = "waits for each peer" if waits else "no waits: on GPUs kernels wait, and nobody takes their time"
    table = Table(
        title=f"messages over {stats['fabric']}, of this process's ranks; {note}", title_justify="left"
    )
    for name in ("local rank", "peer", "exchanges", "sent", "received", "mean wait", "longest wait"):
        table.add_column(name, justify="right")
    for number, own in enumerate(stats["ranks"]):
        for peer, seen in enumerate(own["peers"]):
            table.add_row(
                str(number),
                str(peer),
                str(own["exchanges"]),
                _bytes(seen["sent_bytes"]),
                _bytes(seen["received_bytes"]),
                _microseconds(seen.get("mean_wait_seconds")),
                _microseconds(seen.get("longest_wait_seconds")),
            )
    return table


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count / 1e3:.1f} KB"


def _microseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:.0f} us"


def _continue(model: Decoder, prompt: np.ndarray[Any, Any], options: Options, show: Any) -> _Seen:
    from pplx_jax.models.generation import stream

    seen = _Seen()
    steps = stream(
        model,
        prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        stop_tokens=model.config.eos_token_ids,
        prefill_chunk=options.prefill_chunk,
        progress=seen.progress,
        report=seen.add if options.stats else None,
    )
    for token in steps:
        if int(token[0]) not in model.config.eos_token_ids:
            show(int(token[0]))
    return seen


def main(argv: list[str]) -> int:
    """A process that `run` started."""
    job = json.loads(argv[0])
    die_with_parent()
    options = job["options"]
    if options["tokens"] is not None:
        options["tokens"] = tuple(options["tokens"])
    return _guarded(Options(**options), Job(**job["job"]))


if __name__ == "__main__":
    try:
        status = main(sys.argv[1:])
    except BaseException:
        leave(1)
        raise
    leave(status)
    sys.exit(status)
