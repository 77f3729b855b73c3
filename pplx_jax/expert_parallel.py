"""The group of ranks that exchange tokens, and its two operations."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from pplx_jax import _core, compat, environment, halves, ops
from pplx_jax.config import MAX_RANKS, ExchangeConfig
from pplx_jax.fabric import Fabric
from pplx_jax.membership import Membership


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Tokens of this rank's experts. M rows, H hidden, EL experts a rank."""

    tokens: jax.Array
    """[M, H], the config's ``token_dtype``: rows of one expert after another, within it by (source rank,
    token). In the padded layout [EL, rows, H]. Quantised tokens have no derivative: see ``values``."""
    weights: jax.Array
    """float32 [M] or [EL, rows]: each row's router weight; 0 in padding."""
    group_sizes: jax.Array
    """int32 [EL]: rows of each expert, as ``jax.lax.ragged_dot`` wants them."""
    num_rows: jax.Array
    """int32 []: rows that hold a token."""
    num_dropped: jax.Array
    """int32 []: (token, expert) pairs dropped here by ``on_overflow="drop"``."""
    ok: jax.Array
    """int32 []: 1, or 0 when this exchange failed; then floats are NaN and the counts are 0."""
    values: jax.Array
    """Like ``tokens`` in the config's ``dtype`` and differentiable: where tokens are quantised, what they
    stand for (straight through: the gradient is that of unquantised tokens), otherwise ``tokens``."""
    scales: jax.Array | None = None
    """The config's ``scale_dtype`` [M, S] or [EL, rows, S], one for each 128 values; None without
    quantisation."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Route:
    """What ``combine`` and the derivatives need to know of a ``dispatch``: a pytree of arrays, opaque."""

    arrays: ops.RouteArrays
    weights: jax.Array
    group_sizes: jax.Array
    call: ops.Call = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SentDispatch:
    """A dispatch between its send and its recv; opaque. Receive it exactly once."""

    ticket: jax.Array
    home: jax.Array
    call: ops.Call = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SentCombine:
    """A combine between its send and its recv; opaque. Receive it exactly once."""

    ticket: jax.Array
    arrays: ops.RouteArrays
    call: ops.Call = dataclasses.field(metadata={"static": True})


def _hash63(*parts: object) -> int:
    """The same in every process and on every run, unlike ``hash``; fits a signed 64-bit attribute."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _describe(x: Any) -> str:
    return f"{jnp.result_type(x).name}{list(jnp.shape(x))}"


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
      timeout: seconds of silence after which a peer counts as dead, and limit for connecting; 30, or what
        the environment says (``PPLX_TIMEOUT``).
      stall_timeout: seconds to wait for a live peer that doesn't reach an exchange; three times that at a
        call's first execution. At most 50 where several ranks share a process, as XLA aborts a process
        whose collective is stuck for 60.

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
        **config_fields: Any,
    ) -> None:
        if not isinstance(mesh, (Mesh, AbstractMesh)):
            raise TypeError(f"mesh must be a jax.sharding.Mesh or AbstractMesh, got {type(mesh).__name__}")
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
        self._membership = Membership(self, Fabric.parse(fabric), float(timeout), float(stall_timeout))
        # A group that nobody refers to any more frees its memory and name; so does the interpreter's exit.
        weakref.finalize(self, self._membership.close)

    def _checked_map(self, expert_map: Any) -> np.ndarray[Any, np.dtype[np.int32]]:
        experts, ranks = self.config.num_experts, self.num_ranks
        if expert_map is None:
            slots = self.config.experts_per_rank(ranks) * ranks
            table = np.arange(slots, dtype=np.int32)
            table[experts:] = -1
            return table
        table = np.asarray(expert_map)
        if table.dtype.kind not in "iu" or table.size == 0 or table.size % ranks:
            raise ValueError(
                f"expert_map must hold ints, equally many for each of {ranks} ranks, got {_describe(table)}"
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
        return isinstance(other, ExpertParallel) and self._value == other._value

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
        tokens, before = self._tokens(x, indices, weights, scales, num_tokens, expert_map, after)
        call = self._call(tokens.x.shape[0], name)
        if tokens.x.shape[0] == 0:
            return self._empty(call, tokens)
        return self._batch(call, ops.dispatch(call, tokens, before))

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
        rows, call = self._rows(y, route, weighted)
        accumulate = self._accumulate(accumulate, rows.route)
        rows, accumulate, before = self._varying((rows, accumulate, _order_operands(after)))
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
        """The first half of ``dispatch``: posts the tokens and waits for nobody, so that what runs between
        it and ``dispatch_recv`` (shared experts, another micro-batch) overlaps with the network.

        At most the config's ``depth`` exchanges may be between send and recv. They are received in the order
        in which they were sent, in the same execution of the same program, each exactly once; the result may
        cross a ``jax.lax.scan`` as carry. Differentiable: the derivative of a recv is a send, so under grad
        the recvs of independent exchanges need an order too: give ``after=`` to them as well.

        Args:
          x, indices, weights, scales, num_tokens, expert_map, after, name: as in ``dispatch``.

        Raises:
          TypeError, ValueError: as ``dispatch``; also when T exceeds the config's ``chunk``.
        """
        tokens, before = self._tokens(x, indices, weights, scales, num_tokens, expert_map, after)
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
        self._require_sent(sent, SentDispatch, "dispatch")
        sent, before = self._varying((sent, _order_operands(after)))
        if sent.home.shape[0] == 0:
            zero = jnp.sum(sent.ticket)
            nothing = jnp.sum(sent.home)
            x = jnp.broadcast_to(zero, (0, self.config.hidden))
            tokens = ops.Tokens(x, None, x[:, :1] * 0, sent.home, nothing, nothing)
            return self._empty(sent.call, tokens)
        return self._batch(sent.call, halves.dispatch_recv(sent.call, sent.ticket, sent.home, before))

    def combine_send(
        self, y: jax.Array, route: Route, *, weighted: bool = True, after: Any = None
    ) -> SentCombine:
        """The first half of ``combine``; see ``dispatch_send``.

        Args:
          y, route, weighted, after: as in ``combine``.
        """
        rows, call = self._rows(y, route, weighted)
        if self.config.chunk is not None and rows.route.home.shape[0] > self.config.chunk:
            raise ValueError("send and recv apart go in one round: make chunk at least as large as T")
        rows, before = self._varying((rows, _order_operands(after)))
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
        self._require_sent(sent, SentCombine, "combine")
        accumulate = self._accumulate(accumulate, sent.arrays)
        sent, accumulate, before = self._varying((sent, accumulate, _order_operands(after)))
        if sent.arrays.home.shape[0] == 0:
            empty = jnp.broadcast_to(jnp.sum(sent.ticket), (0, self.config.hidden)).astype(self.config.dtype)
            return empty if accumulate is None else accumulate
        return halves.combine_recv(sent.call, sent.ticket, sent.arrays, accumulate, before)

    # --- arguments and results ---

    def _tokens(
        self,
        x: Any,
        indices: Any,
        weights: Any,
        scales: Any,
        num_tokens: Any,
        expert_map: Any,
        after: Any,
    ) -> tuple[ops.Tokens, ops.After]:
        """Checks the arguments of a dispatch."""
        config = self.config
        x, indices, weights = jnp.asarray(x), jnp.asarray(indices), jnp.asarray(weights)
        if x.ndim != 2 or x.shape[1] != config.hidden:
            raise ValueError(f"x must be [T, {config.hidden}], got {_describe(x)}")
        tokens = x.shape[0]
        if scales is None:
            if x.dtype != config.dtype:
                raise TypeError(f"x must be {config.dtype.name} (the config's dtype), got {_describe(x)}")
        else:
            x, scales = self._quantized(x, jnp.asarray(scales))
        if tokens > config.max_tokens:
            raise ValueError(f"x has {tokens} tokens, max_tokens is {config.max_tokens}")
        for what, array, dtype in (("indices", indices, np.int32), ("weights", weights, np.float32)):
            if array.shape != (tokens, config.top_k):
                raise ValueError(f"{what} must be [{tokens}, {config.top_k}], got {_describe(array)}")
            if array.dtype != dtype:
                raise TypeError(f"{what} must be {np.dtype(dtype).name}, got {_describe(array)}")
        count = jnp.asarray(tokens if num_tokens is None else num_tokens)
        if count.shape != () or not jnp.issubdtype(count.dtype, jnp.integer):
            raise TypeError(f"num_tokens must be an integer scalar, got {_describe(count)}")
        table = jnp.asarray(self.expert_map if expert_map is None else expert_map)
        if table.size != self.expert_map.size or table.shape not in (
            (table.size,),
            (self.num_ranks, self.experts_per_rank),
        ):
            raise ValueError(
                f"expert_map must be [{self.num_ranks}, {self.experts_per_rank}] or flat, like the group's "
                f"own, got {_describe(table)}"
            )
        if not jnp.issubdtype(table.dtype, jnp.integer):
            raise TypeError(f"expert_map must hold integers, got {_describe(table)}")
        self._require_sharded(x)
        operands = ops.Tokens(
            x, scales, weights, indices, count.astype(jnp.int32), table.reshape(-1).astype(jnp.int32)
        )
        checked: tuple[ops.Tokens, ops.After] = self._varying((operands, _order_operands(after)))
        return checked

    def _quantized(self, x: jax.Array, scales: jax.Array) -> tuple[jax.Array, jax.Array]:
        config = self.config
        if config.quant is None or config.scale_dtype is None:
            raise ValueError('scales: the config has quant=None; make it with quant="fp8" or "fp8_ue8m0"')
        for what, array, dtype, columns in (
            ("x", x, config.token_dtype, config.hidden),
            ("scales", scales, config.scale_dtype, config.num_scales),
        ):
            if array.shape != (x.shape[0], columns):
                raise ValueError(
                    f"{what} must be [{x.shape[0]}, {columns}] (with scales=), got {_describe(array)}"
                )
            if array.dtype != dtype:
                raise TypeError(f"{what} must be {dtype.name} (with scales=), got {_describe(array)}")
        why = (
            "dispatch with scales= has no derivative in x and scales: pass unquantised tokens, which "
            "dispatch quantises itself with straight-through gradients, or use jax.lax.stop_gradient"
        )
        return ops.not_differentiable(why, x), ops.not_differentiable(why, scales)

    def _batch(self, call: ops.Call, out: ops.Dispatched) -> tuple[Batch, Route]:
        """Names results, in the shapes of the layout."""

        def shaped(rows: jax.Array) -> jax.Array:
            if self.config.layout == "ragged":
                return rows
            return rows.reshape(self.experts_per_rank, -1, *rows.shape[1:])

        values = shaped(out.values)
        tokens, scales = values, None
        if out.tokens is not None and out.scales is not None:
            why = (
                "batch.tokens and batch.scales of quantised tokens have no derivative: use batch.values (and "
                "don't return them from a function with a custom derivative, which makes zeros for them)"
            )
            tokens = shaped(ops.not_differentiable(why, out.tokens))
            scales = shaped(ops.not_differentiable(why, out.scales))
        batch = Batch(
            tokens=tokens,
            weights=shaped(out.row_weights),
            group_sizes=out.group_sizes,
            num_rows=out.num_rows,
            num_dropped=out.num_dropped,
            ok=out.route.ok,
            values=values,
            scales=scales,
        )
        return batch, Route(out.route, out.row_weights, out.group_sizes, call)

    def _rows(self, y: Any, route: Any, weighted: Any) -> tuple[ops.Rows, ops.Call]:
        """Checks the arguments of a combine."""
        if not isinstance(route, Route):
            raise TypeError(f"route must come from dispatch, got {type(route).__name__}")
        if route.call.group != self.group_id:
            raise ValueError("route comes from another group's dispatch")
        if not isinstance(weighted, bool):
            raise TypeError(f"weighted must be a bool, got {weighted!r}")
        y = jnp.asarray(y)
        shape: tuple[int, ...] = (route.call.rows, self.config.hidden)
        if self.config.layout == "padded":
            experts = self.experts_per_rank
            shape = (experts, route.call.rows // experts, self.config.hidden)
        if y.shape != shape:
            raise ValueError(f"y must be {list(shape)}, got {_describe(y)}")
        if y.dtype != self.config.dtype:
            raise TypeError(f"y must be {self.config.dtype.name}, got {_describe(y)}")
        rows = ops.Rows(y.reshape(-1, self.config.hidden), route.weights, route.arrays, route.group_sizes)
        return rows, dataclasses.replace(route.call, weighted=weighted)

    def _accumulate(self, accumulate: Any, route: ops.RouteArrays) -> jax.Array | None:
        if accumulate is None:
            return None
        accumulate = jnp.asarray(accumulate)
        assert isinstance(accumulate, jax.Array)
        shape = (route.home.shape[0], self.config.hidden)
        if accumulate.shape != shape:
            raise ValueError(f"accumulate must be {list(shape)}, got {_describe(accumulate)}")
        if accumulate.dtype != self.config.dtype:
            raise TypeError(f"accumulate must be {self.config.dtype.name}, got {_describe(accumulate)}")
        return accumulate

    def _require_sent(self, sent: Any, kind: type[Any], operation: str) -> None:
        if not isinstance(sent, kind):
            raise TypeError(f"sent must come from {operation}_send, got {type(sent).__name__}")
        if sent.call.group != self.group_id:
            raise ValueError(f"sent comes from another group's {operation}_send")

    def _require_sharded(self, x: jax.Array) -> None:
        """Refuses tokens that JAX knows to be the same on all ranks of an axis."""
        self._require_manual()
        if not compat.checks_replication(x, self.axes):
            return
        same = [a for a in self.axes if self.mesh.shape[a] > 1 and a not in compat.varying_axes(x)]
        if same:
            raise ValueError(
                f"x is replicated over axis {same[0]!r} of the group: every rank there would send the same "
                f"{x.shape[0]} tokens. Shard them with in_specs=P({self.axis!r}), or slice inside: "
                f"n = x.shape[0] // jax.lax.axis_size({same[0]!r}); "
                f"x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index({same[0]!r}) * n, n)"
            )

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

    def _require_manual(self) -> None:
        """Refuses to run where not every axis of the mesh is manual."""
        bound = compat.bound_axes()
        missing = [axis for axis in self.axes if axis not in bound]
        if missing:
            raise ValueError(
                "dispatch and combine work per shard: call them inside jax.shard_map over the mesh, with "
                f"axis {missing[0]!r} manual (manual here: {sorted(bound) or 'none'})"
            )
        for axis in self.axes:
            size = jax.lax.axis_size(axis)
            if size != self.mesh.shape[axis]:
                raise ValueError(
                    f"axis {axis!r} has size {size} here, {self.mesh.shape[axis]} in the group's mesh"
                )
        partial = [a for a in self.mesh.axis_names if a not in bound and self.mesh.shape[a] > 1]
        if partial:
            raise ValueError(
                f"dispatch and combine need every axis of the mesh manual, {partial[0]!r} is not: leave out "
                "axis_names= of jax.shard_map, or name all axes there, and shard over the others by in_specs"
            )

    def _varying(self, operands: Any) -> Any:
        """Every operand varying over the group's axes and those of the others: JAX then sums the gradient
        of what was replicated."""
        self._require_manual()
        leaves = jax.tree.leaves(operands)
        if not compat.checks_replication(leaves[0], self.axes):
            return operands
        axes = frozenset(self.axes).union(*(compat.varying_axes(leaf) for leaf in leaves))
        return jax.tree.map(lambda leaf: compat.to_varying(leaf, axes), operands)

    def _empty(self, call: ops.Call, tokens: ops.Tokens) -> tuple[Batch, Route]:
        # T is 0 on every rank: there is nothing to exchange. Results depend on operands to vary as they do.
        nothing = tokens.num_tokens * 0
        zero = jnp.sum(tokens.x.astype(jnp.float32)) + jnp.sum(tokens.weights)

        def zeros(dtype: Any, *shape: int) -> jax.Array:
            return jnp.broadcast_to(zero, shape).astype(dtype)

        def ints(*shape: int) -> jax.Array:
            return jnp.broadcast_to(nothing, shape)

        arrays = ops.RouteArrays(
            tokens.indices, ints(call.messages), ints(1), tokens.indices[:, 0], nothing + 1
        )
        out = ops.Dispatched(
            values=zeros(call.dtype, call.rows, call.hidden),
            row_weights=zeros(jnp.float32, call.rows),
            order=zero,
            tokens=zeros(call.token_dtype, call.rows, call.hidden) if call.scales else None,
            scales=zeros(call.scale_dtype, call.rows, call.scales) if call.scales else None,
            group_sizes=ints(call.experts_per_rank),
            num_rows=nothing,
            num_dropped=nothing,
            route=arrays,
        )
        return self._batch(call, out)

    # --- lifetime ---

    def connect(self) -> None:
        """Opens regions and connects to every rank; collective over the mesh's processes. Idempotent.

        Raises:
          FabricError, TimeoutError, MismatchError, PeerError: what failed, with whom.
          ValueError: another live group has this name, or the mesh has no devices.
        """
        self._membership.connect()

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
          A dict: ``name``, ``state``, ``fabric``, ``memory`` in bytes, and
            ``ranks``: for each local rank its ``exchanges``, and ``peers`` by rank: ``process`` (host and
            pid), ``sent_bytes``, ``received_bytes``, and how late its messages came, in seconds after this
            rank, done with sending its own, began to wait: ``waited_seconds`` in all, ``mean_wait_seconds``
            and ``longest_wait_seconds`` for an exchange;
            ``slowest``: the rank that was waited for longest: ``rank`` and, with further mesh axes,
            ``slice``, ``process``, ``seconds`` in all and ``longest`` for one exchange; None where nobody was
            waited for, as on the slowest rank itself.
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


_ORDERING = (Batch, Route, SentDispatch, SentCombine)


def _order_operands(after: Any) -> ops.After:
    """One small operand for each array, route or batch in ``after``."""
    operands = []
    for item in jax.tree.leaves(after, is_leaf=lambda node: isinstance(node, _ORDERING)):
        if isinstance(item, (Batch, Route)):
            item = item.weights
        elif isinstance(item, (SentDispatch, SentCombine)):
            item = item.ticket
        array = jnp.asarray(item)
        if array.size:
            operands.append(array.reshape(-1)[:1])
    return tuple(operands)


__all__ = ["Batch", "ExpertParallel", "Route", "SentCombine", "SentDispatch"]
_core.set_connector(Membership.connect_by_id)
