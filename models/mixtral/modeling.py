"""Mixtral's decoder: grouped attention, softmax router over few large experts."""

from __future__ import annotations

from typing import Any, ClassVar

from flax import nnx

from pplx_jax.models.attention import GroupedAttention
from pplx_jax.models.config import DecoderConfig
from pplx_jax.models.decoder import Decoder
from pplx_jax.models.mixtral.config import MixtralConfig
from pplx_jax.models.sharding import Placement


class Mixtral(Decoder):
    """Mixtral-8x7B and Mixtral-8x22B."""

    config_class: ClassVar[type[DecoderConfig]] = MixtralConfig

    def make_attention(self, config: Any, *, rngs: nnx.Rngs, placement: Placement) -> GroupedAttention:
        """Grouped attention."""
        return GroupedAttention(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            rope=config.rope,
            window=config.sliding_window,
            rngs=rngs,
            placement=placement,
        )
