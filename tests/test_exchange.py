"""Forward results, bit for bit, against a dense oracle."""

from __future__ import annotations

from itertools import count

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moe_oracle import Case, make_mesh, same_bits, sharded

from pplx_jax import ExpertParallel

_names = (f"exchange{i}" for i in count())
SKEWS = ["uniform", "zipf", "all to one", "holes", "nothing", "ragged"]


def run(ep: ExpertParallel, cases: list[Case]) -> None:
    step = jax.jit(sharded(ep))
    for case in cases:
        same_bits(step(*case.args).block_until_ready(), case.expected())
    ep.check()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("ranks", "num_experts", "top_k", "hidden", "tokens", "chunk"),
    [
        (1, 4, 2, 8, 5, None),
        (2, 3, 3, 16, 9, 4),
        (3, 8, 2, 33, 7, None),
        (4, 10, 4, 64, 16, 5),
        (4, 32, 16, 24, 6, None),
        (8, 5, 1, 8, 3, 1),
        (5, 12, 6, 130, 11, 11),
    ],
)
def test_grid(dtype, ranks, num_experts, top_k, hidden, tokens, chunk):
    with ExpertParallel(
        make_mesh(ranks),
        num_experts=num_experts,
        top_k=top_k,
        hidden=hidden,
        max_tokens=tokens,
        chunk=chunk,
        dtype=dtype,
        name=next(_names),
    ) as ep:
        run(ep, [Case(ep, tokens, seed, skew) for seed, skew in enumerate(SKEWS)])


@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_shape(data):
    """Shapes, skew and a T that changes from step to step, drawn at random."""
    ranks = data.draw(st.integers(1, 6), "ranks")
    num_experts = data.draw(st.integers(1, 20), "experts")
    top_k = data.draw(st.integers(1, min(16, num_experts)), "top_k")
    most = data.draw(st.integers(1, 12), "max_tokens")
    ep = ExpertParallel(
        make_mesh(ranks),
        num_experts=num_experts,
        top_k=top_k,
        hidden=data.draw(st.integers(1, 40), "hidden"),
        max_tokens=most,
        chunk=data.draw(st.integers(1, most), "chunk"),
        depth=data.draw(st.integers(1, 2), "depth"),
        alignment=data.draw(st.sampled_from([1, 1, 4, 8]), "alignment"),
        zero_tail=data.draw(st.booleans(), "zero_tail"),
        dtype=data.draw(st.sampled_from([jnp.float32, jnp.bfloat16]), "dtype"),
        name=next(_names),
    )
    with ep:
        for seed in range(3):
            tokens = data.draw(st.integers(0, most), "tokens")
            run(ep, [Case(ep, tokens, seed, data.draw(st.sampled_from(SKEWS), "skew"))])


def test_many_steps():
    """New routing every step; T shrinks and grows."""
    with ExpertParallel(
        make_mesh(4), num_experts=9, top_k=3, hidden=16, max_tokens=12, chunk=5, dtype="float32", name="many"
    ) as ep:
        step = jax.jit(sharded(ep))
        for seed in range(150):
            case = Case(ep, (12, 5, 1, 8)[seed % 4], seed, SKEWS[seed % len(SKEWS)])
            same_bits(step(*case.args).block_until_ready(), case.expected())
        ep.check()
        assert ep.stats()["ranks"][0]["exchanges"] > 300


