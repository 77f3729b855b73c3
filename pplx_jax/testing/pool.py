"""Processes that form one JAX program, from the side of the one that starts them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self

from pplx_jax.testing.network import mark
from pplx_jax.testing.rank import Setup, Target

__all__ = ["Outcome", "ProcessFailure", "ProcessPool", "run_processes"]

Status = Literal["ok", "raised", "died", "timeout", "stopped"]

_MAX_OUTPUT = 20_000  # characters of a rank's output that an error message shows
_GRACE = 2.0  # seconds that the other ranks get to finish once one has failed
_DEVICE_COUNT_FLAG = "--xla_force_host_platform_device_count"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How one rank's call ended.

    ``status`` is ``"ok"`` (``value`` is what it returned), ``"raised"`` (``error`` is the exception where it
    could be pickled, ``text`` its traceback), ``"died"`` (``exit_code`` is negative for a signal),
    ``"timeout"`` (``stderr`` holds the stacks of its threads) or ``"stopped"`` (killed because another rank
    failed).
    """

    rank: int
    status: Status
    value: Any = None
    error: BaseException | None = None
    text: str = ""
    exit_code: int | None = None
    stdout: str = ""
    stderr: str = ""

    @property
    def ok(self) -> bool:
        """Whether the rank returned a value."""
        return self.status == "ok"

    def describe(self) -> str:
        """Return one line: the rank and how it ended."""
        if self.status == "raised":
            last = self.text.strip().splitlines()[-1] if self.text.strip() else "an exception"
            return f"rank {self.rank} raised {last}"
        if self.status == "died":
            return f"rank {self.rank} died: {_exit_text(self.exit_code)}"
        if self.status == "timeout":
            return f"rank {self.rank} did not return in time"
        if self.status == "stopped":
            return f"rank {self.rank} was stopped because another rank failed"
        return f"rank {self.rank} returned"


class ProcessFailure(Exception):
    """A rank raised, died or did not return in time. ``outcomes`` holds every rank's :class:`Outcome`."""

    def __init__(self, what: str, outcomes: Sequence[Outcome] = ()) -> None:
        super().__init__(what)
        self.outcomes = list(outcomes)


def _exit_text(code: int | None) -> str:
    if code is None:
        return "unknown exit status"
    if code < 0:
        try:
            return f"killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"killed by signal {-code}"
    return f"exit status {code}"


# ---- the parent's side -------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Rank:
    index: int
    process: subprocess.Popen[bytes]
    connection: Connection
    lifeline: int
    files: tuple[IO[bytes], IO[bytes]]
    marks: list[int] = dataclasses.field(default_factory=lambda: [0, 0])

    def mark(self) -> None:
        """Let `output` return only what is written from now on."""
        self.marks = [os.fstat(file.fileno()).st_size for file in self.files]

    def output(self) -> tuple[str, str]:
        texts = []
        for file, start in zip(self.files, self.marks, strict=True):
            size = os.fstat(file.fileno()).st_size
            start = max(start, size - 50 * _MAX_OUTPUT)
            texts.append(os.pread(file.fileno(), size - start, start).decode(errors="replace"))
        return texts[0], texts[1]

    def signal(self, number: signal.Signals) -> None:
        """Signal the rank and whatever it started."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, number)

    def poll(self) -> int | None:
        """Its exit status, None while it runs. What it started ends with it.

        Its process group is killed before the rank is reaped: as long as the rank is a zombie, nobody else
        can have the group's number.
        """
        if self.process.returncode is None:
            with contextlib.suppress(ChildProcessError):
                flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
                if os.waitid(os.P_PID, self.process.pid, flags) is None:
                    return None
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.poll()

    def wait(self, timeout: float) -> None:
        """Wait until it has ended, at most ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)

    def release(self) -> None:
        self.connection.close()
        with contextlib.suppress(OSError):
            os.close(self.lifeline)
        for file in self.files:
            file.close()


def _xla_flags(inherited: str, devices: int) -> str:
    kept = [flag for flag in inherited.split() if not flag.startswith(_DEVICE_COUNT_FLAG)]
    return " ".join([*kept, f"{_DEVICE_COUNT_FLAG}={devices}"])


