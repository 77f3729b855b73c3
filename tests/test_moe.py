"""The layer as a function: dense against all experts on all tokens, and over an expert-parallel group against
dense."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from moe_layer import INNER, H, assert_close, collectives, group, make_params, mesh_of

from pplx_jax.experts import ACTIVATIONS, ExpertParams, apply_experts, default_init
from pplx_jax.flax import MoE
from pplx_jax.grouped_gemm import _ragged_rows, _ragged_weights, grouped_gemm
from pplx_jax.moe import MoEConfig, MoEParams, moe, token_axes

# Compiled: op by op takes longer.
dense = jax.jit(moe, static_argnames=("config",))


def one_expert(params: ExpertParams, index: Any, x: jax.Array, act: Any) -> jax.Array:
    def pick(a: jax.Array | None) -> jax.Array | float:
        return 0.0 if a is None else a[index]

    inner = x @ pick(params.up) + pick(params.up_bias)
    if params.gate is None:
        inner = act(inner)
    else:
        inner = act(x @ pick(params.gate) + pick(params.gate_bias)) * inner
    return inner @ pick(params.down) + pick(params.down_bias)


def naive_moe(params: MoEParams, x: jax.Array, config: MoEConfig) -> jax.Array:
    """All experts on all tokens; shares only the router with the layer."""
    from pplx_jax import router

    rows = x.reshape(-1, H)
    logits = rows @ params.router + (0 if params.router_bias is None else params.router_bias)
    routing = router.route(
        logits,
        top_k=config.top_k,
        score_fn=config.score_fn,
        bias=params.selection_bias,
        num_groups=config.num_groups,
        top_groups=config.top_groups,
        normalize=config.normalize,
        scale=config.scale,
    )
    # Every expert on every token; each token then picks its own.
    each = [one_expert(params.experts, e, rows, config.activation_fn) for e in range(params.router.shape[1])]
    picked = jnp.stack(each, axis=1)[jnp.arange(rows.shape[0])[:, None], routing.indices]
    y = (routing.weights[..., None] * picked).sum(axis=1)
    if params.shared is not None:
        y += one_expert(params.shared, ..., rows, config.activation_fn)
    return y.reshape(x.shape)


# ---- dense -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, config",
    [
        ({}, MoEConfig(top_k=2)),
        ({"gated": False}, MoEConfig(top_k=1, normalize=False, activation="relu2")),
        (
            {"use_bias": True, "router_bias": True, "selection_bias": True, "shared_experts": 2},
            MoEConfig(top_k=3, score_fn="sigmoid", num_groups=3, top_groups=2, scale=2.5, activation="gelu"),
        ),
        ({"gated": False, "use_bias": True}, MoEConfig(top_k=6, activation=jnp.sin)),
    ],
)
def test_dense_matches_all_experts_on_all_tokens(options: dict[str, Any], config: MoEConfig) -> None:
    params = make_params(6, **options)
    x = jax.random.normal(jax.random.key(2), (2, 3, H))
    weight = jax.random.normal(jax.random.key(3), x.shape)

    def run(layer: Any) -> Any:
        def loss(params: MoEParams, x: jax.Array) -> Any:
            y = layer(params, x)
            return (y * weight).sum(), y

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)

    assert_close(run(lambda p, x: moe(p, x, config)[0]), run(lambda p, x: naive_moe(p, x, config)))


def test_every_named_activation_is_used() -> None:
    x = jax.random.normal(jax.random.key(2), (5, H))
    experts = make_params(1).experts
    shared = jax.tree.map(lambda w: w[0], experts)
    results = [
        apply_experts(shared, x, None, activation=MoEConfig(top_k=1, activation=name).activation_fn)
        for name in ACTIVATIONS
    ]
    assert len({np.asarray(y).tobytes() for y in results}) == len(ACTIVATIONS)


def test_stacked_experts_are_as_large_as_a_dense_one() -> None:
    for shape in ((64, 32), (16, 64, 32)):
        deviation = default_init(jax.random.key(0), shape, jnp.float32).std()
        assert deviation == pytest.approx(64**-0.5, rel=0.05)


def test_masked_tokens_reach_no_expert_and_count_nowhere() -> None:
    params = make_params(4, shared_experts=1)
    config = MoEConfig(top_k=2)
    x = jax.random.normal(jax.random.key(2), (7, H))
    mask = jnp.array([1, 0, 1, 1, 0, 1, 1], bool)
    y, aux = dense(params, x, config=config, mask=mask)
    kept, kept_aux = dense(params, x[mask], config=config)
    assert_close(y[mask], kept)
    assert_close(aux, kept_aux)
    assert params.shared is not None
    assert_close(y[~mask], apply_experts(params.shared, x[~mask], None))


def test_bfloat16_compute_keeps_the_input_dtype_and_router() -> None:
    params = make_params(4)
    x = jax.random.normal(jax.random.key(2), (8, H))
    y, aux = dense(params, x, config=MoEConfig(top_k=2, dtype=jnp.bfloat16))
    exact, exact_aux = dense(params, x, config=MoEConfig(top_k=2))
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(aux.expert_loads, exact_aux.expert_loads)
    assert_close(y, exact, 0.1)
    assert np.asarray(y != exact).any()
    low = jax.eval_shape(lambda x: moe(params, x, MoEConfig(top_k=2))[0], x.astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "rows, sizes", [(300, [100, 0, 130]), (64, [64]), (9, [0, 0]), (200, [1, 64, 65, 70]), (0, [0, 0])]
)
def test_grouped_gemm_and_its_gradients(rows: int, sizes: list[int]) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    tokens = jax.random.normal(keys[0], (rows, 5))
    weights = jax.random.normal(keys[1], (len(sizes), 5, 7))
    cotangent = jax.random.normal(keys[2], (rows, 7))
    used, group_sizes = sum(sizes), jnp.array(sizes, jnp.int32)
    group_of = np.repeat(np.arange(len(sizes)), sizes)
    want = np.zeros((rows, 7), np.float32)
    want[:used] = np.einsum("ma,mab->mb", tokens[:used], np.asarray(weights)[group_of])
    d_tokens = np.zeros((rows, 5), np.float32)
    d_tokens[:used] = np.einsum("mb,mab->ma", cotangent[:used], np.asarray(weights)[group_of])
    d_weights = np.zeros(weights.shape, np.float32)
    np.add.at(d_weights, group_of, np.einsum("ma,mb->mab", tokens[:used], cotangent[:used]))
    # What lies past the last group is never read.
    tokens, cotangent = (a.at[used:].set(jnp.nan) for a in (tokens, cotangent))
    out, transpose = jax.vjp(lambda t, w: grouped_gemm(t, w, group_sizes), tokens, weights)
    assert_close(out, want)
    assert_close(transpose(cotangent), (d_tokens, d_weights))
    if rows:  # what other platforms run
        assert_close(_ragged_rows(tokens, weights, group_sizes), want)
        assert_close(_ragged_weights(tokens, cotangent, group_sizes), d_weights)


# ---- over a group ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "axes, experts, shape, options, config",
    [
        ({"ep": 4}, 8, (8, 3, H), {"shared_experts": 1}, MoEConfig(top_k=2)),
        ({"ep": 4}, 10, (16, H), {"use_bias": True}, MoEConfig(top_k=3, score_fn="sigmoid", scale=2.5)),
        ({"ep": 3}, 7, (3, 5, H), {"router_bias": True}, MoEConfig(top_k=2)),
        ({"ep": 4}, 2, (7, H), {"gated": False}, MoEConfig(top_k=1, normalize=False)),
        ({"dp": 2, "ep": 4}, 8, (8, 2, H), {}, MoEConfig(top_k=2, num_groups=4, top_groups=2)),
        ({"ep": 2, "dp": 2, "tp": 2}, 5, (3, 3, H), {"selection_bias": True}, MoEConfig(top_k=2)),
        ({"ep": 4}, 8, (H,), {}, MoEConfig(top_k=2)),
        ({"ep": 4}, 8, (8, 3, H), {"shared_experts": 1}, MoEConfig(top_k=2, overlap_shared=True)),
        (
            {"ep": 2, "fsdp": 2, "tp": 2},
            8,
            (8, H),
            {"shared_experts": 2, "use_bias": True},
            MoEConfig(top_k=2, overlap_shared=True),
        ),
        ({"ep": 4}, 8, (8, H), {}, MoEConfig(top_k=2, overlap_shared=True)),
    ],
)
def test_group_equals_dense(
    axes: dict[str, int], experts: int, shape: tuple[int, ...], options: dict[str, Any], config: MoEConfig
) -> None:
    check_group(mesh_of(**axes), experts, shape, options, config)


def test_the_shared_expert_runs_between_the_halves() -> None:
    params, x = make_params(8, shared_experts=1), jnp.ones((16, H))

    def program(ep: Any, *, overlap: bool) -> str:
        config = MoEConfig(top_k=2, overlap_shared=overlap)
        return str(jax.make_jaxpr(lambda p, x: moe(p, x, config, ep=ep)[0])(params, x))

    with group(mesh_of(ep=4), 8, 2, tokens=4) as ep:
        text = program(ep, overlap=True)
        between = text[text.index("pplx_dispatch_send") : text.index("pplx_dispatch_recv")]
        assert between.count("dot_general") >= 3
        assert "pplx_dispatch_send" not in program(ep, overlap=False)
    with group(mesh_of(ep=4), 8, 2, tokens=4, chunk=3) as ep:  # halves go in one round
        assert "pplx_dispatch_send" not in program(ep, overlap=True)
    with pytest.raises(TypeError, match="overlap_shared must be a bool"):
        MoEConfig(top_k=1, overlap_shared=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("axes, experts, shape", [({"ep": 4}, 8, (8, 2, H)), ({"dp": 2, "ep": 2}, 5, (7, H))])
def test_group_on_explicit_axes(axes: dict[str, int], experts: int, shape: tuple[int, ...]) -> None:
    check_group(mesh_of(explicit=True, **axes), experts, shape, {}, MoEConfig(top_k=2))


@pytest.mark.parametrize("zero_tail", [True, False])
def test_group_of_the_padded_layout(zero_tail: bool) -> None:
    fields = {"layout": "padded", "zero_tail": zero_tail}
    check_group(mesh_of(ep=4), 10, (16, H), {"use_bias": True}, MoEConfig(top_k=3), **fields)


@pytest.mark.parametrize("quant", ["fp8", "fp8_ue8m0"])
def test_group_that_quantises_is_near_dense(quant: str) -> None:
    """Experts see tokens of about 4 bits' precision; gradients flow straight through."""
    params, config = make_params(8), MoEConfig(top_k=2)
    x = jax.random.normal(jax.random.key(2), (16, H))

    def run(ep: Any) -> Any:
        return jax.jit(jax.value_and_grad(lambda p, x: (moe(p, x, config, ep=ep)[0] ** 2).sum(), (0, 1)))(
            params, x
        )

    with group(mesh_of(ep=4), 8, 2, quant=quant) as ep:
        got = jax.block_until_ready(run(ep))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(run(None)), strict=True):
        error = np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b))
        assert 0 < error < 0.1


