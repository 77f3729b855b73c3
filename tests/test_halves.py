"""Send and recv apart: two micro-batches in flight, across a scan, differentiated, received exactly once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from moe_oracle import SPEC, Case, dense, experts, make_mesh, same_bits

from pplx_jax import ExpertParallel, MismatchError

SMALL = dict(num_experts=10, top_k=3, hidden=16, max_tokens=8, dtype="float32")


def shard(ep, function, out_specs=SPEC, jit=True):
    mapped = jax.shard_map(function, mesh=ep.mesh, in_specs=SPEC, out_specs=out_specs)
    return jax.jit(mapped) if jit else mapped


def halved(ep, x, indices, weights, scale, counts, after=None):
    sent = ep.dispatch_send(x, indices, weights, num_tokens=counts[0], after=after)
    batch, route = ep.dispatch_recv(sent)
    return ep.combine_recv(ep.combine_send(experts(batch, scale), route))


@pytest.mark.parametrize("fabric", ["local", "sim:seed=3", "shm", "tcp"])
def test_one_after_the_other(fabric):
    with ExpertParallel(make_mesh(4), name="halves", fabric=fabric, **SMALL) as ep:
        step = shard(ep, lambda *a: halved(ep, *a))
        for seed, skew in enumerate(["uniform", "holes", "nothing", "ragged"] * 3):
            case = Case(ep, (8, 3, 0)[seed % 3], seed, skew)
            same_bits(step(*case.args).block_until_ready(), case.expected())
        ep.check()


def two_in_flight(ep, x, i, w, s, y, j, v):
    """Both dispatches are under way at once, then both combines; a shared expert runs meanwhile."""
    first = ep.dispatch_send(x, i, w, name="first")
    second = ep.dispatch_send(y, j, v, name="second", after=first)
    shared = jnp.tanh(x)
    batch, route = ep.dispatch_recv(first)
    # Under grad a recv becomes a send: it needs an order, too.
    other, other_route = ep.dispatch_recv(second, after=route)
    home = ep.combine_send(experts(batch, s), route, after=other_route)
    other_home = ep.combine_send(experts(other, s), other_route, after=home)
    out = ep.combine_recv(home, accumulate=shared)
    return out, ep.combine_recv(other_home, after=out)


@pytest.mark.parametrize("fabric", ["local", "sim:seed=5", "tcp:endpoints=4"])
def test_two_micro_batches(fabric):
    with ExpertParallel(make_mesh(4), name="two halves", depth=2, fabric=fabric, **SMALL) as ep:
        a, b = Case(ep, 8, 1), Case(ep, 8, 2, "zipf")
        b.scale = a.scale
        inputs = (*a.args[:4], *b.args[:3])
        step = shard(ep, lambda *given: two_in_flight(ep, *given))
        for _ in range(20):
            x, y = jax.block_until_ready(step(*inputs))
        np.testing.assert_allclose(x, a.expected() + np.tanh(a.x), rtol=1e-5, atol=1e-6)
        same_bits(y, b.expected())

        def loss(x, w, s, y, v):
            out = shard(ep, lambda *given: two_in_flight(ep, *given), jit=False)
            x, y = out(x, a.indices, w, s, y, b.indices, v)
            return (x**2).sum() + (y**3).sum()

        def wanted(x, w, s, y, v):
            x = dense(x, a.indices, w, s, a.valid()) + jnp.tanh(x)
            return (x**2).sum() + (dense(y, b.indices, v, s, b.valid()) ** 3).sum()

        given = (a.x, a.weights, a.scale, b.x, b.weights)
        ours, theirs = (jax.jit(jax.grad(f, argnums=range(5)))(*given) for f in (loss, wanted))
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
        ep.check()


def pipeline(ep, xs, indices, weights, scale):
    """Each iteration receives what the one before it has sent: the send crosses the scan as carry."""

    def body(sent, step):
        batch, route = ep.dispatch_recv(sent)
        following = ep.dispatch_send(*step, after=batch)
        out = ep.combine(experts(batch, scale), route, after=following)
        return following, out

    given = (xs, indices, weights)
    sent, outs = jax.lax.scan(body, ep.dispatch_send(*(a[0] for a in given)), tuple(a[1:] for a in given))
    batch, route = ep.dispatch_recv(sent, after=outs)
    last = ep.combine(experts(batch, scale), route)
    return jnp.concatenate([outs, last[None]])


def test_across_a_scan():
    with ExpertParallel(make_mesh(4), name="scan halves", depth=2, **SMALL) as ep:
        cases = [Case(ep, 8, seed) for seed in range(5)]
        stack = lambda name: np.stack([getattr(case, name) for case in cases])  # noqa: E731
        xs, indices, weights = stack("x"), stack("indices"), stack("weights")
        scale = cases[0].scale
        spec = P(None, "ep")
        function = jax.shard_map(
            lambda *a: pipeline(ep, *a), mesh=ep.mesh, in_specs=(spec, spec, spec, SPEC), out_specs=spec
        )
        out = jax.jit(function)(xs, indices, weights, scale)
        for case, got in zip(cases, out, strict=True):
            case.scale = scale
            same_bits(got, case.expected())

        def loss(f):
            return lambda x, w, s: (f(x, w, s) ** 2).sum()

        valid = np.ones(32, bool)
        many = jax.vmap(dense, (0, 0, 0, None, None))
        ours = loss(lambda x, w, s: function(x, indices, w, s))
        theirs = loss(lambda x, w, s: many(x, indices, w, s, valid))
        gradients = [jax.jit(jax.grad(f, argnums=(0, 1, 2)))(xs, weights, scale) for f in (ours, theirs)]
        for one, other in zip(*gradients, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
        ep.check()


def test_received_twice():
    with ExpertParallel(make_mesh(2), name="twice received", depth=2, **SMALL) as ep:
        case = Case(ep, 8, 1)

        def per_shard(x, i, w):
            sent = ep.dispatch_send(x, i, w)
            batch, _ = ep.dispatch_recv(sent)
            again, _ = ep.dispatch_recv(sent, after=batch)
            return batch.tokens + again.tokens

        with pytest.raises(Exception, match=r"not under way: each send is received exactly once"):
            shard(ep, per_shard)(*case.args[:3]).block_until_ready()


def test_more_under_way_than_depth():
    with ExpertParallel(make_mesh(2), name="twice in flight", depth=2, **SMALL) as ep:
        shard(ep, lambda x, i, w: beyond(ep, x, i, w))(*Case(ep, 8, 1).args[:3]).block_until_ready()
        ep.check()
    with pytest.raises(MismatchError, match=r"at most depth=1 may be under way"):
        overdraw()


def overdraw():
    with ExpertParallel(make_mesh(2), name="too many", **SMALL) as ep:
        out = shard(ep, lambda x, i, w: beyond(ep, x, i, w))(*Case(ep, 8, 1).args[:3])
        assert np.isnan(np.asarray(out)).all()


def beyond(ep, x, i, w):
    first = ep.dispatch_send(x, i, w)
    second = ep.dispatch_send(x, i, w, after=first)
    batch, _ = ep.dispatch_recv(first, after=second)
    other, _ = ep.dispatch_recv(second, after=batch)
    return batch.tokens + other.tokens


def test_a_send_that_nobody_receives():
    """The next execution clears up after it, and after one that failed in between."""
    with ExpertParallel(make_mesh(2), name="abandoned", **SMALL) as ep:
        case = Case(ep, 8, 1)

        def per_shard(x, i, w):
            sent = ep.dispatch_send(x, i, w)
            return sent.home

        lost = shard(ep, per_shard)
        step = shard(ep, lambda *a: halved(ep, *a))
        for _ in range(3):
            jax.block_until_ready(lost(*case.args[:3]))
            same_bits(step(*case.args).block_until_ready(), case.expected())
        ep.check()
