"""How the ranks of a group find each other: over ``jax.distributed``'s key-value store."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import ipaddress
import json
import secrets
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from pplx_jax import compat, errors
from pplx_jax.interfaces import interfaces


def host_identity() -> str:
    """Equal for processes that share a kernel, hence shared memory: host name and boot id."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        shm = Path("/dev/shm").stat().st_dev
    except OSError:
        boot, shm = "", 0
    return f"{socket.gethostname()}/{boot}/{shm}"


def address_towards(target: str | None) -> str:
    """The local IP address from which ``target`` (``host:port``) is reached. Sends nothing.

    On the target's own host that may be loopback (many hosts' names are in their /etc/hosts), which no other
    host reaches: then it is the first interface that is up.
    """
    host = (target or "127.0.0.1").rsplit(":", 1)[0].strip("[]") or "127.0.0.1"
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)
            own = str(probe.getsockname()[0])
    except OSError as error:
        raise errors.FabricError(f"no route towards {host}: {error}") from error
    if not ipaddress.ip_address(own).is_loopback:
        return own
    outside = [one for one in interfaces() if one.up and one.addresses and not one.loopback]
    if not outside:
        raise errors.FabricError(
            f"the route towards {host} is loopback, which no other host reaches, and no other interface is "
            "up with an address: bring one up, or name one with PPLX_SOCKET_IFNAME"
        )
    return outside[0].addresses[0]


_SECRET_KEY = "pplx_jax/secret"


def job_secret(timeout: float) -> bytes:
    """32 random bytes that all processes of the job have, and nobody who cannot ask the coordination service.

    Whichever process asks first makes them. A process that is a job by itself has its own.

    Raises:
      TimeoutError: the coordination service did not answer within ``timeout`` seconds.
    """
    return _own_secret() if compat.coordination_client() is None else _shared_secret(timeout)


@functools.cache
def _own_secret() -> bytes:
    return secrets.token_bytes(32)


@functools.cache
def _shared_secret(timeout: float) -> bytes:
    client = compat.coordination_client()
    assert client is not None
    with contextlib.suppress(Exception):  # somebody was first, or it does not answer: then it won't below
        client.key_value_set_bytes(_SECRET_KEY, secrets.token_bytes(32))
    try:
        return client.blocking_key_value_get_bytes(_SECRET_KEY, int(timeout * 1000) + 1)
    except Exception as error:
        raise errors.TimeoutError(
            f"the coordination service gave no secret for this job within {timeout:g} s: {error}"
        ) from None


@dataclasses.dataclass(frozen=True)
class Bootstrap:
    """All-to-all exchange of small byte strings between the processes of one group.

    Args:
      scope: prefix of every key; equal on all processes, used once.
      process: this process's index in ``processes``.
      processes: JAX process indices that take part.
      timeout: seconds to wait for the others.
    """

    scope: str
    process: int
    processes: tuple[int, ...]
    timeout: float

    def exchange(self, stage: str, value: bytes) -> Mapping[int, bytes]:
        """Publishes ``value``; returns everybody's, by process index.

        Raises:
          TimeoutError: naming the first process that published nothing in time.
          FabricError: without ``jax.distributed`` although there are several processes.
        """
        if self.processes == (self.process,):
            return {self.process: value}
        client = compat.coordination_client()
        if client is None:
            raise errors.FabricError(
                "the mesh spans several processes but jax.distributed is not initialised: call "
                "jax.distributed.initialize() first"
            )
        client.key_value_set_bytes(self._key(stage, self.process), value)
        deadline = time.monotonic() + self.timeout
        values = {}
        for process in self.processes:
            left = max(0.001, deadline - time.monotonic())
            try:
                values[process] = client.blocking_key_value_get_bytes(
                    self._key(stage, process), int(left * 1000) + 1
                )
            except Exception as error:
                raise errors.TimeoutError(
                    f"process {process} did not reach stage '{stage}' of connecting {self.scope} within "
                    f"{self.timeout:g} s: is it running the same program? ({error})"
                ) from error
        return values

    def exchange_json(self, stage: str, value: object) -> Mapping[int, object]:
        """The same for values that JSON can hold."""
        return {p: json.loads(v) for p, v in self.exchange(stage, json.dumps(value).encode()).items()}

    def barrier(self, stage: str) -> None:
        """Returns once every process is here."""
        self.exchange(f"{stage}/barrier", b"here")

    def forget(self, *stages: str) -> None:
        """Takes back what this process published in ``stages``: everybody has read it."""
        client = compat.coordination_client()
        if client is None or self.processes == (self.process,):
            return
        for stage in stages:
            with contextlib.suppress(Exception):  # it only takes room
                client.key_value_delete(self._key(stage, self.process))

    def _key(self, stage: str, process: int) -> str:
        return f"pplx_jax/{self.scope}/{stage}/{process}"
