#!/usr/bin/env python3
"""Checks the Promela models of this folder with spin: the protocol holds, and each seeded bug is caught.

    run.py            what `make test` runs: under two minutes on two cores
    run.py --large    larger spaces too: hours, and up to 20 GB of memory (docs/protocol.md has their sizes)
    run.py NAME...    some of them; a counterexample is printed step by step

Exit code 0: every space was searched completely without an error, and every bug was found.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
# Whatever is checked is an assertion or the end of every process, hence -DSAFETY.
CC = ("gcc", "-O2", "-w", "-DSAFETY", "-DCOLLAPSE", "-DVECTORSZ=4096")


@dataclasses.dataclass(frozen=True)
class Run:
    """One search. ``bug``: it must find an error, and its text must hold this."""

    name: str
    model: str
    defines: str
    bug: str = ""
    large: bool = False

    @property
    def options(self) -> list[str]:
        return [f"-D{define}" for define in self.defines.split()]


def exchange(name: str, defines: str, bug: str = "", large: bool = False) -> Run:
    return Run(name, "exchange.pml", defines, bug, large)


# Assertions of exchange.pml as pan prints them, macros expanded.
OVERWRITES, BUFFER, REGION, COUNT, STUCK = "received&", ".buffer[", ".region[", ".count[", "invalid end state"

RUNS = (
    exchange("2 ranks", "SHARDS=2"),
    exchange("2 ranks, a fault", "SHARDS=2 FAULTS=1 COMPLETIONS=0"),
    exchange("2 ranks, a fault, local completions", "FAULTS=1 TIMING=2"),
    exchange("2 ranks, depth 2", "DEPTH=2 LAST=6 COMPLETIONS=0"),
    exchange("2 ranks, depth 2, 2 shards, early bytes", "DEPTH=2 SHARDS=2 LAST=6 COMPLETIONS=0 TIMING=1"),
    exchange("2 ranks, depth 2, 2 shards, late bytes", "DEPTH=2 SHARDS=2 LAST=6 COMPLETIONS=0 TIMING=2"),
    exchange("2 ranks, depth 2, a fault, early bytes", "DEPTH=2 LAST=6 FAULTS=1 COMPLETIONS=0 TIMING=1"),
    exchange("2 ranks, depth 2, a fault, late bytes", "DEPTH=2 LAST=6 FAULTS=1 COMPLETIONS=0 TIMING=2"),
    exchange("3 ranks, early bytes", "RANKS=3 LAST=3 COMPLETIONS=0 TIMING=1"),
    exchange("3 ranks, late bytes", "RANKS=3 LAST=3 COMPLETIONS=0 TIMING=2"),
    Run("generations, 2 ranks", "generations.pml", "RANKS=2"),
    Run("generations, 3 ranks", "generations.pml", "RANKS=3"),
    # Seeded bugs.
    exchange("a lane less", "BUG_LANE_LESS", OVERWRITES),
    exchange("a lane less, depth 2", "BUG_LANE_LESS DEPTH=2 COMPLETIONS=0", OVERWRITES),
    exchange("regions by kind", "BUG_REGIONS_BY_KIND", OVERWRITES),
    exchange("sends beyond the window", "BUG_WINDOW", OVERWRITES),
    exchange("sends beyond the window, depth 2", "BUG_WINDOW DEPTH=2 COMPLETIONS=0", OVERWRITES),
    exchange("send buffer reused before local completion", "BUG_BUFFER_REUSED_EARLY", BUFFER),
    exchange("shards of the receiver", "BUG_SHARDS_OF_THE_RECEIVER SHARDS=2", REGION),
    exchange("a failure told to nobody", "BUG_NO_NOTICE FAULTS=1", STUCK),
    Run("memory freed while registered", "generations.pml", "BUG_FREED_WHILE_REGISTERED", "owner==g"),
    Run("a landing not awaited", "generations.pml", "BUG_LANDING_NOT_AWAITED", "owner==g"),
    Run("a key used again", "generations.pml", "BUG_KEY_REUSED", "owner==g"),
    Run("immediates without a nonce", "generations.pml", "BUG_NO_NONCE", "<=1"),
    Run("send buffer freed too early", "generations.pml", "BUG_SEND_BUFFER_FREED", "send_buffer["),
    # Larger spaces.
    exchange("2 ranks, a fault, local completions, any time", "SHARDS=2 FAULTS=1", large=True),
    exchange("2 ranks, depth 2, a fault, any time", "DEPTH=2 LAST=6 FAULTS=1 COMPLETIONS=0", large=True),
    exchange("2 ranks, depth 2, 2 shards, any time", "DEPTH=2 SHARDS=2 LAST=6 COMPLETIONS=0", large=True),
    exchange("2 ranks, depth 2, local completions, early bytes", "DEPTH=2 TIMING=1", large=True),
    exchange("3 ranks, any time", "RANKS=3 LAST=3 COMPLETIONS=0", large=True),
    exchange("3 ranks, a fault, early bytes", "RANKS=3 LAST=3 FAULTS=1 COMPLETIONS=0 TIMING=1", large=True),
    exchange("3 ranks, a fault, late bytes", "RANKS=3 LAST=3 FAULTS=1 COMPLETIONS=0 TIMING=2", large=True),
    exchange("3 ranks, 2 shards, early bytes", "RANKS=3 LAST=3 SHARDS=2 COMPLETIONS=0 TIMING=1", large=True),
    exchange("3 ranks, 2 shards, late bytes", "RANKS=3 LAST=3 SHARDS=2 COMPLETIONS=0 TIMING=2", large=True),
    exchange("3 ranks, longer, early bytes", "RANKS=3 LAST=5 COMPLETIONS=0 TIMING=1", large=True),
    exchange("3 ranks, depth 2, early bytes", "RANKS=3 DEPTH=2 LAST=5 COMPLETIONS=0 TIMING=1", large=True),
)


def search(run: Run, limit: float, show: bool) -> tuple[bool, str]:
    """Whether it ended as it must, and a line about it."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in FOLDER.glob("*.pml"):
            shutil.copy(file, folder)

        def call(*command: str) -> str:
            done = subprocess.run(
                command,
                cwd=folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=limit,
            )
            return done.stdout

        try:
            said = call("spin", *run.options, "-a", run.model)
            said += call(*CC, "-o", "pan", "pan.c")
            if not (folder / "pan").exists():
                return False, f"{run.name}: does not compile\n{said}"
            said = call("./pan", "-m5000000", "-w24")
        except subprocess.TimeoutExpired:
            return False, f"{run.name}: took longer than {limit:g} s"
        if show and (folder / f"{run.model}.trail").exists():
            print(call("./pan", "-r"))
    seconds = time.monotonic() - began
    states = re.search(r"(\S+) states, stored", said)
    error = re.search(r"pan:1: (.*) \(at depth (\d+)\)", said)
    line = f"{run.name}: {states[1] if states else '?'} states, {seconds:.1f} s"
    if run.bug:
        if error is None:
            return False, f"{line}: NOT caught"
        return run.bug in error[1], f"{line}: caught after {error[2]} steps: {error[1][:70]}"
    if error is not None or "errors: 0" not in said or "Search not completed" in said:
        return False, f"{line}: {error[1] if error else said}"
    # Assertions that are never reached prove nothing.
    verdict = re.search(r"unreached in proctype Verdict\n(.*)", said)
    if run.model == "exchange.pml" and (verdict is None or "(0 of" not in verdict[1]):
        return False, f"{line}: no run of it comes to an end\n{said}"
    return True, line


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="runs to do, by the beginning of their names")
    parser.add_argument("--large", action="store_true", help="the larger ones too")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    options = parser.parse_args()
    if shutil.which("spin") is None:
        print("spin is not installed: apt-get install spin")
        return 2
    runs = [run for run in RUNS if not run.large or options.large or options.names]
    if options.names:
        runs = [run for run in runs if any(run.name.startswith(name) for name in options.names)]
    limit = 24 * 3600.0 if options.large or options.names else 900.0
    wrong = 0
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for ok, line in pool.map(lambda run: search(run, limit, bool(options.names)), runs):
            print(("ok   " if ok else "WRONG ") + line, flush=True)
            wrong += not ok
    held, caught = sum(not run.bug for run in runs), sum(bool(run.bug) for run in runs)
    print(f"{len(runs) - wrong} passed, {wrong} failed ({held} spaces, {caught} seeded bugs)")
    return int(wrong > 0 or not runs)


if __name__ == "__main__":
    sys.exit(main())
