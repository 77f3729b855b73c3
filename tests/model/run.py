#!/usr/bin/env python3
"""Checks the Promela models of this folder with spin: the protocol holds, and each seeded bug is caught.

    run.py            what `make test` runs: a minute and a half on two quiet cores
    run.py --large    larger spaces whole, and larger parts: days, up to --memory a search (docs/protocol.md)
    run.py NAME...    those whose names begin so; a counterexample is printed step by step

Spaces are searched whole, but for those called "part", too large for every day. In these a few walks are
taken, each in an order of its own drawn from --seed, the day's by default, and each until a table of 2^bits
bits is full of what was seen (spin's bitstate hashing).

Exit code 0: no error, no search was cut short, all processes came to their end in each, every bug was found.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import datetime
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
CC = ("gcc", "-w", "-DSAFETY", "-DVECTORSZ=4096")
# Every step of the models is taken once, so that no run is longer; one that is would be an error (-b).
DEPTH = "-m10000"
WALKS, BITS, LARGE_BITS = 16, 17, 30
# What pan says of a search that left something out, whatever it left out.
CUT_SHORT = (
    "Search not completed",
    "max search depth too small",
    "out of memory",
    "Interrupted",
    "-DMEMLIM",
)


@dataclasses.dataclass(frozen=True)
class Run:
    """One search. ``bug``: it must find an error, and its text must hold this. ``part``: a part of the space.
    ``large``: only with --large.
    """

    name: str
    model: str
    defines: str
    bug: str = ""
    part: bool = False
    large: bool = False

    @property
    def options(self) -> list[str]:
        return [f"-D{define}" for define in self.defines.split()]


def exchange(name: str, defines: str, bug: str = "", part: bool = False, large: bool = False) -> Run:
    return Run(name, "exchange.pml", defines, bug, part, large)


def generations(name: str, defines: str, bug: str = "", part: bool = False, large: bool = False) -> Run:
    return Run(name, "generations.pml", defines, bug, part, large)


def either_time(name: str, defines: str) -> tuple[Run, Run]:
    """Bytes as early and as late as can be, which between them cover what can go wrong (exchange.pml)."""
    early = exchange(f"{name}, early bytes", f"{defines} TIMING=1", large=True)
    return early, exchange(f"{name}, late bytes", f"{defines} TIMING=2", large=True)


# Assertions as pan prints them, macros expanded.
OVERWRITES, BUFFER, REGION, STUCK = "received&", ".buffer[", ".region[", "invalid end state"
OWNER, WATCHED, SENDS = ".owner==g", ".current==", ".sends==g"

LARGEST = "RANKS=3 DEPTH=2 SHARDS=2 LAST=5 FAULTS=1 DRAWN=1"

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
    exchange("3 ranks, a fault, early bytes", "RANKS=3 LAST=3 FAULTS=1 COMPLETIONS=0 TIMING=1"),
    exchange("3 ranks, a fault, late bytes", "RANKS=3 LAST=3 FAULTS=1 COMPLETIONS=0 TIMING=2"),
    generations("generations, 2 ranks", "RANKS=2"),
    generations("generations, 2 ranks, 2 exchanges", "RANKS=2 EXCHANGES=2"),
    # Spaces searched in part: bytes at any time, local completions.
    exchange(
        "part: 2 ranks, depth 2, 2 shards, a fault", "DEPTH=2 SHARDS=2 LAST=6 FAULTS=1 DRAWN=1", part=True
    ),
    exchange("part: 3 ranks", "RANKS=3 LAST=3 DRAWN=1", part=True),
    exchange("part: 3 ranks, a fault", "RANKS=3 LAST=3 FAULTS=1 DRAWN=1", part=True),
    exchange("part: 3 ranks, 2 shards", "RANKS=3 SHARDS=2 LAST=3 DRAWN=1", part=True),
    exchange("part: 3 ranks, 2 shards, a fault", "RANKS=3 SHARDS=2 LAST=3 FAULTS=1 DRAWN=1", part=True),
    exchange("part: 3 ranks, depth 2", "RANKS=3 DEPTH=2 LAST=5 DRAWN=1", part=True),
    exchange("part: 3 ranks, depth 2, a fault", "RANKS=3 DEPTH=2 LAST=5 FAULTS=1 DRAWN=1", part=True),
    exchange("part: 3 ranks, depth 2, 2 shards", "RANKS=3 DEPTH=2 SHARDS=2 LAST=5 DRAWN=1", part=True),
    exchange(
        "part: 3 ranks, depth 2, 2 shards, a fault",
        "RANKS=3 DEPTH=2 SHARDS=2 LAST=5 FAULTS=1 DRAWN=1",
        part=True,
    ),
    exchange("part: 3 ranks, small send buffer", "RANKS=3 LAST=3 SMALL_BUFFER=1", part=True),
    exchange(
        "part: 3 ranks, small send buffer, a fault",
        "RANKS=3 LAST=3 SMALL_BUFFER=1 FAULTS=1 DRAWN=1",
        part=True,
    ),
    generations(
        "part: generations, 3 ranks, 2 exchanges, a death", "RANKS=3 EXCHANGES=2 DEATHS=1", part=True
    ),
    # Seeded bugs.
    exchange("a lane less", "BUG_LANE_LESS", OVERWRITES),
    exchange("a lane less, depth 2", "BUG_LANE_LESS DEPTH=2 COMPLETIONS=0", OVERWRITES),
    exchange("regions by kind", "BUG_REGIONS_BY_KIND", OVERWRITES),
    exchange("sends beyond the window", "BUG_WINDOW", OVERWRITES),
    exchange("sends beyond the window, depth 2", "BUG_WINDOW DEPTH=2 COMPLETIONS=0", OVERWRITES),
    exchange("send buffer reused before local completion", "BUG_BUFFER_REUSED_EARLY", BUFFER),
    exchange("send buffer reused after a wait timed out", "BUG_BUFFER_REUSED_AFTER_TIMEOUT FAULTS=1", BUFFER),
    exchange(
        "full send buffer not drained", "BUG_FULL_BUFFER_NOT_DRAINED SMALL_BUFFER=1 RANKS=3 LAST=2", BUFFER
    ),
    exchange("shards of the receiver", "BUG_SHARDS_OF_THE_RECEIVER SHARDS=2", REGION),
    exchange("a failure told to nobody", "BUG_NO_NOTICE FAULTS=1", STUCK),
    exchange("part: a lane less", f"BUG_LANE_LESS {LARGEST}", OVERWRITES, part=True),
    exchange("part: send buffer reused early", f"BUG_BUFFER_REUSED_EARLY {LARGEST}", BUFFER, part=True),
    generations("memory freed while registered", "BUG_FREED_WHILE_REGISTERED", OWNER),
    generations("a landing not awaited", "BUG_LANDING_NOT_AWAITED", OWNER),
    generations("a key used again", "BUG_KEY_REUSED", OWNER),
    generations("immediates without a nonce", "BUG_NO_NONCE", WATCHED),
    generations("send buffer freed too early", "BUG_SEND_BUFFER_FREED", SENDS),
    generations("the dead awaited", "BUG_THE_DEAD_AWAITED RANKS=3 DEATHS=1", STUCK),
    # Larger spaces, whole.
    exchange("2 ranks, a fault, local completions, any time", "SHARDS=2 FAULTS=1", large=True),
    exchange("2 ranks, depth 2, a fault, any time", "DEPTH=2 LAST=6 FAULTS=1 COMPLETIONS=0", large=True),
    exchange("2 ranks, depth 2, 2 shards, any time", "DEPTH=2 SHARDS=2 LAST=6 COMPLETIONS=0", large=True),
    exchange("2 ranks, depth 2, local completions, early bytes", "DEPTH=2 TIMING=1", large=True),
    exchange("3 ranks, any time", "RANKS=3 LAST=3 COMPLETIONS=0", large=True),
    exchange("3 ranks, longer, early bytes", "RANKS=3 LAST=5 COMPLETIONS=0 TIMING=1", large=True),
    *either_time("2 ranks, depth 2, 2 shards, a fault", "DEPTH=2 SHARDS=2 LAST=6 FAULTS=1 COMPLETIONS=0"),
    *either_time("3 ranks, local completions", "RANKS=3 LAST=3"),
    *either_time("3 ranks, 2 shards", "RANKS=3 SHARDS=2 LAST=3 COMPLETIONS=0"),
    *either_time("3 ranks, 2 shards, a fault", "RANKS=3 SHARDS=2 LAST=3 FAULTS=1 COMPLETIONS=0"),
    *either_time("3 ranks, depth 2", "RANKS=3 DEPTH=2 LAST=5 COMPLETIONS=0"),
    *either_time("3 ranks, depth 2, a fault", "RANKS=3 DEPTH=2 LAST=5 FAULTS=1 COMPLETIONS=0"),
    *either_time("3 ranks, depth 2, 2 shards", "RANKS=3 DEPTH=2 SHARDS=2 LAST=5 COMPLETIONS=0"),
    *either_time(
        "3 ranks, depth 2, 2 shards, a fault", "RANKS=3 DEPTH=2 SHARDS=2 LAST=5 FAULTS=1 COMPLETIONS=0"
    ),
    *either_time("3 ranks, small send buffer, a fault", "RANKS=3 LAST=3 SMALL_BUFFER=1 FAULTS=1"),
    generations("generations, 3 ranks, a death", "RANKS=3 DEATHS=1", large=True),
)


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of each search: seconds, gigabytes, the logarithm of a part's bits, and the part."""

    seconds: float
    memory: float
    bits: int
    seed: int


