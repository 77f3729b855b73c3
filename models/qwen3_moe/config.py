"""Configuration of Qwen3's models with experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pplx_jax.models.config import RouterConfig, common, required
from pplx_jax.models.grouped import GroupedConfig
from pplx_jax.models.rope import Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3MoeConfig(GroupedConfig):
    """Sizes of a model with normalised queries and keys (Qwen team 2025, arXiv:2505.09388).

    Attributes:
      norm_topk_prob: whether a token's weights sum to 1.
      decoder_sparse_step: every so many layers one has experts.
      mlp_only_layers: layers that have none all the same.
    """

    norm_topk_prob: bool = True
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Qwen3MoeConfig:
        """From a config.json.

        Raises:
          ModelError: a field is missing, or asks for what isn't built.
        """
        sizes = required(config, ("moe_intermediate_size", "num_key_value_heads"))
        # transformers 5 writes num_local_experts, checkpoints have num_experts.
        count = config.get("num_experts") or required(config, ["num_local_experts"])["num_local_experts"]
        shared = common(config)
        return cls(
            **shared,
            **sizes,
            num_experts=count,
            head_dim=config.get("head_dim") or shared["hidden_size"] // shared["num_attention_heads"],
            sliding_window=config.get("sliding_window") if config.get("use_sliding_window") else None,
            norm_topk_prob=bool(config.get("norm_topk_prob", False)),
            decoder_sparse_step=config.get("decoder_sparse_step", 1),
            mlp_only_layers=tuple(config.get("mlp_only_layers") or ()),
        )

    @classmethod
    def qwen3_30b_a3b(cls) -> Qwen3MoeConfig:
        """Qwen/Qwen3-30B-A3B. Figures of its config.json."""
        return cls(
            vocab_size=151936,
            hidden_size=2048,
            num_hidden_layers=48,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
            intermediate_size=6144,
            moe_intermediate_size=768,
            num_experts=128,
            num_experts_per_tok=8,
            rms_norm_eps=1e-6,
            max_position_embeddings=40960,
            rope=Rope(1_000_000.0),
            eos_token_ids=(151645,),
        )

    @classmethod
    def qwen3_235b_a22b(cls) -> Qwen3MoeConfig:
        """Qwen/Qwen3-235B-A22B. Figures of its config.json."""
        return dataclasses.replace(
            cls.qwen3_30b_a3b(),
            hidden_size=4096,
            num_hidden_layers=94,
            num_attention_heads=64,
            intermediate_size=12288,
            moe_intermediate_size=1536,
        )

    @classmethod
    def qwen3_30b_a3b_2507(cls) -> Qwen3MoeConfig:
        """Qwen/Qwen3-30B-A3B-Instruct-2507 and -Thinking-2507: Qwen3-30B-A3B with a longer context."""
        return dataclasses.replace(
            cls.qwen3_30b_a3b(), max_position_embeddings=262144, rope=Rope(10_000_000.0)
        )

    @classmethod
    def qwen3_235b_a22b_2507(cls) -> Qwen3MoeConfig:
        """Qwen/Qwen3-235B-A22B-Instruct-2507 and -Thinking-2507: Qwen3-235B-A22B with a longer context."""
        return dataclasses.replace(
            cls.qwen3_235b_a22b(), max_position_embeddings=262144, rope=Rope(5_000_000.0)
        )

    @classmethod
    def qwen3_coder_480b_a35b(cls) -> Qwen3MoeConfig:
        """Qwen/Qwen3-Coder-480B-A35B-Instruct. Figures of its config.json."""
        return dataclasses.replace(
            cls.qwen3_30b_a3b(),
            hidden_size=6144,
            num_hidden_layers=62,
            num_attention_heads=96,
            num_key_value_heads=8,
            intermediate_size=8192,
            moe_intermediate_size=2560,
            num_experts=160,
            max_position_embeddings=262144,
            rope=Rope(10_000_000.0),
        )

    def is_moe(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0

    @property
    def router(self) -> RouterConfig:
        """Softmax scores."""
        return RouterConfig(score_fn="softmax", normalize=self.norm_topk_prob)
