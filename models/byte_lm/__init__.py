"""A small byte-level decoder transformer with Mixture-of-Experts layers."""

from pplx_jax.models.byte_lm.modeling import ByteLM, ByteLMConfig, Metrics, generate, loss_fn

__all__ = ["ByteLM", "ByteLMConfig", "Metrics", "generate", "loss_fn"]
