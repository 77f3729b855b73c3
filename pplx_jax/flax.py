"""The Mixture-of-Experts layer as a Flax NNX module.

A thin holder of parameters around `pplx_jax.moe.moe`: whatever that function does, this does, so there is one
implementation to trust. Give it a `pplx_jax.ExpertParallel` and its experts are spread over the group's
ranks; leave it out and the same module runs dense on one device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core.spmd import get_logical_axis_rules
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pplx_jax import router as routing
from pplx_jax.experts import ExpertParams, Initializer, default_init
from pplx_jax.grouped_gemm import Implementation
from pplx_jax.moe import Layout, MoEAux, MoEConfig, MoEParams, init_params, layout_of, moe
from pplx_jax.moe_params import check_logical_axes
from pplx_jax.router import SavedRouting

if TYPE_CHECKING:
    from pplx_jax.expert_parallel import ExpertParallel

__all__ = ["MoE", "MoEAux", "SavedRouting", "SelectionBias", "moe_layers", "name_layers"]


class SelectionBias(nnx.Variable[jax.Array]):  # type: ignore[misc]
    """The router's selection bias: state that follows the experts' loads, not a parameter with a gradient."""


class Experts(nnx.Module):  # type: ignore[misc]
    """Parameters of a layer's experts, or of its shared expert; see `pplx_jax.experts.ExpertParams`.

    Args:
      params: the initial values.
      metadata: of the `nnx.Param` of a field, such as its sharding.
    """

    def __init__(self, params: ExpertParams, metadata: Callable[[str], dict[str, Any]]) -> None:
        def hold(name: str) -> nnx.Param[jax.Array] | None:
            value = getattr(params, name)
            return None if value is None else nnx.Param(value, **metadata(name))

        self.up = nnx.Param(params.up, **metadata("up"))
        self.down = nnx.Param(params.down, **metadata("down"))
        self.gate = hold("gate")
        self.up_bias = hold("up_bias")
        self.down_bias = hold("down_bias")
        self.gate_bias = hold("gate_bias")

    def params(self) -> ExpertParams:
        """The current values."""
        return ExpertParams(
            up=self.up[...],
            down=self.down[...],
            gate=_value(self.gate),
            up_bias=_value(self.up_bias),
            down_bias=_value(self.down_bias),
            gate_bias=_value(self.gate_bias),
        )


class MoE(nnx.Module):  # type: ignore[misc]
    """A router and its experts: [..., H] to [..., H], and what the layer reports (`pplx_jax.moe.MoEAux`).

    Experts' weights are stacked on a leading expert axis. With a group they carry ``out_sharding``: that axis
    over the group's mesh axes, H and I over fsdp and tp axes if there are any, so parameters made under
    ``nnx.jit`` are born sharded; where the ranks don't divide the number of experts, JAX can't shard the
    expert axis (see `pplx_jax.moe`). With ``logical_axes`` they carry names instead, which Flax's rules
    (``nnx.logical_axis_rules``, `pplx_jax.moe.Layout.logical_rules`) map to mesh axes. The module works under
    nnx.jit, nnx.grad, nnx.remat and in stacks of layers.

    Args:
      hidden: H, size of a token's vector.
      intermediate: I, inner size of an expert.
      num_experts: E.
      top_k: experts a token, from 1 to E.
      rngs: Flax's generators; the stream "params" is used.
      ep: the expert-parallel group, made for this hidden, num_experts and top_k; None for dense JAX.
      router: "softmax" or "sigmoid" scores.
      router_bias: whether the router's logits have a bias.
      selection_bias: whether a `SelectionBias` takes part in the selection; `update_selection_bias` moves it.
      num_groups, top_groups: group-limited selection, see `pplx_jax.router.route`.
      normalize: whether a token's weights sum to routed_scaling_factor.
      routed_scaling_factor: factor on the weights.
      shared_experts: n > 0 adds a dense expert of width n * intermediate that every token passes.
      activation: a name from `pplx_jax.experts.ACTIVATIONS` or an elementwise function.
      use_bias: whether the experts' linear maps have biases.
      gated: down(act(gate(x)) * up(x)), or without a gate down(act(up(x))).
      dtype: what experts compute in; None for the input's. The router computes in float32.
      param_dtype: of the experts' parameters; the router's are float32.
      kernel_init: initializer (key, shape, dtype) of every weight matrix; its last two axes are (in, out).
      data_axes: mesh axes that shard tokens besides the group's, see `pplx_jax.moe.MoEConfig`.
      fsdp_axis, tp_axis: mesh axes that store, or split, the experts' matrices in parts, see the same.
      grouped_gemm: "auto" or a function, see `pplx_jax.grouped_gemm.grouped_gemm`.
      overlap_shared: whether the shared expert runs while tokens travel, see `pplx_jax.moe.MoEConfig`.
      expert_sharding: mesh axes for the expert axis of the weights; None for the group's, if there is one.
      logical_axes: names of the weights' dimensions (experts, H, I), such as ("expert", "embed", "mlp"), to
        annotate them with in place of mesh axes; None for mesh axes.
      name: of this call site, for errors; `name_layers` sets it from the layer's place in a model.

    Raises:
      TypeError, ValueError: an argument has a wrong type or range; the message names it.
    """

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        num_experts: int,
        top_k: int,
        *,
        rngs: nnx.Rngs,
        ep: ExpertParallel | None = None,
        router: routing.ScoreFn = "softmax",
        router_bias: bool = False,
        selection_bias: bool = False,
        num_groups: int = 1,
        top_groups: int = 1,
        normalize: bool = True,
        routed_scaling_factor: float = 1.0,
        shared_experts: int = 0,
        activation: str | Callable[[jax.Array], jax.Array] = "silu",
        use_bias: bool = False,
        gated: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Initializer = default_init,
        data_axes: tuple[str, ...] | None = None,
        fsdp_axis: str | tuple[str, ...] | None = "auto",
        tp_axis: str | tuple[str, ...] | None = "auto",
        grouped_gemm: Implementation = "auto",
        overlap_shared: bool = False,
        expert_sharding: str | tuple[str, ...] | None = None,
        logical_axes: tuple[str, str, str] | None = None,
        name: str = "",
    ) -> None:
        self.config = MoEConfig(
            top_k=top_k,
            score_fn=router,
            num_groups=num_groups,
            top_groups=top_groups,
            normalize=normalize,
            scale=routed_scaling_factor,
            activation=activation,
            dtype=dtype,
            data_axes=data_axes,
            fsdp_axis=fsdp_axis,
            tp_axis=tp_axis,
            grouped_gemm=grouped_gemm,
            overlap_shared=overlap_shared,
        )
        routing.check_routing_options(
            num_experts, top_k, router, num_groups, top_groups, routed_scaling_factor
        )
        if not isinstance(name, str):
            raise TypeError(f"name must be a string, got {name!r}")
        if ep is not None:
            made = (ep.config.hidden, ep.config.num_experts, ep.config.top_k)
            if made != (hidden, num_experts, top_k):
                raise ValueError(
                    f"ep was made for (hidden, num_experts, top_k) = {made}, "
                    f"but the layer has {(hidden, num_experts, top_k)}"
                )
        self.ep = ep
        self.name = name
        initial = init_params(
            rngs.params(),
            hidden,
            intermediate,
            num_experts,
            shared_experts=shared_experts,
            gated=gated,
            use_bias=use_bias,
            router_bias=router_bias,
            selection_bias=selection_bias,
            dtype=param_dtype,
            init=kernel_init,
        )
        layout: Layout | None = None
        if logical_axes is not None:
            check_logical_axes(logical_axes, expert_sharding)
            layout = Layout((), (), *((axis,) for axis in logical_axes))
        elif ep is not None:
            layout = layout_of(
                ep, self.config, hidden=hidden, intermediate=intermediate, num_experts=num_experts
            )
        if expert_sharding is not None:
            axes = (expert_sharding,) if isinstance(expert_sharding, str) else tuple(expert_sharding)
            layout = replace(layout or Layout((), (), None), experts=axes)

        def annotation(name: str, *, stacked: bool) -> dict[str, Any]:
            spec = P() if layout is None else layout.spec(name, stacked=stacked)
            if all(entry is None for entry in spec):
                return {}
            return {"out_sharding": spec, **_placement(ep, logical=logical_axes is not None)}

        self.router = nnx.Param(initial.router)
        self.router_bias = None if initial.router_bias is None else nnx.Param(initial.router_bias)
        self.selection_bias = (
            None if initial.selection_bias is None else SelectionBias(initial.selection_bias)
        )
        self.experts = Experts(initial.experts, partial(annotation, stacked=True))
        self.shared = (
            None if initial.shared is None else Experts(initial.shared, partial(annotation, stacked=False))
        )

    def params(self) -> MoEParams:
        """The parameters as `pplx_jax.moe.moe` takes them."""
        return MoEParams(
            router=self.router[...],
            experts=self.experts.params(),
            router_bias=_value(self.router_bias),
            selection_bias=_value(self.selection_bias),
            shared=None if self.shared is None else self.shared.params(),
        )

    def __call__(
        self,
        x: jax.Array,
        *,
        mask: jax.Array | None = None,
        routing: SavedRouting | None = None,
        return_routing: bool = False,
        expert_map: Any = None,
    ) -> tuple[jax.Array, MoEAux]:
        """Applies the layer; arguments as in `pplx_jax.moe.moe`.

        Args:
          x: floating [..., H], a global array.
          mask: bool [...], False for tokens that take no part (padding); None: all take part.
          routing: integers [..., K] and maybe weights, to replay in place of the router's choice.
          return_routing: whether ``aux.routing`` says where tokens went.
          expert_map: ints [R, S], where experts are hosted in this call; the module's parameters stay in the
            experts' own order, so nothing else changes when it does.

        Returns:
          (y, aux): y of x's shape and dtype; aux a `MoEAux`.
        """
        with jax.named_scope(self.name or "moe"):
            return moe(
                self.params(),
                x,
                self.config,
                ep=self.ep,
                mask=mask,
                routing=routing,
                return_routing=return_routing,
                expert_map=expert_map,
                name=self.name,
            )

    def update_selection_bias(self, loads: jax.Array, *, speed: float = 1e-3) -> None:
        """Moves the selection bias towards balanced experts; see `pplx_jax.router.update_selection_bias`.

        Args:
          loads: int32 [E], a step's ``aux.expert_loads``.
          speed: the step, in units of the score.
        """
        if self.selection_bias is None:
            raise ValueError("this layer has no selection bias: make it with selection_bias=True")
        self.selection_bias[...] = routing.update_selection_bias(self.selection_bias[...], loads, speed=speed)


def _value(variable: nnx.Variable[jax.Array] | None) -> jax.Array | None:
    return None if variable is None else variable[...]


def _placement(ep: ExpertParallel | None, *, logical: bool) -> dict[str, Any]:
    """Metadata that says where Flax places a parameter with ``out_sharding`` when it is made."""
    if logical and not get_logical_axis_rules():
        return {"eager_sharding": False}  # names that mean no mesh axis yet
    if ep is not None and isinstance(ep.mesh, Mesh):
        return {"mesh": ep.mesh}
    # Without a mesh of devices (none at all, or an abstract one) the annotation is for later.
    return {} if not jax.sharding.get_abstract_mesh().empty else {"eager_sharding": False}


def moe_layers(model: nnx.Module) -> Iterator[tuple[str, MoE]]:
    """The model's MoE layers, each with its path, such as "blocks.3.moe", in a fixed order."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, MoE):
            yield ".".join(map(str, path)), module


def name_layers(model: nnx.Module) -> None:
    """Names every MoE layer after its path, so that errors of the exchange say which layer they come from."""
    for path, layer in moe_layers(model):
        layer.name = path
