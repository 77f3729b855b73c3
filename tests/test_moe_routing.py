"""What steers a layer at run time: expert maps, replayed routing, the selection bias; and its dtypes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from moe_layer import INIT, INNER, H, assert_close, group, make_params, mesh_of

from pplx_jax import grouped_gemm as gemm_module
from pplx_jax.balance import MovingLoads, balance, imbalance, place
from pplx_jax.experts import apply_experts
from pplx_jax.flax import MoE, SelectionBias
from pplx_jax.grouped_gemm import grouped_gemm
from pplx_jax.moe import MoEConfig, MoEParams, moe
from pplx_jax.router import SavedRouting, replay, route

CONFIG = MoEConfig(top_k=2)
MAPS = (
    np.array([[0, 1, 2], [2, 3, 4], [4, 5, 0], [5, 0, -1]], np.int32),
    np.array([[5, 4, 3], [3, 2, 1], [1, 0, 5], [-1, 5, 2]], np.int32),
)


def gradients(params: MoEParams, x: jax.Array, **options: Any) -> Any:
    def loss(params: MoEParams, x: jax.Array) -> Any:
        y, aux = moe(params, x, CONFIG, **options)
        return (y**2).sum() + aux.load_balance_loss, (y, aux)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)


# ---- expert maps -------------------------------------------------------------------------------------------


def test_rebalancing_changes_nothing_and_compiles_once() -> None:
    params = make_params(6, use_bias=True)
    x = jax.random.normal(jax.random.key(2), (8, 2, H))
    want = jax.jit(gradients)(params, x)
    with group(mesh_of(ep=4), 6, 2, expert_map=MAPS[0]) as ep:
        run = jax.jit(lambda params, x, table: gradients(params, x, ep=ep, expert_map=table))
        for table in (*MAPS, MAPS[0].reshape(-1)[::-1].reshape(4, 3)):
            assert_close(jax.block_until_ready(run(params, x, table)), want)
        assert run._cache_size() == 1


def test_placed_experts_equal_dense_and_compile_once() -> None:
    params = make_params(6)
    x = jax.random.normal(jax.random.key(2), (8, 2, H))
    want = jax.jit(gradients)(params, x)
    with group(mesh_of(ep=4), 6, 2, expert_map=MAPS[0]) as ep:

        @jax.jit
        def run(params: MoEParams, x: jax.Array, table: jax.Array) -> Any:
            def loss(params: MoEParams, x: jax.Array) -> Any:
                there = dataclasses.replace(params, experts=place(params.experts, table))
                y, aux = moe(there, x, CONFIG, ep=ep, expert_map=table, placed=True)
                return (y**2).sum() + aux.load_balance_loss, (y, aux)

            return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)

        for table in MAPS:
            assert_close(jax.block_until_ready(run(params, x, table)), want)
        assert run._cache_size() == 1


def test_balanced_map_evens_out_the_rows_of_a_skewed_layer() -> None:
    # A bias on the logits sends most tokens to experts 0 and 1, which lie on one rank.
    skew = jnp.array([4.0, 3.0, 0, 0, 0, 0, 0, 0])
    params = dataclasses.replace(make_params(8, router_bias=True), router_bias=skew)
    x = jax.random.normal(jax.random.key(2), (64, H))
    even = np.append(np.arange(8).reshape(4, 2), np.full((4, 1), -1), axis=1)
    with group(mesh_of(ep=4), 8, 2, expert_map=even) as ep:
        run = jax.jit(lambda table: moe(params, x, CONFIG, ep=ep, expert_map=table))
        y, aux = jax.block_until_ready(run(even))
        loads = MovingLoads().update(aux.expert_loads)
        table = balance(loads.values, 4, 3)
        before, after = imbalance(loads.values, even), imbalance(loads.values, table)
        assert before > 2
        assert after < 1.3
        again, aux = jax.block_until_ready(run(table))
        assert aux.ok == 1
        assert run._cache_size() == 1
    # Another rank sums a token's rows in another order.
    assert_close(again, y)


def test_module_takes_a_map() -> None:
    x = jax.random.normal(jax.random.key(2), (8, H))
    traced = []
    with group(mesh_of(ep=4), 6, 2, expert_map=MAPS[0]) as ep:
        layer = MoE(H, INNER, 6, 2, rngs=nnx.Rngs(0), ep=ep, kernel_init=INIT)

        @nnx.jit
        def run(layer: MoE, x: jax.Array, table: jax.Array) -> jax.Array:
            traced.append(1)
            return layer(x, expert_map=table)[0]

        # The first call moves parameters to where the second one finds them.
        got = [jax.block_until_ready(run(layer, x, jnp.asarray(MAPS[0]))) for _ in range(2)]
        before = len(traced)
        got.append(jax.block_until_ready(run(layer, x, jnp.asarray(MAPS[1]))))
        assert len(traced) == before
    dense = MoE(H, INNER, 6, 2, rngs=nnx.Rngs(0), kernel_init=INIT)
    for y in got:
        assert_close(y, dense(x)[0])


def test_bad_maps_are_named() -> None:
    params, x = make_params(6), jnp.zeros((8, H))
    with group(mesh_of(ep=4), 6, 2, expert_map=MAPS[0]) as ep:
        for bad in (MAPS[0][:, :2], MAPS[0].astype(np.float32)):
            with pytest.raises(ValueError, match=r"expert_map must hold ints \[4, 3\]"):
                moe(params, x, CONFIG, ep=ep, expert_map=bad)
        with pytest.raises(ValueError, match=r"params.experts.up must have shape \(12, 16, 12\), got \(6,"):
            moe(params, x, CONFIG, ep=ep, expert_map=MAPS[0], placed=True)
    with pytest.raises(ValueError, match="placed=True needs a group"):
        moe(params, x, CONFIG, placed=True)


# ---- replayed routing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [8, 7])  # 7: padded
def test_captured_routing_replays_bit_for_bit(tokens: int) -> None:
    params = make_params(8, selection_bias=True)
    x = jax.random.normal(jax.random.key(2), (tokens, 2, H))
    mask = jnp.ones((tokens, 2), bool).at[3, 1].set(False)
    _, plain = moe(params, x, CONFIG, mask=mask)
    assert plain.routing is None
    with group(mesh_of(ep=4), 8, 2) as ep:
        first = jax.jit(lambda p, x: moe(p, x, CONFIG, ep=ep, mask=mask, return_routing=True))
        y, aux = jax.block_until_ready(first(params, x))
        kept = aux.routing
        assert kept is not None
        assert kept.indices.shape == kept.weights.shape == (tokens, 2, 2)
        assert kept.indices.dtype == jnp.int32
        assert (np.asarray(kept.indices)[3, 1] == -1).all()
        np.testing.assert_array_equal(
            np.bincount(np.asarray(kept.indices).reshape(-1) + 1, minlength=9)[1:], aux.expert_loads
        )
        # Another router altogether: the given routing decides.
        other = dataclasses.replace(params, router=-params.router)
        second = jax.jit(lambda p, x, r: moe(p, x, CONFIG, ep=ep, routing=r, return_routing=True))
        again, aux = jax.block_until_ready(second(other, x, kept))
    np.testing.assert_array_equal(again, y)
    assert aux.routing is not None
    jax.tree.map(np.testing.assert_array_equal, aux.routing, kept)
    dense, _ = moe(other, x, CONFIG, routing=kept)
    assert_close(again, dense)


def test_gradients_of_replayed_routing() -> None:
    params = make_params(8)
    x = jax.random.normal(jax.random.key(2), (8, H))
    _, aux = moe(params, x, CONFIG, return_routing=True)
    kept = aux.routing
    assert kept is not None

    @jax.jit
    def own(params: MoEParams, kept: Any, coefficient: float) -> Any:
        def loss(params: MoEParams) -> Any:
            y, aux = moe(params, x, CONFIG, routing=kept)
            return (y**2).sum() + coefficient * aux.z_loss

        return jax.grad(loss)(params)

    # Only the choice is replayed: the router learns exactly as if it had made it.
    chosen = own(params, SavedRouting(kept.indices), 0.0)
    plain = jax.jit(jax.grad(lambda p: (moe(p, x, CONFIG)[0] ** 2).sum()))(params)
    assert_close(chosen, plain)
    assert np.abs(chosen.router).max() > 1e-3
    with group(mesh_of(ep=4), 8, 2) as ep:
        over = jax.jit(jax.grad(lambda p, r: (moe(p, x, CONFIG, ep=ep, routing=r)[0] ** 2).sum(), argnums=0))
        assert_close(jax.block_until_ready(over(params, SavedRouting(kept.indices))), plain)
    # Weights as well: nothing but the losses reaches the router, and the given weights have a gradient.
    constant = own(params, kept, 0.0)
    assert not np.asarray(constant.router).any()
    assert np.asarray(own(params, kept, 1.0).router).any()
    assert_close(constant.experts, plain.experts)
    d_kept = jax.grad(
        lambda w: (moe(params, x, CONFIG, routing=SavedRouting(kept.indices, w))[0] ** 2).sum()
    )(kept.weights)
    assert (np.abs(d_kept) > 0).all()


def test_module_replays_what_another_chose() -> None:
    x = jax.random.normal(jax.random.key(2), (8, H))
    first, second = (MoE(H, INNER, 8, 2, rngs=nnx.Rngs(seed), kernel_init=INIT) for seed in (0, 1))
    _, aux = first(x, return_routing=True)
    second.experts = first.experts  # another router
    assert_close(second(x, routing=aux.routing)[0], first(x)[0])
    assert not np.allclose(second(x)[0], first(x)[0])


def test_replay_of_what_route_chose() -> None:
    logits = jax.random.normal(jax.random.key(0), (6, 5))
    for options in ({}, {"score_fn": "sigmoid", "scale": 2.5}, {"normalize": False}):
        made = route(logits, top_k=2, **options)
        again = replay(logits, SavedRouting(made.indices), **options)
        jax.tree.map(np.testing.assert_array_equal, again, made)
    holes = made.indices.at[2, 1].set(-1)
    weights = replay(logits, SavedRouting(holes)).weights
    np.testing.assert_allclose(weights[2], [1, 0])
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)


@pytest.mark.parametrize(
    "error, match, routing",
    [
        (TypeError, "routing must be a SavedRouting", (jnp.zeros((4, 2), int), None)),
        (TypeError, "routing.indices must be integers", SavedRouting(jnp.zeros((4, 2)))),
        (ValueError, r"routing.indices must have shape \(4, 2\)", SavedRouting(jnp.zeros((4, 3), int))),
        (TypeError, "routing.weights", SavedRouting(jnp.zeros((4, 2), int), jnp.zeros((4, 2), int))),
        (ValueError, "routing.weights", SavedRouting(jnp.zeros((4, 2), int), jnp.zeros((4, 1)))),
    ],
)
def test_bad_routing_is_named(error: type[Exception], match: str, routing: Any) -> None:
    with pytest.raises(error, match=match):
        moe(make_params(8), jnp.zeros((4, H)), CONFIG, routing=routing)


# ---- the selection bias ------------------------------------------------------------------------------------


def test_selection_bias_evens_out_skewed_loads_over_jitted_steps() -> None:
    """Wang et al.'s rule in a jitted step: biased logits favour two of eight experts until it has acted."""
    x = jax.random.normal(jax.random.key(1), (128, H))
    skew = jnp.array([2.0, 1.5, 0, 0, 0, 0, 0, 0])

    def make(ep: Any) -> MoE:
        layer = MoE(
            H, INNER, 8, 2, rngs=nnx.Rngs(0), ep=ep, router="sigmoid", router_bias=True, selection_bias=True,
            kernel_init=jax.nn.initializers.normal(0.2),
        )  # fmt: skip
        assert layer.router_bias is not None
        layer.router_bias[...] = skew
        return layer

    @nnx.jit
    def step(layer: MoE, x: jax.Array) -> tuple[jax.Array, Any]:
        def loss(layer: MoE) -> Any:
            y, aux = layer(x)
            return (y**2).mean(), aux

        (_, aux), grads = nnx.value_and_grad(loss, has_aux=True)(layer)
        layer.update_selection_bias(aux.expert_loads, speed=0.01)
        return aux.expert_loads, nnx.state(grads, SelectionBias)

    with group(mesh_of(ep=4), 8, 2) as ep:
        layer = make(ep)
        history = []
        for _ in range(60):
            loads, no_gradient = jax.block_until_ready(step(layer, x))
            history.append(np.asarray(loads))
    assert not jax.tree.leaves(no_gradient)
    assert all(loads.sum() == 256 for loads in history)
    assert history[0].max() / history[0].mean() > 3
    assert np.mean([loads.max() / loads.mean() for loads in history[-5:]]) < 1.3
    # The weights are the scores without the bias: it moves tokens, not outputs.
    assert layer.selection_bias is not None
    dense = make(None)
    dense.selection_bias[...] = jax.device_get(layer.selection_bias[...])
    _, aux = dense(x, return_routing=True)
    scores = jax.nn.sigmoid(x @ dense.router[...] + skew)
    picked = jnp.take_along_axis(scores, aux.routing.indices, axis=-1)
    assert_close(aux.routing.weights, picked / picked.sum(-1, keepdims=True))


