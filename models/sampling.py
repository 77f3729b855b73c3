"""Drawing the next token by temperature, among the likeliest."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def candidates(ranked: jax.Array, top_p: jax.Array) -> jax.Array:
    """bool [B, V]: which tokens may be drawn; arguments as in `sample`, logits from the largest on."""
    probs = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    # Whatever rounding made of the sums, the first is always a candidate, and of 1 all are.
    return ((before < top_p) | (top_p >= 1)).at[:, 0].set(True)


def sample(logits: jax.Array, key: jax.Array, temperature: jax.Array, top_p: jax.Array) -> jax.Array:
    """One token a row; the likeliest one, for temperature 0, needs no function.

    Args:
      logits: float32 [B, V].
      key: a PRNG key.
      temperature: float32 scalar above 0 that divides the logits.
      top_p: float32 scalar: only the likeliest tokens whose probabilities, largest first, sum up to it (the
        one that reaches it included) are candidates (Holtzman et al. 2019, arXiv:1904.09751); 1: all.

    Returns:
      int32 [B].
    """

    scaled = logits / temperature
    order = jnp.argsort(-scaled, axis=-1)
    ranked = jnp.take_along_axis(scaled, order, axis=-1)
    allowed = candidates(ranked, top_p)
    place = jax.random.categorical(key, jnp.where(allowed, ranked, -jnp.inf), axis=-1)
    chosen: jax.Array = jnp.take_along_axis(order, place[:, None], axis=-1)[:, 0]
    return chosen.astype(jnp.int32)
