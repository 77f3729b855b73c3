"""What an exchange is, as a value: no device, no network."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from pplx_jax import _core

#: Tokens of a round when ``chunk`` is not given.
DEFAULT_CHUNK = 512
MAX_TOP_K = 16
MAX_DEPTH = 6
MAX_RANKS = 2048
#: Values of a row that share a scale where tokens are quantised.
SCALE_BLOCK = 128
_DTYPES = {
    "float32": _core.DType.float32,
    "bfloat16": _core.DType.bfloat16,
    "float16": _core.DType.float16,
}
_QUANTS = {None: _core.Quant.none, "fp8": _core.Quant.fp8, "fp8_ue8m0": _core.Quant.fp8_ue8m0}
_SCALE_DTYPES = {"fp8": jnp.float32, "fp8_ue8m0": jnp.float8_e8m0fnu}


def _dtype(name: str, value: Any) -> np.dtype[Any]:
    allowed = ", ".join(_DTYPES)
    try:
        dtype: np.dtype[Any] = np.dtype(value)
    except TypeError as error:
        raise TypeError(f"{name} must be one of {allowed}, got {value!r}") from error
    if dtype.name not in _DTYPES:
        raise ValueError(f"{name} must be one of {allowed}, got {dtype.name}")
    return dtype


def _integer(name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an int in {low}..{high}, got {value!r} ({type(value).__name__})")
    if not low <= value <= high:
        raise ValueError(f"{name} must be in {low}..{high}, got {value}")
    return int(value)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of exchange memory on one rank."""

    regions: int
    """Receive regions: one a source and lane."""
    staging: int
    """Send buffers: one a lane."""
    tokens: int
    """``batch.tokens`` (and scales) of a step of ``max_tokens``; XLA's memory, not the group's."""

    @property
    def total(self) -> int:
        """Regions and staging: what the group itself allocates."""
        return self.regions + self.staging


