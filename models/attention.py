"""Attention with grouped key and value heads: softmax(q k) v over a cache or over the tokens themselves."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from pplx_jax.models.cache import LayerCache, causal_mask
from pplx_jax.models.layers import Matrix, RMSNorm
from pplx_jax.models.rope import Rope, rotate
from pplx_jax.models.sharding import Placement


def softmax(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """Over the last axis of float32 [..., S, L], where the mask [S, L] allows."""
    return jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, scale: float) -> jax.Array:
    """Scores and softmax in float32, products in the operands' dtype with float32 sums.

    Args:
      q: [B, S, heads, D]; head h looks at key and value head h // (heads / KV heads).
      k, v: [B, L, KV heads, D] and [B, L, KV heads, D'].
      mask: bool [S, L].
      scale: factor on the scores.

    Returns:
      [B, S, heads, D'] of q's dtype.
    """
    batch, length, heads, width = q.shape
    groups = k.shape[2]
    grouped = q.reshape(batch, length, groups, heads // groups, width)
    scores = jnp.einsum("bsgnd,blgd->bgnsl", grouped, k, preferred_element_type=jnp.float32) * scale
    weights = softmax(scores, mask).astype(q.dtype)
    out = jnp.einsum("bgnsl,blgd->bsgnd", weights, v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype).reshape(batch, length, heads, v.shape[-1])


class GroupedAttention(nnx.Module):  # type: ignore[misc]
    """Self-attention with grouped key and value heads (Ainslie et al. 2023, arXiv:2305.13245).

    Heads are split over tp; where it doesn't divide the key and value heads, those are on every rank.

    Args:
      hidden: H.
      heads, kv_heads, head_dim: query heads, key and value heads, D.
      rope: rotary positions.
      norm_eps: an RMSNorm on every query and key head with this epsilon (Qwen3), or None.
      window: tokens that a query looks back at, its own included; None for all.
      rngs: Flax's generators.
      placement: where and in which dtype.
    """

    def __init__(
        self,
        hidden: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        rope: Rope,
        norm_eps: float | None = None,
        window: int | None = None,
        rngs: nnx.Rngs,
        placement: Placement,
    ) -> None:
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.rope, self.window, self.placement = rope, window, placement
        tp, tp_kv = placement.tp(heads), placement.tp(kv_heads)
        self.q = Matrix(hidden, heads * head_dim, (None, tp), rngs=rngs, placement=placement)
        self.k = Matrix(hidden, kv_heads * head_dim, (None, tp_kv), rngs=rngs, placement=placement)
        self.v = Matrix(hidden, kv_heads * head_dim, (None, tp_kv), rngs=rngs, placement=placement)
        self.out = Matrix(heads * head_dim, hidden, (tp, None), rngs=rngs, placement=placement)
        self.q_norm = None if norm_eps is None else RMSNorm(head_dim, norm_eps, placement.dtype)
        self.k_norm = None if norm_eps is None else RMSNorm(head_dim, norm_eps, placement.dtype)

    def cache(self, batch: int, length: int) -> LayerCache:
        """An empty one for ``length`` tokens of each of ``batch`` sequences."""
        shape = (batch, length, self.kv_heads, self.head_dim)
        spec = (self.placement.batch(batch), None, self.placement.tp(self.kv_heads), None)

        def zeros() -> jax.Array:
            return self.placement.constrain(jnp.zeros(shape, self.placement.dtype), *spec)

        return LayerCache(zeros(), zeros())

    def __call__(
        self, x: jax.Array, cache: LayerCache | None, position: jax.Array | int
    ) -> tuple[jax.Array, LayerCache | None]:
        """Attends tokens to themselves and those before them.

        Args:
          x: [B, S, H].
          cache: of the tokens before ``position``, or None: there are none.
          position: int32 scalar, of the first token.

        Returns:
          [B, S, H], and the cache with these tokens.
        """
        batch, length, _ = x.shape
        q = self.q(x).reshape(batch, length, self.heads, self.head_dim)
        k = self.k(x).reshape(batch, length, self.kv_heads, self.head_dim)
        v = self.v(x).reshape(batch, length, self.kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        tables = self.rope.tables(position + jnp.arange(length), self.head_dim)
        q, k = rotate(q, tables), rotate(k, tables)
        if cache is not None:
            cache = cache.write(k, v, jnp.asarray(position))
            k, v = cache.first, cache.second
        mask = causal_mask(position, length, k.shape[1], self.window)
        y = attend(q, k, v, mask, self.head_dim**-0.5)
        return self.out(y.reshape(batch, length, -1)), cache
