"""Choosing the next token: greedy, or drawn by temperature among the likeliest."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def sample(logits: jax.Array, key: jax.Array, temperature: jax.Array, top_p: jax.Array) -> jax.Array:
    """One token a row.

    Args:
      logits: float32 [B, V].
      key: a PRNG key.
      temperature: float32 scalar that divides the logits; 0 takes the likeliest token, of equals the first.
      top_p: float32 scalar: only the likeliest tokens whose probabilities, largest first, sum up to it (the
        one that reaches it included) are candidates (Holtzman et al. 2019, arXiv:1904.09751); 1: all.

    Returns:
      int32 [B].
    """

    def drawn(logits: jax.Array) -> jax.Array:
        scaled = logits / jnp.maximum(temperature, 1e-6)
        order = jnp.argsort(-scaled, axis=-1)
        ranked = jnp.take_along_axis(scaled, order, axis=-1)
        before = jnp.cumsum(jax.nn.softmax(ranked, axis=-1), axis=-1) - jax.nn.softmax(ranked, axis=-1)
        # The first is always a candidate, whatever rounding made of the sums.
        allowed = (before < top_p).at[:, 0].set(True)
        place = jax.random.categorical(key, jnp.where(allowed, ranked, -jnp.inf), axis=-1)
        return jnp.take_along_axis(order, place[:, None], axis=-1)[:, 0].astype(jnp.int32)

    def greedy(logits: jax.Array) -> jax.Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    chosen: jax.Array = jax.lax.cond(temperature > 0, drawn, greedy, logits)
    return chosen
