"""Derivatives against autodiff of the dense oracle, and the transformations around them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from moe_oracle import SPEC, Case, dense, experts, make_mesh, sharded

import pplx_jax
from pplx_jax import ExpertParallel

SMALL = dict(num_experts=10, top_k=3, hidden=16, max_tokens=8, chunk=3, dtype="float32")
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)


def gradients(function, case, cotangent):
    loss = lambda x, w, s: (function(x, w, s) * cotangent).sum()  # noqa: E731
    result = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(case.x, case.weights, case.scale)
    return jax.block_until_ready(result)


def exchanged(ep, case, **options):
    return lambda x, w, s: sharded(ep, **options)(x, case.indices, w, s, case.counts)


def oracle(case):
    return lambda x, w, s: dense(x, case.indices, w, s, case.valid())


def check(ep, case, **options):
    cotangent = np.random.default_rng(5).normal(size=case.x.shape).astype(np.float32)
    ours = gradients(exchanged(ep, case, **options), case, cotangent)
    theirs = gradients(oracle(case), case, cotangent)
    for name, a, b in zip(("x", "weights", "scale"), ours, theirs, strict=True):
        close(a, b, err_msg=name)
    ep.check()


@pytest.mark.parametrize("skew", ["uniform", "zipf", "all to one", "holes", "nothing", "ragged"])
@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_against_autodiff(ranks, skew):
    with ExpertParallel(make_mesh(ranks), name=f"grad{ranks}{skew}", **SMALL) as ep:
        check(ep, Case(ep, 8, 1, skew))
        check(ep, Case(ep, 5, 2, skew))


def test_bfloat16():
    with ExpertParallel(make_mesh(4), name="grad bf16", **SMALL | {"dtype": "bfloat16"}) as ep:
        case = Case(ep, 8, 1)
        loss = lambda f: lambda x, w, s: f(x, w, s).astype(jnp.float32).sum()  # noqa: E731
        grad = lambda f: jax.jit(jax.grad(loss(f), argnums=(0, 1, 2)))  # noqa: E731
        ours = grad(exchanged(ep, case))(case.x, case.weights, case.scale)
        theirs = grad(oracle(case))(case.x.astype(np.float32), case.weights, case.scale)
        for a, b in zip(ours, theirs, strict=True):
            difference = np.asarray(a, np.float32) - np.asarray(b, np.float32)
            assert np.linalg.norm(difference) < 1e-2 * np.linalg.norm(np.asarray(b, np.float32))


def test_unweighted_weights_get_their_gradient_in_the_layer():
    """combine(weighted=False): the layer multiplies by batch.weights, whose gradient goes home."""
    with ExpertParallel(make_mesh(4), name="inner weights", **SMALL) as ep:
        case = Case(ep, 8, 3, "holes")

        def per_shard(x, w, s):
            batch, route = ep.dispatch(x, INDICES(case, ep), w)
            return ep.combine(experts(batch, s) * batch.weights[:, None], route, weighted=False)

        # The indices are sharded like x; inside, each rank takes its own block.
        function = jax.shard_map(per_shard, mesh=ep.mesh, in_specs=P("ep"), out_specs=P("ep"))
        cotangent = np.random.default_rng(5).normal(size=case.x.shape).astype(np.float32)
        for a, b in zip(
            gradients(function, case, cotangent), gradients(oracle(case), case, cotangent), strict=True
        ):
            close(a, b)


def INDICES(case, ep):
    per_rank = case.tokens
    return jax.lax.dynamic_slice_in_dim(
        jnp.asarray(case.indices), jax.lax.axis_index(ep.axis) * per_rank, per_rank
    )


def test_accumulate():
    with ExpertParallel(make_mesh(2), name="grad accumulate", **SMALL) as ep:
        case = Case(ep, 8, 4, "ragged")

        def per_shard(x, i, w, s, counts, extra):
            batch, route = ep.dispatch(x, i, w, num_tokens=counts[0])
            return ep.combine(experts(batch, s), route, accumulate=extra)

        function = jax.shard_map(per_shard, mesh=ep.mesh, in_specs=SPEC, out_specs=SPEC)
        loss = lambda extra: (  # noqa: E731
            function(case.x, case.indices, case.weights, case.scale, case.counts, extra) * case.x
        ).sum()
        gradient = jax.jit(jax.grad(loss))(np.ones_like(case.x))
        close(gradient, np.where(case.valid()[:, None], case.x, 0))


def test_replicated_operands_are_summed():
    """A scale that every rank holds: JAX adds the ranks' gradients."""
    with ExpertParallel(make_mesh(4), name="replicated", **SMALL) as ep:
        case = Case(ep, 8, 6)

        def per_shard(x, w, factor):
            batch, route = ep.dispatch(x * factor, INDICES(case, ep), w)
            return ep.combine(batch.tokens, route)

        specs = (P("ep"), P("ep"), P())
        function = jax.shard_map(per_shard, mesh=ep.mesh, in_specs=specs, out_specs=P("ep"))
        ours = jax.jit(jax.grad(lambda f: (function(case.x, case.weights, f) * case.x).sum()))(2.0)
        close(ours, (case.x * case.x * case.weights.sum(-1)[:, None]).sum(), rtol=1e-4)