def search(run: Run, limits: Limits, show: bool) -> tuple[bool, str]:
    """Whether it ended as it must, and a line about it."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(FOLDER / run.model, folder)

        def call(*command: str) -> str:
            done = subprocess.run(
                command,
                cwd=folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=limits.seconds,
            )
            return done.stdout

        store = ["-DBITSTATE", "-DT_RAND", "-DP_RAND"] if run.part else ["-DCOLLAPSE"]
        # Most of a small search is the compiler's time.
        optimise = "-O0" if run.bug else "-O2" if run.large else "-O1"
        store += [optimise, f"-DMEMLIM={limits.memory * 1000:.0f}"]
        walks = [[f"-w{26 if run.large else 22}"]]
        if run.part:
            first = (0 if run.bug else limits.seed) * WALKS  # a bug is found every day
            walks = [[f"-w{limits.bits}", f"-RS{first + walk}"] for walk in range(WALKS)]
        try:
            said = call("spin", *run.options, "-a", run.model)
            said += call(*CC, *store, "-o", "pan", "pan.c")
            if not (folder / "pan").exists():
                return False, f"{run.name}: does not compile\n{said}"
            reports = []
            for walk in walks:
                reports.append(call("./pan", DEPTH, "-b", *walk))
                if (folder / f"{run.model}.trail").exists():
                    break
        except subprocess.TimeoutExpired:
            return False, f"{run.name}: took longer than {limits.seconds:g} s"
        if show and (folder / f"{run.model}.trail").exists():
            print(call("./pan", "-r"))
    return judge(run, limits, reports, time.monotonic() - began)


def unreached(report: str, process: str) -> set[str] | None:
    """Statements that no run of this process came to; None: the report does not say."""
    found = re.search(rf"unreached in proctype {process}\n((?:\t.*\n)*?)\t\((\d+) of \d+ states\)", report)
    lines = set(found[1].splitlines()) if found else set()
    return lines if found and len(lines) == int(found[2]) else None


def judge(run: Run, limits: Limits, reports: list[str], seconds: float) -> tuple[bool, str]:
    """What pan's reports, one a walk, mean."""
    said = "\n".join(reports)
    states = sum(int(float(count)) for count in re.findall(r"(\d\S*) states, stored", said))
    error = re.search(r"pan:1: (.*) \(at depth (\d+)\)", said)
    line = f"{run.name}: {states} states, {seconds:.1f} s"
    if run.bug:
        if error is None:
            return False, f"{line}: NOT caught\n{said}"
        return run.bug in error[1], f"{line}: caught after {error[2]} steps: {error[1][:70]}"
    if error is not None:
        again = f" (--seed {limits.seed} --bits {limits.bits})" if run.part else ""
        return False, f"{line}: {error[1]}{again}"
    kind = "Bit" if run.part else "Full"
    for report in reports:
        if "errors: 0" not in report:
            return False, f"{line}: no result\n{report}"
        for words in CUT_SHORT:
            if words in report:
                return False, f"{line}: the search was cut short: {words}\n{report}"
        if f"{kind} statespace search for" not in report:
            return False, f"{line}: not the search that was meant\n{report}"
    # Assertions that are never reached prove nothing.
    model = (FOLDER / run.model).read_text()
    for process in re.findall(r"^proctype (Rank|Verdict)\b", model, re.MULTILINE):
        each = [unreached(report, process) for report in reports]
        if None in each:
            return False, f"{line}: nothing is said of {process}\n{said}"
        nowhere = set.intersection(*[lines for lines in each if lines is not None])
        if nowhere and not run.part:
            return False, f"{line}: never reached: {nowhere}\n{said}"
        if nowhere:
            line += f", never {'; '.join(sorted(text.strip()[:60] for text in nowhere))}"
    # With 100 bits a state next to nothing is left out.
    factors = [float(factor) for factor in re.findall(r"hash factor: (\S+)", said)]
    return True, line + (f", in part: {min(factors):.1f} bits a state" if run.part else "")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    today = int(datetime.datetime.now(datetime.UTC).strftime("%Y%m%d"))
    parser.add_argument("names", nargs="*", help="runs to do, by the beginning of their names")
    parser.add_argument("--large", action="store_true", help="larger spaces too, and larger parts")
    parser.add_argument("--seed", type=int, default=today, help="of the walks")
    parser.add_argument("--bits", type=int, help=f"of a walk ({BITS}; with --large {LARGE_BITS})")
    parser.add_argument("--memory", type=float, help="GB a search (4; with --large 20)")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    options = parser.parse_args()
    if shutil.which("spin") is None:
        print("spin is not installed: apt-get install spin")
        return 2
    runs = [run for run in RUNS if not run.large or options.large or options.names]
    if options.names:
        runs = [run for run in runs if any(run.name.startswith(name) for name in options.names)]
    limits = Limits(
        seconds=24 * 3600.0 if options.large or options.names else 900.0,
        memory=options.memory or (20.0 if options.large else 4.0),
        bits=options.bits or (LARGE_BITS if options.large else BITS),
        seed=options.seed,
    )
    print(f"parts: --seed {limits.seed} --bits {limits.bits}")
    wrong = 0
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for ok, line in pool.map(lambda run: search(run, limits, bool(options.names)), runs):
            print(("ok   " if ok else "WRONG ") + line, flush=True)
            wrong += not ok
    bugs, parts = sum(bool(run.bug) for run in runs), sum(run.part and not run.bug for run in runs)
    print(
        f"{len(runs) - wrong} passed, {wrong} failed "
        f"({len(runs) - bugs - parts} spaces whole, {parts} in part, {bugs} seeded bugs)"
    )
    if not options.large:
        print(f"left to --large: {'; '.join(run.name for run in RUNS if run.large and run not in runs)}")
    return int(wrong > 0 or not runs)


if __name__ == "__main__":
    sys.exit(main())
