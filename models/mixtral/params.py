"""Tensors of Mixtral's checkpoints."""

from __future__ import annotations

import re

from pplx_jax.models import sources
from pplx_jax.models.grouped import attention_sources
from pplx_jax.models.mixtral.config import MixtralConfig
from pplx_jax.models.sources import Source, matrix


def param_sources(config: MixtralConfig, *, fused: bool = False) -> dict[str, Source]:
    """The source of every parameter, by its path; of a checkpoint with fused experts or not."""

    def feed_forward(layer: int, path: str, name: str) -> dict[str, Source]:
        moe = f"{path}.moe"
        if fused:  # transformers 5 has renamed the layer as well
            theirs = f"{name}.mlp"
            found = sources.fused_experts(moe, f"{theirs}.experts")
        else:
            theirs = f"{name}.block_sparse_moe"
            parts = {"gate": "w1", "down": "w2", "up": "w3"}
            found = sources.experts(moe, f"{theirs}.experts", config.num_experts, parts)
        return {**found, f"{moe}.router": matrix(f"{theirs}.gate")}

    return sources.decoder(config, attention_sources, feed_forward)


def ignored(config: MixtralConfig) -> re.Pattern[str]:
    """Tensors that checkpoints hold and these models don't use: rotary frequencies of old ones."""
    return re.compile(r".*\.rotary_emb\.inv_freq")