def check_group(
    mesh: Mesh,
    experts: int,
    shape: tuple[int, ...],
    options: dict[str, Any],
    config: MoEConfig,
    **fields: Any,
) -> None:
    params = make_params(experts, **options)
    x = jax.random.normal(jax.random.key(2), shape)
    weight = jax.random.normal(jax.random.key(3), shape)
    mask = jax.random.bernoulli(jax.random.key(4), 0.8, shape[:-1])

    def run(ep: Any) -> Any:
        def loss(params: MoEParams, x: jax.Array) -> Any:
            y, aux = moe(params, x, config, ep=ep, mask=mask)
            return (y * weight).sum() + 3 * aux.load_balance_loss + aux.z_loss, (y, aux)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x)

    with group(mesh, experts, config.top_k, **fields) as ep:
        got = jax.block_until_ready(run(ep))
    assert_close(got, run(None))
    aux = got[0][1][1]
    assert aux.ok == 1
    assert aux.num_dropped == 0


def test_no_tokens() -> None:
    params = make_params(8)
    with group(mesh_of(ep=4), 8, 2) as ep:
        y, aux = jax.block_until_ready(
            jax.jit(lambda x: moe(params, x, MoEConfig(top_k=2), ep=ep))(jnp.zeros((0, H)))
        )
    assert y.shape == (0, H)
    assert aux.ok == 1
    assert not aux.expert_loads.any()


