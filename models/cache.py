"""Caches of keys and values with static shapes, so that decoding is one compiled program."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax


@partial(jax.tree_util.register_dataclass, data_fields=("first", "second"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """What one layer keeps of earlier tokens, for L positions of each sequence.

    Attributes:
      first: keys [B, L, KV heads, D]; or multi-head latent attention's latents [B, L, R].
      second: values [B, L, KV heads, D]; or its rotated keys [B, L, D].
    """

    first: jax.Array
    second: jax.Array

    def write(self, first: jax.Array, second: jax.Array, position: jax.Array) -> LayerCache:
        """With S new tokens at ``position`` (int32 scalar) and after it."""

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            return lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), position, 1)

        return LayerCache(put(self.first, first), put(self.second, second))

    @property
    def length(self) -> int:
        """L."""
        return self.first.shape[1]


def causal_mask(position: jax.Array | int, queries: int, keys: int, window: int | None = None) -> jax.Array:
    """bool [S, L]: whether query i, at ``position + i``, looks at key j.

    Args:
      position: of the first query, int32 scalar.
      queries, keys: S and L; key j is at position j.
      window: a query looks at itself and the window - 1 tokens before it; None: at all before it.
    """
    at = position + jnp.arange(queries)[:, None]
    key = jnp.arange(keys)
    mask = key <= at
    return mask if window is None else mask & (key > at - window)
