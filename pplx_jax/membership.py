"""A group's connections on this process: one C++ member for each local device of the mesh."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import hmac
import os
import threading
import time
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import jax
import numpy as np
from jax.sharding import Mesh

from pplx_jax import _core, bootstrap, compat, environment, errors, gpu, nics
from pplx_jax.engine_types import set_library_search_path
from pplx_jax.errors import FabricError, GroupClosedError, MismatchError, make_error
from pplx_jax.fabric import Fabric
from pplx_jax.verbs import VerbsOptions

if TYPE_CHECKING:
    from pplx_jax import _cuda
    from pplx_jax.expert_parallel import ExpertParallel

    Member: TypeAlias = _core.Member | _cuda.Member

#: XLA aborts a process whose in-process collective is stuck for 60 s; our waits end before.
_SHARED_PROCESS_STALL = 50.0
_FIRST_CALL_FACTOR = 3
#: Seconds that loading libraries and pinning memory may take, however soon peers have to answer later.
_SET_UP = 10.0

_lock = threading.RLock()
#: The youngest group of each id that is not closed: what a program's first exchange connects.
_known: weakref.WeakValueDictionary[int, Membership] = weakref.WeakValueDictionary()
#: Connected groups by name.
_live: dict[str, Membership] = {}


def _forget_groups() -> None:
    """In a forked child: the groups are the parent's, and their locks may be held by threads of its own."""
    global _lock
    _lock = threading.RLock()
    _known.clear()
    _live.clear()


os.register_at_fork(after_in_child=_forget_groups)


