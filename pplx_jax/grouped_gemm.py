"""The experts' matrix products: contiguous groups of rows, a matrix for each group.

The one place where they are made, so that a faster kernel for a platform replaces one function. On NVIDIA
GPUs that is ``tokamax.ragged_dot`` where tokamax is installed, on CPU a loop, else ``jax.lax.ragged_dot``.

XLA:CPU expands ragged_dot into a masked product of all rows with all groups' matrices; a rank of an
expert-parallel group has room for the worst case and usually fills a fraction of it, so there a loop over
blocks of live rows does the work instead, and its cost follows group_sizes.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.custom_batching
import jax.numpy as jnp
from jax import lax

from pplx_jax import compat

# Rows that the CPU loop multiplies at a time: large enough for an efficient product, small against a group.
_BLOCK = 64


#: "auto", or a function with `grouped_gemm`'s arguments, result and promises about the rows past the end.
Implementation: TypeAlias = Literal["auto"] | Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def check_implementation(implementation: Any) -> None:
    """Raises TypeError or ValueError, naming the argument, unless it is an `Implementation`."""
    if isinstance(implementation, str):
        if implementation != "auto":
            raise ValueError(f'grouped_gemm must be "auto" or a function, got {implementation!r}')
    elif not callable(implementation):
        raise TypeError(f'grouped_gemm must be "auto" or a function, got {type(implementation).__name__}')


def grouped_gemm(
    tokens: jax.Array,
    weights: jax.Array,
    group_sizes: jax.Array,
    *,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Multiplies contiguous groups of rows by a matrix each. Reverse-mode differentiable in both.

    Args:
      tokens: [M, A]; the first group_sizes[0] rows belong to group 0, and so on.
      weights: [G, A, B], tokens' dtype.
      group_sizes: int32 [G], with a sum of at most M.
      implementation: "auto" takes the best one known for the platform that the program is compiled for. Or a
        function of (tokens, weights, group_sizes) that is differentiable itself; inside ``jax.shard_map`` its
        operands all vary over the same axes.

    Returns:
      [M, B] of tokens' dtype, accumulated in float32; rows past the last group are zero, and neither they nor
      their cotangents are read.

    Raises:
      TypeError, ValueError: shapes or dtypes don't fit each other.
    """
    if tokens.ndim != 2 or weights.ndim != 3 or tokens.shape[1] != weights.shape[1]:
        raise ValueError(
            f"tokens and weights must be [M, A] and [G, A, B], got {tuple(tokens.shape)} and "
            f"{tuple(weights.shape)}"
        )
    if group_sizes.shape != weights.shape[:1]:
        raise ValueError(f"group_sizes must have shape [{weights.shape[0]}], got {tuple(group_sizes.shape)}")
    if tokens.dtype != weights.dtype:
        raise TypeError(f"weights must have tokens' dtype {tokens.dtype}, got {weights.dtype}")
    # Inside shard_map all operands vary alike from here on, so JAX sums the gradients of replicated ones.
    operands = (tokens, weights, group_sizes)
    axes = frozenset().union(*(compat.varying_axes(a) for a in operands))
    tokens, weights, group_sizes = (compat.to_varying(a, axes) for a in operands)
    if implementation == "auto":
        return _gemm(tokens, weights, group_sizes)
    check_implementation(implementation)
    out = implementation(tokens, weights, group_sizes)
    shape = (tokens.shape[0], weights.shape[2])
    if getattr(out, "shape", None) != shape or out.dtype != tokens.dtype:
        raise ValueError(
            f"grouped_gemm={implementation!r} must return {tokens.dtype} {list(shape)}, got "
            f"{getattr(out, 'dtype', type(out).__name__)} {list(getattr(out, 'shape', ()))}"
        )
    return out


@functools.cache
def gpu_library() -> Any:
    """tokamax, where it is installed and JAX has a GPU (it chooses its kernel by that device); else None."""
    if jax.default_backend() != "gpu" or importlib.util.find_spec("tokamax") is None:
        return None
    return importlib.import_module("tokamax")


