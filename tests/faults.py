"""What happens when a rank dies, stops or loses its network at every stage of a training step.

``run`` puts one fault after another into real processes and tells what their ranks saw. ``test_faults.py``
demands that it is what docs/reliability.md says; ``python tests/faults.py`` writes it there.

A *stage* is a place in one rank's step, before an exchange's send or between its send and its recv, forward
and backward: a callback on the host between the halves of the exchanges, at which the rank's process does to
itself what the fault says. The other ranks wait for it, or have all they need and learn of it later. A step
of whole exchanges ("blocking") has callbacks before them only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
if __name__ == "__main__":  # where the package may not be installed; tests have one that is
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from pplx_jax.testing import HostPool, ProcessPool  # noqa: E402 - starts no JAX

#: Seconds of silence after which a peer counts as dead, and how long ranks are stopped.
TIMEOUT = 3.0
SHORT, LONG = 0.4 * TIMEOUT, 1.7 * TIMEOUT
#: What a survivor may take to raise, from the beginning of the step: silence, the monitor's interval of an
#: eighth of that, and the rest for a busy machine of two cores. Whoever has a message under way to the dead
#: raises at once.
DEADLINE = 2 * TIMEOUT
#: When a rank that should have raised is given up.
PATIENCE = 6 * DEADLINE
#: What a close may take: two seconds for its last writes, and the same.
CLOSING = 4.0
RANKS = 3
VICTIM = 2
#: Processes that die in one pool, one after the other.
MOST_DEATHS = 4
#: Without it JAX's coordination service ends all processes 100 s after one of them died.
RECOVERABLE = {"JAX_ENABLE_RECOVERABILITY": "1"}

EXCHANGES = ("dispatch", "combine", "combine transpose", "dispatch transpose")
STAGES = tuple(f"{exchange}, {when}" for exchange in EXCHANGES for when in ("not sent", "sent", "blocking"))

FAULTS = {
    "kill": "`kill -9`",
    "kill shm": "`kill -9`, fabric `shm`",
    "stop": "SIGSTOP, longer than `timeout`",
    "pause": "SIGSTOP, shorter",
    "sockets": "its sockets shut down",
    "unplug": "its cable pulled",
}
KILLS = ("kill", "kill shm")

_MARKS = ("<!-- faults: written by tests/faults.py -->", "<!-- end of faults -->")
DOCUMENT = TESTS.parent / "docs" / "reliability.md"

SHAPE = dict(num_experts=6, top_k=2, hidden=16, max_tokens=8, dtype="float32")


# ---- on the ranks ------------------------------------------------------------------------------------------

_kept: dict[str, Any] = {}
#: The stage at which this process does something to itself, once, and what.
_trap: list[tuple[str, Callable[[], None]]] = []


def _reached(stage: str, value: Any) -> Any:
    if _trap and _trap[0][0] == stage:
        _trap.pop()[1]()
    return value


def make_step(ep: Any, blocking: bool) -> Any:
    """Value, out and gradients of a step, in halves or of whole exchanges, with a callback at every stage."""
    import jax
    from jax.sharding import PartitionSpec as P
    from moe_oracle import experts

    def at(stage: str, x: Any) -> Any:
        return jax.pure_callback(
            functools.partial(_reached, stage), jax.ShapeDtypeStruct(x.shape, x.dtype), x
        )

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
    def gate(forward: str, backward: str, x: Any) -> Any:
        return at(forward, x) if forward else x

    gate.defvjp(
        lambda forward, backward, x: (gate(forward, backward, x), None),
        lambda forward, backward, _, d: (at(backward, d) if backward else d,),
    )

    def whole(x: Any, indices: Any, weights: Any, scale: Any) -> Any:
        batch, route = ep.dispatch(gate("dispatch, blocking", "", x), indices, weights)
        y = gate("combine, blocking", "dispatch transpose, blocking", experts(batch, scale))
        return gate("", "combine transpose, blocking", ep.combine(y, route))

    def halves(x: Any, indices: Any, weights: Any, scale: Any) -> Any:
        x = gate("dispatch, not sent", "", x)
        sent = ep.dispatch_send(x, indices, weights)
        ticket = gate("dispatch, sent", "dispatch transpose, sent", sent.ticket)
        batch, route = ep.dispatch_recv(dataclasses.replace(sent, ticket=ticket))
        y = gate("combine, not sent", "dispatch transpose, not sent", experts(batch, scale))
        going = ep.combine_send(y, route)
        ticket = gate("combine, sent", "combine transpose, sent", going.ticket)
        out = ep.combine_recv(dataclasses.replace(going, ticket=ticket))
        return gate("", "combine transpose, not sent", out)

    def per_shard(x: Any, indices: Any, weights: Any, scale: Any) -> Any:
        def loss(x: Any, weights: Any) -> Any:
            out = (whole if blocking else halves)(x, indices, weights, scale)
            return (out**2).sum(), out

        (_, out), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, weights)
        return out, *gradients

    axis = P("ep")
    return jax.jit(
        jax.shard_map(per_shard, mesh=ep.mesh, in_specs=(axis,) * 4, out_specs=axis, check_vma=False)
    )


@dataclasses.dataclass
class Seen:
    """What one rank saw of a fault."""

    rank: int
    kind: str
    """Of the error that ``check()`` raised; "" for none."""
    text: str
    seconds: float
    """From the beginning of the step until the error."""
    closing: float
    outputs: str
    """"right", "nan" or what else."""
    left: str
    """Sockets and engine threads that are still there after ``close()``; "" for none."""


class Session:
    """A group of some processes, one rank each, and the step that they run."""

    def __init__(self, members: Sequence[int], fabric: str) -> None:
        import jax
        import numpy as np
        from jax.sharding import Mesh, PartitionSpec

        devices = {device.process_index: device for device in jax.devices()}
        self.rank = list(members).index(jax.process_index())
        self.mesh = Mesh(np.array([devices[process] for process in members]), ("ep",))
        self.fabric = fabric
        self.sharding = jax.NamedSharding(self.mesh, PartitionSpec("ep"))
        self.steps: dict[bool, Any] = {}
        self.truth: Any = None

    def open(self, stage: str = "") -> None:
        """A new group, whose first step gives the right bytes: a step that comes to ``stage``."""
        import jax
        from moe_oracle import Case, dense

        from pplx_jax import ExpertParallel

        # Of the same value each time, so that the compiled step runs on it.
        self.ep = ExpertParallel(
            self.mesh, name="faults", fabric=self.fabric, timeout=TIMEOUT, stall_timeout=30, **SHAPE
        )
        self.ep.connect()  # before anything that takes long on one rank only
        blocking = stage.endswith("blocking")
        if blocking not in self.steps:
            self.steps[blocking] = make_step(self.ep, blocking)
        self.step = self.steps[blocking]
        if self.truth is None:
            case = Case(self.ep, 8, 1)
            self.args = [self.put(a) for a in case.args[:4]]

            def loss(x: Any, w: Any) -> Any:
                return (dense(x, case.indices, w, case.scale, case.valid()) ** 2).sum()

            gradients = jax.grad(loss, argnums=(0, 1))(case.x, case.weights)
            self.truth = [case.expected(), *gradients]
        outputs = self.outputs()
        assert outputs == "right", outputs
        self.ep.check()

    def put(self, array: Any) -> Any:
        import jax

        return jax.make_array_from_callback(array.shape, self.sharding, lambda index: array[index])

    def outputs(self) -> str:
        """Runs a step: whether what it gave is right, or NaN, or neither."""
        import jax
        import numpy as np

        results = jax.block_until_ready(self.step(*self.args))
        verdict = set()
        for result, truth in zip(results, self.truth, strict=True):
            mine = np.asarray(result.addressable_shards[0].data)
            want = np.asarray(truth)[self.rank * len(mine) : (self.rank + 1) * len(mine)]
            # One token may be right and the next one NaN: never a third.
            wrong = ~np.isnan(mine) & ~np.isclose(mine, want, rtol=1e-4, atol=1e-5)
            verdict.add("wrong" if wrong.any() else "nan" if np.isnan(mine).any() else "right")
        return "wrong" if "wrong" in verdict else "nan" if "nan" in verdict else "right"

    def suffer(self, patience: float) -> Seen:
        """A step during which something happens to somebody; then waits for an error, and closes."""
        import jax

        from pplx_jax import errors

        began = time.monotonic()
        try:
            outputs = self.outputs()
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            outputs = f"raised {error}"
        kind = text = ""
        try:
            while time.monotonic() - began < patience:
                self.ep.check()
                time.sleep(0.02)
        except errors.PplxError as error:
            kind, text = type(error).__name__, str(error)
        seconds = time.monotonic() - began
        if not kind:  # nothing was wrong: it goes on working
            again = self.outputs()
            outputs = outputs if again == "right" else again
            self.ep.check()
        before = time.monotonic()
        self.ep.close()
        return Seen(self.rank, kind, text, seconds, time.monotonic() - before, outputs, _left())


def open_session(key: str, members: Sequence[int], fabric: str, stage: str = "") -> None:
    if key not in _kept:
        _kept[key] = Session(members, fabric)
        _kept["sockets"] = set(_sockets())  # those of JAX's own services
    _kept[key].open(stage)


def close_session(key: str) -> None:
    _kept[key].ep.close()


def _sockets() -> dict[str, int]:
    """Sockets of this process but for those to the coordination service: descriptors by inode."""
    from pplx_jax import compat

    coordinator = int((compat.coordinator_address() or ":0").rsplit(":", 1)[1])
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            name = os.readlink(entry)  # noqa: PTH115 - relative names are not paths
            if not name.startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as one, contextlib.suppress(OSError):
                if one.family in (socket.AF_INET, socket.AF_INET6) and one.getpeername()[1] == coordinator:
                    continue
            found[name] = int(entry.name)
    return found


def _shut_sockets() -> None:
    for name, number in _sockets().items():
        if name not in _kept["sockets"]:
            with socket.socket(fileno=os.dup(number)) as one, contextlib.suppress(OSError):
                one.getpeername()  # those that listen go on
                one.shutdown(socket.SHUT_RDWR)


def _left() -> str:
    sockets = len(set(_sockets()) - _kept["sockets"])
    threads = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            name = (task / "comm").read_text().strip()
            threads += [name] if name.startswith("pplx") else []
    return f"{sockets} sockets, threads {threads}" if sockets or threads else ""


def _stop(seconds: float) -> None:
    subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"], start_new_session=True)
    os.kill(os.getpid(), signal.SIGSTOP)


def _ask(folder: str) -> None:
    """Has the parent do it, and waits until it is done."""
    Path(folder, "wanted").touch()
    deadline = time.monotonic() + 10
    while not Path(folder, "done").exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def suffer(key: str, fault: str, stage: str, folder: str) -> Seen:
    session = _kept[key]
    acts: dict[str, Callable[[], None]] = {
        "stop": functools.partial(_stop, LONG),
        "pause": functools.partial(_stop, SHORT),
        "sockets": _shut_sockets,
        "unplug": functools.partial(_ask, folder),
    }
    _trap.clear()
    if session.rank == VICTIM:
        _trap.append((stage, acts[fault]))
    # Where there may be no error to wait for: until the monitor would have had one.
    seen: Seen = session.suffer(2 * TIMEOUT if fault in ("pause", "sockets") else PATIENCE)
    assert not _trap, "the stage was not reached"
    return seen


def killed_one_by_one(stages: Sequence[str], fabric: str, folder: str) -> list[Seen]:
    """Ranks 0 and 1 stay, and in each group with them another process dies."""
    import jax

    me = jax.process_index()
    jax.local_devices()  # what takes long does so before anybody waits for this process
    import moe_oracle  # noqa: F401 - imports pplx_jax and all that it needs

    _kept["sockets"] = set(_sockets())
    results = []
    for number, stage in enumerate(stages):
        victim = VICTIM + number
        turn = Path(folder, str(number))
        if me == 0:
            turn.touch()
        if me < VICTIM or me == victim:
            deadline = time.monotonic() + 280
            while not turn.exists():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            session = Session([0, 1, victim], fabric)
            session.open(stage)
            if me == victim:
                _trap.append((stage, lambda: os.kill(os.getpid(), signal.SIGKILL)))
            results.append(session.suffer(PATIENCE))
            assert me != victim
    survivors = Session([0, 1], fabric)
    survivors.open()
    survivors.ep.close()
    return results


def wait_for_the_network(token: str) -> None:
    """Until this process and the coordination service hear each other again: TCP tries again ever later."""
    from pplx_jax import compat

    client = compat.coordination_client()
    assert client is not None
    deadline = time.monotonic() + 40
    while True:
        with contextlib.suppress(Exception):
            client.key_value_set_bytes(f"faults/{token}/{os.getpid()}", b"here")
            client.blocking_key_value_get_bytes(f"faults/{token}/{os.getpid()}", 1000)
            return
        assert time.monotonic() < deadline


def without_locked_memory(fabrics: Sequence[str]) -> str:
    """Groups in a process that may lock no memory."""
    import jax

    before = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, before[1]))
    try:
        for fabric in fabrics:
            session = Session(range(jax.process_count()), fabric)
            session.open()
            session.ep.close()
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, before)
    return "works"


# ---- from outside ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Result:
    """A fault at a stage: what each rank saw that was not its victim, and the victim where it lives."""

    fault: str
    stage: str
    seen: tuple[Seen, ...]

    def problem(self) -> str:
        """What is not as it should be; "" for nothing."""
        for one in self.seen:
            who = f"rank {one.rank}: "
            if one.closing > CLOSING:
                return f"{who}close() took {one.closing:.1f} s"
            if one.left:
                return f"{who}close() left {one.left}"
            # Who is stopped before its first exchange of the step comes to a group that has failed.
            refused = one.rank == VICTIM and one.outputs.startswith("raised ") and "Error: " in one.outputs
            if one.outputs not in ("right", "nan") and not refused:
                return f"{who}outputs: {one.outputs}"
            if self.fault == "pause":
                if one.kind or one.outputs != "right":
                    return f"{who}{one.kind or 'no error'}, outputs {one.outputs}: {one.text}"
                continue
            if self.fault == "sockets" and not one.kind and one.outputs == "right":
                continue  # connected anew before anything was lost
            if one.kind not in ("PeerError", "TimeoutError", "FabricError"):
                return f"{who}raised {one.kind or 'nothing'}: {one.text}"
            if one.rank != VICTIM:
                if f"rank {VICTIM}" not in one.text:
                    return f"{who}rank {VICTIM} is not named: {one.text}"
                if one.seconds > DEADLINE:
                    return f"{who}raised after {one.seconds:.1f} s"
        return ""

    def outcome(self) -> str:
        """In words."""
        if problem := self.problem():
            return f"**{problem}**"
        if self.fault == "pause":
            return "waited for"
        return "named, or mended" if self.fault == "sockets" else "named"

    def cell(self) -> str:
        """For the table: with the seconds of the survivor that raised last."""
        raised = [one.seconds for one in self.seen if one.kind and one.rank != VICTIM]
        return self.outcome() + (f", {max(raised):.1f} s" if raised else "")


@contextlib.contextmanager
def _helper(pool: HostPool, folder: Path) -> Iterator[None]:
    """Pulls the victim's cable when it asks for that, and puts it back at the end."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.005):
            if (folder / "wanted").exists():
                pool.network.unplug(VICTIM)
                (folder / "done").touch()
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        pool.network.plug(VICTIM)


