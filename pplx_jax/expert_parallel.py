"""The group of ranks that exchange tokens, and its two operations."""

from __future__ import annotations

import hashlib
import math
import weakref
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from pplx_jax import _core, arguments, environment, gpu, halves, ops, results
from pplx_jax.config import MAX_RANKS, ExchangeConfig
from pplx_jax.fabric import Fabric
from pplx_jax.membership import Membership
from pplx_jax.nics import check as checked_nics
from pplx_jax.results import Batch, Route, SentCombine, SentDispatch, order_operands


def _hash63(*parts: object) -> int:
    """The same in every process and on every run, unlike ``hash``; fits a signed 64-bit attribute."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class ExpertParallel:
    """Expert-parallel exchanges over one mesh axis (or several, taken as one).

    A group is its value: ``name``, config, axis and mesh shape. Equal groups are interchangeable, and a
    compiled program runs on whichever equal group is open. Making one needs no network; it connects in
    ``connect()`` or at its first execution.

    Args:
      mesh: the mesh that ``jax.shard_map`` will use. Every slice along ``axis`` is a group of its own.
      axis: name of the mesh axis, or a tuple of names, over which experts are sharded; R ranks.
      config: an ``ExchangeConfig``; or give its fields as keywords.
      name: tells groups of one program apart.
      expert_map: int [R, slots] or [R * slots]: the expert that each rank's slot hosts, -1 for none. An
        expert may be hosted several times; its tokens are spread over the replicas.
      fabric: "auto" (``PPLX_FABRIC`` where that is set; else in process where all ranks are in one, shared
        memory on one host, TCP otherwise), "local", "shm", "tcp", "sim" or a libfabric provider; options as
        in ``pplx_jax.fabric``.
      timeout: seconds of silence after which a peer counts as dead, and for which ``mask`` waits for others;
        30, or what the environment says (``PPLX_TIMEOUT``).
      stall_timeout: seconds to wait for a live peer that doesn't reach an exchange; three times that at a
        call's first execution, and to connect: others may still be compiling or reading a checkpoint. At
        most 50 where several CPU ranks share a process, as XLA aborts a process whose collective is stuck
        for 60.
      nvlink: on GPUs: kernels write into the memory of ranks on the same host themselves. False: all goes
        through the host and ``fabric``.
      node_size: on GPUs: only ranks r of equal r // node_size do so; default all on the same host.
      num_sms: on GPUs: multiprocessors that an exchange may take, equal on all ranks; default 64, or what the
        smallest GPU of the group has. Its blocks wait for those of other ranks: leave some for kernels that
        run beside it and wait too, such as collectives (NCCL takes up to 32).
      nics: 1 to 8 NICs that each of this process's devices opens, by name. Default: what ``PPLX_NICS`` names,
        else, on RDMA networks, those nearest to each device; ``stats()["nics"]`` says which, and why.

    Raises:
      TypeError, ValueError: which argument, what it was, what is allowed.
    """

    def __init__(
        self,
        mesh: Mesh | AbstractMesh,
        axis: str | Sequence[str] = "ep",
        *,
        config: ExchangeConfig | None = None,
        name: str = "default",
        expert_map: Any = None,
        fabric: str = "auto",
        timeout: float | None = None,
        stall_timeout: float = 300.0,
        nvlink: bool = True,
        node_size: int | None = None,
        num_sms: int | None = None,
        nics: Sequence[str] | None = None,
        **config_fields: Any,
    ) -> None:
        if not isinstance(mesh, (Mesh, AbstractMesh)):
            raise TypeError(f"mesh must be a jax.sharding.Mesh or AbstractMesh, got {type(mesh).__name__}")
        if not isinstance(axis, (str, list, tuple)):
            raise TypeError(f"axis must be a mesh axis or a tuple of them, got {axis!r}")
        self.axes = (axis,) if isinstance(axis, str) else tuple(axis)
        for one in self.axes:
            if one not in mesh.axis_names:
                raise ValueError(f"axis {one!r} is not an axis of the mesh, which has {mesh.axis_names}")
        if not self.axes or len(set(self.axes)) != len(self.axes):
            raise ValueError(f"axis must name one or more distinct mesh axes, got {axis!r}")
        if config is None:
            try:
                config = ExchangeConfig(**config_fields)
            except TypeError as error:
                raise TypeError(f"config: {error}") from error
        elif config_fields:
            raise TypeError(f"give config= or its fields, not both: {', '.join(sorted(config_fields))}")
        if not isinstance(config, ExchangeConfig):
            raise TypeError(f"config must be an ExchangeConfig, got {type(config).__name__}")
        if not isinstance(name, str) or not name or len(name) > 64:
            raise ValueError(f"name must be a string of 1 to 64 characters, got {name!r}")
        environment.check()
        if timeout is None:
            timeout = environment.timeout()
        for what, seconds in (("timeout", timeout), ("stall_timeout", stall_timeout)):
            if not isinstance(seconds, (int, float)) or not 0 < seconds < 1e6:
                raise ValueError(f"{what} must be a number of seconds > 0, got {seconds!r}")
        self.mesh = mesh
        self.axis: str | tuple[str, ...] = self.axes[0] if len(self.axes) == 1 else self.axes
        self.name = name
        self.config = config
        self.num_ranks = math.prod(mesh.shape[one] for one in self.axes)
        if self.num_ranks > MAX_RANKS:
            raise ValueError(f"axis {axis!r} has {self.num_ranks} ranks, at most {MAX_RANKS} are supported")
        self.expert_map = self._checked_map(expert_map)
        self.experts_per_rank = self.expert_map.size // self.num_ranks
        pairs = self.num_ranks * config.max_tokens * min(config.top_k, self.experts_per_rank)
        if pairs >= 1 << 31:
            raise ValueError(
                f"max_tokens={config.max_tokens} on {self.num_ranks} ranks makes {pairs} pairs of token and "
                f"expert on one rank, at most 2^31 - 1 are supported"
            )
        self._value = (
            self.name,
            self.config,
            self.axes,
            tuple(sorted(mesh.shape.items())),
            self.experts_per_rank,
        )
        self.group_id = _hash63("group", *self._value)
        # Not in group_id: compiled programs revive on a group with another map, which is their operand.
        self.map_digest = _hash63("expert_map", *self.expert_map.tolist())
        self._membership = Membership(
            self,
            Fabric.parse(fabric),
            float(timeout),
            float(stall_timeout),
            gpu.Options(nvlink, node_size, num_sms),
            checked_nics(nics),
        )
        # A group that nobody refers to any more frees its memory and name; so does the interpreter's exit.
        weakref.finalize(self, self._membership.close)

    def _checked_map(self, expert_map: Any) -> np.ndarray[Any, np.dtype[np.int32]]:
        experts, ranks = self.config.num_experts, self.num_ranks
        if expert_map is None:
            slots = self.config.experts_per_rank(ranks) * ranks
            table = np.arange(slots, dtype=np.int32)
            table[experts:] = -1
            return table
        try:
            table = np.asarray(expert_map)
        except ValueError as error:
            raise ValueError(f"expert_map must be [{ranks}, slots] or flat, got {expert_map!r}") from error
        if table.ndim not in (1, 2) or (table.ndim == 2 and len(table) != ranks):
            raise ValueError(f"expert_map must be [{ranks}, slots] or flat, got shape {list(table.shape)}")
        if table.dtype.kind not in "iu" or table.size == 0 or table.size % ranks:
            raise ValueError(
                f"expert_map must hold ints, equally many for each of {ranks} ranks, "
                f"got {arguments.describe(table)}"
            )
        table = table.reshape(-1).astype(np.int32)
        if table.min() < -1 or table.max() >= experts:
            raise ValueError(f"expert_map must hold -1 or 0..{experts - 1}, got {table.min()}..{table.max()}")
        missing = sorted(set(range(experts)) - set(table.tolist()))
        if missing:
            raise ValueError(f"expert_map places no rank for expert {missing[0]} ({len(missing)} in all)")
        return table

    # --- value ---

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, ExpertParallel)
            and self._value == other._value
            and self.map_digest == other.map_digest
        )

    def __hash__(self) -> int:
        return self.group_id

    def __repr__(self) -> str:
        return (
            f"ExpertParallel(name={self.name!r}, axis={self.axis!r}, num_ranks={self.num_ranks}, "
            f"{self._membership.state}, config={self.config})"
        )

    def __copy__(self) -> ExpertParallel:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertParallel:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an ExpertParallel holds connections and cannot be pickled; pickle its .config and make a new one"
        )

    # --- exchange ---

    def dispatch(
        self,
        x: jax.Array,
        indices: jax.Array,
        weights: jax.Array,
        *,
        scales: Any = None,
        num_tokens: Any = None,
        expert_map: Any = None,
        after: Any = None,
        name: str = "",
    ) -> tuple[Batch, Route]:
        """Sends every token to the ranks of its experts. Call it per shard, inside ``jax.shard_map``.

        Every rank must make the same calls in the same order, with the same T; ``num_tokens`` may differ.

        Args:
          x: [T, H] of the config's dtype; 0 <= T <= max_tokens. Differentiable.
          indices: int32 [T, K]: a token's experts, distinct; -1 for none.
          weights: float32 [T, K]: router weights. Differentiable: they travel with the tokens.
          scales: the config's ``scale_dtype`` [T, S], one for each 128 values of a row: ``x`` is then
            quantised already, float8_e4m3fn. Neither is differentiable.
          num_tokens: int32 scalar: tokens at and past it are not sent; their results are zero.
          expert_map: int32 [R, slots] or [R * slots], in place of the group's own: the expert that each
            rank's slot hosts, -1 for none. A runtime array, so that experts move without recompiling; an
            expert that is routed to and placed nowhere is a data error. Its shape is the group's.
          after: arrays, routes or batches whose exchanges come before this one, on every rank. The backward
            pass runs them in reverse. Needed only between exchanges that no data orders.
          name: of this call, for errors, and to tell calls of equal shape apart.

        Returns:
          ``(batch, route)``: the tokens of this rank's experts, and what ``combine`` needs.

        Raises:
          TypeError, ValueError: which argument, what it was, what is allowed.
          jax.errors.JaxRuntimeError: at execution, see ``check``.
        """
        tokens, before = arguments.tokens(self, x, indices, weights, scales, num_tokens, expert_map, after)
        call = self._call(tokens.x.shape[0], name)
        if tokens.x.shape[0] == 0:
            return results.empty_batch(self, call, tokens)
        return results.batch_of(self, call, ops.dispatch(call, tokens, before))

    def combine(
        self,
        y: jax.Array,
        route: Route,
        *,
        weighted: bool = True,
        accumulate: jax.Array | None = None,
        after: Any = None,
    ) -> jax.Array:
        """Brings the experts' outputs home: token t gets the sum over its experts of weight * row.

        Args:
          y: of ``batch.values``'s shape and the config's dtype, row for row what the experts made of it.
            Differentiable.
          route: of the dispatch.
          weighted: multiply each row by its router weight, in float32. False: the layer has done so.
          accumulate: [T, H] to add, a residual or a shared expert's output. Differentiable.
          after: as in ``dispatch``.

        Returns:
          [T, H] of the config's dtype. Tokens at and past ``num_tokens`` are zero.

        Raises:
          TypeError, ValueError: which argument, what it was, what is allowed.
        """
        rows, call = arguments.rows(self, y, route, weighted)
        accumulate = arguments.accumulated(self, accumulate, rows.route)
        rows, accumulate, before = arguments.varying(self, (rows, accumulate, order_operands(after)))
        if rows.route.home.shape[0] == 0:
            nothing: jax.Array = rows.y[:0] if accumulate is None else accumulate
            return nothing
        return ops.combine(call, rows, accumulate, before)

    # --- exchange in halves ---

    def dispatch_send(
        self,
        x: jax.Array,
        indices: jax.Array,
        weights: jax.Array,
        *,
        scales: Any = None,
        num_tokens: Any = None,
        expert_map: Any = None,
        after: Any = None,
        name: str = "",
    ) -> SentDispatch:
        """The first half of ``dispatch``: posts the tokens, so that what runs between it and
        ``dispatch_recv`` (shared experts, another micro-batch) overlaps with the network. It waits for no
        message; but while a recv of the group waits on this device, a send waits for that.

        At most the config's ``depth`` exchanges may be under way, counted from the oldest one that is not yet
        received. Each is received exactly once, in the same execution of the same program; the result may
        cross a ``jax.lax.scan`` as carry. Differentiable: the derivative of a recv is a send, so under grad
        the recvs of independent exchanges need an order too: give ``after=`` to them as well.

        Args:
          x, indices, weights, scales, num_tokens, expert_map, after, name: as in ``dispatch``.

        Raises:
          TypeError, ValueError: as ``dispatch``; also when T exceeds the config's ``chunk``.
        """
        tokens, before = arguments.tokens(self, x, indices, weights, scales, num_tokens, expert_map, after)
        count = tokens.x.shape[0]
        if self.config.chunk is not None and count > self.config.chunk:
            raise ValueError(
                f"send and recv apart go in one round, but x has {count} tokens and chunk is "
                f"{self.config.chunk}: make chunk at least as large"
            )
        call = self._call(count, name)
        if count == 0:
            nothing = jnp.sum(tokens.weights) * jnp.zeros(4, jnp.float32)
            return SentDispatch(nothing, tokens.indices, call)
        ticket, home = halves.dispatch_send(call, tokens, before)
        return SentDispatch(ticket, home, call)

    def dispatch_recv(self, sent: SentDispatch, *, after: Any = None) -> tuple[Batch, Route]:
        """The second half of ``dispatch``: waits for every rank's tokens.

        Args:
          sent: of ``dispatch_send``.
          after: as in ``dispatch``.

        Raises:
          jax.errors.JaxRuntimeError: at execution, when ``sent`` was received before.
        """
        arguments.require_sent(self, sent, SentDispatch, "dispatch")
        sent, before = arguments.varying(self, (sent, order_operands(after)))
        if sent.home.shape[0] == 0:
            zero = jnp.sum(sent.ticket)
            nothing = jnp.sum(sent.home)
            x = jnp.broadcast_to(zero, (0, self.config.hidden))
            tokens = ops.Tokens(x, None, x[:, :1] * 0, sent.home, nothing, nothing)
            return results.empty_batch(self, sent.call, tokens)
        return results.batch_of(
            self, sent.call, halves.dispatch_recv(sent.call, sent.ticket, sent.home, before)
        )

    def combine_send(
        self, y: jax.Array, route: Route, *, weighted: bool = True, after: Any = None
    ) -> SentCombine:
        """The first half of ``combine``; see ``dispatch_send``.

        Args:
          y, route, weighted, after: as in ``combine``.
        """
        rows, call = arguments.rows(self, y, route, weighted)
        if self.config.chunk is not None and rows.route.home.shape[0] > self.config.chunk:
            raise ValueError("send and recv apart go in one round: make chunk at least as large as T")
        rows, before = arguments.varying(self, (rows, order_operands(after)))
        if rows.route.home.shape[0] == 0:
            return SentCombine(jnp.sum(rows.row_weights) * jnp.zeros(4, jnp.float32), rows.route, call)
        return SentCombine(halves.combine_send(call, rows, before), rows.route, call)

    def combine_recv(
        self, sent: SentCombine, *, accumulate: jax.Array | None = None, after: Any = None
    ) -> jax.Array:
        """The second half of ``combine``.

        Args:
          sent: of ``combine_send``.
          accumulate, after: as in ``combine``.

        Raises:
          jax.errors.JaxRuntimeError: at execution, when ``sent`` was received before.
        """
        arguments.require_sent(self, sent, SentCombine, "combine")
        accumulate = arguments.accumulated(self, accumulate, sent.arrays)
        sent, accumulate, before = arguments.varying(self, (sent, accumulate, order_operands(after)))
        if sent.arrays.home.shape[0] == 0:
            empty = jnp.broadcast_to(jnp.sum(sent.ticket), (0, self.config.hidden)).astype(self.config.dtype)
            return empty if accumulate is None else accumulate
        return halves.combine_recv(sent.call, sent.ticket, sent.arrays, accumulate, before)

    def _call(self, tokens: int, name: str) -> ops.Call:
        self._membership.require_own_process()
        config = self.config
        if not isinstance(name, str):
            raise TypeError(f"name must be a string, got {name!r}")
        rounds = config.shape(0, self.num_ranks, self.experts_per_rank).rounds(tokens)
        site = name or self.name
        return ops.Call(
            group=self.group_id,
            tag=_hash63("call", site, tokens, config.hidden, config.top_k, config.dtype.name, config.layout),
            site=site,
            hidden=config.hidden,
            dtype=config.dtype.name,
            rows=config.num_rows(self.num_ranks, tokens, self.experts_per_rank),
            experts_per_rank=self.experts_per_rank,
            slots=self.num_ranks * tokens,
            entries=min(config.top_k, self.experts_per_rank),
            messages=rounds * self.num_ranks,
            token_dtype=config.token_dtype.name,
            scales=config.num_scales,
            scale_dtype=config.scale_dtype.name if config.scale_dtype else "",
        )

    # --- lifetime ---

    def connect(self) -> None:
        """Opens regions and connects to every rank; collective over the mesh's processes. Idempotent.

        Waits for the others to come for three times ``stall_timeout``, and then for ``timeout`` for each
        further step of theirs. ``close`` in another thread ends it. A call that has failed may be repeated,
        on this group or a new, equal one, whatever the others did meanwhile.

        Raises:
          FabricError, TimeoutError, MismatchError, PeerError: what failed, with whom.
          GroupClosedError: the group is closed, or was meanwhile.
          ValueError: another live group has this name, or the mesh has no devices.
        """
        self._membership.connect()

    def mask(self, ranks: Sequence[int]) -> None:
        """Goes on without ``ranks``, which have died: for decoding, on CPUs. Collective over the others.

        Connects the ranks that are left anew; compiled programs run on as they are, with the same shapes. The
        masked ranks send nothing and get nothing. Their experts are lost, but for those that ``expert_map``
        places elsewhere too: ``dispatch`` treats a token's choices that are lost as -1, and multiplies the
        router weights of those that remain so that their sum stays what it was. A token that has lost all
        its experts gets zeros. ``stats()["masked"]`` tells how many did, and of how much weight. There are
        no derivatives any more: a program that needs them raises a ValueError. Tokens of an expert with
        replicas come to those that are left: where ``rows`` bounds what a rank receives, leave room for that.

        Every rank that is left must give the same ranks, which are added to those masked before. The error
        that ``check()`` raises names one that died as its ``rank``. JAX, too, must be told to live with dead
        processes: see docs/reliability.md.

        Args:
          ranks: positions along the group's axis, in every slice along it. All ranks of a process, or none.

        Raises:
          ValueError: a rank out of range, of this process, or of a process that has other ranks as well.
          TimeoutError: some rank that is left did not mask the same ranks within ``timeout``.
          FabricError: on GPUs.
          GroupClosedError: the group is closed.
        """
        if isinstance(ranks, (str, bytes)) or not isinstance(ranks, Iterable):
            raise TypeError(f"ranks must be a sequence of ints, got {ranks!r}")
        given = list(ranks)
        for rank in given:
            if isinstance(rank, bool) or not isinstance(rank, (int, np.integer)):
                why = ": the error holds nobody responsible" if rank is None else ""
                raise TypeError(f"ranks must be ints, got {rank!r}{why}")
        self._membership.mask(frozenset(int(rank) for rank in given))

    @property
    def masked(self) -> tuple[int, ...]:
        """Ranks that are masked, ascending."""
        return self._membership.masked

    def check(self, sync: bool = False) -> None:
        """Raises the typed error of the first exchange that failed on this process's ranks, if any.

        A data error (``RoutingError``) is thereby settled and the group usable again; every other failure
        is final.

        Args:
          sync: first wait for what has been dispatched to this process's devices.
        """
        self._membership.check(sync)

    def stats(self) -> dict[str, Any]:
        """Counters of this process's ranks, since they connected.

        Returns:
          A dict: ``name``, ``state``, ``fabric``,
            ``nics``: for each of this process's ranks the ``names`` of the NICs that it opened ("" is the
            first that the fabric offers), and ``why`` these,
            ``memory``: bytes of one rank, ``regions``, ``staging`` and ``total``; of a connected group on
            GPUs ``device``, ``pinned`` and ``total``, as they are allocated;
            ``ranks``: for each local rank its ``exchanges``, ``registrations`` of memory, and ``peers`` by
            rank: ``process`` (host and pid), ``sent_bytes``, ``received_bytes``, and how late its messages
            came, in seconds after this rank, done with sending its own, began to wait: ``waited_seconds`` in
            all, ``mean_wait_seconds``, ``longest_wait_seconds`` and ``recent_wait_seconds`` for an exchange,
            the latter a mean over about the last 64; on GPUs ``transport`` ("nvlink" or "proxy") too, and
            no waits; the rank's ``device_bytes``, ``pinned_bytes`` and ``num_sms``, and where messages go by
            the host ``regions`` and ``flags``, which lie in "device" or "pinned" ``memory``, and ``why`` (the
            messages themselves, and the words by which the host tells kernels of them), and ``courier``: its
            ``exchanges``, ``mean_posting_seconds`` that it took from a kernel's submission until all was
            posted, and ``mean_arrival_seconds`` until all was here;
            ``slowest``: the rank that was waited for longest: ``rank`` and, with further mesh axes,
            ``slice``, ``process``, ``seconds`` in all and ``longest`` for one exchange; None where nobody was
            waited for, as on the slowest rank itself;
            ``straggler``: the same of late, when "slowest" may still be who compiled longest: ``rank``,
            ``slice``, ``process``, and ``seconds``, its ``recent_wait_seconds``;
            ``masked``: None, or where ranks are masked ``ranks`` and what that cost this process's tokens
            since: ``routed_tokens`` that had an expert, ``tokens`` of these that lost one or more,
            ``whole_tokens`` that lost all, ``by_share``: how many of the others lost less than a quarter, a
            half, three quarters of their router weight, or more, and ``weight``: the sum of what was lost.
        """
        return self._membership.stats()

    def close(self) -> None:
        """Frees regions, threads and sockets, even while compiled programs refer to the group: running one
        then raises ``GroupClosedError``, until an equal group is opened. Idempotent.

        First waits, at most ``timeout``, for programs of this process that are under way."""
        self._membership.close()

    def __enter__(self) -> ExpertParallel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            # JAX's fast path turns an error of a program that runs synchronously into a ValueError.
            if error is None or isinstance(error, (jax.errors.JaxRuntimeError, ValueError)):
                self._membership.check(sync=False)
        finally:
            self.close()


__all__ = ["Batch", "ExpertParallel", "Route", "SentCombine", "SentDispatch"]
_core.set_connector(Membership.connect_by_id)
if (_cuda := gpu.extension()) is not None:
    _cuda.set_connector(Membership.connect_by_id)
