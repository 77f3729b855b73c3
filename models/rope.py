"""Rotary positions, and YaRN's stretching of them to longer contexts.

Sources: rotary positions, Su et al. 2021 (arXiv:2104.09864); YaRN, Peng et al. 2023 (arXiv:2309.00071),
section 3.2 for the ramp between interpolated and kept frequencies and 3.4 for the temperature of the softmax.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pplx_jax.models.errors import ModelError


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN's parameters, named as in Hugging Face configurations.

    Attributes:
      factor: how many times longer the context is than in pretraining.
      original_max_position_embeddings: context length of pretraining, tokens.
      beta_fast, beta_slow: rotations over that context above which a frequency is kept, and below which it is
        divided by ``factor``.
      mscale, mscale_all_dim: temperature of the softmax, see `Rope`; 0 where the configuration has none.
      attention_factor: factor on cos and sin, in place of the one that follows from these; or None.
      truncate: whether the ramp starts and ends at whole dimensions.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True


def number(fields: Mapping[str, Any], name: str, default: float) -> float:
    """A number of a config.json; null is as good as none.

    Raises:
      ModelError: it is something else.
    """
    value = fields.get(name)
    if value is None:
        return float(default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ModelError(f"config.json has {name}={value!r}, which must be a number")
    return float(value)


def magnitude(factor: float, mscale: float = 1.0) -> float:
    """YaRN's 0.1 * mscale * ln(factor) + 1; 1 where the context isn't longer."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions of a model.

    Attributes:
      theta: base of the frequencies.
      yarn: how they are stretched, or None.
    """

    theta: float = 10_000.0
    yarn: Yarn | None = None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Rope:
        """From a config.json: either ``rope_theta`` and ``rope_scaling``, or ``rope_parameters`` with both.

        Raises:
          ModelError: a kind of scaling that isn't known here, or a value of it is missing.
        """
        fields: dict[str, Any] = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        theta = number(fields, "rope_theta", number(config, "rope_theta", 10_000.0))
        kind = fields.get("rope_type", fields.get("type", "default"))
        if kind in ("default", None):
            return cls(theta)
        if kind != "yarn":
            raise ModelError(f'rope_scaling has type {kind!r}; "yarn" and none are supported')
        known = {field.name for field in dataclasses.fields(Yarn)}
        given = {name: value for name, value in fields.items() if name in known and value is not None}
        given.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
        missing = [name for name in ("factor", "original_max_position_embeddings") if given.get(name) is None]
        if missing:
            raise ModelError(
                f"rope_scaling of type yarn lacks {' and '.join(missing)}: see the checkpoint's card"
            )
        for name in given.keys() - {"truncate"}:
            number(given, name, 0.0)
        return cls(theta, Yarn(**given))

    def frequencies(self, dim: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """float32 [dim / 2], radians a position."""
        exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
        plain: np.ndarray[Any, np.dtype[np.float32]] = np.float32(1) / np.float32(self.theta) ** exponents
        if self.yarn is None:
            return plain
        yarn = self.yarn

        def dimension(rotations: float) -> float:
            """The (fractional) pair that turns so often over the original context."""
            turns = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
            return dim * math.log(turns) / (2 * math.log(self.theta))

        low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
        if yarn.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        width = high - low or 0.001
        ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(width), 0, 1)
        stretched: np.ndarray[Any, np.dtype[np.float32]] = (
            plain * (1 - ramp) + plain / np.float32(yarn.factor) * ramp
        ).astype(np.float32)
        return stretched

    @property
    def amplitude(self) -> float:
        """Factor on cos and sin."""
        if self.yarn is None:
            return 1.0
        if self.yarn.attention_factor is not None:
            return self.yarn.attention_factor
        factor, mscale, all_dim = self.yarn.factor, self.yarn.mscale, self.yarn.mscale_all_dim
        if mscale and all_dim:
            return magnitude(factor, mscale) / magnitude(factor, all_dim)
        return magnitude(factor)

    @property
    def softmax_factor(self) -> float:
        """Factor on the scores of models that scale all dimensions (DeepSeek's ``mscale_all_dim``)."""
        if self.yarn is None or not self.yarn.mscale_all_dim:
            return 1.0
        return magnitude(self.yarn.factor, self.yarn.mscale_all_dim) ** 2

    def tables(self, positions: jax.Array, dim: int) -> tuple[jax.Array, jax.Array]:
        """(cos, sin) of int32 positions [S], float32 [S, dim / 2] each."""
        angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(self.frequencies(dim))
        return jnp.cos(angles) * self.amplitude, jnp.sin(angles) * self.amplitude


def rotate(x: jax.Array, tables: tuple[jax.Array, jax.Array], *, interleaved: bool = False) -> jax.Array:
    """Rotates pairs of the last axis.

    Args:
      x: [B, S, heads, D].
      tables: of `Rope.tables`, [S, D / 2] each.
      interleaved: pairs are neighbours (0, 1), (2, 3), ... as DeepSeek stores them; else (i, i + D / 2). The
        result has the latter order in both cases, which is the same to a product of two results.

    Returns:
      [B, S, heads, D] of x's dtype.
    """
    cos, sin = (table[:, None, :] for table in tables)
    wide = x.astype(jnp.float32)
    first, second = (wide[..., 0::2], wide[..., 1::2]) if interleaved else jnp.split(wide, 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
