"""What the families with grouped key and value heads share: their configuration's part, their tensors."""

from __future__ import annotations

import dataclasses
from typing import Literal

from pplx_jax.models.config import DecoderConfig
from pplx_jax.models.errors import ModelError
from pplx_jax.models.sources import Source, matrix


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedConfig(DecoderConfig):
    """Sizes of a model with grouped key and value heads.

    Attributes:
      num_key_value_heads: a divisor of num_attention_heads.
      head_dim: size of every head.
      sliding_window: tokens that a query looks back at, its own included; None for all.
    """

    num_key_value_heads: int
    head_dim: int
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_attention_heads % self.num_key_value_heads:
            raise ModelError(
                f"num_key_value_heads={self.num_key_value_heads} doesn't divide "
                f"num_attention_heads={self.num_attention_heads}"
            )

    @property
    def cache_elements(self) -> int:
        """Keys and values of every head."""
        return 2 * self.num_key_value_heads * self.head_dim

    @property
    def cache_splits(self) -> int:
        """One head a rank at least."""
        return self.num_key_value_heads

    @property
    def attention_flops(self) -> int:
        """A product of head_dim for the score, and one for the value."""
        return 4 * self.num_attention_heads * self.head_dim

    def attention_matrices(self) -> dict[str, tuple[int, int, Literal["in", "out", ""]]]:
        """By the name in the checkpoint."""
        hidden, heads = self.hidden_size, self.num_attention_heads * self.head_dim
        groups = self.num_key_value_heads * self.head_dim
        return {
            "q_proj": (hidden, heads, "out"),
            "k_proj": (hidden, groups, "out"),
            "v_proj": (hidden, groups, "out"),
            "o_proj": (heads, hidden, "in"),
        }


def attention_sources(path: str, name: str) -> dict[str, Source]:
    """Of `GroupedAttention`, without norms."""
    found = {f"{path}.{part}.kernel": matrix(f"{name}.{part}_proj") for part in ("q", "k", "v")}
    return {**found, f"{path}.out.kernel": matrix(f"{name}.o_proj")}
