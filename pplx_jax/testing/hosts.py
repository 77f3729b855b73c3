"""One JAX process on each of several hosts of a :class:`Network`."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pplx_jax.testing.network import Network, remove_leftovers
from pplx_jax.testing.pool import ProcessPool
from pplx_jax.testing.rank import Setup

__all__ = ["HostPool", "slurm_environment"]

Launch = Literal["jax", "slurm"]


def slurm_environment(network: Network, rank: int, job: int) -> dict[str, str]:
    """What ``srun --ntasks-per-node=1`` sets on host ``rank``, as far as launchers of jobs read it.

    Where the hosts are not isolated, all ranks are tasks of one node, ``localhost``.
    """
    count = len(network.hosts)
    nodes = count if network.isolated else 1
    names = "localhost"
    if nodes > 1:
        names = f"node[0-{nodes - 1}]"
    elif network.isolated:
        names = "node0"
    tasks = f"1(x{nodes})" if nodes > 1 else str(count // nodes)
    return {
        "SLURM_JOB_ID": str(job),
        "SLURM_JOB_NODELIST": names,
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_NNODES": str(nodes),
        "SLURM_NTASKS": str(count),
        "SLURM_NPROCS": str(count),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": names,
        "SLURM_STEP_NUM_NODES": str(nodes),
        "SLURM_STEP_NUM_TASKS": str(count),
        "SLURM_STEP_TASKS_PER_NODE": tasks,
        "SLURM_TASKS_PER_NODE": tasks,
        "SLURM_NODEID": str(rank if nodes > 1 else 0),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(0 if network.isolated else rank),
        "SLURMD_NODENAME": network.hosts[rank].name if network.isolated else "localhost",
    }


class HostPool(ProcessPool):
    """A :class:`ProcessPool` whose rank i is alone on host i of a :class:`Network`, its ``network``.

    Args:
        num_hosts: ranks, each on a host of its own.
        devices_per_host: virtual CPU devices of each rank.
        nics: interfaces of each host.
        launch: ``"jax"``: ``jax.distributed`` is told everything, and the coordination service runs beside
            the hosts, so that it outlives any of them. ``"slurm"``: each rank has the environment of a SLURM
            step and calls ``jax.distributed.initialize()``, which finds the job by itself and runs the
            service in rank 0: all ranks end when that dies.
        isolate: as for :class:`Network`. Where hosts are not isolated, ``PPLX_FABRIC`` is ``tcp`` unless
            ``env`` or the caller's environment says otherwise, so that ranks don't meet in shared memory.
        timeout, env, distributed, start_timeout: as for :class:`ProcessPool`.

    Raises:
        OSError: ``isolate`` is True, and hosts cannot be isolated here.
    """

    def __init__(
        self,
        num_hosts: int,
        *,
        devices_per_host: int = 1,
        nics: int = 1,
        launch: Launch = "jax",
        isolate: bool | None = None,
        timeout: float = 120.0,
        env: Mapping[str, str | None] | None = None,
        distributed: bool | None = None,
        start_timeout: float = 120.0,
    ) -> None:
        if launch not in ("jax", "slurm"):
            raise ValueError(f"launch: must be 'jax' or 'slurm', is {launch!r}")
        super().__init__(
            num_hosts,
            devices_per_process=devices_per_host,
            timeout=timeout,
            env=env,
            distributed=distributed,
            start_timeout=start_timeout,
        )
        self.launch = launch
        self._job = 0
        remove_leftovers()
        self.network = Network(num_hosts, nics, isolate=isolate)

    def close(self, *, graceful: bool = True) -> None:
        """End the ranks as :meth:`ProcessPool.close` does, and their network with them."""
        try:
            super().close(graceful=graceful)
        finally:
            self.network.close()

    # -- internals

    def _popen(self, index: int | None, command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        return self.network.popen(index, command, **options)

    def _reserve_address(self) -> contextlib.AbstractContextManager[str | None]:
        if self.launch == "slurm":
            # SLURM numbers its jobs, and JAX makes a port of that.
            self._job = random.SystemRandom().randrange(1, 1 << 24)
            return contextlib.nullcontext(None)
        if not self.network.isolated:
            return super()._reserve_address()
        # Nobody else is on that address, but a service that has just ended may be in the port's way.
        port = random.SystemRandom().randrange(20000, 30000)
        return contextlib.nullcontext(f"{self.network.coordinator_address}:{port}")

    def _setup(self, index: int, coordinator: str | None) -> Setup:
        detect = self._distributed and self.launch == "slurm"
        return dataclasses.replace(super()._setup(index, coordinator), detect=detect)

    def _environment(self, index: int | None = None) -> dict[str, str]:
        env = super()._environment(index)
        # A job that runs the tests is not theirs.
        for name in [name for name in env if name.startswith(("SLURM_", "SLURMD_"))]:
            del env[name]
        if self.launch == "slurm" and index is not None:
            env.update(slurm_environment(self.network, index, self._job))
        if not self.network.isolated and not env.get("PPLX_FABRIC") and "PPLX_FABRIC" not in self._env:
            env["PPLX_FABRIC"] = "tcp"
        if self.network.isolated and "PPLX_SOCKET_IFNAME" not in self._env:
            env.pop("PPLX_SOCKET_IFNAME", None)  # names this machine's interfaces
        return env