def test_batch_layout():
    """Rows by (expert, source rank, token); tail and padding zero; counts and weights of every row."""
    ranks, tokens, top_k, experts = 3, 6, 2, 7
    with ExpertParallel(
        make_mesh(ranks),
        num_experts=experts,
        top_k=top_k,
        hidden=4,
        max_tokens=tokens,
        alignment=4,
        dtype="float32",
        name="layout",
    ) as ep:
        case = Case(ep, tokens, 3, "holes")
        case.x[:] = np.arange(1, ranks * tokens + 1)[:, None]  # a row names its token

        def per_shard(x, indices, weights):
            batch, _ = ep.dispatch(x, indices, weights)
            scalars = jnp.stack([batch.num_rows, batch.num_dropped, batch.ok])
            return batch.tokens, batch.weights, batch.group_sizes, scalars

        step = jax.shard_map(
            per_shard,
            mesh=ep.mesh,
            in_specs=jax.P("ep"),
            out_specs=jax.P("ep"),
        )
        rows, weights, sizes, scalars = jax.block_until_ready(
            jax.jit(step)(case.x, case.indices, case.weights)
        )
        per_rank = ep.experts_per_rank
        rows = np.asarray(rows).reshape(ranks, -1, 4)
        weights = np.asarray(weights).reshape(ranks, -1)
        sizes = np.asarray(sizes).reshape(ranks, per_rank)
        scalars = np.asarray(scalars).reshape(ranks, 3)
        for rank in range(ranks):
            at = 0
            total = 0
            for local in range(per_rank):
                where = np.argwhere(case.indices == rank * per_rank + local)  # sorted by token
                total += len(where)
                assert sizes[rank, local] == -(-len(where) // 4) * 4
                for i, (t, k) in enumerate(where):
                    assert rows[rank, at + i, 0] == t + 1
                    assert weights[rank, at + i] == case.weights[t, k]
                at += sizes[rank, local]
                assert not rows[rank, at - (sizes[rank, local] - len(where)) : at].any()
            assert not rows[rank, at:].any()
            assert not weights[rank, at:].any()
            assert scalars[rank].tolist() == [total, 0, 1]


def test_unweighted_and_accumulate():
    with ExpertParallel(
        make_mesh(4), num_experts=8, top_k=2, hidden=8, max_tokens=6, dtype="float32", name="accumulate"
    ) as ep:
        case = Case(ep, 6, 0, "ragged")
        residual = np.random.default_rng(1).normal(size=case.x.shape).astype(np.float32)

        def per_shard(x, indices, weights, counts, residual):
            batch, route = ep.dispatch(x, indices, weights, num_tokens=counts[0])
            plain = ep.combine(batch.tokens, route, weighted=False)
            return plain, ep.combine(batch.tokens, route, weighted=False, accumulate=residual)

        step = jax.jit(jax.shard_map(per_shard, mesh=ep.mesh, in_specs=jax.P("ep"), out_specs=jax.P("ep")))
        plain, added = step(case.x, case.indices, case.weights, case.counts, residual)
        valid = case.valid()[:, None]
        np.testing.assert_allclose(plain, np.where(valid, 2 * case.x, 0), rtol=1e-6)
        np.testing.assert_allclose(added, np.where(valid, 2 * case.x + residual, 0), rtol=1e-5, atol=1e-5)


def outputs(ep: ExpertParallel, case: Case) -> list[bytes]:
    """Every float output of a step with its gradients."""

    def loss(x, weights, scale):
        out = sharded(ep)(x, case.indices, weights, scale, case.counts)
        return (out.astype(jnp.float32) ** 2).sum(), out

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    (_, out), gradients = jax.block_until_ready(step(case.x, case.weights, case.scale))
    ep.check()
    return [np.asarray(a).tobytes() for a in (out, *gradients)]


def test_every_fabric_gives_the_same_bytes():
    config = dict(num_experts=10, top_k=4, hidden=48, max_tokens=16, chunk=6, dtype="bfloat16")
    seen = {}
    for fabric in ["local", "sim:seed=1", "tcp", "shm", "tcp:endpoints=4"]:
        with ExpertParallel(make_mesh(4), fabric=fabric, name="bytes", **config) as ep:
            seen[fabric] = outputs(ep, Case(ep, 16, 7))
    for fabric, result in seen.items():
        assert result == seen["local"], fabric


def test_chunks_give_the_same_bytes():
    config = dict(num_experts=10, top_k=4, hidden=48, max_tokens=16, dtype="bfloat16")
    seen = []
    for chunk in [16, 7, 1]:
        with ExpertParallel(make_mesh(4), chunk=chunk, name=f"chunk{chunk}", **config) as ep:
            seen.append(outputs(ep, Case(ep, 16, 7)))
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.slow
def test_every_seed_gives_the_same_bytes():
    """A few hundred networks that reorder, delay and split; one compilation (the group's value is one)."""
    config = dict(num_experts=7, top_k=3, hidden=12, max_tokens=6, chunk=4, dtype="float32", name="seeds")
    mesh = make_mesh(4)
    step = None
    expected = None
    for seed in range(300):
        with ExpertParallel(mesh, fabric=f"sim:seed={seed},stall_every={seed % 3 * 20}", **config) as ep:
            case = Case(ep, 6, 11, "zipf")
            step = step or jax.jit(sharded(ep))
            expected = case.expected() if expected is None else expected
            for _ in range(2):
                same_bits(step(*case.args).block_until_ready(), expected)
            ep.check()
    assert step._cache_size() == 1
