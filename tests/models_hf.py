"""Tiny models of Hugging Face transformers with random weights, and what they compute."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

VOCAB = 128
#: Largest allowed |ours - theirs| over the largest |theirs|, float32.
TOLERANCE = 1e-4

_SIZES: dict[str, dict[str, Any]] = {
    # A latent so large that prompts of 32 tokens are expanded and shorter ones absorbed.
    "deepseek_v3": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_routed_experts": 16,
        "q_lora_rank": 24,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 12,
        "v_head_dim": 16,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 4,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 256,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 0.8,
        },
    },
    "qwen3_moe": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
        "max_position_embeddings": 256,
    },
    "mixtral": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 256,
    },
}
#: Further shapes: (family, changes).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v3": ("deepseek_v3", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "mixtral": ("mixtral", {}),
    # Kimi K2's: one group, YaRN without a ramp, its own model_type.
    "kimi_k2": (
        "deepseek_v3",
        {
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 2.827,
            "rope_theta": 50000.0,
            "rope_scaling": {
                "type": "yarn",
                "factor": 32.0,
                "original_max_position_embeddings": 8,
                "beta_fast": 1.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        },
    ),
    "deepseek_plain_queries": (
        "deepseek_v3",
        {"q_lora_rank": None, "rope_scaling": None, "rope_interleave": False, "norm_topk_prob": False},
    ),
    "qwen3_moe_unnormalised": ("qwen3_moe", {"norm_topk_prob": False, "tie_word_embeddings": True}),
    "mixtral_window": ("mixtral", {"sliding_window": 7}),
}


@dataclasses.dataclass(frozen=True)
class Reference:
    """A saved model and what transformers computes with it.

    Attributes:
      folder: of the checkpoint.
      tokens: int [B, S], prompts.
      logits: float32 [B, S, V].
      continuation: int [B, N], greedy.
      margin: the smallest lead of a token of it over the second best, in logits.
    """

    folder: Path
    tokens: np.ndarray
    logits: np.ndarray
    continuation: np.ndarray
    margin: float


def build(variant: str, folder: Path, *, seed: int = 0, shard: str | None = None) -> Any:
    """Makes and saves a model; returns the torch one."""
    torch = pytest.importorskip("torch", reason="needs torch, a test dependency where Python is 3.11")
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    family, changes = VARIANTS[variant]
    configs = {
        "deepseek_v3": (transformers.DeepseekV3Config, transformers.DeepseekV3ForCausalLM),
        "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
        "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM),
    }
    make_config, make_model = configs[family]
    config = make_config(vocab_size=VOCAB, **{**_SIZES[family], **changes})
    # More threads than cores that are free wait for each other.
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = make_model(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            # Weights of a trained model's order: attention and routing then matter.
            if value.ndim == 1:
                value.copy_(1 + 0.2 * torch.randn_like(value))
            elif "embed" not in name:
                value.copy_(torch.randn_like(value) * 1.2 * value.shape[-1] ** -0.5)
            else:
                value.copy_(torch.randn_like(value))
        for name, value in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                value.copy_(0.2 * torch.randn_like(value))
    options = {} if shard is None else {"max_shard_size": shard}
    model.save_pretrained(folder, **options)
    if variant == "kimi_k2":
        raw = json.loads((folder / "config.json").read_text())
        raw["model_type"] = "kimi_k2"
        (folder / "config.json").write_text(json.dumps(raw))
    return model


def compute(model: Any, folder: Path, *, batch: int = 4, length: int = 37, new: int = 8) -> Reference:
    """What transformers computes."""
    import torch

    tokens = np.random.default_rng(1).integers(0, VOCAB, (batch, length))
    with torch.no_grad():
        logits = model(torch.tensor(tokens)).logits.numpy()
        model.generation_config.eos_token_id = None
        # Step by step with its cache, as generate() does; ours must agree with that as well.
        out = model.generate(
            torch.tensor(tokens),
            attention_mask=torch.ones(batch, length, dtype=torch.int64),
            max_new_tokens=new,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    best = np.sort(np.stack([step.numpy() for step in out.logits]), axis=-1)
    margin = float((best[..., -1] - best[..., -2]).min())
    return Reference(folder, tokens, logits, out.sequences[:, length:].numpy(), margin)


def difference(ours: Any, theirs: np.ndarray) -> float:
    """Largest |ours - theirs| over the largest |theirs|."""
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def chunked(model: Any, tokens: np.ndarray, chunk: int) -> np.ndarray:
    """Logits [B, S, V] by prefill in chunks with a cache, the last one padded.

    With a chunk of 1 that is step by step.
    """
    import jax
    from flax import nnx

    from pplx_jax.models.programs import Programs

    programs, state = Programs.of(model), nnx.state(model)
    batch, length = tokens.shape
    caches = programs.caches(model, batch, -(-length // chunk) * chunk)
    graph = nnx.split(model)[0]

    @jax.jit
    def step(state, caches, part, start, live):
        logits, caches, _ = nnx.merge(graph, state).step(part, caches, start, num_tokens=live)
        return model.placement.constrain(logits), caches

    found = []
    for start in range(0, length, chunk):
        part = tokens[:, start : start + chunk]
        live = part.shape[1]
        part = np.pad(part, ((0, 0), (0, chunk - live)))
        logits, caches = step(state, caches, *map(programs.place, (part, np.int32(start), np.int32(live))))
        found.append(np.asarray(logits)[:, :live])
    return np.concatenate(found, axis=1)