def test_experts_placed_by_a_map_with_replicas() -> None:
    params = make_params(5)
    config = MoEConfig(top_k=2)
    x = jax.random.normal(jax.random.key(2), (8, H))

    def gradients(ep: Any) -> Any:
        return jax.jit(jax.grad(lambda p, x: (moe(p, x, config, ep=ep)[0] ** 2).sum(), argnums=(0, 1)))(
            params, x
        )

    with group(mesh_of(ep=4), 5, 2, expert_map=[[4, 1], [3, 0], [2, 1], [0, -1]]) as ep:
        assert_close(gradients(ep), gradients(None))


def test_vmap_of_the_layer() -> None:
    params, config = make_params(8), MoEConfig(top_k=2)
    x = jax.random.normal(jax.random.key(2), (3, 8, H))

    def gradients(ep: Any) -> Any:
        def loss(params: MoEParams, x: jax.Array) -> jax.Array:
            return (jax.vmap(lambda x: moe(params, x, config, ep=ep)[0])(x) ** 2).sum()

        return jax.jit(jax.grad(loss, (0, 1)))(params, x)

    with group(mesh_of(ep=4), 8, 2) as ep:
        assert_close(gradients(ep), gradients(None))


def test_mixed_mesh_axes() -> None:
    """Some axes Explicit, some Auto: each is moved by whom it belongs to."""
    for kinds in ((AxisType.Explicit, AxisType.Auto), (AxisType.Auto, AxisType.Explicit)):
        devices = np.array(jax.devices()[:4]).reshape(2, 2)
        for names in (("dp", "ep"), ("ep", "fsdp"), ("ep", "tp")):
            check_group(Mesh(devices, names, axis_types=kinds), 8, (8, 2, H), {}, MoEConfig(top_k=2))


