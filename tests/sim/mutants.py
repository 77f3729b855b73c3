#!/usr/bin/env python3
"""Bugs on purpose, to see that the simulation finds them.

mutants.py write OUT         copies of the sources concerned, with every bug in them, switched off
mutants.py run BINARY        switches one on after the other; exit code 0: each was found
mutants.py run BINARY NAME   one of them, with what the simulation says about it
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).absolute().parents[2]


@dataclasses.dataclass(frozen=True)
class Mutant:
    """``old``, found exactly once in ``file``, becomes ``new``, in which ON is the switch.

    ``faults``: with which the simulation looks for it, in at most ``seeds`` runs of ``ranks``.
    ``rule``: of docs/protocol.md, that it breaks.
    """

    name: str
    rule: str
    file: str
    old: str
    new: str
    faults: str = "none"
    seeds: int = 400
    ranks: int = 4


GROUP, MONITOR, EXCHANGE = "proxy/moe/exchange_group.cc", "proxy/moe/monitor.cc", "proxy/moe/exchange.cc"
NICS = "proxy/engine/nics.cc"

MUTANTS = (
    Mutant(
        "a-lane-less", "P1", GROUP, "lanes_(2 * config_.depth),", "lanes_(2 * config_.depth - (ON ? 1 : 0)),"
    ),
    Mutant(
        "immediate-counted-twice",
        "P2",
        "proxy/engine/immediates.cc",
        "  bump(counters_.immediates);\n",
        "  bump(counters_.immediates);\n  if (ON && counters_.immediates.load() % 53 == 0) state->add();\n",
    ),
    Mutant(
        "shards-of-the-receiver",
        "P2",
        EXCHANGE,
        "uses * peer.shards",
        "uses * (ON ? group_.engine_->shards() : peer.shards)",
    ),
    Mutant(
        "send-buffer-reused-early",
        "P3",
        EXCHANGE,
        "[&] { return lane.local.done() >= lane.posted ||",
        "[&] { return ON || lane.local.done() >= lane.posted ||",
    ),
    Mutant(
        "header-unchecked",
        "P8",
        EXCHANGE,
        "  if (theirs.exchange != number_ ||",
        "  if (ON) return true;\n  if (theirs.exchange != number_ ||",
        faults="mismatch",
    ),
    Mutant(
        "failure-told-to-nobody",
        "P22",
        MONITOR,
        "  if (!connected_ || engine_->closed()) return;\n",
        "  if (ON || !connected_ || engine_->closed()) return;\n",
        faults="give-up,leave",
    ),
    Mutant(
        "death-unnoticed",
        "P26",
        MONITOR,
        "if (!failed_) check_liveness(",
        "if (!failed_ && !ON) check_liveness(",
        faults="freeze",
    ),
    Mutant(
        "absence-blamed-on-peers",
        "P27",
        MONITOR,
        "std::max<Duration>(now - before - 2 * interval, Duration(0))",
        "ON ? Duration(0) : std::max<Duration>(now - before - 2 * interval, Duration(0))",
        faults="suspend",
    ),
    Mutant(
        "absence-counted-as-lateness",
        "P27",
        "proxy/engine/core.cc",
        "ran += std::min<Duration>(now - maintained, Presence::kAbsent);",
        "ran += ON ? Duration(now - maintained) : std::min<Duration>(now - maintained, Presence::kAbsent);",
        faults="suspend",
    ),
    Mutant(
        "closed-nic-polled",
        "P60",
        "proxy/engine/core.cc",
        "if (nics_.size() == 1 && !nics_[0].down)",
        "if (nics_.size() == 1 && (ON || !nics_[0].down))",
        faults="nic",
    ),
    Mutant(
        "refusals-of-past-exchanges-unread",
        "P25",
        MONITOR,
        "    if (lane_state_[one]->local.failed() == 0) continue;\n",
        "    if (lane_state_[one]->local.failed() == 0 || (ON && one != lane)) continue;\n",
        faults="nic",
    ),
    Mutant(
        "failure-hidden-by-the-close",
        "P22",
        MONITOR,
        "if (notice.text[0] != '\\0')",
        "if (!ON && notice.text[0] != '\\0')",
        faults="give-up,kill",
        ranks=12,
    ),
    Mutant(
        "abandoned-exchange-not-received",
        "P36",
        EXCHANGE,
        "    wait_for_arrivals(false);\n",
        "    if (!ON) wait_for_arrivals(false);\n",
    ),
    Mutant(
        "immediates-repeated",
        "P60",
        NICS,
        "const bool harmless = op->undelivered ||",
        "const bool harmless = ON || op->undelivered ||",
        faults="nic",
    ),
)


def write(out: Path) -> int:
    out.mkdir(parents=True, exist_ok=True)
    texts: dict[str, str] = {}
    for mutant in MUTANTS:
        text = texts.setdefault(mutant.file, (ROOT / mutant.file).read_text())
        if text.count(mutant.old) != 1:
            print(
                f"{mutant.file} has changed: mutant {mutant.name} of tests/sim/mutants.py looks for"
                f" {mutant.old!r}, which is there {text.count(mutant.old)} times"
            )
            return 1
        switch = f'::pplx::sim::mutated("{mutant.name}")'
        texts[mutant.file] = text.replace(mutant.old, mutant.new.replace("ON", switch))
    for file, text in texts.items():
        written = f'#include "tests/sim/mutants.h"\n#line 1 "{file}"\n{text}'
        path = out / Path(file).name
        if not path.exists() or path.read_text() != written:
            path.write_text(written)
    return 0


def run(binary: str, names: list[str]) -> int:
    missed = 0
    for mutant in MUTANTS:
        if names and mutant.name not in names:
            continue
        began = time.monotonic()
        command = [binary, "--mutant", mutant.name, "--faults", mutant.faults]
        command += ["--ranks", str(mutant.ranks), "--exchanges", "80"]
        command += ["--seeds", str(mutant.seeds), "--stop-at", "1", "--jobs", "2"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        seconds = time.monotonic() - began
        lines = done.stdout.splitlines()
        caught = [line for line in lines if line.startswith("FAILED seed")]
        if names:
            print(done.stdout)
        if done.returncode != 1 or not caught:
            missed += 1
            print(
                f"WRONG {mutant.name} ({mutant.rule}): NOT caught in {mutant.seeds} runs, {seconds:.1f} s",
                flush=True,
            )
            continue
        said = lines[lines.index(caught[0]) + 1].strip()
        seed = caught[0].split(":")[0].removeprefix("FAILED ")
        print(f"ok    {mutant.name} ({mutant.rule}): {seed}, {seconds:.1f} s: {said[:110]}", flush=True)
    print(f"{len(MUTANTS) - missed} of {len(MUTANTS)} seeded bugs caught" if not names else "")
    return int(missed > 0 or not (names or refuses_a_program_that_fails(binary)))


def refuses_a_program_that_fails(binary: str) -> bool:
    """--every-step must not go on where the run that tells the steps has complaints: it may tell too few."""
    command = [binary, "--mutant", "immediate-counted-twice", "--ranks", "3", "--exchanges", "40"]
    command += ["--every-step", "--faults", "kill", "--stop-at", "1"]
    for seed in range(1, 20):
        done = subprocess.run(
            [*command, "--seed", str(seed)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if done.returncode == 2 and "--every-step: the run without a fault" in done.stdout:
            print(f"ok    --every-step refuses a program that fails without a fault: seed {seed}", flush=True)
            return True
    print("WRONG --every-step takes the steps of programs that fail", flush=True)
    return False


def main() -> int:
    if len(sys.argv) == 3 and sys.argv[1] == "write":
        return write(Path(sys.argv[2]))
    if len(sys.argv) >= 3 and sys.argv[1] == "run":
        return run(sys.argv[2], sys.argv[3:])
    print(__doc__)
    return 2


if __name__ == "__main__":
    sys.exit(main())
