"""Qwen3 with experts."""

from pplx_jax.models.qwen3_moe.config import Qwen3MoeConfig
from pplx_jax.models.qwen3_moe.modeling import Qwen3Moe

__all__ = ["Qwen3Moe", "Qwen3MoeConfig"]
