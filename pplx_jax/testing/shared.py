"""Pools of processes that the tests of a session share: what the pytest fixtures give."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Generic, TypeVar

from pplx_jax.testing.hosts import HostPool, Launch
from pplx_jax.testing.pool import ProcessPool

__all__ = ["Hosts", "Processes"]

P = TypeVar("P", bound=ProcessPool)
Env = Mapping[str, str | None] | None


class _Shared(Generic[P]):
    """Pools by shape. At most ``keep`` stay alive, the least recently used one is ended first."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._pools: dict[Hashable, P] = {}

    def _get(self, key: Hashable, make: Callable[[], P]) -> P:
        pool = self._pools.pop(key, None)
        if pool is None:
            while len(self._pools) >= self._keep:
                self._pools.pop(next(iter(self._pools))).close()
            pool = make()
        self._pools[key] = pool
        return pool

    def close(self) -> None:
        """End all pools."""
        while self._pools:
            self._pools.popitem()[1].close()


class Processes(_Shared[ProcessPool]):
    """What the fixture ``processes`` gives: pools by shape, shared by the tests of a session.

    At most ``keep`` pools stay alive, the least recently used one is ended first.
    """

    def __init__(self, keep: int = 2) -> None:
        super().__init__(keep)

    def pool(self, num_processes: int, *, devices_per_process: int = 1, env: Env = None) -> ProcessPool:
        """Return the running pool of this shape and environment, or a new one."""
        return self._get(
            (num_processes, devices_per_process, tuple(sorted((env or {}).items()))),
            lambda: ProcessPool(num_processes, devices_per_process=devices_per_process, env=env),
        )

    def run(
        self,
        fn: Callable[..., Any] | str | os.PathLike[str],
        num_processes: int,
        *args: Any,
        devices_per_process: int = 1,
        env: Env = None,
        **kwargs: Any,
    ) -> list[Any]:
        """Call ``fn(*args)`` on the ranks of the pool; ``kwargs`` are those of :meth:`ProcessPool.run`."""
        pool = self.pool(num_processes, devices_per_process=devices_per_process, env=env)
        return pool.run(fn, *args, **kwargs)


class Hosts(_Shared[HostPool]):
    """What the fixture ``hosts`` gives: :class:`HostPool` by shape, shared by the tests of a session.

    At most ``keep`` pools stay alive, the least recently used one is ended first.
    """

    def __init__(self, keep: int = 1) -> None:
        super().__init__(keep)

    def pool(
        self,
        num_hosts: int,
        *,
        devices_per_host: int = 1,
        nics: int = 1,
        launch: Launch = "jax",
        env: Env = None,
    ) -> HostPool:
        """Return the running pool of this shape and environment, or a new one."""
        return self._get(
            (num_hosts, devices_per_host, nics, launch, tuple(sorted((env or {}).items()))),
            lambda: HostPool(num_hosts, devices_per_host=devices_per_host, nics=nics, launch=launch, env=env),
        )

    def run(
        self,
        fn: Callable[..., Any] | str | os.PathLike[str],
        num_hosts: int,
        *args: Any,
        devices_per_host: int = 1,
        nics: int = 1,
        launch: Launch = "jax",
        env: Env = None,
        **kwargs: Any,
    ) -> list[Any]:
        """Call ``fn(*args)`` on every host; ``kwargs`` are those of :meth:`ProcessPool.run`."""
        pool = self.pool(num_hosts, devices_per_host=devices_per_host, nics=nics, launch=launch, env=env)
        return pool.run(fn, *args, **kwargs)