def layers(ep, wrap=lambda f: f, count=3):
    """Per shard: `count` residual MoE layers."""

    def layer(x, i, w, s):
        batch, route = ep.dispatch(x, i, w)
        return x + ep.combine(jnp.tanh(experts(batch, s)), route)

    def stack(x, i, w, s):
        for depth in range(count):
            x = wrap(layer)(x, i, w, s * (depth + 1))
        return x

    return stack


def scanned(ep, wrap=lambda f: f, count=3):
    def stack(x, i, w, s):
        def layer(x, factor):
            def body(x, s):
                batch, route = ep.dispatch(x, i, w)
                return x + ep.combine(jnp.tanh(experts(batch, s)), route)

            return wrap(body)(x, s * factor), None

        x = jax.lax.pcast(x, tuple({"ep"} - jax.typeof(x).manual_axis_type.varying), to="varying")
        return jax.lax.scan(layer, x, jnp.arange(1.0, count + 1))[0]

    return stack


def dense_stack(case, count=3):
    def stack(x, w, s):
        for depth in range(count):
            chosen = case.indices >= 0
            rows = jnp.tanh(x[:, None, :] * (s * (depth + 1))[case.indices][..., None])
            x = x + (rows * (w * chosen)[..., None]).sum(1)
        return x

    return stack


@pytest.mark.parametrize(
    ("build", "wrap"),
    [
        (layers, lambda f: f),
        (layers, pplx_jax.moe_remat),
        (layers, jax.checkpoint),
        (scanned, lambda f: f),
        (scanned, pplx_jax.moe_remat),
        (scanned, jax.checkpoint),
    ],
    ids=["stack", "moe_remat", "checkpoint", "scan", "scan moe_remat", "scan checkpoint"],
)
def test_stacks_of_layers(build, wrap):
    """Same tag in every layer, rematerialised or not, unrolled or scanned: no aliasing, right gradients."""
    with ExpertParallel(make_mesh(4), name="stack", **SMALL) as ep:
        case = Case(ep, 8, 9)
        per_shard = build(ep, wrap)

        def function(x, w, s):
            step = lambda x, w, s: per_shard(x, INDICES(case, ep), w, s)  # noqa: E731
            return jax.shard_map(step, mesh=ep.mesh, in_specs=P("ep"), out_specs=P("ep"))(x, w, s)

        cotangent = np.random.default_rng(5).normal(size=case.x.shape).astype(np.float32)
        for _ in range(3):
            ours = gradients(function, case, cotangent)
            ep.check()
        for a, b in zip(ours, gradients(dense_stack(case), case, cotangent), strict=True):
            close(a, b, rtol=1e-3, atol=1e-3)


def test_cond_with_equal_predicates():
    with ExpertParallel(make_mesh(4), name="cond", **SMALL) as ep:
        case = Case(ep, 8, 1)

        def per_shard(x, i, w, s, flag):
            def exchange(x):
                batch, route = ep.dispatch(x, i, w)
                return ep.combine(experts(batch, s), route)

            return jax.lax.cond(flag, exchange, lambda x: 2 * x, x)

        function = jax.jit(
            jax.shard_map(per_shard, mesh=ep.mesh, in_specs=(P("ep"),) * 4 + (P(),), out_specs=P("ep"))
        )
        args = case.args[:4]
        close(function(*args, True), case.expected())
        close(function(*args, False), 2 * case.x)


