"""Tensors of DeepSeek-V3's and Kimi K2's checkpoints."""

from __future__ import annotations

import re

from pplx_jax.models import sources
from pplx_jax.models.deepseek.config import DeepSeekConfig
from pplx_jax.models.sources import Source, matrix, vector


def param_sources(config: DeepSeekConfig, *, fused: bool = False) -> dict[str, Source]:
    """The source of every parameter, by its path; of a checkpoint with fused experts or not."""

    def attention(path: str, name: str) -> dict[str, Source]:
        found = {
            f"{path}.kv_down.kernel": matrix(f"{name}.kv_a_proj_with_mqa"),
            f"{path}.kv_norm.weight": vector(f"{name}.kv_a_layernorm.weight"),
            f"{path}.kv_up.kernel": matrix(f"{name}.kv_b_proj"),
            f"{path}.out.kernel": matrix(f"{name}.o_proj"),
        }
        if config.q_lora_rank is None:
            found[f"{path}.q_up.kernel"] = matrix(f"{name}.q_proj")
        else:
            found[f"{path}.q_down.kernel"] = matrix(f"{name}.q_a_proj")
            found[f"{path}.q_norm.weight"] = vector(f"{name}.q_a_layernorm.weight")
            found[f"{path}.q_up.kernel"] = matrix(f"{name}.q_b_proj")
        return found

    def feed_forward(layer: int, path: str, name: str) -> dict[str, Source]:
        if not config.is_moe(layer):
            return sources.mlp(f"{path}.mlp", f"{name}.mlp")
        moe = f"{path}.moe"
        if fused:
            found = sources.fused_experts(moe, f"{name}.mlp.experts")
        else:
            found = sources.experts(moe, f"{name}.mlp.experts", config.num_experts, sources.HF_PARTS)
        found[f"{moe}.router"] = matrix(f"{name}.mlp.gate")
        found[f"{moe}.selection_bias"] = vector(f"{name}.mlp.gate.e_score_correction_bias")
        if config.num_shared_experts:
            for part, theirs in sources.HF_PARTS.items():
                found[f"{moe}.shared.{part}"] = matrix(f"{name}.mlp.shared_experts.{theirs}")
        return found

    return sources.decoder(config, attention, feed_forward)


def ignored(config: DeepSeekConfig) -> re.Pattern[str]:
    """Tensors that checkpoints hold and these models don't use.

    DeepSeek-V3's multi-token prediction modules are layers after the last (model.layers.61); Kimi K2 keeps
    the rotary frequencies, which follow from the configuration.
    """
    first = config.num_hidden_layers
    layers = range(first, first + config.num_nextn_predict_layers)
    modules = [rf"model\.layers\.{layer}\..*" for layer in layers]
    return re.compile("|".join([*modules, r".*\.rotary_emb\.inv_freq"]))