class ProcessPool:
    """``num_processes`` ranks of one JAX program that stay alive and run one function after another.

    Args:
        num_processes: ranks, at least 1.
        devices_per_process: virtual CPU devices, or GPUs, of each rank, at least 1.
        timeout: seconds that a call may take unless :meth:`run` says otherwise.
        env: environment variables to set in the ranks (``None`` removes one), on top of this process's.
        distributed: whether to call :func:`jax.distributed.initialize`; by default where there are several.
        start_timeout: seconds within which all ranks must be connected.

    The ranks start at the first :meth:`run` and, after a call that left some of them dead or stuck, afresh
    at the next. State that functions keep in module globals lives from call to call until then. Use it as a
    context manager, or call :meth:`close`.
    """

    def __init__(
        self,
        num_processes: int,
        *,
        devices_per_process: int = 1,
        timeout: float = 120.0,
        env: Mapping[str, str | None] | None = None,
        distributed: bool | None = None,
        start_timeout: float = 120.0,
    ) -> None:
        for name, value in (("num_processes", num_processes), ("devices_per_process", devices_per_process)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: must be an integer of at least 1, is {value!r}")
        for name, seconds in (("timeout", timeout), ("start_timeout", start_timeout)):
            if not seconds > 0:
                raise ValueError(f"{name}: must be a positive number of seconds, is {seconds!r}")
        self.num_processes = num_processes
        self.devices_per_process = devices_per_process
        self.timeout = timeout
        self._env = dict(env or {})
        self._distributed = num_processes > 1 if distributed is None else distributed
        self._start_timeout = start_timeout
        self._ranks: list[_Rank] = []
        self._coordinator: tuple[subprocess.Popen[bytes], int] | None = None
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(graceful=error is None)

    @property
    def pids(self) -> list[int]:
        """Process ids by rank; empty while the ranks are not running. Each leads a process group."""
        return [rank.process.pid for rank in self._ranks]

    def run(
        self,
        fn: Callable[..., Any] | str | os.PathLike[str],
        *args: Any,
        timeout: float | None = None,
        allow_failures: bool = False,
        expect_death: Mapping[int, int] | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """Call ``fn(*args, **kwargs)`` on every rank and return what each returned, by rank.

        Args:
            fn: a function at the top level of an importable module, ``"module:function"``, or the path of a
                ``.py`` script (which gets ``args`` as ``sys.argv[1:]`` and returns ``None``). Ranks import it
                by name; its folder is put on their ``sys.path``.
            args: positional arguments; must pickle, as must results. ``kwargs`` likewise.
            timeout: seconds within which all ranks must have returned; the pool's by default.
            allow_failures: return a list of :class:`Outcome` instead, whatever happened, and give every rank
                the whole timeout.
            expect_death: ``{rank: signal}``: these ranks must be killed by that signal (they may kill
                themselves) and every other rank must return. The dead ranks' results are ``None``.

        Raises:
            ProcessFailure: a rank raised (its exception is the ``__cause__``), died or timed out.
        """
        if self._closed:
            raise ValueError("the pool is closed")
        expected = dict(expect_death or {})
        if bad := [rank for rank in expected if not 0 <= rank < self.num_processes]:
            raise ValueError(f"expect_death: rank {bad[0]} is not in 0..{self.num_processes - 1}")
        limit = self.timeout if timeout is None else timeout
        if not limit > 0:
            raise ValueError(f"timeout: must be a positive number of seconds, is {limit!r}")
        request = pickle.dumps((Target.of(fn), pickle.dumps((args, kwargs))))
        self._ensure_started()
        for rank in self._ranks:
            rank.mark()
            with contextlib.suppress(OSError):  # it died since the last call: _collect finds out
                rank.connection.send_bytes(request)
        patient = allow_failures or bool(expected)
        outcomes = self._collect(limit, patient=patient)
        if allow_failures:
            return outcomes
        name = fn.__qualname__ if callable(fn) else os.fspath(fn)
        return _values(outcomes, expected, f"{name} on {self.num_processes} processes", limit)

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to a rank and whatever it started; for use from another thread during a call."""
        self._ranks[rank].signal(signal.Signals(number))

    def close(self, *, graceful: bool = True) -> None:
        """End the ranks: through their exit handlers, within 15 s, or by SIGKILL. Idempotent."""
        self._closed = True
        self._stop(graceful=graceful)

    # -- internals

    def _ensure_started(self) -> None:
        if self._ranks and all(rank.poll() is None for rank in self._ranks):
            return
        self._stop(graceful=False)
        with contextlib.ExitStack() as reservation:
            coordinator = reservation.enter_context(self._reserve_address()) if self._distributed else None
            try:
                if coordinator is not None:
                    self._coordinator = self._spawn_coordinator(coordinator)
                for index in range(self.num_processes):
                    self._ranks.append(self._spawn(index))
                    setup = self._setup(index, coordinator)
                    self._ranks[-1].connection.send_bytes(pickle.dumps(setup))
                outcomes = self._collect(self._start_timeout, patient=False)
            except BaseException:
                self._stop(graceful=False)
                raise
        _values(outcomes, {}, f"starting {self.num_processes} processes", self._start_timeout)

    # -- what a HostPool does otherwise

    def _popen(self, index: int | None, command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """Start a rank, or the coordination service (None)."""
        return subprocess.Popen(command, **options)

    def _reserve_address(self) -> contextlib.AbstractContextManager[str | None]:
        """Where the coordination service is to listen; None where the ranks have their own."""
        return _reserve_port()

    def _setup(self, index: int, coordinator: str | None) -> Setup:
        return Setup(index, self.num_processes, coordinator, self._start_timeout, self.devices_per_process)

    def _environment(self, index: int | None = None) -> dict[str, str]:
        env = dict(os.environ)
        env["JAX_PLATFORMS"] = "cpu"
        env["JAX_CPU_COLLECTIVES_IMPLEMENTATION"] = "gloo"
        env["XLA_FLAGS"] = _xla_flags(env.get("XLA_FLAGS", ""), self.devices_per_process)
        env["PYTHONPATH"] = os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)
        env["PYTHONUNBUFFERED"] = "1"
        env.update(mark())
        for name, value in self._env.items():
            if value is None:
                env.pop(name, None)
            else:
                env[name] = value
        return env

    def _spawn_coordinator(self, address: str) -> tuple[subprocess.Popen[bytes], int]:
        alive, lifeline = os.pipe()
        try:
            process = self._popen(
                None,
                [
                    sys.executable,
                    "-c",
                    "from pplx_jax.testing.rank import coordinator_main; coordinator_main()",
                    address,
                    str(self.num_processes),
                    str(alive),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=self._environment(),
                pass_fds=(alive,),
                start_new_session=True,
            )
        except BaseException:
            os.close(lifeline)
            raise
        finally:
            os.close(alive)
        return process, lifeline

    def _spawn(self, index: int) -> _Rank:
        env = self._environment(index)
        ours, theirs = socket.socketpair()
        alive, lifeline = os.pipe()
        files = (tempfile.TemporaryFile(), tempfile.TemporaryFile())  # noqa: SIM115 - closed by release
        try:
            process = self._popen(
                index,
                [
                    sys.executable,
                    "-c",
                    "from pplx_jax.testing.rank import rank_main; rank_main()",
                    str(theirs.fileno()),
                    str(alive),
                ],
                stdin=subprocess.DEVNULL,
                stdout=files[0],
                stderr=files[1],
                env=env,
                pass_fds=(theirs.fileno(), alive),
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            os.close(lifeline)
            raise
        finally:
            theirs.close()
            os.close(alive)
        return _Rank(index, process, Connection(ours.detach()), lifeline, files)

    def _collect(self, limit: float, *, patient: bool) -> list[Outcome]:
        """Wait for one reply of every rank; stop the ranks where some did not give one."""
        deadline = time.monotonic() + limit
        outcomes: dict[int, Outcome] = {}
        failed = False
        try:
            while len(outcomes) < self.num_processes:
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                waiting = [rank for rank in self._ranks if rank.index not in outcomes]
                wait([rank.connection for rank in waiting], timeout=min(left, 0.2))
                for rank in waiting:
                    outcome = self._poll(rank)
                    if outcome is None:
                        continue
                    outcomes[rank.index] = outcome
                    if not outcome.ok and not failed:
                        failed = True
                        if not patient:
                            deadline = min(deadline, time.monotonic() + _GRACE)
        except BaseException:  # Ctrl-C, or pytest-timeout
            self._stop(graceful=False)
            raise
        late = [rank for rank in self._ranks if rank.index not in outcomes]
        stopped = failed and not patient
        if late and not stopped:
            for rank in late:
                rank.signal(signal.SIGUSR1)  # faulthandler prints all stacks
            time.sleep(1.0)
        for rank in late:
            stdout, stderr = rank.output()
            status: Status = "stopped" if stopped else "timeout"
            outcomes[rank.index] = Outcome(rank.index, status, stdout=stdout, stderr=stderr)
        if late or any(outcome.status == "died" for outcome in outcomes.values()):
            self._stop(graceful=False)
        return [outcomes[index] for index in range(self.num_processes)]

    @staticmethod
    def _poll(rank: _Rank) -> Outcome | None:
        try:
            if rank.connection.poll():
                kind, payload = rank.connection.recv()
                stdout, stderr = rank.output()
                if kind == "ok":
                    value = pickle.loads(payload)
                    return Outcome(rank.index, "ok", value=value, stdout=stdout, stderr=stderr)
                text, pickled = payload
                error = pickle.loads(pickled) if pickled is not None else None
                return Outcome(rank.index, "raised", error=error, text=text, stdout=stdout, stderr=stderr)
            if rank.poll() is None:
                return None
        except (EOFError, OSError):
            pass
        # The connection or the process is gone, or both in a moment.
        rank.wait(5.0)
        stdout, stderr = rank.output()
        return Outcome(rank.index, "died", exit_code=rank.poll(), stdout=stdout, stderr=stderr)

    def _stop(self, *, graceful: bool) -> None:
        ranks, self._ranks = self._ranks, []
        if graceful:
            for rank in ranks:
                with contextlib.suppress(OSError):
                    rank.connection.send_bytes(b"")
            deadline = time.monotonic() + 15.0
            for rank in ranks:
                rank.wait(max(0.0, deadline - time.monotonic()))
        for rank in ranks:
            rank.signal(signal.SIGKILL)
        for rank in ranks:
            rank.wait(60.0)  # a killed process may take its time to give its memory back
            rank.release()
        if self._coordinator is not None:  # last: ranks end themselves once it is gone
            process, lifeline = self._coordinator
            self._coordinator = None
            os.close(lifeline)
            process.kill()
            process.wait()


@contextlib.contextmanager
def _reserve_port() -> Iterator[str]:
    """Yield a 127.0.0.1 address whose port nobody else gets until rank 0's coordinator listens on it.

    The coordinator (gRPC) binds with SO_REUSEPORT, so a socket of ours that is bound with it, and does not
    listen, keeps the port without being in the way.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as keeper:
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        keeper.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{keeper.getsockname()[1]}"


def _values(outcomes: Sequence[Outcome], expected: Mapping[int, int], what: str, limit: float) -> list[Any]:
    bad = []
    lines = []
    for outcome in outcomes:
        if outcome.rank in expected:
            wanted = expected[outcome.rank]
            if outcome.status != "died" or outcome.exit_code != -wanted:
                bad.append(outcome)
                lines.append(f"{outcome.describe()}, but was expected to be {_exit_text(-wanted)}")
        elif not outcome.ok:
            bad.append(outcome)
            lines.append(outcome.describe())
    if not bad:
        return [outcome.value for outcome in outcomes]
    # Culprits before those that only fell with them.
    order = {"raised": 0, "died": 1, "timeout": 2, "ok": 3, "stopped": 4}
    bad.sort(key=lambda outcome: (order[outcome.status], outcome.rank))
    if any(outcome.status == "timeout" for outcome in bad):
        what += f" (timeout {limit:g} s)"
    parts = [f"{what}: " + "; ".join(lines)]
    for outcome in bad:
        parts.append(f"---- rank {outcome.rank}: {outcome.status} ----")
        if outcome.text:
            parts.append(outcome.text.rstrip())
        for name, text in (("stdout", outcome.stdout), ("stderr", outcome.stderr)):
            if text.strip():
                cut = "…" + text[-_MAX_OUTPUT:] if len(text) > _MAX_OUTPUT else text
                parts.append(f"-- {name}\n{cut.rstrip()}")
    failure = ProcessFailure("\n".join(parts), outcomes)
    raise failure from next((outcome.error for outcome in bad if outcome.error is not None), None)


def run_processes(
    fn_or_script: Callable[..., Any] | str | os.PathLike[str],
    num_processes: int,
    *,
    devices_per_process: int = 1,
    timeout: float = 120.0,
    env: Mapping[str, str | None] | None = None,
    args: Sequence[Any] = (),
    allow_failures: bool = False,
    expect_death: Mapping[int, int] | None = None,
    distributed: bool | None = None,
) -> list[Any]:
    """Start ``num_processes`` fresh processes, call a function once in each, end them.

    The arguments are those of :class:`ProcessPool` and :meth:`ProcessPool.run`; ``timeout`` (seconds) is
    the call's, on top of which the processes get the same time to start.
    """
    with ProcessPool(
        num_processes,
        devices_per_process=devices_per_process,
        timeout=timeout,
        env=env,
        distributed=distributed,
        start_timeout=timeout,
    ) as pool:
        return pool.run(fn_or_script, *args, allow_failures=allow_failures, expect_death=expect_death)
