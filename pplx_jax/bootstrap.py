"""How the ranks of a group find each other: over ``jax.distributed``'s key-value store."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import ipaddress
import json
import logging
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from pplx_jax import compat, environment, errors
from pplx_jax.interfaces import interfaces

_logger = logging.getLogger("pplx_jax")


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


def _shared_secret(timeout: float) -> bytes:
    # Asked for each time: after shutdown() and initialize() the service is another one, with another secret.
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


#: Keys that a process has published in a scope and not yet taken back.
_published: dict[tuple[str, int], list[str]] = {}
#: Seconds after which a wait is logged.
_PATIENCE = 10.0
#: Seconds for which the service itself is asked to wait for a key. Who doesn't wait until it is set leaves a
#: callback there until it is, or for good: so once a key, and polled from then on.
_BLOCKING = 1.0


class BegunAnewError(Exception):
    """Another process has given up connecting, or died, and begins anew: so must this one. Never leaves
    ``Membership``.

    Attributes:
      process: which.
    """

    def __init__(self, process: int) -> None:
        super().__init__(f"process {process} began to connect anew")
        self.process = process


class Bootstrap:
    """One attempt to connect some processes: names it, and exchanges small byte strings under that name.

    Attempts share no memory, so that those that failed, or whose process died, need not be counted alike by
    anybody (docs/protocol.md, "Finding each other").

    Args:
      scope: prefix of every key; equal on all processes, for all attempts of a group.
      process: this process's index in ``processes``.
      processes: JAX process indices that take part.
      timeout: seconds to wait for the others to come: to ``meet``, and at the first ``exchange`` after it.
      what: is being connected, for errors.
      stage_timeout: seconds to wait at each later stage, for those who were there a moment ago; None: as
        ``timeout``.
      closing: once it is set, waits end soon, with ``GroupClosedError``.

    Attributes:
      connection: name of the connection: of these attempts of all processes, and no others. After ``meet``.
    """

    def __init__(
        self,
        scope: str,
        process: int,
        processes: tuple[int, ...],
        timeout: float,
        what: str,
        *,
        stage_timeout: float | None = None,
        closing: threading.Event | None = None,
    ) -> None:
        self.scope = f"pplx_jax/{scope}"
        self.process = process
        self.processes = processes
        self.timeout = timeout
        self.stage_timeout = timeout if stage_timeout is None else stage_timeout
        self.what = what
        self._closing = closing or threading.Event()
        self._all_came = False
        self.connection = ""
        self._number = secrets.token_hex(8)
        self._numbers: dict[int, str] = {}
        self._meet_until = time.monotonic() + timeout
        # Every process asks for all numbers: less often where there are many.
        self._interval = min(1.0, max(0.1, 0.002 * len(processes)))

    @property
    def alone(self) -> bool:
        """Whether there is nobody to meet."""
        return self.processes == (self.process,)

    def meet(self) -> None:
        """Waits until every process attempts to connect, and names the ``connection``.

        Raises:
          TimeoutError: naming the first process that did not come in time.
          GroupClosedError: ``closing`` was set.
          FabricError: without ``jax.distributed`` although there are several processes.
        """
        self._numbers, self._all_came = {self.process: self._number}, False
        if not self.alone:
            client = self._client()
            client.key_value_set_bytes(self._number_key(self.process), self._number.encode(), True)
            for process in self.processes:
                if process != self.process:
                    found = self._wait(self._number_key(process), process, "meeting", self.timeout)
                    self._numbers[process] = found.decode()
        named = repr(sorted(self._numbers.items())).encode()
        self.connection = hashlib.blake2b(named, digest_size=16).hexdigest()

    def meet_again(self, begun: BegunAnewError) -> None:
        """``meet``, after one of the others has begun anew."""
        if time.monotonic() > self._meet_until:
            raise errors.TimeoutError(
                f"{begun}, and {self.timeout:g} s of connecting {self.what} have passed"
            )
        self.meet()

    def exchange(self, stage: str, value: bytes) -> Mapping[int, bytes]:
        """Publishes ``value``; returns everybody's, by process index. After ``meet``.

        Raises:
          TimeoutError: naming the first process that published nothing in time.
          GroupClosedError: ``closing`` was set.
          BegunAnewError: another process has begun anew and will publish nothing.
        """
        if self.alone:
            return {self.process: value}
        key = self._key(stage, self.process)
        _published.setdefault((self.scope, self.process), []).append(key)
        # A second time where this process has met the same attempts again.
        self._client().key_value_set_bytes(key, value, True)
        within = self.stage_timeout if self._all_came else self.timeout
        until = time.monotonic() + within
        found = {p: self._wait(self._key(stage, p), p, stage, within, until) for p in self.processes}
        self._all_came = True
        return found

    def exchange_json(self, stage: str, value: object) -> Mapping[int, object]:
        """The same for values that JSON can hold."""
        return {p: json.loads(v) for p, v in self.exchange(stage, json.dumps(value).encode()).items()}

    def finish(self) -> None:
        """Returns once every process is here, when nothing of earlier attempts is needed any more."""
        if self.alone:
            return
        # First, so that who connects again at once does not take it for one of an attempt to come.
        self._delete(self._number_key(self.process))
        self.exchange("connected/barrier", b"here")
        last = self._key("connected/barrier", self.process)  # somebody may still have to read it
        published = _published[self.scope, self.process]
        for key in set(published) - {last}:
            self._delete(key)
        published[:] = [last]

    def _wait(self, key: str, process: int, stage: str, within: float, until: float | None = None) -> bytes:
        """What ``process`` published; ``until``: the deadline of an exchange, whose others may begin anew."""
        client = self._client()
        deadline = self._meet_until if until is None else until
        began, told, asked = time.monotonic(), False, False
        while True:
            left = deadline - time.monotonic()
            try:
                if asked:
                    return client.key_value_try_get_bytes(key)
                left = min(max(left, 0.001), _BLOCKING)
                return client.blocking_key_value_get_bytes(key, int(left * 1000) + 1)
            except Exception as error:
                missing = ("NOT_FOUND" if asked else "DEADLINE_EXCEEDED") in str(error)
                if not missing or time.monotonic() >= deadline:
                    raise errors.TimeoutError(
                        f"process {process} did not reach stage '{stage}' of connecting {self.what} within "
                        f"{within:g} s: is it running the same program? ({error})"
                    ) from error
            asked = True
            if until is not None and (begun := self._begun_anew()) is not None:
                # It may have published that first, having had all that it needed under this name.
                try:
                    return client.key_value_try_get_bytes(key)
                except Exception:
                    raise BegunAnewError(begun) from None
            if not told and time.monotonic() - began > _PATIENCE:
                told = True
                if environment.log_level() not in ("error", "off"):
                    _logger.warning(
                        "connecting %s: waiting for process %d, stage '%s'", self.what, process, stage
                    )
            if self._closing.wait(min(self._interval, max(0.0, deadline - time.monotonic()))):
                raise errors.GroupClosedError(f"{self.what} was closed while it connected")

    def _begun_anew(self) -> int | None:
        """A process that has another number than when they met. One that has none is about to be done."""
        now: dict[str, bytes] = {}
        with contextlib.suppress(Exception):  # the wait goes on, and ends by its deadline
            now = dict(self._client().key_value_dir_get_bytes(f"{self.scope}/number"))
        for process, number in self._numbers.items():
            if now.get(self._number_key(process), number.encode()).decode() != number:
                return process
        return None

    def _client(self) -> compat.CoordinationClient:
        client = compat.coordination_client()
        if client is None:
            raise errors.FabricError(
                "the mesh spans several processes but jax.distributed is not initialised: call "
                "jax.distributed.initialize() first"
            )
        return client

    def _delete(self, key: str) -> None:
        with contextlib.suppress(Exception):  # it only takes room
            self._client().key_value_delete(key)

    def _number_key(self, process: int) -> str:
        return f"{self.scope}/number/{process}"

    def _key(self, stage: str, process: int) -> str:
        return f"{self.scope}/{self.connection}/{stage}/{process}"
