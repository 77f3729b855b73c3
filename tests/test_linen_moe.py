"""The Linen module against the NNX one and dense JAX: parameters, metadata, state, sharding."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from moe_layer import INIT, INNER, H, assert_close, group, mesh_of

from pplx_jax.experts import ExpertParams
from pplx_jax.linen import STATE, MoE
from pplx_jax.moe import MoEConfig, MoEParams, moe


def layer(experts: int = 8, **options: Any) -> MoE:
    return MoE(hidden=H, intermediate=INNER, num_experts=experts, top_k=2, kernel_init=INIT, **options)


def as_params(variables: Any) -> MoEParams:
    params = nn.meta.unbox(variables["params"])
    return MoEParams(
        router=params["kernel"],
        experts=ExpertParams(**params["experts"]),
        router_bias=params.get("bias"),
        selection_bias=variables.get(STATE, {}).get("bias"),
        shared=ExpertParams(**params["shared"]) if "shared" in params else None,
    )


@pytest.mark.parametrize("names", [("expert", "embed"), "xyz", ("expert", "embed", 3)])
def test_bad_logical_axes_are_named(names: Any) -> None:
    with pytest.raises(TypeError, match="logical_axes must be three names"):
        layer(logical_axes=names).init(jax.random.key(0), jnp.ones((4, H)))


def test_module_is_the_pure_function() -> None:
    x = jax.random.normal(jax.random.key(1), (4, 3, H))
    options: dict[str, Any] = {"use_bias": True, "router_bias": True, "shared_experts": 2}
    module = layer(6, selection_bias=True, router="sigmoid", routed_scaling_factor=2.5, **options)
    variables = module.init(jax.random.key(0), x)
    mask = jnp.arange(12).reshape(4, 3) != 5
    y, aux = module.apply(variables, x, mask=mask, return_routing=True)
    config = MoEConfig(top_k=2, score_fn="sigmoid", scale=2.5)
    want, want_aux = moe(as_params(variables), x, config, mask=mask, return_routing=True)
    np.testing.assert_array_equal(y, want)
    jax.tree.map(np.testing.assert_array_equal, aux, want_aux)
    experts = nn.meta.unbox(variables["params"]["experts"])
    assert {name: value.shape for name, value in experts.items()} == {
        "up": (6, H, INNER),
        "down": (6, INNER, H),
        "gate": (6, H, INNER),
        "up_bias": (6, INNER),
        "down_bias": (6, H),
        "gate_bias": (6, INNER),
    }
    # Each expert has weights of its own.
    assert len({np.asarray(w).tobytes() for w in experts["up"]}) == 6


def test_module_over_a_group_is_born_sharded_and_equals_dense() -> None:
    x = jax.random.normal(jax.random.key(1), (8, H))
    dense = layer(shared_experts=1)

    def run(module: MoE, variables: Any) -> Any:
        def loss(variables: Any) -> Any:
            y, aux = module.apply(variables, x)
            return (y**2).sum() + aux.load_balance_loss

        return jax.jit(jax.value_and_grad(loss))(variables)

    with group(mesh_of(fsdp=2, tp=2, ep=2), 8, 2) as ep:
        module = layer(shared_experts=1, ep=ep)
        specs = nn.get_partition_spec(jax.eval_shape(module.init, jax.random.key(0), x))
        assert specs["params"]["experts"]["down"] == P("expert", "mlp", "embed")
        assert specs["params"]["shared"]["up"] == P("embed", "mlp")
        shardings = nn.logical_to_mesh_sharding(specs, ep.mesh, module.logical_rules())
        init = jax.jit(module.init, out_shardings=shardings)
        variables = jax.block_until_ready(nn.meta.unbox(init(jax.random.key(0), x)))
        down = variables["params"]["experts"]["down"]
        assert down.sharding == NamedSharding(ep.mesh, P("ep", "tp", "fsdp"))
        got = jax.block_until_ready(run(module, variables))
    assert_close(got, run(dense, jax.device_get(variables)), 1e-4)
    with pytest.raises(ValueError, match="logical_rules needs a group"):
        dense.logical_rules()


def test_param_dtype_and_dtype() -> None:
    x = jnp.ones((4, H))
    module = layer(4, param_dtype=jnp.bfloat16, dtype=jnp.float16, use_bias=True, shared_experts=1)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    params = nn.meta.unbox(variables["params"])
    assert {a.dtype for a in jax.tree.leaves((params["experts"], params["shared"]))} == {
        jnp.dtype("bfloat16")
    }
    assert params["kernel"].dtype == jnp.float32
    assert jax.eval_shape(module.apply, variables, x)[0].dtype == jnp.float32


def test_selection_bias_moves_when_asked() -> None:
    x = jax.random.normal(jax.random.key(1), (32, H))
    module = layer(4, selection_bias=True)
    variables = nn.meta.unbox(module.init(jax.random.key(0), x, bias_speed=0.5))
    np.testing.assert_array_equal(variables[STATE]["bias"], np.zeros(4))
    (_, aux), state = jax.jit(lambda v: module.apply(v, x, bias_speed=0.5, mutable=[STATE]))(variables)
    loads = np.asarray(aux.expert_loads)
    np.testing.assert_allclose(state[STATE]["bias"], 0.5 * np.sign(loads.mean() - loads))
    _, same = module.apply(variables, x, mutable=[STATE])
    np.testing.assert_array_equal(same[STATE]["bias"], np.zeros(4))
    with pytest.raises(ValueError, match="selection_bias=True"):
        layer(4).init(jax.random.key(0), x, bias_speed=0.5)


@pytest.mark.parametrize(
    "error, match, changes",
    [
        (ValueError, "num_experts", {"num_experts": 0}),
        (TypeError, "hidden", {"hidden": 1.5}),
        (ValueError, "shared_experts", {"shared_experts": -1}),
        (TypeError, "param_dtype", {"param_dtype": jnp.int8}),
        (ValueError, "top_k", {"top_k": 9}),
        (ValueError, "activation", {"activation": "swish"}),
        (ValueError, "grouped_gemm", {"grouped_gemm": "mine"}),
    ],
)
def test_bad_attributes_are_named(error: type[Exception], match: str, changes: dict[str, Any]) -> None:
    module = layer(8).clone(**changes)
    with pytest.raises(error, match=match):
        module.init(jax.random.key(0), jnp.zeros((2, H)))
