"""The parts that every family is made of: matrices, norms, dense MLPs, the MoE layer with float8 experts."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pplx_jax.experts import ExpertParams, default_init
from pplx_jax.flax import MoE
from pplx_jax.models.config import DecoderConfig
from pplx_jax.models.quantized import dequantize, scale_shape
from pplx_jax.models.sharding import Placement
from pplx_jax.moe import MoEParams

FLOAT8 = jnp.float8_e4m3fn


def _init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    # Not every dtype has random numbers.
    return default_init(key, shape, jnp.float32).astype(dtype)


class Scale(nnx.Variable[jax.Array]):  # type: ignore[misc]
    """Scales of the blocks of a float8 weight, float32; no parameter with a gradient."""


class Matrix(nnx.Module):  # type: ignore[misc]
    """x @ kernel, without a bias.

    Args:
      inputs, outputs: of the kernel [inputs, outputs].
      spec: mesh axes that split each.
      rngs: Flax's generators; the stream "params" is used.
      placement: where it lies; with a ``block`` the kernel is float8, and is dequantised at each use.
      quantized: False for a matrix that checkpoints never quantise.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        spec: tuple[Any, Any],
        *,
        rngs: nnx.Rngs,
        placement: Placement,
        quantized: bool = True,
    ) -> None:
        self.dtype = placement.dtype
        # A checkpoint's matrices are [outputs, inputs], and so are its blocks.
        self.block = placement.block[::-1] if placement.block is not None and quantized else None
        stored = placement.dtype if self.block is None else FLOAT8
        self.kernel = nnx.Param(_init(rngs.params(), (inputs, outputs), stored), **placement.metadata(*spec))
        if self.block is None:
            self.scale = None
        else:
            self.scale = Scale(jnp.ones(scale_shape((inputs, outputs), self.block), jnp.float32))

    def value(self) -> jax.Array:
        """The kernel, [inputs, outputs] of the placement's dtype."""
        if self.scale is None or self.block is None:
            kernel: jax.Array = self.kernel[...]
            return kernel
        return dequantize(self.kernel[...], self.scale[...], self.block, self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., inputs] to [..., outputs], with float32 sums; of x's dtype."""
        y = jnp.dot(x, self.value(), preferred_element_type=jnp.float32)
        return y.astype(x.dtype)


class RMSNorm(nnx.Module):  # type: ignore[misc]
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32 but for the last product.

    Args:
      size: of the last axis.
      eps: added to the mean.
      dtype: of the weight.
    """

    def __init__(self, size: int, eps: float, dtype: Any) -> None:
        self.eps = eps
        self.weight = nnx.Param(jnp.ones(size, dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Of x's shape and dtype."""
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        y: jax.Array = self.weight[...] * normed.astype(x.dtype)
        return y.astype(x.dtype)


class MLP(nnx.Module):  # type: ignore[misc]
    """down(silu(gate(x)) * up(x)), its inner size split over tp.

    Args:
      hidden, intermediate: H and the inner size.
      rngs: Flax's generators.
      placement: where and in which dtype.
    """

    def __init__(self, hidden: int, intermediate: int, *, rngs: nnx.Rngs, placement: Placement) -> None:
        tp = placement.tp(intermediate)
        self.gate = Matrix(hidden, intermediate, (None, tp), rngs=rngs, placement=placement)
        self.up = Matrix(hidden, intermediate, (None, tp), rngs=rngs, placement=placement)
        self.down = Matrix(intermediate, hidden, (tp, None), rngs=rngs, placement=placement)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., H] to [..., H]."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class ExpertScales(nnx.Module):  # type: ignore[misc]
    """Scales in the place of an experts' arrays: [E, blocks, blocks], or without E for the shared expert.

    Args:
      params: the float8 arrays that they belong to.
      block: inputs and outputs of a block.
      metadata: of each variable, such as its sharding.
    """

    def __init__(self, params: ExpertParams, block: tuple[int, int], metadata: dict[str, Any]) -> None:
        def ones(values: jax.Array) -> Scale:
            return Scale(jnp.ones(scale_shape(values.shape, block), jnp.float32), **metadata)

        assert params.gate is not None
        self.up, self.down, self.gate = ones(params.up), ones(params.down), ones(params.gate)


class ExpertLayer(MoE):
    """`pplx_jax.flax.MoE` as a model's configuration asks for it; its experts may be float8 in blocks.

    float8 experts are dequantised at each use, a layer at a time: memory holds the float8 weights and one
    layer's local experts in the placement's dtype.

    Args:
      config: sizes and router.
      rngs: Flax's generators.
      placement: group, dtype and whether weights stay float8.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, placement: Placement) -> None:
        route = config.router
        super().__init__(
            config.hidden_size,
            config.moe_intermediate_size,
            config.num_experts,
            config.num_experts_per_tok,
            rngs=rngs,
            ep=placement.ep,
            router=route.score_fn,
            selection_bias=route.selection_bias,
            num_groups=route.num_groups,
            top_groups=route.top_groups,
            normalize=route.normalize,
            routed_scaling_factor=route.scale,
            shared_experts=config.num_shared_experts,
            dtype=placement.dtype,
            param_dtype=placement.dtype if placement.block is None else FLOAT8,
            kernel_init=_init,
            fsdp_axis=None,
            overlap_shared=placement.overlap_shared,
        )
        self.block = None if placement.block is None else placement.block[::-1]
        if self.block is None:
            self.expert_scales = None
        else:
            spread = placement.metadata("ep", None, None)
            self.expert_scales = ExpertScales(self.experts.params(), self.block, spread)
        if self.block is None or self.shared is None:
            self.shared_scales = None
        else:
            self.shared_scales = ExpertScales(self.shared.params(), self.block, {})

    def params(self) -> MoEParams:
        """The parameters, experts in the placement's dtype."""
        stored = super().params()
        if self.block is None or self.expert_scales is None:
            return stored
        experts = self._dequantized(stored.experts, self.expert_scales)
        shared = stored.shared
        if shared is not None and self.shared_scales is not None:
            shared = self._dequantized(shared, self.shared_scales)
        return dataclasses.replace(stored, experts=experts, shared=shared)

    def _dequantized(self, stored: ExpertParams, scales: ExpertScales) -> ExpertParams:
        assert self.block is not None
        assert stored.gate is not None
        dtype = self.config.dtype
        return dataclasses.replace(
            stored,
            up=dequantize(stored.up, scales.up[...], self.block, dtype),
            down=dequantize(stored.down, scales.down[...], self.block, dtype),
            gate=dequantize(stored.gate, scales.gate[...], self.block, dtype),
        )