class Membership:
    """Connects, checks and closes on behalf of an ``ExpertParallel``."""

    def __init__(
        self,
        group: ExpertParallel,
        fabric: Fabric,
        timeout: float,
        stall_timeout: float,
        gpu_options: gpu.Options,
        wanted_nics: tuple[str, ...] | None = None,
    ) -> None:
        self._group_id = group.group_id
        self._name = group.name
        self._value = f"{group._value!r} with expert_map {group.map_digest:x}"
        self._mesh = group.mesh
        self._axes = group.axes
        self._config = group.config
        self._experts_per_rank = group.experts_per_rank
        self._num_ranks = group.num_ranks
        self._fabric = fabric
        self._timeout = timeout
        self._stall_timeout = stall_timeout
        self._gpu_options = gpu_options
        self._wanted_nics = wanted_nics
        self._nics: list[nics.Chosen] = []  # of the members, in their order
        self._members: dict[int, Member] = {}
        self._slices: list[int] = []  # of the members, in their order
        self._masked: frozenset[int] = frozenset()
        self._closing: list[threading.Thread] = []  # members of before a mask
        self._process = os.getpid()
        self._closed = False
        self._close_wanted = threading.Event()
        self._connect_lock = threading.Lock()
        _known[self._group_id] = self

    @property
    def state(self) -> str:
        """For people."""
        return "closed" if self._closed else "connected" if self._members else "not connected"

    @staticmethod
    def connect_by_id(group_id: int) -> None:
        """What the first exchange of a program calls when its group is not connected."""
        membership = _known.get(group_id)
        if membership is not None:
            membership.connect(in_program=True)

    def require_own_process(self) -> None:
        """Raises where this process was forked from the one that made the group."""
        if os.getpid() != self._process:
            raise FabricError(
                f"group '{self._name}' belongs to process {self._process}; this one, {os.getpid()}, was "
                "forked from it, and neither threads nor network endpoints survive a fork: start processes "
                "with multiprocessing.get_context('spawn') and make a group there"
            )

    # --- connect ---

    def connect(self, in_program: bool = False) -> None:
        """``ExpertParallel.connect``."""
        self.require_own_process()
        with self._connect_lock:
            if self._closed:
                raise GroupClosedError(f"group '{self._name}' was closed: make a new, equal one to reopen it")
            if self._members:
                return
            if not isinstance(self._mesh, Mesh):
                raise ValueError("the group's mesh is abstract: connecting needs a Mesh with devices")
            # Others may still be compiling, or reading a checkpoint: they get the time that they have to come
            # to a first exchange.
            patience = self._stall_timeout * _FIRST_CALL_FACTOR
            if in_program and len(self._mesh.local_devices) > 1 and not _on_gpus(self._mesh):
                patience = min(patience, _SHARED_PROCESS_STALL)
            with self._holding_name():
                self._members = self._open(self._mesh, patience)

    def mask(self, ranks: frozenset[int]) -> None:
        """``ExpertParallel.mask``."""
        self.require_own_process()
        with self._connect_lock:
            if self._closed:
                raise GroupClosedError(
                    f"group '{self._name}' was closed: make a new, equal one and mask that"
                )
            mesh = self._mesh
            if not isinstance(mesh, Mesh):
                raise ValueError("the group's mesh is abstract: masking ranks needs a Mesh with devices")
            masked = self._masked | ranks
            self._check_masked(mesh, masked)
            if masked == self._masked and self._members:
                return
            with self._holding_name():
                if not any(member.failure() for member in self._members.values()):
                    self._drain()
                self._closing += _close_together(self._members)
                self._members, self._masked = {}, masked
                try:
                    self._members = self._open(mesh, self._timeout)
                except errors.TimeoutError as error:
                    raise errors.TimeoutError(
                        f"{error}; ranks {sorted(masked)} are masked here: every rank that is left must mask "
                        "the same"
                    ) from error

    @contextlib.contextmanager
    def _holding_name(self) -> Iterator[None]:
        """No other group of this process has the name from now on, unless what is done now fails."""
        with _lock:
            if _live.setdefault(self._name, self) is not self:
                raise ValueError(
                    f"a group named '{self._name}' is already connected in this process: close() it, or "
                    f"give this one another name="
                )
        try:
            yield
        except BaseException:
            with _lock:
                _live.pop(self._name, None)
            raise

    @property
    def masked(self) -> tuple[int, ...]:
        """Ranks that take no part."""
        return tuple(sorted(self._masked))

    def _check_masked(self, mesh: Mesh, masked: frozenset[int]) -> None:
        if wrong := [rank for rank in masked if not 0 <= rank < self._num_ranks]:
            raise ValueError(f"ranks to mask must be in 0..{self._num_ranks - 1}, got {wrong[0]}")
        if _on_gpus(mesh):
            raise FabricError(
                f"group '{self._name}' is on GPUs, whose kernels wait for every rank: close it and make one "
                "on a mesh without the ranks that are gone"
            )
        of_process: dict[int, set[int]] = {}
        for device, (_, rank) in self._ranks(mesh).items():
            of_process.setdefault(device.process_index, set()).add(rank)
        for process, ranks in of_process.items():
            if ranks & masked and process == jax.process_index():
                raise ValueError(
                    f"rank {min(ranks & masked)} is of this process, {process}: others may mask it"
                )
            if ranks & masked and ranks - masked:
                raise ValueError(
                    f"process {process} has ranks {sorted(ranks)}: mask all of them or none, a process is "
                    "there or is not"
                )

    def _open(self, mesh: Mesh, patience: float) -> dict[int, Member]:
        """Members that are connected. ``patience``: seconds that the others have to come. Those who have come
        and fall silent before they are connected get ``timeout``, as peers do later, or what setting up
        takes."""
        ranks = {d: place for d, place in self._ranks(mesh).items() if place[1] not in self._masked}
        process = jax.process_index()
        processes = tuple(sorted({device.process_index for device in ranks}))
        if process not in processes:
            raise ValueError(f"process {process} has no device in the group's mesh")
        # By name, so that who is configured differently is met, and told.
        scope = hashlib.blake2b(repr((self._name, processes)).encode(), digest_size=8).hexdigest()
        boot = bootstrap.Bootstrap(
            scope,
            process,
            processes,
            patience,
            f"group '{self._name}'",
            stage_timeout=min(patience, max(self._timeout, _SET_UP)),
            closing=self._close_wanted,
        )
        boot.meet()
        while True:
            try:
                return self._open_met(boot, ranks, _on_gpus(mesh))
            except bootstrap.BegunAnewError as begun:
                boot.meet_again(begun)

    def _open_met(
        self, boot: bootstrap.Bootstrap, ranks: dict[Any, tuple[int, int]], on_gpus: bool
    ) -> dict[int, Member]:
        local = {device: place for device, place in ranks.items() if device.process_index == boot.process}
        connection = f"{self._group_id:x}/{boot.connection}"
        most_sms = self._most_sms(list(local)) if on_gpus else 0
        secret = bootstrap.job_secret(self._timeout)
        meeting = self._meet(boot, on_gpus, most_sms, secret)
        fabric, address = meeting.fabric, meeting.address
        set_library_search_path()
        slices: dict[int, list[Any]] = {}
        for device, (slice_index, _) in ranks.items():  # in the order of their ranks
            slices.setdefault(slice_index, []).append(device)
        topologies = {
            s: gpu.Topology.of(d, meeting.hosts, self._gpu_options) for s, d in slices.items() if on_gpus
        }
        named = f"{environment.job()}/{connection}".encode()
        token = hmac.new(secret, named, "sha256").hexdigest()
        members: dict[int, Member] = {}
        chosen: list[nics.Chosen] = []
        try:
            launches = {slice_index: _core.Launches() for slice_index, _ in local.values()}
            for number, (device, (slice_index, rank)) in enumerate(local.items()):
                shape = self._config.shape(rank, self._num_ranks, self._experts_per_rank)
                # On GPUs no runtime watches for collectives that are stuck.
                shared = len(local) > 1 and not on_gpus
                pci = gpu.pci(device) if on_gpus else None
                chosen.append(nics.choose(fabric.name, number, wanted=self._wanted_nics, pci=pci))
                config = self._group_config(fabric, address, chosen[-1].names, token, shared)
                config.absent = self.masked
                config.launches = launches[slice_index]
                _set_network(config, fabric, f"{connection}/{slice_index}", rank)
                if on_gpus:
                    config.set_near(gpu.pci(device))
                    members[device.id] = gpu.open_member(
                        self._group_id,
                        device,
                        shape,
                        config,
                        **topologies[slice_index].arguments(rank, meeting.most_sms),
                    )
                else:
                    members[device.id] = _core.Member(self._group_id, device.id, shape, config)
            endpoints = self._exchange_endpoints(boot, members)
            for device, (slice_index, _) in local.items():
                peers = {rank: d.id for d, (s, rank) in ranks.items() if s == slice_index}
                members[device.id].connect(
                    [endpoints[peers[rank]] if rank in peers else b"" for rank in range(self._num_ranks)]
                )
            boot.finish()
            for member in members.values():
                member.publish()
        except BaseException:
            for member in members.values():
                member.close()
            raise
        self._slices = [slice_index for slice_index, _ in local.values()]
        self._nics = chosen
        return members

    def _ranks(self, mesh: Mesh) -> dict[Any, tuple[int, int]]:
        """Device -> (slice, rank): a slice for each position along the mesh's other axes."""
        others = [axis for axis in mesh.axis_names if axis not in self._axes]
        order = [mesh.axis_names.index(axis) for axis in (*others, *self._axes)]
        table = np.transpose(mesh.devices, order).reshape(-1, self._num_ranks)
        return {table[s, r]: (s, r) for s in range(table.shape[0]) for r in range(table.shape[1])}

    def _most_sms(self, devices: list[jax.Device]) -> int:
        """Blocks of our kernels that the least able of these GPUs runs at a time; loads the kernels."""
        shape = self._config.shape(0, self._num_ranks, self._experts_per_rank)
        return min(int(gpu.require().most_blocks(gpu.ordinal(device), shape)) for device in devices)

    def _meet(self, boot: bootstrap.Bootstrap, on_gpus: bool, most_sms: int, secret: bytes) -> _Meeting:
        """What all processes agree on."""
        fabric, source = self._fabric, "fabric="
        if fabric.name == "auto" and (wanted := environment.fabric()) is not None:
            fabric, source = wanted, "PPLX_FABRIC="
        # How a fabric was asked for is for people: only what was asked for has to agree.
        hello = {
            "host": bootstrap.host_identity(),
            "fabric": str(fabric),
            "value": self._value,
            "asked": f"{source}{fabric}",
            "gpu": str(self._gpu_options) if on_gpus else "",
            "most_sms": str(most_sms),
            "job": _job_label(secret),
        }
        everybody = cast("dict[int, dict[str, str]]", boot.exchange_json("hello", hello))
        for process, other in everybody.items():
            for what, shown in (
                ("job", "job"),
                ("value", "value"),
                ("fabric", "asked"),
                ("gpu", "gpu"),
            ):
                if other[what] != hello[what]:
                    raise MismatchError(
                        f"group '{self._name}' is configured differently on process {boot.process} on "
                        f"{hello['host'].split('/')[0]} ({hello[shown]}) and on process {process} on "
                        f"{other['host'].split('/')[0]} ({other[shown]}): give every rank the same arguments "
                        "and environment"
                    )
        if fabric.in_process and not boot.alone:
            raise ValueError(
                f"{source}{fabric}: '{fabric.name}' reaches only ranks of one process; use 'shm' or 'tcp'"
            )
        hosts = {process: other["host"] for process, other in everybody.items()}
        one_host = len(set(hosts.values())) == 1
        if fabric.name == "auto":
            fabric = Fabric("local" if boot.alone else "shm" if one_host else "tcp", fabric.endpoints)
        address = environment.socket_address()
        if address is None:
            address = "127.0.0.1" if one_host else bootstrap.address_towards(compat.coordinator_address())
        most = min(int(other["most_sms"]) for other in everybody.values())
        return _Meeting(fabric, address, hosts, most)

    def _group_config(
        self, fabric: Fabric, address: str, names: tuple[str, ...], token: str, shares_process: bool
    ) -> _core.GroupConfig:
        config = _core.GroupConfig()
        config.name = self._name
        config.depth = self._config.depth
        config.fingerprint = self._group_id
        config.fingerprint_text = self._value
        stall, first = self._stall_timeout, self._stall_timeout * _FIRST_CALL_FACTOR
        if shares_process:
            stall, first = min(stall, _SHARED_PROCESS_STALL), min(first, _SHARED_PROCESS_STALL)
        config.set_timeouts(self._timeout, stall, first)
        # Of verbs an address chooses the GID, and the coordinator's network need not be the NIC's.
        verbs = fabric.name == "verbs"
        config.set_fabric(fabric.name, fabric.endpoints, "" if verbs else address, names[0])
        if len(names) > 1:
            config.set_nics(list(names))
        config.set_job(token)
        if verbs:
            config.set_verbs(dataclasses.asdict(VerbsOptions(**cast("dict[str, Any]", dict(fabric.verbs)))))
        return config

    def _exchange_endpoints(self, boot: bootstrap.Bootstrap, members: dict[int, Member]) -> dict[int, bytes]:
        mine = {str(d): base64.b64encode(member.endpoint()).decode() for d, member in members.items()}
        everybody = cast("dict[int, dict[str, str]]", boot.exchange_json("endpoints", mine))
        return {int(d): base64.b64decode(e) for other in everybody.values() for d, e in other.items()}

    # --- use ---

    def check(self, sync: bool) -> None:
        """``ExpertParallel.check``."""
        self.require_own_process()
        if sync:
            self._drain()
        for member in self._members.values():
            if (failure := member.failure()) is not None:
                culprit = member.failure_culprit() if isinstance(member, _core.Member) else None
                raise make_error(*failure, culprit)
        found = [e for member in self._members.values() if (e := member.take_data_error()) is not None]
        # The rank whose data is wrong knows best what is wrong with it.
        found.sort(key=lambda error: not error[2])
        for name, text, _ in found:
            raise make_error(name, text)

    def _drain(self) -> None:
        """Waits, at most ``timeout``, for what this process has dispatched: programs run asynchronously, and
        the runtime tells of their end only through their results."""

        def under_way(array: Any) -> bool:
            with contextlib.suppress(Exception):  # deleted meanwhile, or its program failed
                return not array.is_ready()
            return False

        # Not in a thread: none can be started while the interpreter shuts down.
        deadline = time.monotonic() + self._timeout
        waiting = jax.live_arrays()
        while (waiting := [array for array in waiting if under_way(array)]) and time.monotonic() < deadline:
            time.sleep(0.001)

    def stats(self) -> dict[str, Any]:
        """``ExpertParallel.stats``."""
        self.require_own_process()
        ranks = [member.stats() for member in self._members.values()]
        for rank in ranks:
            for peer in rank["peers"]:
                peer["mean_wait_seconds"] = peer["waited_seconds"] / max(rank["exchanges"], 1)
        return {
            "name": self._name,
            "state": self.state,
            "fabric": ranks[0]["fabric"] if ranks else None,
            "nics": [{"names": list(one.names), "why": one.why} for one in self._nics],
            "memory": self._memory(ranks),
            "ranks": ranks,
            "slowest": self._slowest(ranks),
            "straggler": self._straggler(ranks),
            "masked": self._losses(ranks),
        }

    def _losses(self, ranks: list[dict[str, Any]]) -> dict[str, Any] | None:
        """What this process's tokens lost with the masked ranks."""
        lost = [rank.pop("lost") for rank in ranks if "lost" in rank]
        if not self._masked:
            return None
        return {
            "ranks": list(self.masked),
            "routed_tokens": sum(one["routed_tokens"] for one in lost),
            "tokens": sum(one["tokens"] for one in lost),
            "whole_tokens": sum(one["whole_tokens"] for one in lost),
            "by_share": [sum(column) for column in zip(*(one["by_share"] for one in lost), strict=True)],
            "weight": sum(one["weight"] for one in lost),
        }

    def _memory(self, ranks: list[dict[str, Any]]) -> dict[str, int]:
        """Bytes of one rank: of a CPU's computed, of a GPU's as the largest local rank has allocated them."""
        if ranks and "device_bytes" in ranks[0]:
            most = max(ranks, key=lambda rank: rank["device_bytes"] + rank["pinned_bytes"])
            device, pinned = most["device_bytes"], most["pinned_bytes"]
            return {"device": device, "pinned": pinned, "total": device + pinned}
        memory = self._config.memory(self._num_ranks, self._experts_per_rank)
        return {"regions": memory.regions, "staging": memory.staging, "total": memory.total}

    def _slowest(self, ranks: list[dict[str, Any]]) -> dict[str, Any] | None:
        slowest: dict[str, Any] | None = None
        for slice_index, own in zip(self._slices, ranks, strict=True):
            for rank, peer in enumerate(own["peers"]):
                if peer["waited_seconds"] > (slowest["seconds"] if slowest else 0):
                    slowest = {
                        "rank": rank,
                        "slice": slice_index,
                        "process": peer["process"],
                        "seconds": peer["waited_seconds"],
                        "longest": peer["longest_wait_seconds"],
                    }
        return slowest

    def _straggler(self, ranks: list[dict[str, Any]]) -> dict[str, Any] | None:
        found: dict[str, Any] | None = None
        for slice_index, own in zip(self._slices, ranks, strict=True):
            for rank, peer in enumerate(own["peers"]):
                seconds = peer.get("recent_wait_seconds", 0.0)
                if seconds > (found["seconds"] if found else 0):
                    found = {"rank": rank, "slice": slice_index, "process": peer["process"]}
                    found["seconds"] = seconds
        return found

    def close(self) -> None:
        """``ExpertParallel.close``."""
        if os.getpid() != self._process:  # at a forked child's exit; nothing of it is ours to close
            return
        # Before the lock is taken: a program under way may need it, to connect.
        # It may not have come to that yet, so that no members doesn't mean no program. Where no backend has
        # started none runs, and looking for arrays would start one.
        failed = any(member.failure() for member in self._members.values())
        if not self._closed and not failed and compat.backends_started():
            self._drain()
        # Who holds the lock may wait for others that never come, far longer than close() may take.
        self._close_wanted.set()
        with self._connect_lock:
            if self._closed:
                return
            self._closed = True
            with _lock:
                if _live.get(self._name) is self:
                    del _live[self._name]
                if _known.get(self._group_id) is self:
                    del _known[self._group_id]
            for thread in self._closing + _close_together(self._members):
                thread.join()


