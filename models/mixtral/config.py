"""Configuration of Mixtral's models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pplx_jax.models.config import RouterConfig, common, required
from pplx_jax.models.grouped import GroupedConfig
from pplx_jax.models.rope import Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtralConfig(GroupedConfig):
    """Sizes of Mixtral (Jiang et al. 2024, arXiv:2401.04088); every layer has experts."""

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> MixtralConfig:
        """From a config.json.

        Raises:
          ModelError: a field is missing, or asks for what isn't built.
        """
        shared = common(config)
        sizes = required(config, ("num_local_experts", "num_key_value_heads"))
        return cls(
            **shared,
            moe_intermediate_size=shared["intermediate_size"],
            num_experts=sizes["num_local_experts"],
            num_key_value_heads=sizes["num_key_value_heads"],
            head_dim=config.get("head_dim") or shared["hidden_size"] // shared["num_attention_heads"],
            sliding_window=config.get("sliding_window"),
        )

    @classmethod
    def mixtral_8x7b(cls) -> MixtralConfig:
        """mistralai/Mixtral-8x7B-v0.1. Figures of its config.json."""
        return cls(
            vocab_size=32000,
            hidden_size=4096,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            intermediate_size=14336,
            moe_intermediate_size=14336,
            num_experts=8,
            num_experts_per_tok=2,
            rms_norm_eps=1e-5,
            max_position_embeddings=32768,
            rope=Rope(1_000_000.0),
            eos_token_ids=(2,),
        )

    @classmethod
    def mixtral_8x22b(cls) -> MixtralConfig:
        """mistralai/Mixtral-8x22B-v0.1. Figures of its config.json."""
        return dataclasses.replace(
            cls.mixtral_8x7b(),
            hidden_size=6144,
            num_hidden_layers=56,
            num_attention_heads=48,
            intermediate_size=16384,
            moe_intermediate_size=16384,
            max_position_embeddings=65536,
        )

    @classmethod
    def mixtral_8x22b_instruct(cls) -> MixtralConfig:
        """mistralai/Mixtral-8x22B-Instruct-v0.1: Mixtral-8x22B with tokens for calls of tools."""
        return dataclasses.replace(cls.mixtral_8x22b(), vocab_size=32768)

    @property
    def router(self) -> RouterConfig:
        """Softmax scores, weights that sum to 1."""
        return RouterConfig(score_fn="softmax", normalize=True)