def test_donation():
    with ExpertParallel(make_mesh(4), name="donate", **SMALL) as ep:
        case = Case(ep, 8, 1)
        function = sharded(ep)
        step = jax.jit(function, donate_argnums=(0,))
        x = jax.device_put(case.x, jax.NamedSharding(ep.mesh, P("ep")))
        expected = case.expected()
        close(step(x, *case.args[1:]).block_until_ready(), expected)


def test_after_orders_the_backward_pass_in_reverse():
    """Two independent branches: without `after` nothing orders them, with it both passes are ordered."""
    with ExpertParallel(make_mesh(4), name="branches", **SMALL) as ep:
        case, other = Case(ep, 8, 1), Case(ep, 8, 2)

        def per_shard(x, w, s):
            first, first_route = ep.dispatch(x, INDICES(case, ep), w, name="first")
            a = ep.combine(experts(first, s), first_route)
            second, second_route = ep.dispatch(2 * x, INDICES(other, ep), w, name="second", after=a)
            return a + ep.combine(experts(second, s), second_route)

        function = jax.shard_map(per_shard, mesh=ep.mesh, in_specs=P("ep"), out_specs=P("ep"))

        def expected(x, w, s):
            return oracle(case)(x, w, s) + oracle(other)(2 * x, w, s)

        cotangent = np.random.default_rng(5).normal(size=case.x.shape).astype(np.float32)
        for _ in range(5):
            ours = gradients(function, case, cotangent)
        ep.check()
        for a, b in zip(ours, gradients(expected, case, cotangent), strict=True):
            close(a, b, rtol=1e-4, atol=1e-4)


def test_vmap_runs_one_after_the_other():
    with ExpertParallel(make_mesh(4), name="vmap", **SMALL) as ep:
        case, other = Case(ep, 8, 1), Case(ep, 8, 2)

        def per_shard(x, i, w, s):
            def one(x, i, w):
                batch, route = ep.dispatch(x, i, w)
                return ep.combine(experts(batch, s), route)

            return jax.vmap(one)(x, i, w)

        specs = (P(None, "ep"),) * 3 + (P("ep"),)
        function = jax.jit(jax.shard_map(per_shard, mesh=ep.mesh, in_specs=specs, out_specs=P(None, "ep")))
        both = [np.stack([a, b]) for a, b in zip(case.args[:3], other.args[:3], strict=True)]
        out = function(*both, case.scale)
        other.scale = case.scale
        close(out[0], case.expected())
        close(out[1], other.expected())


def test_depth_two_runs_the_same_programs():
    with ExpertParallel(make_mesh(4), name="depth", depth=2, **SMALL) as ep:
        check(ep, Case(ep, 8, 1))
        check(ep, Case(ep, 6, 2, "zipf"))


def test_data_and_expert_axes():
    """dp x ep: each slice along ep is a group of its own; gradients of dp-replicated scales are summed."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("dp", "ep"))
    with ExpertParallel(mesh, name="dp x ep", **SMALL) as ep:
        left, right = Case(ep, 8, 1), Case(ep, 8, 2)
        x, i, w = (np.concatenate(pair) for pair in zip(left.args[:3], right.args[:3], strict=True))

        def per_shard(x, i, w, s):
            batch, route = ep.dispatch(x, i, w)
            return ep.combine(experts(batch, s), route)

        both = P(("dp", "ep"))
        function = jax.shard_map(per_shard, mesh=mesh, in_specs=(both, both, both, P("ep")), out_specs=both)
        right.scale = left.scale
        out = jax.jit(function)(x, i, w, left.scale)
        close(out, np.concatenate([left.expected(), right.expected()]))

        ours = jax.jit(jax.grad(lambda s: (function(x, i, w, s) * x).sum()))(left.scale)
        theirs = jax.grad(lambda s: sum((oracle(c)(c.x, c.weights, s) * c.x).sum() for c in (left, right)))(
            left.scale
        )
        close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_without_replication_checks():
    with ExpertParallel(make_mesh(4), name="no checks", **SMALL) as ep:
        case = Case(ep, 8, 1)

        def per_shard(x, w, s):
            batch, route = ep.dispatch(x, INDICES(case, ep), w)
            return ep.combine(experts(batch, s), route)

        function = jax.shard_map(
            per_shard, mesh=ep.mesh, in_specs=P("ep"), out_specs=P("ep"), check_vma=False
        )
        cotangent = np.random.default_rng(5).normal(size=case.x.shape).astype(np.float32)
        for a, b in zip(
            gradients(function, case, cotangent), gradients(oracle(case), case, cotangent), strict=True
        ):
            close(a, b)
