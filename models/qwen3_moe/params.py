"""Tensors of Qwen3's checkpoints with experts."""

from __future__ import annotations

import re

from pplx_jax.models import sources
from pplx_jax.models.grouped import attention_sources
from pplx_jax.models.qwen3_moe.config import Qwen3MoeConfig
from pplx_jax.models.sources import Source, matrix, vector


def param_sources(config: Qwen3MoeConfig, *, fused: bool = False) -> dict[str, Source]:
    """The source of every parameter, by its path; of a checkpoint with fused experts or not."""

    def attention(path: str, name: str) -> dict[str, Source]:
        norms = {f"{path}.{part}_norm.weight": vector(f"{name}.{part}_norm.weight") for part in ("q", "k")}
        return {**attention_sources(path, name), **norms}

    def feed_forward(layer: int, path: str, name: str) -> dict[str, Source]:
        if not config.is_moe(layer):
            return sources.mlp(f"{path}.mlp", f"{name}.mlp")
        moe, theirs = f"{path}.moe", f"{name}.mlp.experts"
        if fused:
            found = sources.fused_experts(moe, theirs)
        else:
            found = sources.experts(moe, theirs, config.num_experts, sources.HF_PARTS)
        return {**found, f"{moe}.router": matrix(f"{name}.mlp.gate")}

    return sources.decoder(config, attention, feed_forward)


def ignored(config: Qwen3MoeConfig) -> re.Pattern[str]:
    """Tensors that checkpoints hold and these models don't use: rotary frequencies of old ones."""
    return re.compile(r".*\.rotary_emb\.inv_freq")
