"""The router against a naive one in NumPy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pplx_jax import router


def naive_route(
    logits: np.ndarray,
    top_k: int,
    score_fn: str,
    bias: Any,
    groups: int,
    top: int,
    normalize: bool,
    scale: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    logits = np.asarray(logits, np.float64)
    if score_fn == "softmax":
        scores = np.exp(logits - logits.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
    else:
        scores = 1 / (1 + np.exp(-logits))
    tokens, experts = logits.shape
    size = experts // groups
    indices, weights = np.zeros((tokens, top_k), np.int32), np.zeros((tokens, top_k))
    for t in range(tokens):
        biased = scores[t] + (0 if bias is None else bias)
        of_group = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
        allowed = sorted(range(groups), key=lambda g: -of_group[g])[:top]
        candidates = [e for e in range(experts) if e // size in allowed]
        chosen = sorted(candidates, key=lambda e: -biased[e])[:top_k]
        indices[t], weights[t] = chosen, scores[t, chosen]
    if normalize:
        weights /= weights.sum(-1, keepdims=True)
    return indices, weights * scale, scores


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([(8, 1, 1), (8, 4, 2), (8, 2, 1), (12, 4, 3), (5, 1, 1), (6, 6, 4)]),
    st.integers(1, 4),
    st.sampled_from(router.SCORE_FNS),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1.0, 2.5]),
)
def test_route_matches_numpy(
    seed: int,
    sizes: tuple[int, int, int],
    top_k: int,
    score_fn: Any,
    biased: bool,
    normalize: bool,
    scale: float,
) -> None:
    experts, groups, top = sizes
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(7, experts)).astype(np.float32)
    bias = rng.normal(size=experts).astype(np.float32) if biased else None
    got = router.route(
        jnp.asarray(logits),
        top_k=top_k,
        score_fn=score_fn,
        bias=None if bias is None else jnp.asarray(bias),
        num_groups=groups,
        top_groups=top,
        normalize=normalize,
        scale=scale,
    )
    indices, weights, scores = naive_route(logits, top_k, score_fn, bias, groups, top, normalize, scale)
    assert got.indices.dtype == jnp.int32
    assert got.weights.dtype == got.probs.dtype == jnp.float32
    np.testing.assert_array_equal(got.indices, indices)
    np.testing.assert_allclose(got.weights, weights, rtol=2e-5)
    np.testing.assert_allclose(got.probs, scores, rtol=2e-5, atol=1e-7)


def test_ties_go_to_the_lower_index() -> None:
    got = router.route(jnp.zeros((3, 8)), top_k=3)
    np.testing.assert_array_equal(got.indices, [[0, 1, 2]] * 3)
    grouped = router.route(jnp.zeros((1, 8)), top_k=3, num_groups=4, top_groups=2)
    np.testing.assert_array_equal(grouped.indices, [[0, 1, 2]])


def test_nan_and_extreme_logits_still_choose_distinct_experts() -> None:
    logits = jnp.array([[jnp.nan] * 6, [jnp.inf] * 6, [-1e30] * 6, [1e30, 0, 0, 0, 0, -1e30]])
    for score_fn in router.SCORE_FNS:
        indices = np.asarray(router.route(logits, top_k=4, score_fn=score_fn).indices)
        assert all(len(set(row)) == 4 for row in indices.tolist())
        assert indices.min() >= 0
        assert indices.max() < 6


def test_low_precision_logits_are_computed_with_in_float32() -> None:
    logits = jax.random.normal(jax.random.key(0), (5, 8)).astype(jnp.bfloat16)
    got, want = (router.route(x, top_k=2) for x in (logits, logits.astype(jnp.float32)))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_gradient_ignores_bias_and_selection() -> None:
    logits = jax.random.normal(jax.random.key(0), (6, 8))
    chosen = router.route(logits, top_k=2, bias=jnp.arange(8.0)).indices

    def through_route(logits: jax.Array, bias: jax.Array) -> jax.Array:
        return (router.route(logits, top_k=2, bias=bias).weights * jnp.array([1.0, -2.0])).sum()

    def by_hand(logits: jax.Array) -> jax.Array:
        scores = jnp.take_along_axis(jax.nn.softmax(logits), chosen, axis=1)
        return (scores / scores.sum(1, keepdims=True) * jnp.array([1.0, -2.0])).sum()

    d_logits, d_bias = jax.grad(through_route, argnums=(0, 1))(logits, jnp.arange(8.0))
    np.testing.assert_allclose(d_logits, jax.grad(by_hand)(logits), atol=1e-6)
    assert not d_bias.any()


def test_losses_and_loads_match_numpy() -> None:
    logits = np.random.default_rng(0).normal(size=(9, 6)).astype(np.float32)
    mask = np.arange(9) % 4 != 3
    routing = router.route(jnp.asarray(logits), top_k=2, score_fn="sigmoid")
    probs = 1 / (1 + np.exp(-logits[mask]))
    probs /= probs.sum(1, keepdims=True)
    counts = np.bincount(np.asarray(routing.indices)[mask].ravel(), minlength=6)
    balance = 6 * ((counts / counts.sum()) * probs.mean(0)).sum()
    z = (np.log(np.exp(logits[mask]).sum(1)) ** 2).mean()
    keep = jnp.asarray(mask)
    np.testing.assert_allclose(
        router.load_balancing_loss(jnp.asarray(logits), routing, mask=keep), balance, rtol=1e-5
    )
    np.testing.assert_allclose(router.z_loss(jnp.asarray(logits), mask=keep), z, rtol=1e-5)
    np.testing.assert_array_equal(
        router.expert_loads(jnp.where(keep[:, None], routing.indices, -1), 6), counts
    )


def test_uniform_balance_is_one_and_no_tokens_is_zero() -> None:
    logits = jnp.zeros((4, 4))
    routing = router.Routing(jnp.arange(4)[:, None], jnp.ones((4, 1)), jnp.full((4, 4), 0.25))
    assert router.load_balancing_loss(logits, routing) == pytest.approx(1.0)
    empty = router.route(jnp.zeros((0, 4)), top_k=2)
    assert router.load_balancing_loss(jnp.zeros((0, 4)), empty) == 0
    assert router.z_loss(jnp.zeros((0, 4))) == 0


def test_losses_over_shards_equal_those_over_all_tokens() -> None:
    mesh = Mesh(np.array(jax.devices()[:4]), ("ep",))
    logits = jax.random.normal(jax.random.key(1), (12, 6))

    def losses(axis: str | None) -> Any:
        def compute(logits: jax.Array) -> Any:
            routing = router.route(logits, top_k=2)
            return (
                router.load_balancing_loss(logits, routing, axis_name=axis),
                router.z_loss(logits, axis_name=axis),
                router.expert_loads(routing.indices, 6, axis_name=axis),
            )

        return compute

    whole = losses(None)(logits)
    sharded = jax.jit(jax.shard_map(losses("ep"), mesh=mesh, in_specs=P("ep"), out_specs=P()))(logits)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), sharded, whole)


def test_counts_in_the_float_message_are_exact() -> None:
    mesh = Mesh(np.array(jax.devices()[:4]), ("ep",))
    loads = np.array([[2**28 + 1, 4095, 4097, 0]] * 4, np.int32) + np.arange(4, dtype=np.int32)[:, None]

    def add(loads: jax.Array) -> Any:
        zero = loads.sum() * 0.0
        sums = router.RouterSums(jnp.zeros(4) + zero, zero, loads[0], loads[0, 3])
        return router.sum_over_ranks(sums, "ep", counts=(loads[0, 0] - loads[0, 0] + 1,))

    sums, (extra,) = jax.jit(jax.shard_map(add, mesh=mesh, in_specs=P("ep"), out_specs=P()))(
        jnp.asarray(loads)
    )
    np.testing.assert_array_equal(sums.loads, loads.sum(0))
    assert sums.tokens == 6
    assert extra == 4


def test_selection_bias_moves_towards_balance() -> None:
    bias = router.update_selection_bias(jnp.zeros(3), jnp.array([9, 0, 3]), speed=0.5)
    np.testing.assert_allclose(bias, [-0.5, 0.5, 0.5])


@pytest.mark.parametrize(
    "error, match, changes",
    [
        (ValueError, "top_k", {"top_k": 0}),
        (ValueError, "top_k", {"top_k": 9}),
        (TypeError, "top_k", {"top_k": 2.0}),
        (TypeError, "top_k", {"top_k": True}),
        (ValueError, "score_fn", {"score_fn": "relu"}),
        (ValueError, "num_groups must divide", {"num_groups": 3}),
        (ValueError, "top_groups", {"num_groups": 4, "top_groups": 5}),
        (ValueError, "top_groups=1 of num_groups=8", {"num_groups": 8, "top_groups": 1}),
        (ValueError, "scale", {"scale": float("nan")}),
        (TypeError, "scale", {"scale": "2"}),
        (ValueError, "bias", {"bias": jnp.zeros(7)}),
        (ValueError, "logits", {"logits": jnp.zeros(8)}),
        (ValueError, "logits", {"logits": jnp.zeros((4, 0))}),
        (TypeError, "logits", {"logits": jnp.zeros((4, 8), jnp.int32)}),
        (TypeError, "logits", {"logits": [[0.0] * 8]}),
    ],
)
def test_bad_arguments_are_named(error: type[Exception], match: str, changes: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"logits": jnp.zeros((4, 8)), "top_k": 2, **changes}
    with pytest.raises(error, match=match):
        router.route(arguments.pop("logits"), **arguments)


def test_bad_masks_and_shapes_are_named() -> None:
    logits = jnp.zeros((4, 8))
    routing = router.route(logits, top_k=2)
    with pytest.raises(ValueError, match="mask"):
        router.load_balancing_loss(logits, routing, mask=jnp.ones(3, bool))
    with pytest.raises(TypeError, match="mask"):
        router.z_loss(logits, mask=jnp.ones(4))
    with pytest.raises(TypeError, match="indices"):
        router.expert_loads(jnp.zeros((4, 2)), 8)
    with pytest.raises(ValueError, match="loads"):
        router.update_selection_bias(jnp.zeros(3), jnp.zeros(4, jnp.int32))