def run(pool: HostPool, fault: str, stages: Sequence[str]) -> Iterator[Result]:
    """A fault that leaves its victim alive, at one stage after the other, each in a new group of the pool's
    processes."""
    members = tuple(range(RANKS))
    for stage in stages:
        pool.run(open_session, "session", members, "tcp", stage)
        with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
            folder = Path(name)
            if fault == "unplug":
                stack.enter_context(_helper(pool, folder))
            seen = pool.run(suffer, "session", fault, stage, name, timeout=60)
        if fault == "unplug":
            pool.run(wait_for_the_network, stage)
        # What the fault must not have spoilt: a new group of the same processes.
        pool.run(open_session, "session", members, "tcp")
        pool.run(close_session, "session")
        yield Result(fault, stage, tuple(seen))


def run_kills(fault: str, stages: Sequence[str]) -> Iterator[Result]:
    """Each stage kills another process of a pool; two survive all of that."""
    for first in range(0, len(stages), MOST_DEATHS):
        some = stages[first : first + MOST_DEATHS]
        dead = {VICTIM + number: signal.SIGKILL for number in range(len(some))}
        shm = fault == "kill shm"
        pool = (ProcessPool if shm else HostPool)(VICTIM + len(some), env=RECOVERABLE)
        pids: list[int] = []
        try:
            pids = pool.run("os:getpid")
            with tempfile.TemporaryDirectory() as folder:
                survivors = pool.run(
                    killed_one_by_one, some, "shm" if shm else "tcp", folder, expect_death=dead, timeout=280
                )[:VICTIM]
        finally:
            pool.close(graceful=False)  # JAX would wait for the dead
            for left in (path for pid in pids for path in Path("/dev/shm").glob(f"{pid}:*")):
                left.unlink(missing_ok=True)  # libfabric's: who is killed cannot
        for stage, *seen in zip(some, *survivors, strict=True):
            yield Result(fault, stage, tuple(seen))


