"""DeepSeek-V3's decoder, which Kimi K2 shares: latent attention, sigmoid router, a shared expert."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from pplx_jax.models.attention import softmax
from pplx_jax.models.cache import LayerCache, causal_mask
from pplx_jax.models.config import DecoderConfig
from pplx_jax.models.decoder import Decoder
from pplx_jax.models.deepseek.config import DeepSeekConfig
from pplx_jax.models.layers import Matrix, RMSNorm
from pplx_jax.models.rope import rotate
from pplx_jax.models.sharding import Placement

# The checkpoints' norms within attention have this epsilon, whatever rms_norm_eps says.
_LATENT_NORM_EPS = 1e-6


class LatentAttention(nnx.Module):  # type: ignore[misc]
    """Multi-head latent attention (DeepSeek-AI 2024, arXiv:2405.04434, section 2.1), heads split over tp.

    A token's keys and values are linear in a latent of ``kv_lora_rank`` numbers, which is all that caches
    keep besides one rotated key. Few queries are taken into the latents' space (the matrices that would
    expand the latents are multiplied into queries and outputs instead); with many it is cheaper to expand
    the latents.

    Args:
      config: sizes.
      rngs: Flax's generators.
      placement: where and in which dtype.
    """

    def __init__(self, config: DeepSeekConfig, *, rngs: nnx.Rngs, placement: Placement) -> None:
        self.config, self.placement = config, placement
        hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
        tp = placement.tp(heads)
        inputs = hidden
        if config.q_lora_rank is None:
            self.q_down = self.q_norm = None
        else:
            inputs = config.q_lora_rank
            self.q_down = Matrix(hidden, inputs, (None, None), rngs=rngs, placement=placement)
            self.q_norm = RMSNorm(inputs, _LATENT_NORM_EPS, placement.dtype)
        self.q_up = Matrix(inputs, heads * config.qk_head_dim, (None, tp), rngs=rngs, placement=placement)
        self.kv_down = Matrix(
            hidden, rank + config.qk_rope_head_dim, (None, None), rngs=rngs, placement=placement
        )
        self.kv_norm = RMSNorm(rank, _LATENT_NORM_EPS, placement.dtype)
        expanded = heads * (config.qk_nope_head_dim + config.v_head_dim)
        self.kv_up = Matrix(rank, expanded, (None, tp), rngs=rngs, placement=placement)
        self.out = Matrix(heads * config.v_head_dim, hidden, (tp, None), rngs=rngs, placement=placement)

    def cache(self, batch: int, length: int) -> LayerCache:
        """An empty one for ``length`` tokens of each of ``batch`` sequences; on every tp rank."""

        def zeros(size: int) -> jax.Array:
            empty = jnp.zeros((batch, length, size), self.placement.dtype)
            return self.placement.constrain(empty, self.placement.batch(batch), None, None)

        return LayerCache(zeros(self.config.kv_lora_rank), zeros(self.config.qk_rope_head_dim))

    def absorbs(self, queries: int) -> bool:
        """Whether so many queries are taken into the latents' space: it then needs fewer multiplications.

        For each head and key, absorbed, every query costs rank + rope for its score and rank for its output;
        expanded it costs nope + rope and v, and the expansion rank * (nope + v) once.
        """
        config = self.config
        once = config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim)
        saved = 2 * config.kv_lora_rank - config.qk_nope_head_dim - config.v_head_dim
        return queries * saved < once

    def __call__(
        self, x: jax.Array, cache: LayerCache | None, position: jax.Array | int
    ) -> tuple[jax.Array, LayerCache | None]:
        """Attends tokens [B, S, H] to themselves and those before them, see `GroupedAttention`."""
        config, (batch, length, _) = self.config, x.shape
        heads, rank = config.num_attention_heads, config.kv_lora_rank
        q = x if self.q_down is None or self.q_norm is None else self.q_norm(self.q_down(x))
        q = self.q_up(q).reshape(batch, length, heads, config.qk_head_dim)
        q_nope, q_rope = jnp.split(q, [config.qk_nope_head_dim], axis=-1)
        latent, k_rope = jnp.split(self.kv_down(x), [rank], axis=-1)
        latent = self.kv_norm(latent)

        tables = config.rope.tables(position + jnp.arange(length), config.qk_rope_head_dim)
        q_rope = rotate(q_rope, tables, interleaved=config.rope_interleave)
        k_rope = rotate(k_rope[:, :, None], tables, interleaved=config.rope_interleave)[:, :, 0]
        if cache is not None:
            cache = cache.write(latent, k_rope, jnp.asarray(position))
            latent, k_rope = cache.first, cache.second

        mask = causal_mask(position, length, latent.shape[1])
        expand = self.kv_up.value().reshape(rank, heads, config.qk_nope_head_dim + config.v_head_dim)
        to_key, to_value = jnp.split(expand, [config.qk_nope_head_dim], axis=-1)

        def product(formula: str, *operands: jax.Array) -> jax.Array:
            return jnp.einsum(formula, *operands, preferred_element_type=jnp.float32)

        scores = product("bshd,bld->bhsl", q_rope, k_rope)
        if self.absorbs(length):
            query = product("bshd,rhd->bshr", q_nope, to_key).astype(x.dtype)
            weights = self._weights(scores + product("bshr,blr->bhsl", query, latent), mask, x.dtype)
            mixed = product("bhsl,blr->bshr", weights, latent).astype(x.dtype)
            y = product("bshr,rhd->bshd", mixed, to_value)
        else:
            keys = product("blr,rhd->blhd", latent, to_key).astype(x.dtype)
            values = product("blr,rhd->blhd", latent, to_value).astype(x.dtype)
            weights = self._weights(scores + product("bshd,blhd->bhsl", q_nope, keys), mask, x.dtype)
            y = product("bhsl,blhd->bshd", weights, values)
        return self.out(y.astype(x.dtype).reshape(batch, length, -1)), cache

    def _weights(self, scores: jax.Array, mask: jax.Array, dtype: Any) -> jax.Array:
        scale = self.config.qk_head_dim**-0.5 * self.config.rope.softmax_factor
        return softmax(scores * scale, mask).astype(dtype)


class DeepSeek(Decoder):
    """DeepSeek-V3, DeepSeek-R1, Kimi K2."""

    config_class: ClassVar[type[DecoderConfig]] = DeepSeekConfig

    def make_attention(self, config: Any, *, rngs: nnx.Rngs, placement: Placement) -> LatentAttention:
        """Multi-head latent attention."""
        return LatentAttention(config, rngs=rngs, placement=placement)
