"""Weights sharded over fsdp and tp axes besides the group's, on Auto and Explicit axes, against dense JAX."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from moe_layer import INNER, H, assert_close, collectives, group, make_params, mesh_of

from pplx_jax.flax import MoE
from pplx_jax.moe import Layout, MoEConfig, MoEParams, layout_of, moe


def layout(ep: Any, config: MoEConfig, experts: int = 8) -> Layout:
    return layout_of(ep, config, hidden=H, intermediate=INNER, num_experts=experts)


def put(params: MoEParams, ep: Any, where: Layout) -> MoEParams:
    """Parameters as the layout stores them."""

    def place(tree: Any, specs: Any) -> Any:
        return jax.tree.map(lambda a, spec: jax.device_put(a, NamedSharding(ep.mesh, spec)), tree, specs)

    replicated = jax.device_put(params, NamedSharding(ep.mesh, P()))
    changes = {"experts": place(params.experts, where.expert_specs(params.experts))}
    if params.shared is not None:
        changes["shared"] = place(params.shared, where.expert_specs(params.shared, stacked=False))
    return dataclasses.replace(replicated, **changes)


def gradients(params: MoEParams, x: jax.Array, config: MoEConfig, ep: Any) -> Any:
    def loss(params: MoEParams, x: jax.Array) -> Any:
        y, aux = moe(params, x, config, ep=ep)
        weight = jnp.cos(7 * jax.lax.stop_gradient(x))  # something arbitrary that is sharded like x
        return (y * weight).sum() + 3 * aux.load_balance_loss + aux.z_loss, (y, aux)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x)


@pytest.mark.parametrize(
    "explicit, axes, axis, experts, config, want",
    [
        # Names that mean something are found.
        (False, {"fsdp": 2, "tp": 2, "ep": 2}, "ep", 8, {}, ("ep", "fsdp", "tp")),
        (True, {"fsdp": 2, "tp": 2, "ep": 2}, "ep", 8, {}, ("ep", "fsdp", "tp")),
        # Any name may be given; two axes may do one job.
        (False, {"dp": 2, "model": 2, "ep": 2}, "ep", 4, {"fsdp_axis": "dp", "tp_axis": "model"}, None),
        (False, {"a": 2, "fsdp": 2, "ep": 2}, "ep", 4, {"fsdp_axis": ("a", "fsdp"), "tp_axis": None}, None),
        (False, {"ep": 2, "a": 2, "tp": 2}, "ep", 4, {"tp_axis": ("a", "tp")}, None),
        # The ranks don't divide the experts: each picks its own before the gather.
        (False, {"fsdp": 2, "tp": 2, "ep": 2}, "ep", 5, {}, (None, "fsdp", "tp")),
        # One group over two axes.
        (False, {"dp": 2, "tp": 2}, ("dp", "tp"), 8, {}, (("dp", "tp"), None, None)),
        (True, {"dp": 2, "tp": 2, "fsdp": 2}, ("tp", "dp"), 8, {}, (("tp", "dp"), "fsdp", None)),
    ],
)
def test_sharded_weights_equal_dense(
    explicit: bool,
    axes: dict[str, int],
    axis: Any,
    experts: int,
    config: dict[str, Any],
    want: Any,
) -> None:
    options = MoEConfig(top_k=2, **config)
    params = make_params(experts, use_bias=True, shared_experts=1)
    x = jax.random.normal(jax.random.key(2), (8, 2, H))
    dense = gradients(params, x, options, None)
    with group(mesh_of(explicit, **axes), experts, 2, axis=axis) as ep:
        where = layout(ep, options, experts)
        if want is not None:
            assert where.spec("up") == P(*want)
            assert where.spec("down") == P(want[0], want[2], want[1])
        got = jax.block_until_ready(
            gradients(put(params, ep, where), jax.device_put(x, sharding(ep, where)), options, ep)
        )
    assert_close(got, dense, 1e-4)
    (_, (_, aux)), (d_params, _) = got
    assert aux.ok == 1
    # Gradients lie as the weights do: no rank holds more.
    up = d_params.experts.up
    parts = math.prod(axes[a] for a in (*(where.experts or ()), *where.fsdp, *where.tp))
    if where.experts is not None:
        assert up.addressable_shards[0].data.size == up.size // parts


def sharding(ep: Any, where: Layout) -> NamedSharding:
    return NamedSharding(ep.mesh, P(where.tokens))


def test_shared_expert_that_tp_does_not_divide_stays_whole() -> None:
    params = make_params(4, use_bias=True, shared_experts=1)
    assert params.shared is not None
    odd = {"up": (..., slice(-1)), "gate": (..., slice(-1)), "down": (slice(-1),), "up_bias": (slice(-1),),
           "gate_bias": (slice(-1),)}  # fmt: skip
    cut = {name: getattr(params.shared, name)[where] for name, where in odd.items()}
    params = dataclasses.replace(params, shared=dataclasses.replace(params.shared, **cut))
    x = jax.random.normal(jax.random.key(2), (4, H))
    options = MoEConfig(top_k=2)
    with group(mesh_of(ep=2, tp=2), 4, 2) as ep:
        got = jax.block_until_ready(
            gradients(params, jax.device_put(x, NamedSharding(ep.mesh, P("ep"))), options, ep)
        )
    assert_close(got, gradients(params, x, options, None), 1e-4)


def test_half_precision_is_gathered_in_half_precision() -> None:
    params = make_params(4)
    options = MoEConfig(top_k=2, dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(2), (8, H))
    with group(mesh_of(fsdp=2, ep=2), 4, 2, dtype=jnp.bfloat16) as ep:
        where = layout(ep, options, 4)
        run = jax.jit(lambda p, x: moe(p, x, options, ep=ep)[0])
        arguments = put(params, ep, where), jax.device_put(x, sharding(ep, where))
        text = run.lower(*arguments).as_text()
        y = jax.block_until_ready(run(*arguments))
    gathers = [line for line in text.splitlines() if "stablehlo.all_gather" in line]
    assert len(gathers) == 3
    assert all("bf16" in line and "f32" not in line.split("->")[1] for line in gathers)
    assert_close(y, moe(params, x, MoEConfig(top_k=2))[0], 0.1)


def test_collectives_are_the_declared_ones() -> None:
    options = MoEConfig(top_k=2)
    params = make_params(8)
    with group(mesh_of(fsdp=2, tp=2, ep=2), 8, 2) as ep:
        where = layout(ep, options)
        arguments = put(params, ep, where), jax.device_put(jnp.ones((8, 3, H)), sharding(ep, where))
        placed = jax.tree.map(lambda a: a.sharding, arguments)
        everywhere = NamedSharding(ep.mesh, P())

        def forward(params: MoEParams, x: jax.Array) -> Any:
            return moe(params, x, options, ep=ep)

        def backward(params: MoEParams, x: jax.Array) -> Any:
            return jax.grad(lambda p, x: (forward(p, x)[0] ** 2).sum(), argnums=(0, 1))(params, x)

        once = jax.jit(forward, out_shardings=(placed[1], everywhere)).lower(*arguments).compile().as_text()
        assert sorted(collectives(once)) == ["all-gather"] * 3 + ["all-reduce"] * 2
        both = jax.jit(backward, out_shardings=placed).lower(*arguments).compile().as_text()
        found = collectives(both)
        assert set(found) == {"all-gather", "all-reduce", "reduce-scatter"}
        assert found.count("reduce-scatter") == 3
        # Over tp it is a shard's 6 tokens that are added up, both ways, and never the 24 rows of its experts.
        reduced = "\n".join(line for line in both.splitlines() if " all-reduce(" in line)
        assert reduced.count(f"f32[6,{H}]") >= 2
        assert f"f32[24,{H}]" not in reduced


def test_module_is_born_sharded() -> None:
    x = jax.random.normal(jax.random.key(1), (8, H))
    make = lambda ep: MoE(H, INNER, 8, 2, rngs=nnx.Rngs(0), ep=ep, shared_experts=1, use_bias=True)  # noqa: E731
    with group(mesh_of(fsdp=2, tp=2, ep=2), 8, 2) as ep:
        layer = nnx.jit(lambda: make(ep))()
        specs = nnx.get_partition_spec(nnx.state(layer))
        assert specs["experts"]["down"].get_value() == P("ep", "tp", "fsdp")
        assert specs["experts"]["gate_bias"].get_value() == P("ep", "tp")
        assert specs["shared"]["up"].get_value() == P("fsdp", "tp")
        assert layer.experts.up[...].addressable_shards[0].data.shape == (4, H // 2, INNER // 2)
        y, aux = jax.block_until_ready(nnx.jit(lambda layer, x: layer(x))(layer, x))
    assert aux.ok == 1
    assert_close(y, make(None)(x)[0])


def layer_on_all_devices(axes: dict[str, int]) -> int:
    """Compares this process's shards with dense JAX; returns how many there were."""
    params = make_params(8, use_bias=True, shared_experts=1)
    options = MoEConfig(top_k=2)
    x = jax.random.normal(jax.random.key(2), (8, 2, H))
    dense = jax.device_get(gradients(params, x, options, None))
    with group(mesh_of(**axes), 8, 2) as ep:
        where = layout(ep, options)

        def spread(a: Any, place: NamedSharding) -> jax.Array:
            whole = np.asarray(a)
            return jax.make_array_from_callback(whole.shape, place, lambda index: whole[index])

        given = spread(x, sharding(ep, where))
        shapes = jax.eval_shape(lambda: params)
        specs = jax.tree.map(lambda _: P(), shapes)
        specs = dataclasses.replace(specs, experts=where.expert_specs(params.experts))
        stored = jax.tree.map(lambda a, spec: spread(a, NamedSharding(ep.mesh, spec)), params, specs)
        got = jax.block_until_ready(gradients(stored, given, options, ep))
        count = 0
        for mine, want in zip(jax.tree.leaves(got), jax.tree.leaves(dense), strict=True):
            for shard in mine.addressable_shards:
                assert_close(shard.data, np.asarray(want)[shard.index], 1e-4)
                count += 1
        return count


