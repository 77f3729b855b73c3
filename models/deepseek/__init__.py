"""DeepSeek-V3, DeepSeek-R1 and Kimi K2."""

from pplx_jax.models.deepseek.config import DeepSeekConfig
from pplx_jax.models.deepseek.modeling import DeepSeek, LatentAttention

__all__ = ["DeepSeek", "DeepSeekConfig", "LatentAttention"]