def test_drops_are_counted() -> None:
    # All tokens choose expert 0, and its rank has room for half of them.
    params = dataclasses.replace(make_params(4, router_bias=True), router_bias=jnp.array([99.0, 0, 0, 0]))
    x = jax.random.normal(jax.random.key(2), (16, H))
    with group(mesh_of(ep=4), 4, 1, rows=8, on_overflow="drop") as ep:
        y, aux = jax.block_until_ready(jax.jit(lambda x: moe(params, x, MoEConfig(top_k=1), ep=ep))(x))
    assert aux.num_dropped == 8
    assert aux.ok == 1
    np.testing.assert_array_equal(aux.expert_loads, [16, 0, 0, 0])
    assert np.count_nonzero(np.abs(np.asarray(y)).sum(1)) == 8


@pytest.mark.parametrize("explicit", [False, True])
def test_compiled_program_has_only_the_declared_collectives(explicit: bool) -> None:
    mesh = mesh_of(explicit=explicit, dp=2, ep=4)
    config = MoEConfig(top_k=2)
    with group(mesh, 8, 2) as ep:
        tokens = NamedSharding(mesh, P(token_axes(ep)))
        spread, everywhere = NamedSharding(mesh, P("ep")), NamedSharding(mesh, P())
        params = make_params(8, shared_experts=1)
        params = dataclasses.replace(
            jax.device_put(params, everywhere), experts=jax.device_put(params.experts, spread)
        )
        x = jax.device_put(jnp.ones((16, 2, H)), tokens)

        def forward(params: MoEParams, x: jax.Array) -> Any:
            return moe(params, x, config, ep=ep)

        def backward(params: MoEParams, x: jax.Array) -> Any:
            def loss(params: MoEParams, x: jax.Array) -> jax.Array:
                y, aux = forward(params, x)
                return (y.astype(jnp.float32) ** 2).mean() + aux.load_balance_loss

            return jax.grad(loss, argnums=(0, 1))(params, x)

        placed = jax.tree.map(lambda a: a.sharding, (params, x))
        once = jax.jit(forward, out_shardings=(tokens, everywhere)).lower(params, x).compile().as_text()
        assert collectives(once) == ["all-reduce"]  # losses, loads and status, in one
        both = jax.jit(backward, out_shardings=placed).lower(params, x).compile().as_text()
        assert set(collectives(both)) == {"all-reduce"}


