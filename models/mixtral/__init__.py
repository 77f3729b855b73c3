"""Mixtral."""

from pplx_jax.models.mixtral.config import MixtralConfig
from pplx_jax.models.mixtral.modeling import Mixtral

__all__ = ["Mixtral", "MixtralConfig"]