@jax.custom_vjp
def _gemm(tokens: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
    if tokens.shape[0] == 0:
        return tokens @ weights[0]
    library = gpu_library()
    kernels = {} if library is None else {"cuda": functools.partial(_library_rows, library)}
    out: jax.Array = _by_platform(_loop_rows, _ragged_rows, kernels)(tokens, weights, group_sizes)
    return out


def _by_platform(cpu: Any, default: Any, kernels: Any) -> Any:
    """One implementation a platform; under vmap one call after the other: ragged_dot has no rule."""

    def call(*operands: jax.Array) -> jax.Array:
        out: jax.Array = lax.platform_dependent(*operands, cpu=cpu, default=default, **kernels)
        return out

    return jax.custom_batching.sequential_vmap(call)


def _forward(tokens: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> tuple[jax.Array, Any]:
    return _gemm(tokens, weights, group_sizes), (tokens, weights, group_sizes)


def _backward(saved: Any, cotangent: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    tokens, weights, group_sizes = saved
    d_tokens = _gemm(cotangent, weights.swapaxes(1, 2), group_sizes)
    if tokens.shape[0] == 0:
        return d_tokens, jnp.zeros_like(weights), None
    library = gpu_library()
    kernels = {} if library is None else {"cuda": functools.partial(_library_weights, library)}
    d_weights = _by_platform(_loop_weights, _ragged_weights, kernels)(tokens, cotangent, group_sizes)
    return d_tokens, d_weights, None


_gemm.defvjp(_forward, _backward)


def _ragged_rows(tokens: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
    out = lax.ragged_dot(tokens, weights, group_sizes, preferred_element_type=jnp.float32)
    return out.astype(tokens.dtype)


# Rows of both operands are contracted, group by group: [M, A] and [M, B] to [G, A, B].
_CONTRACT_ROWS = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


def _ragged_weights(tokens: jax.Array, cotangent: jax.Array, group_sizes: jax.Array) -> jax.Array:
    out = lax.ragged_dot_general(
        tokens, cotangent, group_sizes, _CONTRACT_ROWS, preferred_element_type=jnp.float32
    )
    return out.astype(tokens.dtype)


def _live(rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Zeros past the last group, where a kernel may leave, and might read, anything."""
    row = jnp.arange(rows.shape[0], dtype=group_sizes.dtype)
    return jnp.where((row < group_sizes.sum())[:, None], rows, 0)


def _library_rows(library: Any, tokens: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
    def product(tokens: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
        out = library.ragged_dot(tokens, weights, group_sizes, preferred_element_type=tokens.dtype)
        return _live(out, group_sizes)

    return compat.as_unchecked(product, tokens, weights, group_sizes)


def _library_weights(
    library: Any, tokens: jax.Array, cotangent: jax.Array, group_sizes: jax.Array
) -> jax.Array:
    def product(tokens: jax.Array, cotangent: jax.Array, group_sizes: jax.Array) -> jax.Array:
        out: jax.Array = library.ragged_dot_general(
            _live(tokens, group_sizes),
            _live(cotangent, group_sizes),
            group_sizes,
            _CONTRACT_ROWS,
            preferred_element_type=tokens.dtype,
        )
        return out

    return compat.as_unchecked(product, tokens, cotangent, group_sizes)


def _blocks(group_sizes: jax.Array) -> tuple[jax.Array, Any]:
    """How many blocks cover the live rows, and a function from a block to (group, first row, group's end)."""
    ends = jnp.cumsum(group_sizes)
    counts = (group_sizes + (_BLOCK - 1)) // _BLOCK
    last = jnp.cumsum(counts)

    def locate(block: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        group = jnp.searchsorted(last, block, side="right")
        within = block - (last[group] - counts[group])
        return group, ends[group] - group_sizes[group] + within * _BLOCK, ends[group]

    return last[-1], locate


def _rows_at(padded: jax.Array, first: jax.Array, end: jax.Array) -> jax.Array:
    """A block of rows; those at and past `end` belong to others and read as zero, whatever they hold."""
    rows = lax.dynamic_slice_in_dim(padded, first, _BLOCK)
    live = first + jnp.arange(_BLOCK, dtype=first.dtype) < end
    return jnp.where(live[:, None], rows, 0)


def _pad(rows: jax.Array) -> jax.Array:
    # A slice that starts near the end must not be moved back to fit.
    return jnp.pad(rows, ((0, _BLOCK), (0, 0)))


def _accumulator(shape: tuple[int, ...], like: jax.Array) -> jax.Array:
    return compat.to_varying(jnp.zeros(shape, jnp.float32), compat.varying_axes(like))


def _loop_rows(tokens: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
    count, locate = _blocks(group_sizes)
    padded = _pad(tokens)

    def body(block: jax.Array, out: jax.Array) -> jax.Array:
        group, first, end = locate(block)
        product = jnp.dot(_rows_at(padded, first, end), weights[group], preferred_element_type=jnp.float32)
        # The zeros behind this group's end are overwritten by the next group's block, which comes later.
        return lax.dynamic_update_slice_in_dim(out, product, first, 0)

    out = lax.fori_loop(0, count, body, _accumulator((padded.shape[0], weights.shape[2]), tokens))
    rows: jax.Array = out[: tokens.shape[0]].astype(tokens.dtype)
    return rows


def _loop_weights(tokens: jax.Array, cotangent: jax.Array, group_sizes: jax.Array) -> jax.Array:
    count, locate = _blocks(group_sizes)
    left, right = _pad(tokens), _pad(cotangent)

    def body(block: jax.Array, out: jax.Array) -> jax.Array:
        group, first, end = locate(block)
        product = jnp.dot(
            _rows_at(left, first, end).T, _rows_at(right, first, end), preferred_element_type=jnp.float32
        )
        return out.at[group].add(product)

    shape = (group_sizes.shape[0], tokens.shape[1], cotangent.shape[1])
    out: jax.Array = lax.fori_loop(0, count, body, _accumulator(shape, tokens))
    return out.astype(tokens.dtype)