# ---- dtypes and kernels ------------------------------------------------------------------------------------


def test_param_dtype_and_dtype() -> None:
    x = jax.random.normal(jax.random.key(1), (8, H), jnp.bfloat16)
    layer = MoE(
        H, INNER, 4, 2, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16, dtype=jnp.float32, shared_experts=1,
        use_bias=True, kernel_init=INIT,
    )  # fmt: skip
    assert {a.dtype for a in jax.tree.leaves(nnx.state((layer.experts, layer.shared)))} == {
        jnp.dtype("bfloat16")
    }
    assert layer.router[...].dtype == jnp.float32
    y, _ = layer(x)
    assert y.dtype == jnp.bfloat16
    # Computed in float32: the same as with weights and tokens that were float32 all along.
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), layer.params())
    exact, _ = moe(wide, x.astype(jnp.float32), CONFIG)
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))
    narrow, _ = moe(layer.params(), x, CONFIG)
    assert np.asarray(narrow != y).any()


def test_a_function_may_multiply() -> None:
    calls = []

    def mine(tokens: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
        calls.append(tokens.shape)
        return jax.lax.ragged_dot(tokens, weights, group_sizes)

    params = make_params(6)
    x = jax.random.normal(jax.random.key(2), (8, H))
    config = MoEConfig(top_k=2, grouped_gemm=mine)
    run = jax.jit(jax.grad(lambda p, c, ep: (moe(p, x, c, ep=ep)[0] ** 2).sum()), static_argnames=("c", "ep"))
    want = run(params, CONFIG, None)
    assert not calls
    assert_close(run(params, config, None), want)
    assert len(calls) == 3
    with group(mesh_of(ep=2), 6, 2) as ep:
        assert_close(jax.block_until_ready(run(params, config, ep)), want)
    assert len(calls) == 6
    bad = MoEConfig(top_k=2, grouped_gemm=lambda t, w, g: t)
    with pytest.raises(ValueError, match=r"must return float32 \[16, 12\], got float32 \[16, 16\]"):
        moe(params, x, bad)
    for error, value in ((ValueError, "mine"), (TypeError, 3)):
        with pytest.raises(error, match="grouped_gemm must be"):
            MoEConfig(top_k=2, grouped_gemm=value)  # type: ignore[arg-type]


def test_auto_takes_tokamax_for_nvidia_gpus_and_ragged_dot_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = (
        jax.ShapeDtypeStruct((64, 8), jnp.float32),
        jax.ShapeDtypeStruct((3, 8, 4), jnp.float32),
        jax.ShapeDtypeStruct((3,), jnp.int32),
    )

    def traced(platform: str) -> str:
        run = jax.jit(jax.grad(lambda t, w, g: grouped_gemm(t, w, g).sum(), argnums=(0, 1)))
        return run.trace(*shapes).lower(lowering_platforms=(platform,)).as_text()

    class Fake:
        """Stands for the library: a product that the program's text tells from all others."""

        @staticmethod
        def ragged_dot(tokens: Any, weights: Any, group_sizes: Any, **_: Any) -> jax.Array:
            return jnp.sinh(jax.lax.ragged_dot(tokens, weights, group_sizes))

        @staticmethod
        def ragged_dot_general(tokens: Any, rows: Any, group_sizes: Any, numbers: Any, **_: Any) -> jax.Array:
            return jnp.cosh(jax.lax.ragged_dot_general(tokens, rows, group_sizes, numbers))

    assert gemm_module.gpu_library() is None  # no GPU here
    assert "sinh" not in traced("cuda")
    monkeypatch.setattr(gemm_module, "gpu_library", lambda: Fake)
    text = traced("cuda")
    assert "sinh" in text
    assert "cosh" in text
    for platform in ("cpu", "rocm", "tpu"):
        assert "sinh" not in traced(platform)


def test_apply_experts_takes_the_function_too() -> None:
    params = make_params(2)
    x = jax.random.normal(jax.random.key(2), (6, H))
    sizes = jnp.array([4, 2])
    doubled = apply_experts(params.experts, x, sizes, gemm=lambda t, w, g: 2 * grouped_gemm(t, w, g))
    assert not np.allclose(doubled, apply_experts(params.experts, x, sizes))
