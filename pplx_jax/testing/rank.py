"""The side of a test's process: what :mod:`pplx_jax.testing` starts, and what it sends there."""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import importlib
import importlib.util
import os
import pickle
import runpy
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

# ---- what travels to a rank --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Target:
    """A function by name, or a script by path; resolved in the rank."""

    module: str
    name: str
    file: str | None

    @staticmethod
    def of(target: Callable[..., Any] | str | os.PathLike[str]) -> Target:
        """How a rank finds the function or script."""
        if isinstance(target, str | os.PathLike):
            text = os.fspath(target)
            if text.endswith(".py"):
                if not Path(text).is_file():
                    raise ValueError(f"fn: there is no script {text!r}")
                return Target("", "", str(Path(text).resolve()))
            module, colon, name = text.partition(":")
            if not colon or not module or not name:
                raise ValueError(f"fn: {text!r} is neither 'module:function' nor the path of a .py file")
            spec = importlib.util.find_spec(module)
            return Target(module, name, spec.origin if spec is not None else None)
        name = getattr(target, "__qualname__", "")
        module = getattr(target, "__module__", "")
        if not callable(target) or not name or not module:
            raise TypeError(f"fn: must be a function, 'module:function' or a script's path, is {target!r}")
        if "<" in name:  # <lambda>, <locals>
            raise ValueError(f"fn: {name} is not at the top level of its module, so ranks cannot import it")
        loaded = sys.modules.get(module)
        return Target(module, name, getattr(loaded, "__file__", None))

    def load(self) -> Callable[..., Any]:
        """On the rank: the function itself."""
        if not self.module:
            return self._run_script
        value: Any = self._import()
        for part in self.name.split("."):
            value = getattr(value, part)
        if not callable(value):
            raise TypeError(f"fn: {self.module}:{self.name} is not callable")
        return value  # type: ignore[no-any-return]

    def _run_script(self, *args: object) -> None:
        assert self.file is not None
        sys.argv = [self.file, *map(str, args)]
        sys.path.insert(0, str(Path(self.file).parent))
        runpy.run_path(self.file, run_name="__main__")

    def _import(self) -> ModuleType:
        if self.file is not None:
            folder = Path(self.file).parent
            if Path(self.file).name == "__init__.py":
                folder = folder.parent
            for _ in range(self.module.count(".")):
                folder = folder.parent
            if str(folder) not in sys.path:
                sys.path.insert(0, str(folder))
        if self.module != "__main__":
            return importlib.import_module(self.module)
        # The caller was a script: its code runs again under another name, so that
        # `if __name__ == "__main__"` does not.
        if self.file is None:
            raise ValueError("fn: functions typed into an interpreter cannot be imported by ranks")
        name = "__pplx_main__"
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, self.file)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            spec.loader.exec_module(module)
        return sys.modules[name]


# ---- the rank's side ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a rank is told when it starts."""

    rank: int
    num_processes: int
    coordinator: str | None
    start_timeout: float
    devices_per_process: int = 1
    detect: bool = False  # jax.distributed finds coordinator and rank in the environment


def _watch_lifeline(descriptor: int) -> None:
    """End this process when the one that started it is gone: its end of the pipe closes."""
    with contextlib.suppress(OSError):
        os.read(descriptor, 1)
    if os.getpgrp() == os.getpid():  # and whatever it started
        os.killpg(0, signal.SIGKILL)
    os._exit(70)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def _reply(call: Callable[[], Any]) -> tuple[str, Any]:
    try:
        value = call()
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code in (None, 0):
            return "ok", pickle.dumps(None)
        text = "".join(traceback.format_exception(error))
        try:
            pickled = pickle.dumps(error)
            pickle.loads(pickled)
        except Exception:
            pickled = None
        return "raised", (text, pickled)
    try:
        return "ok", pickle.dumps(value)
    except Exception as error:
        text = f"TypeError: the returned {type(value).__name__} cannot be pickled: {error}"
        return "raised", (text, None)


# jax.distributed puts the coordination service into rank 0, and every process ends itself (SIGABRT) once the
# service is gone. Tests that kill rank 0 want to see what the survivors do, so the service runs in a process
# of its own. (The JAX internals that this takes are in compat.py.)


def coordinator_main() -> None:
    """Run the coordination service until the parent is gone; the entry point of its process."""
    from pplx_jax import compat

    address, num_processes, lifeline = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    service = compat.coordination_service(address, num_processes)
    assert service is not None  # and alive as long as this function runs
    _watch_lifeline(lifeline)


def _start(setup: Setup) -> None:
    if setup.coordinator is None and not setup.detect:
        return
    import jax

    if setup.detect:
        jax.distributed.initialize(initialization_timeout=max(1, int(setup.start_timeout)))
        if (jax.process_index(), jax.process_count()) != (setup.rank, setup.num_processes):
            raise RuntimeError(
                f"jax.distributed took this for process {jax.process_index()} of {jax.process_count()}, "
                f"it is {setup.rank} of {setup.num_processes}"
            )
        return
    from pplx_jax import compat

    compat.use_external_coordination_service()
    jax.distributed.initialize(
        setup.coordinator,
        setup.num_processes,
        setup.rank,
        local_device_ids=_own_gpus(setup),
        initialization_timeout=max(1, int(setup.start_timeout)),
    )


def _own_gpus(setup: Setup) -> list[int] | None:
    # Without a choice every process of a host would take all of its GPUs.
    if not os.environ.get("JAX_PLATFORMS", "").startswith(("cuda", "gpu")):
        return None
    first = setup.rank * setup.devices_per_process
    return list(range(first, first + setup.devices_per_process))


def rank_main() -> None:
    """Serve calls until the parent closes the connection; the entry point of a rank's process."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True, chain=False)
    connection = Connection(int(sys.argv[1]))
    threading.Thread(target=_watch_lifeline, args=(int(sys.argv[2]),), daemon=True).start()
    setup: Setup = pickle.loads(connection.recv_bytes())
    reply = _reply(lambda: _start(setup))
    connection.send(reply)
    while reply[0] == "ok":
        try:
            request = connection.recv_bytes()
        except (EOFError, OSError):
            break
        if not request:  # a graceful end: run exit handlers, but never wait for long
            watchdog = threading.Timer(10.0, os._exit, (0,))
            watchdog.daemon = True
            watchdog.start()
            _flush()
            return

        def call(request: bytes = request) -> Any:
            target, packed = pickle.loads(request)
            function = target.load()
            args, kwargs = pickle.loads(packed)
            return function(*args, **kwargs)

        message = _reply(call)
        _flush()
        try:
            connection.send(message)
        except OSError:
            break
    _flush()
    os._exit(70)
