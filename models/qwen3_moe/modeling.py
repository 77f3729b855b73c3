"""Qwen3's decoder with experts: grouped attention with normalised queries and keys, softmax router."""

from __future__ import annotations

from typing import Any, ClassVar

from flax import nnx

from pplx_jax.models.attention import GroupedAttention
from pplx_jax.models.config import DecoderConfig
from pplx_jax.models.decoder import Decoder
from pplx_jax.models.qwen3_moe.config import Qwen3MoeConfig
from pplx_jax.models.sharding import Placement


class Qwen3Moe(Decoder):
    """Qwen3-30B-A3B, Qwen3-235B-A22B and their kin."""

    config_class: ClassVar[type[DecoderConfig]] = Qwen3MoeConfig

    def make_attention(self, config: Any, *, rngs: nnx.Rngs, placement: Placement) -> GroupedAttention:
        """Grouped attention with norms."""
        return GroupedAttention(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            rope=config.rope,
            norm_eps=config.rms_norm_eps,
            window=config.sliding_window,
            rngs=rngs,
            placement=placement,
        )