# ---- the table ---------------------------------------------------------------------------------------------


def parse_cell(cell: str) -> tuple[str, float | None]:
    """Outcome and seconds of a cell, the latter None where nobody raised."""
    timed = re.fullmatch(r"(.*), (\d+\.\d) s", cell)
    return (timed[1], float(timed[2])) if timed else (cell, None)


def read_table(text: str) -> dict[tuple[str, str], str]:
    """Cells of the documented table by fault and stage; empty where there is none."""
    rest = text.partition(_MARKS[0])[2]
    lines = [line for line in rest.partition(_MARKS[1])[0].splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    if not cells or cells[0][1:] != list(FAULTS.values()):
        return {}
    return {(fault, row[0]): cell for row in cells[2:] for fault, cell in zip(FAULTS, row[1:], strict=True)}


def write_table(text: str, cells: dict[tuple[str, str], str]) -> str:
    """``text`` with a table of ``cells`` between its marks."""
    before, mark, rest = text.partition(_MARKS[0])
    _, end, after = rest.partition(_MARKS[1])
    assert mark, f"{DOCUMENT}: no {_MARKS[0]}"
    assert end, f"{DOCUMENT}: no {_MARKS[1]}"
    lines = ["| | " + " | ".join(FAULTS.values()) + " |", "|---" * (1 + len(FAULTS)) + "|"]
    lines += [
        f"| {stage} | " + " | ".join(cells[fault, stage] for fault in FAULTS) + " |" for stage in STAGES
    ]
    return "\n".join([before + mark, *lines, end + after])


def main() -> None:
    """Runs every fault at every stage and writes the table."""
    cells = {}
    with HostPool(RANKS) as pool:
        if not pool.network.isolated:
            sys.exit(f"there are no cables to pull: {pool.network.why}")
        for fault in FAULTS:
            for result in run_kills(fault, STAGES) if fault in KILLS else run(pool, fault, STAGES):
                cells[fault, result.stage] = result.cell()
                print(f"{fault:10} {result.stage:30} {result.cell()}", flush=True)
    DOCUMENT.write_text(write_table(DOCUMENT.read_text(), cells))


if __name__ == "__main__":
    # Under its importable name, as ranks know it.
    import faults

    faults.main()
