"""Configuration of DeepSeek-V3, DeepSeek-R1 and Kimi K2."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from pplx_jax.models.config import DecoderConfig, RouterConfig, common, required
from pplx_jax.models.errors import ModelError
from pplx_jax.models.rope import Rope, Yarn, number


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepSeekConfig(DecoderConfig):
    """Sizes of a model with multi-head latent attention (DeepSeek-AI 2024, arXiv:2412.19437, section 2.1).

    Attributes:
      q_lora_rank: size of a query's latent, or None: queries come straight from the token.
      kv_lora_rank: size of the latent of keys and values, which is what caches keep.
      qk_nope_head_dim, qk_rope_head_dim: parts of a query and key head without and with a position.
      v_head_dim: size of a value head.
      n_group, topk_group: groups of experts, and how many of them a token may use.
      norm_topk_prob: whether a token's weights sum to routed_scaling_factor.
      routed_scaling_factor: factor on the experts' weights.
      first_k_dense_replace: layers at the start that have a dense MLP.
      rope_interleave: whether rotated pairs are neighbours in the weights.
      num_nextn_predict_layers: multi-token prediction modules, which checkpoints may hold as layers after the
        last one. They are passed over.
    """

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    first_k_dense_replace: int = 0
    rope_interleave: bool = True
    num_shared_experts: int = 1
    num_nextn_predict_layers: int = 1

    @classmethod
    def _may_be_zero(cls) -> tuple[str, ...]:
        return ("num_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> DeepSeekConfig:
        """From a config.json.

        Raises:
          ModelError: a field is missing, or asks for what isn't built.
        """
        for name, wanted in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc"), ("moe_layer_freq", 1)):
            if config.get(name, wanted) != wanted:
                raise ModelError(f"{name}={config[name]!r} is not supported, only {wanted!r}")
        sizes = required(
            config,
            (
                "moe_intermediate_size",
                "n_routed_experts",
                "kv_lora_rank",
                "qk_nope_head_dim",
                "qk_rope_head_dim",
                "v_head_dim",
            ),
        )
        return cls(
            **common(config),
            num_experts=sizes.pop("n_routed_experts"),
            **sizes,
            num_shared_experts=config.get("n_shared_experts") or 0,
            q_lora_rank=config.get("q_lora_rank"),
            n_group=config.get("n_group") or 1,
            topk_group=config.get("topk_group") or 1,
            norm_topk_prob=bool(config.get("norm_topk_prob", True)),
            routed_scaling_factor=number(config, "routed_scaling_factor", 1.0),
            first_k_dense_replace=config.get("first_k_dense_replace", 0),
            rope_interleave=bool(config.get("rope_interleave", True)),
            num_nextn_predict_layers=config.get("num_nextn_predict_layers", 1),
        )

    @classmethod
    def deepseek_v3(cls) -> DeepSeekConfig:
        """deepseek-ai/DeepSeek-V3: 671 B parameters, 256 experts. Figures of its config.json."""
        return cls(
            vocab_size=129280,
            hidden_size=7168,
            num_hidden_layers=61,
            num_attention_heads=128,
            intermediate_size=18432,
            moe_intermediate_size=2048,
            num_experts=256,
            num_experts_per_tok=8,
            num_shared_experts=1,
            rms_norm_eps=1e-6,
            max_position_embeddings=163840,
            rope=Rope(10_000.0, Yarn(40.0, 4096, 32.0, 1.0, 1.0, 1.0)),
            eos_token_ids=(1,),
            q_lora_rank=1536,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            n_group=8,
            topk_group=4,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
            first_k_dense_replace=3,
        )

    @classmethod
    def deepseek_r1(cls) -> DeepSeekConfig:
        """deepseek-ai/DeepSeek-R1: DeepSeek-V3's sizes."""
        return cls.deepseek_v3()

    @classmethod
    def deepseek_v3_1(cls) -> DeepSeekConfig:
        """deepseek-ai/DeepSeek-V3.1: DeepSeek-V3's sizes; its scales are powers of two, stored as float32."""
        return cls.deepseek_v3()

    @classmethod
    def kimi_k2(cls) -> DeepSeekConfig:
        """moonshotai/Kimi-K2-Instruct: 1 T parameters, 384 experts. Figures of its config.json."""
        return dataclasses.replace(
            cls.deepseek_v3(),
            vocab_size=163840,
            num_attention_heads=64,
            num_experts=384,
            max_position_embeddings=131072,
            rope=Rope(50_000.0, Yarn(32.0, 4096, 1.0, 1.0, 1.0, 1.0)),
            eos_token_ids=(163585,),
            n_group=1,
            topk_group=1,
            routed_scaling_factor=2.827,
            first_k_dense_replace=1,
            num_nextn_predict_layers=0,
        )

    @classmethod
    def kimi_k2_0905(cls) -> DeepSeekConfig:
        """moonshotai/Kimi-K2-Instruct-0905: Kimi K2 with a context twice as long."""
        first = cls.kimi_k2()
        assert first.rope.yarn is not None
        yarn = dataclasses.replace(first.rope.yarn, factor=64.0)
        return dataclasses.replace(
            first, max_position_embeddings=262144, rope=dataclasses.replace(first.rope, yarn=yarn)
        )

    def is_moe(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return layer >= self.first_k_dense_replace

    @property
    def router(self) -> RouterConfig:
        """Sigmoid scores, a selection bias, groups."""
        return RouterConfig(
            score_fn="sigmoid",
            normalize=self.norm_topk_prob,
            selection_bias=True,
            num_groups=self.n_group,
            top_groups=self.topk_group,
            scale=self.routed_scaling_factor,
        )

    @property
    def qk_head_dim(self) -> int:
        """Size of a query and key head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_elements(self) -> int:
        """The latent and one rotated key for all heads."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def cache_splits(self) -> int:
        """All heads read the same latent."""
        return 1

    @property
    def attention_flops(self) -> int:
        """Queries in the latents' space: products of rank + rope for the score, of rank for the value."""
        return 2 * self.num_attention_heads * (2 * self.kv_lora_rank + self.qk_rope_head_dim)

    def attention_matrices(self) -> dict[str, tuple[int, int, Literal["in", "out", ""]]]:
        """By the name in the checkpoint."""
        hidden, heads = self.hidden_size, self.num_attention_heads
        queries: dict[str, tuple[int, int, Literal["in", "out", ""]]]
        if self.q_lora_rank is None:
            queries = {"q_proj": (hidden, heads * self.qk_head_dim, "out")}
        else:
            queries = {
                "q_a_proj": (hidden, self.q_lora_rank, ""),
                "q_b_proj": (self.q_lora_rank, heads * self.qk_head_dim, "out"),
            }
        return {
            **queries,
            "kv_a_proj_with_mqa": (hidden, self.kv_lora_rank + self.qk_rope_head_dim, ""),
            "kv_b_proj": (self.kv_lora_rank, heads * (self.qk_nope_head_dim + self.v_head_dim), "out"),
            "o_proj": (heads * self.v_head_dim, hidden, "in"),
        }