@dataclasses.dataclass(frozen=True, eq=False)
class ExchangeConfig:
    """Shape of a group's exchanges. Frozen, hashable, equal by value; does no I/O.

    Args:
      num_experts: experts of the layer, E, over all ranks. Expert ``e`` lies on rank
        ``e // ceil(E / R)`` unless an ``expert_map`` says otherwise; R need not divide E.
      top_k: experts of a token, K, 1 to 16 and at most ``num_experts``.
      hidden: elements of a token's row, H.
      max_tokens: most tokens of one rank in a step.
      dtype: of tokens and rows: float32, bfloat16 or float16.
      rows: most rows a rank receives: a count (int), or a factor (float) of the balanced load
        ``tokens * top_k``. In the padded layout, the same of one expert (balanced load:
        ``R * tokens * top_k / num_experts``). None: room for the worst case. See ``on_overflow``.
      chunk: tokens that one region holds; a larger step goes in rounds. Bounds the group's memory. Default
        ``min(max_tokens, 512)``.
      depth: exchanges that may be between send and recv; memory grows with it.
      layout: "ragged": [M, H], rows of one expert after another, ``group_sizes`` for
        ``jax.lax.ragged_dot``. "padded": [EL, rows, H], as many rows for each expert; ``group_sizes`` says
        how many hold a token.
      alignment: every expert's first row is a multiple of this. In the ragged layout padding rows are zero
        and count in ``group_sizes``.
      zero_tail: rows at and past ``sum(group_sizes)`` are zero; otherwise unspecified and never read.
      on_overflow: "raise" (a ``RoutingError``; outputs are NaN) or "drop": every expert keeps its first
        ``c`` rows with the largest common ``c`` that fits, dropped pairs contribute nothing, forward and
        backward, and ``batch.num_dropped`` counts them.
      quant: None, or "fp8": dispatched tokens are float8 e4m3 with a float32 scale for each 128 values of a
        row; "fp8_ue8m0": the scales are powers of two in a byte each. dispatch quantises, unless it is
        given ``scales=``. What comes back is never quantised. Format and bits: docs/protocol.md.
      combine_dtype: of rows on their way home, forward and backward: float32 keeps the experts' partial
        sums unrounded, for twice the bytes. None: ``dtype``.

    Raises:
      TypeError, ValueError: which field, what it was, what is allowed.
    """

    num_experts: int
    top_k: int
    hidden: int
    max_tokens: int
    dtype: Any = jnp.bfloat16
    rows: int | float | None = None
    chunk: int | None = None
    depth: int = 1
    layout: Literal["ragged", "padded"] = "ragged"
    alignment: int = 1
    zero_tail: bool = True
    on_overflow: Literal["raise", "drop"] = "raise"
    quant: Literal["fp8", "fp8_ue8m0"] | None = None
    combine_dtype: Any = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "num_experts", _integer("num_experts", self.num_experts, 1, 65535))
        put(self, "top_k", _integer("top_k", self.top_k, 1, min(MAX_TOP_K, self.num_experts)))
        put(self, "hidden", _integer("hidden", self.hidden, 1, 1 << 20))
        put(self, "max_tokens", _integer("max_tokens", self.max_tokens, 1, 1 << 20))
        if self.chunk is None:
            put(self, "chunk", min(self.max_tokens, DEFAULT_CHUNK))
        put(self, "chunk", _integer("chunk", self.chunk, 1, self.max_tokens))
        put(self, "depth", _integer("depth", self.depth, 1, MAX_DEPTH))
        put(self, "alignment", _integer("alignment", self.alignment, 1, 4096))
        put(self, "dtype", _dtype("dtype", self.dtype))
        home = self.dtype if self.combine_dtype is None else _dtype("combine_dtype", self.combine_dtype)
        if home not in (self.dtype, np.dtype(np.float32)):
            raise ValueError(f"combine_dtype must be float32 or dtype, {self.dtype.name}, got {home.name}")
        put(self, "combine_dtype", home)
        if not (self.quant is None or isinstance(self.quant, str)) or self.quant not in _QUANTS:
            raise ValueError(f'quant must be None, "fp8" or "fp8_ue8m0", got {self.quant!r}')
        if isinstance(self.rows, (float, np.floating)):
            put(self, "rows", float(self.rows))
            if not (math.isfinite(self.rows) and self.rows > 0):
                raise ValueError(f"rows as a factor of the balanced load must be > 0, got {self.rows}")
        elif self.rows is not None:
            put(self, "rows", _integer("rows", self.rows, 1, (1 << 31) - 1))
        if self.layout not in ("ragged", "padded"):
            raise ValueError(f'layout must be "ragged" or "padded", got {self.layout!r}')
        if self.on_overflow not in ("raise", "drop"):
            raise ValueError(f'on_overflow must be "raise" or "drop", got {self.on_overflow!r}')
        if not isinstance(self.zero_tail, bool):
            raise TypeError(f"zero_tail must be a bool, got {self.zero_tail!r}")

    def _key(self) -> tuple[Any, ...]:
        # rows=2 is a count and rows=2.0 a factor, though 2 == 2.0.
        return (isinstance(self.rows, float), *dataclasses.astuple(self))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ExchangeConfig) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def experts_per_rank(self, num_ranks: int) -> int:
        """Experts of one rank, ``ceil(num_experts / num_ranks)``; the last ranks may hold fewer."""
        return -(-self.num_experts // num_ranks)

    def num_rows(self, num_ranks: int, tokens: int | None = None, experts_per_rank: int | None = None) -> int:
        """Rows M of ``batch.tokens`` for a step of ``tokens`` (default ``max_tokens``) on each of
        ``num_ranks`` ranks: the worst case, or ``rows`` where that is less."""
        tokens = self.max_tokens if tokens is None else tokens
        experts = self.experts_per_rank(num_ranks) if experts_per_rank is None else experts_per_rank
        if self.layout == "padded":
            return experts * self.rows_per_expert(num_ranks, tokens)
        worst = num_ranks * tokens * min(self.top_k, experts) + experts * (self.alignment - 1)
        if self.rows is None:
            return worst
        rows = math.ceil(self.rows * tokens * self.top_k) if isinstance(self.rows, float) else self.rows
        return min(rows, worst)

    def rows_per_expert(self, num_ranks: int, tokens: int | None = None) -> int:
        """Rows of each expert in the padded layout, a multiple of ``alignment``."""
        tokens = self.max_tokens if tokens is None else tokens
        rows = num_ranks * tokens
        if isinstance(self.rows, float):
            rows = min(rows, math.ceil(self.rows * rows * self.top_k / self.num_experts))
        elif self.rows is not None:
            rows = min(rows, self.rows)
        return -(-rows // self.alignment) * self.alignment

    @property
    def token_dtype(self) -> np.dtype[Any]:
        """Of ``batch.tokens``: ``dtype``, or float8_e4m3fn where tokens are quantised."""
        quantized: np.dtype[Any] = np.dtype(jnp.float8_e4m3fn)
        return np.dtype(self.dtype) if self.quant is None else quantized

    @property
    def scale_dtype(self) -> np.dtype[Any] | None:
        """Of ``batch.scales``: float32 or float8_e8m0fnu, or None where tokens are not quantised."""
        return None if self.quant is None else np.dtype(_SCALE_DTYPES[self.quant])

    @property
    def num_scales(self) -> int:
        """Scales of a row: one for each 128 values, or 0 where tokens are not quantised."""
        return 0 if self.quant is None else -(-self.hidden // SCALE_BLOCK)

    def memory(self, num_ranks: int, experts_per_rank: int | None = None) -> Memory:
        """Bytes that a group of ``num_ranks`` allocates on each rank, on CPUs.

        On GPUs the ``regions`` lie in device memory, with 64 bytes more for each of their
        ``2 * depth * num_ranks * chunk`` slots and a few MiB of scratch. Where ranks are reached by the host,
        twice as much as ``regions`` comes on top, in place of ``staging``: pinned host memory, or device
        memory where the NICs reach it. What a group has allocated is in
        ``ExpertParallel.stats()["memory"]``.
        """
        num_ranks = _integer("num_ranks", num_ranks, 1, MAX_RANKS)
        if experts_per_rank is not None:
            experts_per_rank = _integer("experts_per_rank", experts_per_rank, 1, 65535)
        experts = self.experts_per_rank(num_ranks) if experts_per_rank is None else experts_per_rank
        region, staging = self.shape(0, num_ranks, experts).buffer_bytes()
        lanes = 2 * self.depth
        rows = self.num_rows(num_ranks, experts_per_rank=experts)
        return Memory(
            regions=lanes * num_ranks * region,
            staging=lanes * staging,
            tokens=rows
            * (
                self.hidden * self.token_dtype.itemsize
                + self.num_scales * (self.scale_dtype.itemsize if self.scale_dtype else 0)
            ),
        )

    def shape(self, rank: int, num_ranks: int, experts_per_rank: int) -> _core.MoeShape:
        """The same for the C++ side."""
        shape = _core.MoeShape()
        shape.rank = rank
        shape.num_ranks = num_ranks
        shape.num_experts = self.num_experts
        shape.experts_per_rank = experts_per_rank
        shape.top_k = self.top_k
        shape.hidden = self.hidden
        shape.max_tokens = self.max_tokens
        shape.chunk = self.chunk or self.max_tokens
        shape.alignment = self.alignment
        shape.dtype = _DTYPES[self.dtype.name]
        shape.home_dtype = _DTYPES[self.combine_dtype.name]
        shape.quant = _QUANTS[self.quant]
        shape.padded = self.layout == "padded"
        shape.zero_tail = self.zero_tail
        shape.drop = self.on_overflow == "drop"
        return shape
