"""Dense oracles and the sharded function they are compared with. Expert e multiplies a token by ``scale[e]``:
a misrouted row changes the result."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pplx_jax import ExpertParallel

SPEC = P("ep")


def make_mesh(ranks: int, axis: str = "ep") -> Mesh:
    return Mesh(np.array(jax.devices()[:ranks]), (axis,))


def row_experts(batch: Any) -> jax.Array:
    """Local expert of every row; rows past the last group get the last expert."""
    rows = jnp.arange(batch.tokens.shape[0])
    ends = jnp.cumsum(batch.group_sizes)
    return jnp.minimum((rows[:, None] >= ends).sum(-1), batch.group_sizes.shape[0] - 1)


def experts(batch: Any, scale: jax.Array) -> jax.Array:
    scale = scale.astype(batch.values.dtype)
    if batch.values.ndim == 3:  # padded
        return batch.values * scale[:, None, None]
    return batch.values * scale[row_experts(batch)][:, None]


def sharded(ep: ExpertParallel, **options: Any) -> Any:
    """[R*T, H] tokens, [R*T, K] indices and weights, [R*EL] scales, [R] counts -> [R*T, H], not jitted."""

    def per_shard(x: Any, indices: Any, weights: Any, scale: Any, counts: Any) -> Any:
        batch, route = ep.dispatch(x, indices, weights, num_tokens=counts[0])
        return ep.combine(experts(batch, scale), route, **options)

    axis = P(ep.axis)
    return jax.shard_map(per_shard, mesh=ep.mesh, in_specs=(axis,) * 5, out_specs=axis)


class Case:
    """Inputs of one step."""

    def __init__(self, ep: ExpertParallel, tokens: int, seed: int, skew: str = "uniform") -> None:
        config, ranks = ep.config, ep.num_ranks
        rng = np.random.default_rng(seed)
        self.ep, self.tokens = ep, tokens
        total = ranks * tokens
        self.x = np.array(jnp.asarray(rng.normal(size=(total, config.hidden)), config.dtype))
        probabilities = np.ones(config.num_experts)
        if skew == "zipf":
            probabilities = 1.0 / np.arange(1, config.num_experts + 1) ** 1.5
        probabilities /= probabilities.sum()
        choose = lambda: rng.choice(config.num_experts, config.top_k, replace=False, p=probabilities)  # noqa: E731
        if skew == "all to one":
            choose = lambda: rng.permutation(config.top_k)  # noqa: E731
        rows = [choose() for _ in range(total)]
        self.indices = np.array(rows, np.int32).reshape(total, config.top_k)
        if skew == "holes":
            self.indices[rng.random(self.indices.shape) < 0.4] = -1
        if skew == "nothing":
            self.indices[:] = -1
        self.weights = rng.random((total, config.top_k)).astype(np.float32)
        self.counts = np.full(ranks, tokens, np.int32)
        if skew == "ragged":
            self.counts = rng.integers(0, tokens + 1, ranks).astype(np.int32)
        self.scale = np.zeros(ranks * ep.experts_per_rank, np.float32)
        self.scale[: config.num_experts] = rng.normal(size=config.num_experts)
        self.scale = np.asarray(jnp.asarray(self.scale, config.dtype).astype(np.float32))

    @property
    def args(self) -> tuple[Any, ...]:
        return (self.x, self.indices, self.weights, self.scale, self.counts)

    def valid(self) -> np.ndarray:
        position = np.tile(np.arange(self.tokens), self.ep.num_ranks)
        return position < np.repeat(self.counts, self.tokens)

    def expected(self) -> np.ndarray:
        """The same bits as the exchange: on a rank in top-k column order, at home in rank order, products
        and sums rounded apart in float32, rows rounded to the config's dtype, on their way home to its
        combine_dtype; the tokens are quantised first where the config says so."""
        dtype, per_rank = self.ep.config.dtype, self.ep.experts_per_rank
        travels = self.ep.config.combine_dtype
        out = np.zeros_like(self.x)
        tokens = self.x if self.ep.config.quant is None else dequantized(self.ep.config, *quantized(self))
        for t in np.flatnonzero(self.valid()):
            total = None
            chosen = self.indices[t]
            for rank in sorted({e // per_rank for e in chosen if e >= 0}):
                partial = None
                for k, e in enumerate(chosen):
                    if e < 0 or e // per_rank != rank:
                        continue
                    scaled = tokens[t].astype(np.float32) * self.scale[e]
                    term = self.weights[t, k] * scaled.astype(dtype).astype(np.float32)
                    partial = term if partial is None else partial + term
                row = partial.astype(travels).astype(np.float32)
                total = row if total is None else total + row
            if total is not None:
                out[t] = total.astype(dtype)
        return out


def quantized(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """The case's tokens as float8 e4m3 and their scales, as docs/protocol.md defines them."""
    config = case.ep.config
    x = case.x.astype(np.float32)
    blocks = -(-config.hidden // 128)
    padded = np.zeros((len(x), blocks * 128), np.float32)
    padded[:, : config.hidden] = x
    largest = np.maximum(np.abs(padded).reshape(len(x), blocks, 128).max(-1), np.float32(2.0**-100))
    if config.quant == "fp8":
        scales, inverse = largest / np.float32(448), np.float32(448) / largest
    else:
        scales = np.exp2(np.ceil(np.log2(largest.astype(np.float64) / 448))).astype(np.float32)
        inverse = 1 / scales
    values = padded * np.repeat(inverse, 128, axis=1)
    values = np.clip(values, -448, 448).astype(config.token_dtype)[:, : config.hidden]
    return values, scales.astype(config.scale_dtype)


def dequantized(config: Any, values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    spread = np.repeat(scales.astype(np.float32), 128, axis=1)[:, : config.hidden]
    return (values.astype(np.float32) * spread).astype(config.dtype)


def dense(x: Any, indices: Any, weights: Any, scale: Any, valid: Any) -> jax.Array:
    """The function that dispatch and combine compute, for autodiff."""
    chosen = (indices >= 0) & valid[:, None]
    factor = (weights * scale[jnp.where(chosen, indices, 0)] * chosen).sum(-1)
    return x * factor[:, None]


def same_bits(a: Any, b: Any) -> None:
    a, b = np.asarray(a), np.asarray(b)
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    different = a.reshape(-1).view(np.uint8) != b.reshape(-1).view(np.uint8)
    # -0.0 and 0.0 are one value: the oracle starts from zeros where nothing was added.
    if different.any():
        np.testing.assert_array_equal(a.astype(np.float64), b.astype(np.float64))
