"""The demo: train a small byte-level MoE transformer whose experts live in several processes.

``run`` starts the processes, shows their progress and judges the result; ``python -m pplx_jax demo`` calls
it. Each process is one rank of a ``jax.distributed`` program on CPU: sequences and experts are sharded over
the ranks, and tokens travel between them through `pplx_jax.ExpertParallel`. The text is the Python standard
library's own sources.

Two things are judged: the validation loss must fall well below what the bytes' frequencies alone explain (the
unigram entropy), and the same first steps with the dense layer in a single process must give the same losses.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import math
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from pplx_jax.demo_rank import EVENT_MARK, DemoConfig, die_with_parent, load_corpus, unigram_entropy, work


class DemoError(Exception):
    """A process failed, or time ran out. The message holds the end of its output."""


class _Child:
    """A process of the demo: its events go to a queue, all else it prints to a log."""

    def __init__(self, config: DemoConfig, rank: int, port: int, dense: bool, log: Path) -> None:
        job = {
            "config": dataclasses.asdict(config),
            "rank": rank,
            "coordinator": f"127.0.0.1:{port}",
            "dense": dense,
        }
        self.name = "dense process" if dense else f"rank {rank}"
        self.rank = rank
        self.tail: collections.deque[str] = collections.deque(maxlen=40)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pplx_jax.demo", "--worker", json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=_child_environment(),
            text=True,
            errors="replace",
        )
        self._log = log
        self._reader: threading.Thread | None = None

    def start(self, events: queue.Queue[tuple[_Child, dict[str, Any] | None]]) -> None:
        """Starts to read the process's output; None in the queue says that it ended."""
        assert self.process.stdout is not None
        stdout = self.process.stdout

        def read(stdout: IO[str]) -> None:
            with self._log.open("w") as log:
                for line in stdout:
                    if line.startswith(EVENT_MARK):
                        events.put((self, json.loads(line[len(EVENT_MARK) :])))
                    else:
                        log.write(line)
                        log.flush()
                        self.tail.append(line)
            self.process.wait()
            events.put((self, None))

        self._reader = threading.Thread(target=read, args=(stdout,), daemon=True)
        self._reader.start()

    def stop(self) -> None:
        """Kills the process if it still runs, and waits for its end."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self._reader is not None:
            self._reader.join(timeout=5)
        if self.process.stdin is not None:
            self.process.stdin.close()


def _child_environment() -> dict[str, str]:
    env = dict(os.environ)
    # Each process has one CPU device, whatever the caller's tests ask for.
    flags = [f for f in env.get("XLA_FLAGS", "").split() if "xla_force_host_platform_device_count" not in f]
    env["XLA_FLAGS"] = " ".join(flags)
    env["JAX_PLATFORMS"] = "cpu"
    env["PYTHONUNBUFFERED"] = "1"
    here = str(Path(__file__).resolve().parent.parent)
    env["PYTHONPATH"] = os.pathsep.join([here, *filter(None, [env.get("PYTHONPATH")])])
    return env


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _supervise(
    config: DemoConfig, logs: Path, deadline: float, on_event: Any, *, dense: bool = False
) -> None:
    """Runs the processes to their end; the first that fails ends the others.

    Raises:
      DemoError: one failed, or the deadline (a time.monotonic) passed.
    """
    events: queue.Queue[tuple[_Child, dict[str, Any] | None]] = queue.Queue()
    port = _free_port()
    children: list[_Child] = []
    try:
        for rank in range(1 if dense else config.processes):
            log = logs / ("dense.log" if dense else f"rank{rank}.log")
            children.append(_Child(config, rank, port, dense, log))
            children[-1].start(events)
        running = len(children)
        failed: list[_Child] = []
        while running:
            # Once one has failed the others get a moment to fail too: their errors may say more.
            left = (2.0 if failed else 0.0) or deadline - time.monotonic()
            try:
                child, event = events.get(timeout=max(0.0, left))
            except queue.Empty:
                if failed:
                    break
                raise DemoError("it took longer than the total timeout; all processes were stopped") from None
            if event is None:
                running -= 1
                if child.process.returncode != 0:
                    failed.append(child)
            elif child.rank == 0:
                on_event(event)
        if failed:
            raise DemoError(
                "\n".join(
                    f"{child.name} ended with status {child.process.returncode}; the end of its output:\n"
                    + "".join(child.tail).rstrip()
                    for child in failed
                )
            )
    finally:
        for child in children:
            child.stop()


def _plot(path: Path, history: list[dict[str, Any]], unigram: float, config: DemoConfig) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot([h["step"] + 1 for h in history], [h["loss"] for h in history], label="training", linewidth=1)
    checks = [h for h in history if h["validation"] is not None]
    axes.plot([h["step"] + 1 for h in checks], [h["validation"] for h in checks], "o-", label="validation")
    axes.axhline(unigram, color="gray", linestyle="--", label="unigram entropy")
    axes.set(xlabel="step", ylabel="nats per byte", ylim=(0, None))
    axes.set_title(
        f"Byte-level MoE transformer: {config.num_experts} experts, top-{config.top_k}, "
        f"over {config.processes} processes"
    )
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def run(
    processes: int = 4,
    steps: int = 180,
    out: str | os.PathLike[str] = "demo_out",
    fabric: str = "auto",
    *,
    timeout: float = 1200.0,
    **options: Any,
) -> bool:
    """Runs the demo and prints a verdict.

    Args:
      processes: ranks, each a process; from 1 to 64.
      steps: training steps.
      out: folder for ``loss.png``, ``losses.json``, ``sample.txt`` and the processes' logs; made if missing.
      fabric: see `pplx_jax.ExpertParallel`.
      timeout: seconds for everything.
      **options: further fields of `DemoConfig`.

    Returns:
      Whether both conditions hold; the last line printed says the same.

    Raises:
      TypeError, ValueError: an argument has a wrong type or range.
    """
    config = DemoConfig(processes=processes, steps=steps, fabric=fabric, **options)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(soft_wrap=True, highlight=False)
    try:
        problems = _train_and_prove(config, folder, console, time.monotonic() + timeout)
    except (DemoError, RuntimeError, OSError) as error:
        console.print(Text(str(error)))
        problems = ["a process failed" if isinstance(error, DemoError) else "it could not start"]
    if problems:
        console.print(Text(f"demo: FAILED: {'; '.join(problems)}"))
    else:
        console.print(Text(f"demo: OK, see {folder}/loss.png"))
    return not problems


def _train_and_prove(config: DemoConfig, folder: Path, console: Console, deadline: float) -> list[str]:
    """Both runs and their report; returns what is wrong with the result."""
    train, validation = load_corpus()
    unigram = unigram_entropy(validation)
    console.print(
        f"Training on {train.size / 1e6:.1f} MB of Python sources, validating on "
        f"{validation.size / 1e6:.1f} MB of other files (unigram entropy {_rate(unigram)}).\n"
        f"{config.num_experts} experts, top-{config.top_k}, on {config.processes} processes; "
        f"the first step includes compilation."
    )
    history: list[dict[str, Any]] = []
    dense: list[float] = []
    results: dict[str, Any] = {}
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )
    began = time.monotonic()
    with progress:
        bar = progress.add_task("training", total=config.steps, note="starting")

        def on_train(event: dict[str, Any]) -> None:
            if event["event"] == "done":
                results.update(event)
                return
            history.append(event)
            progress.update(bar, completed=len(history), note=f"loss {event['loss']:.3f}")
            if event["validation"] is not None:
                console.print(
                    f"step {event['step'] + 1:4d}  loss {event['loss']:.4f}  "
                    f"validation {event['validation']:.4f} nats per byte"
                )

        _supervise(config, folder, deadline, on_train)
        if config.proof_steps:
            bar = progress.add_task(
                "dense proof", total=min(config.proof_steps, config.steps), note="starting"
            )

            def on_dense(event: dict[str, Any]) -> None:
                if event["event"] == "step":
                    dense.append(event["loss"])
                    progress.update(bar, completed=len(dense), note=f"loss {event['loss']:.3f}")

            proof = dataclasses.replace(config, proof_steps=min(config.proof_steps, config.steps))
            _supervise(proof, folder, deadline, on_dense, dense=True)

    (folder / "sample.txt").write_text(results["text"])
    record = {"config": dataclasses.asdict(config), "history": history, "dense": dense, **results}
    (folder / "losses.json").write_text(json.dumps(record, indent=1))
    _plot(folder / "loss.png", history, unigram, config)
    console.print(Panel(Text(results["text"]), title="a sample from the trained model"))
    console.print(
        f"{config.steps} steps of {config.batch * config.window} bytes, "
        f"{results['seconds_per_step'] * 1e3:.0f} ms each, {results['parameters']:,} parameters, "
        f"{time.monotonic() - began:.0f} s in all."
    )
    problems = []
    final = float(results["final"])
    console.print(f"validation loss {_rate(final)}; unigram entropy {_rate(unigram)}.")
    if not final < 0.8 * unigram:
        problems.append(f"the validation loss {final:.3f} is not below 80 % of the unigram entropy")
    if dense:
        difference = max(abs(a - h["loss"]) for a, h in zip(dense, history, strict=False))
        console.print(
            f"first {len(dense)} steps, experts on {config.processes} processes against the dense layer in "
            f"one process: losses differ by at most {difference:.1e} nats per byte "
            f"(allowed {config.tolerance:.0e})."
        )
        if not difference <= config.tolerance:
            problems.append(f"losses differ from the dense layer's by {difference:.1e}")
    return problems


def _rate(nats: float) -> str:
    return f"{nats:.3f} nats ({nats / math.log(2):.3f} bits) per byte"


def main(argv: list[str] | None = None) -> int:
    """The command line of ``python -m pplx_jax.demo``; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m pplx_jax.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--steps", type=int, default=DemoConfig.steps)
    parser.add_argument("--out", default="demo_out")
    parser.add_argument("--fabric", default="auto")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker is not None:
        job = json.loads(options.worker)
        die_with_parent()
        work(DemoConfig(**job["config"]), job["rank"], job["coordinator"], dense=job["dense"])
        return 0
    ok = run(options.processes, options.steps, options.out, options.fabric)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