# ---- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, match, changes",
    [
        (TypeError, "params", {"params": {}}),
        (TypeError, "config", {"config": 2}),
        (TypeError, "x must be a floating", {"x": jnp.zeros((4, H), jnp.int32)}),
        (TypeError, "x must be a floating", {"x": [0.0]}),
        (ValueError, r"x must have shape \[..., 16\]", {"x": jnp.zeros((4, H + 1))}),
        (ValueError, "mask", {"mask": jnp.ones(3, bool)}),
        (TypeError, "mask", {"mask": jnp.ones(4)}),
        (ValueError, "top_k", {"config": MoEConfig(top_k=9)}),
        (TypeError, "ep must be", {"ep": "ep"}),
    ],
)
def test_bad_arguments_are_named(error: type[Exception], match: str, changes: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {
        "params": make_params(8),
        "x": jnp.zeros((4, H)),
        "config": MoEConfig(top_k=2),
    }
    arguments.update(changes)
    with pytest.raises(error, match=match):
        moe(arguments.pop("params"), arguments.pop("x"), arguments.pop("config"), **arguments)


def test_parameters_that_do_not_fit_are_named() -> None:
    params = make_params(4, use_bias=True, shared_experts=1)
    run = jax.tree_util.Partial(moe, x=jnp.zeros((4, H)), config=MoEConfig(top_k=2))
    experts = params.experts
    for match, bad in (
        ("params.router", dataclasses.replace(params, router=jnp.zeros(H))),
        ("params.router_bias", dataclasses.replace(params, router_bias=jnp.zeros(3))),
        (
            "params.experts.down ",
            dataclasses.replace(params, experts=dataclasses.replace(experts, down=experts.down[:, 1:])),
        ),
        (
            "gate_bias must be None",
            dataclasses.replace(params, experts=dataclasses.replace(experts, gate=None)),
        ),
        ("params.shared.up", dataclasses.replace(params, shared=experts)),
    ):
        with pytest.raises(ValueError, match=match):
            run(bad)
    with pytest.raises(TypeError, match=r"params\.router must be floating"):
        run(dataclasses.replace(params, router=params.router.astype(jnp.int32)))


def test_group_that_does_not_fit_is_named() -> None:
    mesh = mesh_of(ep=4)
    with group(mesh, 8, 2, tokens=2) as ep:
        with pytest.raises(ValueError, match="max_tokens=2"):
            moe(make_params(8), jnp.zeros((16, H)), MoEConfig(top_k=2), ep=ep)
        with pytest.raises(ValueError, match="num_experts=8"):
            moe(make_params(4), jnp.zeros((4, H)), MoEConfig(top_k=2), ep=ep)
        with pytest.raises(ValueError, match="data_axes"):
            moe(make_params(8), jnp.zeros((4, H)), MoEConfig(top_k=2, data_axes=("dp",)), ep=ep)
        with pytest.raises(ValueError, match="ep was made for"):
            MoE(H, INNER, 8, 3, rngs=nnx.Rngs(0), ep=ep)
