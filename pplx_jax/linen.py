"""The Mixture-of-Experts layer as a Flax Linen module.

Like `pplx_jax.flax.MoE` a thin holder of parameters around `pplx_jax.moe.moe`, for models that are written
with Linen. Weights carry logical axis names (``nn.with_logical_partitioning``); with a group,
`MoE.logical_rules` says which mesh axes they are:

    layer = MoE(hidden=64, intermediate=128, num_experts=8, top_k=2, ep=ep)
    specs = nn.get_partition_spec(jax.eval_shape(layer.init, key, x))
    shardings = nn.logical_to_mesh_sharding(specs, ep.mesh, layer.logical_rules())
    variables = nn.meta.unbox(jax.jit(layer.init, out_shardings=shardings)(key, x))
    y, aux = layer.apply(variables, x)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from pplx_jax import router as routing_fns
from pplx_jax.experts import ExpertParams, Initializer, default_init
from pplx_jax.grouped_gemm import Implementation
from pplx_jax.moe import MoEAux, MoEConfig, MoEParams, layout_of, moe
from pplx_jax.moe_config import check_float_dtype
from pplx_jax.moe_params import check_logical_axes
from pplx_jax.router import SavedRouting

__all__ = ["STATE", "MoE", "MoEAux", "SavedRouting"]

#: The collection that holds the selection bias: state that follows the loads, not a parameter.
STATE = "moe_state"


class Experts(nn.Module):  # type: ignore[misc]
    """Parameters of a layer's experts (``sizes`` is (E,)) or of its shared expert (``sizes`` is ()).

    Attributes:
      sizes: leading shape of every parameter.
      names: logical axis of each entry of sizes, then those of H and I.
      hidden, intermediate: H and I.
      gated, use_bias: see `pplx_jax.experts.ExpertParams`.
      dtype: of the parameters.
      init_fn: initializer (key, shape, dtype) of the matrices.
    """

    sizes: tuple[int, ...]
    names: tuple[str | None, ...]
    hidden: int
    intermediate: int
    gated: bool
    use_bias: bool
    dtype: Any
    init_fn: Initializer

    @nn.compact  # type: ignore[untyped-decorator]
    def __call__(self) -> ExpertParams:
        """The current values."""
        *lead, h, i = self.names
        into, back = (self.hidden, self.intermediate), (self.intermediate, self.hidden)

        def matrix(name: str, shape: tuple[int, int], names: tuple[str | None, ...]) -> jax.Array:
            init = nn.with_logical_partitioning(self.init_fn, (*lead, *names))
            value: jax.Array = self.param(name, init, (*self.sizes, *shape), self.dtype)
            return value

        def bias(name: str, size: int, axis: str | None) -> jax.Array:
            init = nn.with_logical_partitioning(nn.initializers.zeros, (*lead, axis))
            value: jax.Array = self.param(name, init, (*self.sizes, size), self.dtype)
            return value

        return ExpertParams(
            up=matrix("up", into, (h, i)),
            down=matrix("down", back, (i, h)),
            gate=matrix("gate", into, (h, i)) if self.gated else None,
            up_bias=bias("up_bias", self.intermediate, i) if self.use_bias else None,
            down_bias=bias("down_bias", self.hidden, None) if self.use_bias else None,
            gate_bias=bias("gate_bias", self.intermediate, i) if self.use_bias and self.gated else None,
        )


class MoE(nn.Module):  # type: ignore[misc]
    """A router and its experts: [..., H] to [..., H], and what the layer reports (`pplx_jax.moe.MoEAux`).

    Parameters are the router's ``kernel`` [H, E] and ``bias`` [E], and ``experts`` and ``shared`` with the
    fields of `pplx_jax.experts.ExpertParams`.

    Attributes:
      hidden, intermediate, num_experts, top_k: H, I, E and K.
      ep: the expert-parallel group, made for this hidden, num_experts and top_k; None for dense JAX.
      router, router_bias, selection_bias, num_groups, top_groups, normalize, routed_scaling_factor,
      shared_experts, activation, use_bias, gated, dtype, param_dtype, kernel_init, data_axes, fsdp_axis,
      tp_axis, grouped_gemm, overlap_shared: as in `pplx_jax.flax.MoE`. The selection bias lives in the
        collection `STATE`.
      logical_axes: names of the weights' dimensions (experts, H, I).

    Raises:
      TypeError, ValueError: an attribute has a wrong type or range, at ``init`` and ``apply``.
    """

    hidden: int
    intermediate: int
    num_experts: int
    top_k: int
    ep: Any = None
    router: routing_fns.ScoreFn = "softmax"
    router_bias: bool = False
    selection_bias: bool = False
    num_groups: int = 1
    top_groups: int = 1
    normalize: bool = True
    routed_scaling_factor: float = 1.0
    shared_experts: int = 0
    activation: str | Callable[[jax.Array], jax.Array] = "silu"
    use_bias: bool = False
    gated: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = default_init
    data_axes: tuple[str, ...] | None = None
    fsdp_axis: str | tuple[str, ...] | None = "auto"
    tp_axis: str | tuple[str, ...] | None = "auto"
    grouped_gemm: Implementation = "auto"
    overlap_shared: bool = False
    logical_axes: tuple[str, str, str] = ("expert", "embed", "mlp")

    @property
    def config(self) -> MoEConfig:
        """The layer's configuration as `pplx_jax.moe.moe` takes it."""
        return MoEConfig(
            top_k=self.top_k,
            score_fn=self.router,
            num_groups=self.num_groups,
            top_groups=self.top_groups,
            normalize=self.normalize,
            scale=self.routed_scaling_factor,
            activation=self.activation,
            dtype=self.dtype,
            data_axes=self.data_axes,
            fsdp_axis=self.fsdp_axis,
            tp_axis=self.tp_axis,
            grouped_gemm=self.grouped_gemm,
            overlap_shared=self.overlap_shared,
        )

    def logical_rules(self) -> tuple[tuple[str, Any], ...]:
        """Rules from the names in ``logical_axes`` to the axes of the group's mesh: what moves nothing.

        Raises ValueError without a group.
        """
        if self.ep is None:
            raise ValueError("logical_rules needs a group's mesh, got ep=None")
        layout = layout_of(
            self.ep,
            self.config,
            hidden=self.hidden,
            intermediate=self.intermediate,
            num_experts=self.num_experts,
        )
        return layout.logical_rules(self.logical_axes)

    @nn.compact  # type: ignore[untyped-decorator]
    def __call__(
        self,
        x: jax.Array,
        *,
        mask: jax.Array | None = None,
        routing: SavedRouting | None = None,
        return_routing: bool = False,
        expert_map: Any = None,
        bias_speed: float = 0.0,
    ) -> tuple[jax.Array, MoEAux]:
        """Applies the layer; arguments as in `pplx_jax.moe.moe`.

        Args:
          x: floating [..., H], a global array.
          mask: bool [...], False for tokens that take no part (padding); None: all take part.
          routing: integers [..., K] and maybe weights, to replay in place of the router's choice.
          return_routing: whether ``aux.routing`` says where tokens went.
          expert_map: ints [R, S], where experts are hosted in this call.
          bias_speed: if not 0, moves the selection bias by this step towards even loads after use, see
            `pplx_jax.router.update_selection_bias`; apply with ``mutable=["moe_state"]``.

        Returns:
          (y, aux): y of x's shape and dtype; aux a `MoEAux`.
        """
        for name in ("hidden", "intermediate", "num_experts", "top_k"):
            routing_fns._check_int(name, getattr(self, name), 1)
        routing_fns._check_int("shared_experts", self.shared_experts, 0)
        check_float_dtype("param_dtype", self.param_dtype)
        if bias_speed and not self.selection_bias:
            raise ValueError(f"bias_speed={bias_speed} needs a layer with selection_bias=True")
        shape = (self.hidden, self.num_experts)
        # Small, and used on every rank: no axis of the router is ever sharded.
        kernel: jax.Array = self.param(
            "kernel", nn.with_logical_partitioning(self.kernel_init, (None, None)), shape, jnp.float32
        )
        router_bias: jax.Array | None = None
        if self.router_bias:
            router_bias = self.param("bias", nn.initializers.zeros, shape[1:], jnp.float32)
        bias = self.variable(STATE, "bias", jnp.zeros, shape[1:]) if self.selection_bias else None
        params = MoEParams(
            router=kernel,
            experts=self._experts("experts", (self.num_experts,), self.intermediate),
            router_bias=router_bias,
            selection_bias=None if bias is None else bias.value,
            shared=self._experts("shared", (), self.intermediate * self.shared_experts)
            if self.shared_experts
            else None,
        )
        path = ".".join(self.path)
        with jax.named_scope(path or "moe"):
            y, aux = moe(
                params,
                x,
                self.config,
                ep=self.ep,
                mask=mask,
                routing=routing,
                return_routing=return_routing,
                expert_map=expert_map,
                name=path,
            )
        if bias is not None and bias_speed and not self.is_initializing():
            bias.value = routing_fns.update_selection_bias(bias.value, aux.expert_loads, speed=bias_speed)
        return y, aux

    def _experts(self, name: str, sizes: tuple[int, ...], intermediate: int) -> ExpertParams:
        check_logical_axes(self.logical_axes)
        made: ExpertParams = Experts(
            sizes=sizes,
            names=self.logical_axes if sizes else self.logical_axes[1:],
            hidden=self.hidden,
            intermediate=intermediate,
            gated=self.gated,
            use_bias=self.use_bias,
            dtype=self.param_dtype,
            init_fn=self.kernel_init,
            name=name,
        )()
        return made
