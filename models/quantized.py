"""float8 weights with a scale for each block of a matrix, as DeepSeek-V3 and Kimi K2 publish them.

A matrix ``name.weight`` [out, in] is float8_e4m3fn and comes with ``name.weight_scale_inv``
[ceil(out / rows), ceil(in / columns)]: what each block of rows * columns (128 * 128) is to be multiplied with
(DeepSeek-AI 2024, arXiv:2412.19437, section 3.3.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pplx_jax.models.errors import ModelError

SUFFIX = "_scale_inv"


def block_of(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """(rows, columns) of a block according to a config.json; None where it names no quantisation.

    Raises:
      ModelError: the checkpoint is quantised in another way.
    """
    quantization = config.get("quantization_config")
    if not quantization:
        return None
    method = quantization.get("quant_method")
    block = quantization.get("weight_block_size")
    if method != "fp8" or not (isinstance(block, (list, tuple)) and len(block) == 2):
        raise ModelError(
            f"the checkpoint is quantised with quant_method={method!r}, weight_block_size={block!r}; "
            f"float8 in blocks is supported: convert it, or take one that is float8 or bfloat16"
        )
    return int(block[0]), int(block[1])


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the scales of a matrix, or of a stack of matrices."""
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def dequantize(values: jax.Array, scales: jax.Array, block: tuple[int, int], dtype: Any) -> jax.Array:
    """Multiplies float8 [..., A, B] with its blocks' scales, in float32; of ``dtype``."""
    rows, columns = values.shape[-2:]
    wide = jnp.repeat(jnp.repeat(scales.astype(jnp.float32), block[0], axis=-2), block[1], axis=-1)
    return (values.astype(jnp.float32) * wide[..., :rows, :columns]).astype(dtype)


def dequantize_part(
    values: np.ndarray[Any, Any],
    scales: np.ndarray[Any, Any],
    start: tuple[int, int],
    block: tuple[int, int],
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The same on the host for a part of a matrix.

    Args:
      values: float8 [a, b], the part.
      scales: those of the blocks that it touches.
      start: its first row and column in the matrix.
      block: rows and columns of a block.
    """
    at = [
        (first + np.arange(count)) // size - first // size
        for first, count, size in zip(start, values.shape, block, strict=True)
    ]
    out: np.ndarray[Any, np.dtype[np.float32]] = values.astype(np.float32)
    out *= scales.astype(np.float32)[np.ix_(*at)]
    return out