@pytest.mark.multiprocess
def test_groups_and_gathers_across_processes(processes: Any) -> None:
    for axes in ({"ep": 2, "tp": 2}, {"fsdp": 2, "ep": 2}):
        assert all(
            count > 20 for count in processes.run(layer_on_all_devices, 2, axes, devices_per_process=2)
        )


NAMES = ("expert", "embed", "mlp")


def test_module_with_logical_axes() -> None:
    make = lambda ep=None: MoE(  # noqa: E731
        H, INNER, 8, 2, rngs=nnx.Rngs(0), ep=ep, shared_experts=1, use_bias=True, logical_axes=NAMES
    )
    plain = nnx.state(make())  # no rules yet: names only
    assert nnx.get_partition_spec(plain)["experts"]["up"].get_value() == P(*NAMES)
    x = jax.random.normal(jax.random.key(1), (8, H))
    with group(mesh_of(fsdp=2, tp=2, ep=2), 8, 2) as ep:
        rules = layout(ep, MoEConfig(top_k=2)).logical_rules(NAMES)
        with nnx.logical_axis_rules(rules):
            layer = nnx.jit(lambda: make(ep))()
            specs = nnx.get_partition_spec(nnx.state(layer))
        assert specs["experts"]["down"].get_value() == P("ep", "tp", "fsdp")
        assert specs["experts"]["down_bias"].get_value() == P("ep", None)
        assert specs["shared"]["gate"].get_value() == P("fsdp", "tp")
        assert layer.experts.down[...].sharding == NamedSharding(ep.mesh, P("ep", "tp", "fsdp"))
        y, _ = jax.block_until_ready(nnx.jit(lambda layer, x: layer(x))(layer, x))
    assert_close(y, make()(x)[0])
    with pytest.raises(TypeError, match="logical_axes must be three names"):
        MoE(H, INNER, 8, 2, rngs=nnx.Rngs(0), logical_axes=("expert",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="logical_axes or expert_sharding, not both"):
        MoE(H, INNER, 8, 2, rngs=nnx.Rngs(0), logical_axes=NAMES, expert_sharding="ep")


@pytest.mark.parametrize(
    "error, match, config",
    [
        (ValueError, "fsdp_axis must name axes of the group's mesh", {"fsdp_axis": "nowhere"}),
        (ValueError, "fsdp_axis must not name 'ep', which shards the group", {"fsdp_axis": "ep"}),
        (ValueError, "tp_axis must not name 'dp', which shards tokens", {"tp_axis": "dp"}),
        (
            ValueError,
            "tp_axis must not name 'one', which shards tokens",
            {"fsdp_axis": "one", "tp_axis": "one"},
        ),
        (ValueError, "distinct", {"tp_axis": ("odd", "odd")}),
        (ValueError, "fsdp_axis='odd' has 3 parts, which don't divide hidden=16", {"fsdp_axis": "odd"}),
        (TypeError, "tp_axis must be a mesh axis name", {"tp_axis": 3}),
    ],
)
def test_bad_axes_are_named(error: type[Exception], match: str, config: dict[str, Any]) -> None:
    mesh = mesh_of(dp=1, one=1, odd=3, ep=2)
    with group(mesh, 4, 2) as ep, pytest.raises(error, match=match):
        moe(make_params(4), jnp.zeros((6, H)), MoEConfig(top_k=2, **config), ep=ep)


def test_auto_leaves_alone_what_it_cannot_divide() -> None:
    with group(mesh_of(fsdp=3, tp=2), 4, 2, axis="tp") as ep:
        where = layout(ep, MoEConfig(top_k=2), 4)
    assert where == Layout(group=("tp",), tokens=("fsdp", "tp"), experts=("tp",))
    np.testing.assert_equal(
        where.logical_rules(("expert", "embed", "mlp")), (("expert", "tp"), ("embed", None), ("mlp", None))
    )
