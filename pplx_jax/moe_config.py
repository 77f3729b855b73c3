"""How a Mixture-of-Experts layer computes, as a value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pplx_jax import router
from pplx_jax.experts import ACTIVATIONS
from pplx_jax.grouped_gemm import Implementation, check_implementation

#: Of ``fsdp_axis`` and ``tp_axis``: the mesh axis of that name, if there is one and it divides the weights.
AUTO = "auto"


@dataclass(frozen=True)
class MoEConfig:
    """How the layer computes; hashable. Sizes follow from the parameters.

    Attributes:
      top_k: experts a token.
      score_fn, num_groups, top_groups, normalize, scale: see `pplx_jax.router.route`.
      activation: a name from `ACTIVATIONS` or an elementwise function.
      dtype: what the experts compute in; None for the tokens' dtype. Products accumulate in float32.
      data_axes: mesh axes that shard tokens besides the group's own; None for those named in
        `pplx_jax.moe_sharding.DATA_AXES`.
      fsdp_axis: mesh axis, or axes, over which experts' matrices are stored in parts (of H) besides the
        group's. They are gathered just before use, in the dtype that experts compute in, and their gradients
        are reduce-scattered. These axes shard tokens as well. None: no such axis. "auto": the axis "fsdp" if
        the mesh has one outside the group and it divides H, else none.
      tp_axis: mesh axis, or axes, that split every expert's inner dimension I. Tokens are replicated over
        them; partial sums are added in the dtype that experts compute in. None and "auto" (with the name
        "tp") as in fsdp_axis.
      grouped_gemm: "auto" or a function, see `pplx_jax.grouped_gemm.grouped_gemm`.
      overlap_shared: whether the shared expert is computed between dispatch's send and its recv, while
        tokens travel, instead of after combine; over a group, and where its ``chunk`` holds a call's tokens.
    """

    top_k: int
    score_fn: router.ScoreFn = "softmax"
    num_groups: int = 1
    top_groups: int = 1
    normalize: bool = True
    scale: float = 1.0
    activation: str | Callable[[jax.Array], jax.Array] = "silu"
    dtype: Any = None
    data_axes: tuple[str, ...] | None = None
    fsdp_axis: str | tuple[str, ...] | None = AUTO
    tp_axis: str | tuple[str, ...] | None = AUTO
    grouped_gemm: Implementation = "auto"
    overlap_shared: bool = False

    def __post_init__(self) -> None:
        router._check_int("top_k", self.top_k, 1)
        if isinstance(self.activation, str):
            if self.activation not in ACTIVATIONS:
                names = ", ".join(map(repr, ACTIVATIONS))
                raise ValueError(f"activation must be a function or one of {names}, got {self.activation!r}")
        elif not callable(self.activation):
            raise TypeError(f"activation must be a name or a function, got {type(self.activation).__name__}")
        if self.dtype is not None:
            check_float_dtype("dtype", self.dtype)
            object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        if self.data_axes is not None and not isinstance(self.data_axes, tuple):
            raise TypeError(f"data_axes must be a tuple of mesh axis names, got {self.data_axes!r}")
        for name in ("fsdp_axis", "tp_axis"):
            value = getattr(self, name)
            if not (value is None or isinstance(value, (str, tuple))):
                raise TypeError(
                    f'{name} must be a mesh axis name, a tuple of them, "auto" or None, got {value!r}'
                )
        check_implementation(self.grouped_gemm)
        if not isinstance(self.overlap_shared, bool):
            raise TypeError(f"overlap_shared must be a bool, got {self.overlap_shared!r}")

    @property
    def activation_fn(self) -> Callable[[jax.Array], jax.Array]:
        """The elementwise function that `activation` names or is."""
        return ACTIVATIONS[self.activation] if isinstance(self.activation, str) else self.activation


def check_float_dtype(name: str, dtype: Any) -> None:
    """Raises TypeError, naming the argument, unless dtype is a floating-point dtype."""
    try:
        floating = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise TypeError(f"{name} must be a floating-point dtype, got {dtype!r}")
