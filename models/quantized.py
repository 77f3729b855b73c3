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
    block = quantization.get("weight_block_size") if isinstance(quantization, Mapping) else None
    sizes = isinstance(block, (list, tuple)) and len(block) == 2 and all(type(n) is int for n in block)
    if block is None or not sizes or quantization.get("quant_method") != "fp8" or min(block) < 1:
        raise ModelError(
            f"the checkpoint's weights are quantised as {_described(quantization)}, which is not supported; "
            f"float8 in blocks (quant_method fp8 with a weight_block_size) and unquantised weights are: "
            f"take such a checkpoint, or dequantise this one to bfloat16 first"
        )
    return int(block[0]), int(block[1])


def _described(quantization: Any) -> str:
    """A quantisation that isn't known here: its method, its format, and what config.json says of weights."""
    if not isinstance(quantization, Mapping):
        return repr(quantization)
    facts = [
        f"{name}={quantization[name]!r}"
        for name in ("format", "bits", "group_size", "fmt", "weight_block_size")
        if quantization.get(name) is not None
    ]
    # compressed-tensors' groups of layers, as Kimi K2 Thinking has them.
    groups = quantization.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping):
            size = weights.get("group_size")
            facts.append(
                f"{str(weights.get('type', '?')).upper()}{weights.get('num_bits', '?')}"
                + (f" in groups of {size}" if size else "")
            )
    method = quantization.get("quant_method", "an unnamed method")
    return f"{method} ({', '.join(facts)})" if facts else str(method)


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