@dataclasses.dataclass(frozen=True)
class _Meeting:
    fabric: Fabric
    """The one that all processes use."""
    address: str
    """To listen on."""
    hosts: dict[int, str]
    """By process."""
    most_sms: int
    """On GPUs: blocks of a kernel that every device runs at a time."""


def _close_together(members: dict[int, Member]) -> list[threading.Thread]:
    """Closes all at the same time: each tells its peers and waits for the last local completions."""
    threads = []
    for member in members.values():
        thread = threading.Thread(target=member.close)
        try:
            thread.start()
            threads.append(thread)
        except RuntimeError:  # the interpreter shuts down
            member.close()
    return threads


def _job_label(secret: bytes) -> str:
    """PPLX_JOB for others to compare. The token is not their business; the hash is keyed, so that who reads a
    log cannot guess it either."""
    token = environment.job()
    if not token:
        return "PPLX_JOB unset"
    hashed = hashlib.blake2b(token.encode(), digest_size=6, key=secret).hexdigest()
    return f"PPLX_JOB with the hash {hashed}"


def _on_gpus(mesh: Mesh) -> bool:
    """Whether the group needs kernels; all its devices or none."""
    platforms = {device.platform for device in mesh.devices.flat}
    if len(platforms) > 1:
        raise ValueError(f"a group's devices must be of one platform, the mesh has {sorted(platforms)}")
    return bool(gpu.is_gpu(mesh.devices.flat[0]))


def _set_network(config: _core.GroupConfig, fabric: Fabric, network: str, rank: int) -> None:
    """In-process fabrics: the ranks that meet, and for "sim" what happens to their traffic."""
    options = dict(fabric.sim)
    config.set_simulation(
        options.get("seed", 0) * 4099 + rank,
        network,
        bool(options.get("reorder", 0)),
        options.get("max_delay", 0),
        options.get("max_pieces", 1),
        options.get("stall_every", 0),
    )
