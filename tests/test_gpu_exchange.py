"""Exchanges between GPUs of one process: bits, gradients, replay, halves, overlap, errors."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu import PATHS, SKEWS, group
from jax.sharding import PartitionSpec as P
from moe_oracle import SPEC, Case, dense, experts, row_experts, same_bits, sharded
from test_halves import halved, pipeline, two_in_flight

from pplx_jax import ExpertParallel, RoutingError

pytestmark = pytest.mark.gpu
paths = pytest.mark.parametrize("path", PATHS)
ranks_of = pytest.mark.parametrize("ranks", [1, 2])


def run(ep: ExpertParallel, cases: list[Case]) -> None:
    step = jax.jit(sharded(ep))
    for case in cases:
        same_bits(step(*case.args).block_until_ready(), case.expected())
    ep.check(sync=True)


# --- forward, bit for bit -------------------------------------------------------------------------------


@paths
@ranks_of
@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": "float32"},
        {"dtype": "float32", "chunk": 3},
        {"dtype": "bfloat16", "alignment": 8, "depth": 2},
        {"dtype": "bfloat16", "hidden": 7168, "num_experts": 64, "top_k": 8},
        {"dtype": "bfloat16", "combine_dtype": "float32", "chunk": 4},
        {"dtype": "float16", "layout": "padded"},
        {"dtype": "bfloat16", "quant": "fp8", "hidden": 272},
        {"dtype": "bfloat16", "quant": "fp8_ue8m0", "hidden": 128, "chunk": 4},
        {"dtype": "float32", "quant": "fp8", "hidden": 144, "layout": "padded"},
        {"dtype": "float16", "quant": "fp8_ue8m0", "combine_dtype": "float32", "alignment": 4, "hidden": 256},
        {"dtype": "bfloat16", "zero_tail": False, "num_sms": 4},
    ],
    ids=str,
)
def test_grid(path, ranks, fields):
    with group(ranks, **PATHS[path] | fields) as ep:
        run(ep, [Case(ep, (8, 5)[seed % 2], seed, skew) for seed, skew in enumerate(SKEWS)])


@pytest.mark.parametrize("fabric", ["shm", "tcp"])
def test_nvlink_inside_and_proxy_outside(fabric):
    """Two nodes of two GPUs each, all on this host."""
    with group(4, node_size=2, fabric=fabric, dtype="bfloat16") as ep:
        run(ep, [Case(ep, (8, 5)[seed % 2], seed, SKEWS[seed % len(SKEWS)]) for seed in range(20)])
        transports = [peer["transport"] for peer in ep.stats()["ranks"][0]["peers"]]
        assert transports == ["nvlink", "nvlink", "proxy", "proxy"]


@ranks_of
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("experts", [10, 40])
def test_many_tokens(ranks, experts, dtype):
    """More tokens than blocks have threads, in rounds and in one."""
    for chunk in (None, 1000, 1500):
        with group(ranks, max_tokens=1500, num_experts=experts, top_k=4, chunk=chunk, dtype=dtype) as ep:
            run(ep, [Case(ep, tokens, tokens) for tokens in (1500, 1, 700)])


@paths
def test_drop(path):
    """What exceeds the rows is dropped, counted, and adds nothing at home."""
    fields = {"rows": 6, "on_overflow": "drop"}
    with group(2, **PATHS[path] | fields) as ep:
        case = Case(ep, 8, 1)

        def per_shard(x, i, w, s):
            batch, route = ep.dispatch(x, i, w)
            return ep.combine(experts(batch, s), route), batch.num_rows[None], batch.num_dropped[None]

        step = jax.jit(jax.shard_map(per_shard, mesh=ep.mesh, in_specs=SPEC, out_specs=SPEC))
        out, rows, dropped = jax.block_until_ready(step(*case.args[:4]))
        assert np.asarray(rows).max() <= 6
        assert np.asarray(rows).sum() + np.asarray(dropped).sum() == case.indices.size
        assert np.asarray(dropped).sum() > 0
        # Every expert keeps its first c rows: take the same ones.
        kept = np.zeros(case.indices.shape, bool)
        for rank in range(2):
            mine = range(rank * ep.experts_per_rank, (rank + 1) * ep.experts_per_rank)
            where = [np.argwhere(case.indices == e) for e in mine]
            clip = max(c for c in range(17) if sum(min(len(w), c) for w in where) <= 6)
            for of_expert in where:
                kept[tuple(of_expert[:clip].T)] = True
        weights = np.where(kept, case.weights, 0)
        wanted = dense(case.x, case.indices, weights, case.scale, case.valid())
        np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-5)
        ep.check(sync=True)


# --- derivatives ----------------------------------------------------------------------------------------


@paths
@ranks_of
@pytest.mark.parametrize("fields", [{}, {"chunk": 3}, {"quant": "fp8", "hidden": 64}], ids=str)
def test_gradients(path, ranks, fields):
    with group(ranks, **PATHS[path] | fields) as ep:
        for seed, skew in enumerate(SKEWS):
            case = Case(ep, 8, seed, skew)
            cotangent = np.random.default_rng(5).normal(size=case.x.shape).astype(np.float32)

            def ours(x, w, s, case=case, cotangent=cotangent):
                return (sharded(ep)(x, case.indices, w, s, case.counts) * cotangent).sum()

            def wanted(x, w, s, case=case, cotangent=cotangent):
                return (dense(x, case.indices, w, s, case.valid()) * cotangent).sum()

            # Straight through the quantisation: only what depends on the tokens' values differs.
            numbers = (0, 1, 2) if ep.config.quant is None else (0,)
            given = (case.x, case.weights, case.scale)
            a, b = (jax.jit(jax.grad(f, argnums=numbers))(*given) for f in (ours, wanted))
            for one, other in zip(a, b, strict=True):
                np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5, err_msg=skew)
        ep.check(sync=True)


# --- halves ---------------------------------------------------------------------------------------------


@paths
@ranks_of
def test_halves(path, ranks):
    with group(ranks, **PATHS[path]) as ep:
        mapped = jax.shard_map(lambda *a: halved(ep, *a), mesh=ep.mesh, in_specs=SPEC, out_specs=SPEC)
        step = jax.jit(mapped)
        for seed, skew in enumerate(SKEWS):
            case = Case(ep, (8, 3)[seed % 2], seed, skew)
            same_bits(step(*case.args).block_until_ready(), case.expected())
        ep.check(sync=True)


@paths
@ranks_of
def test_two_micro_batches(path, ranks):
    with group(ranks, depth=2, **PATHS[path]) as ep:
        function = jax.shard_map(
            lambda *a: two_in_flight(ep, *a), mesh=ep.mesh, in_specs=SPEC, out_specs=SPEC
        )
        step = jax.jit(function)
        for seed in range(20):
            a, b = Case(ep, 8, seed), Case(ep, 8, 100 + seed, "zipf")
            b.scale = a.scale
            x, y = jax.block_until_ready(step(*a.args[:4], *b.args[:3]))
            np.testing.assert_allclose(x, a.expected() + np.tanh(a.x), rtol=1e-5, atol=1e-5)
            same_bits(y, b.expected())

        def loss(x, w, s, y, v):
            x, y = function(x, a.indices, w, s, y, b.indices, v)
            return (x**2).sum() + (y**3).sum()

        def wanted(x, w, s, y, v):
            x = dense(x, a.indices, w, s, a.valid()) + jnp.tanh(x)
            return (x**2).sum() + (dense(y, b.indices, v, s, b.valid()) ** 3).sum()

        given = (a.x, a.weights, a.scale, b.x, b.weights)
        ours, theirs = (jax.jit(jax.grad(f, argnums=range(5)))(*given) for f in (loss, wanted))
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)
        ep.check(sync=True)


def test_across_a_scan():
    with group(2, depth=2) as ep:
        cases = [Case(ep, 8, seed) for seed in range(5)]
        stack = lambda name: np.stack([getattr(case, name) for case in cases])  # noqa: E731
        spec = P(None, "ep")
        function = jax.shard_map(
            lambda *a: pipeline(ep, *a), mesh=ep.mesh, in_specs=(spec, spec, spec, SPEC), out_specs=spec
        )
        out = jax.jit(function)(stack("x"), stack("indices"), stack("weights"), cases[0].scale)
        for case, got in zip(cases, out, strict=True):
            case.scale = cases[0].scale
            same_bits(got, case.expected())
        ep.check(sync=True)


# --- many executions ------------------------------------------------------------------------------------


@paths
@ranks_of
def test_replay(path, ranks):
    """Command buffers of a whole step, replayed with new routing; every result is checked."""
    steps = 1000 if path == "nvlink" else 300
    with group(ranks, dtype="bfloat16", **PATHS[path]) as ep:
        step = jax.jit(sharded(ep), compiler_options={"xla_gpu_graph_min_graph_size": 1})
        cases = [Case(ep, 8, seed, SKEWS[seed % len(SKEWS)]) for seed in range(50)]
        sharding = jax.NamedSharding(ep.mesh, SPEC)
        inputs = [jax.device_put(case.args, sharding) for case in cases]
        wanted = [case.expected() for case in cases]
        order = np.random.default_rng(0).integers(0, len(cases), steps)
        # Several under way at a time, as in a training loop.
        for start in range(0, steps, 20):
            batch = order[start : start + 20]
            for which, out in zip(batch, [step(*inputs[i]) for i in batch], strict=True):
                same_bits(out, wanted[which])
        ep.check(sync=True)


def distance(out, x):
    return ((out - jnp.sin(x)) ** 2).mean()


def layers(ep: ExpertParallel | None, mixes, scales, x, indices, weights, exchange):
    """Two layers: an all-gathered dense matrix beside the experts."""
    for layer in range(2):
        mix = jax.lax.all_gather(mixes[layer], "ep", tiled=True) if ep is not None else mixes[layer]
        x = jnp.tanh(x @ mix) + exchange(x, indices[:, layer], weights[:, layer], scales[layer])
    return x


def train_step(ep: ExpertParallel):
    """A step of SGD: weights of the dense part sharded (FSDP), those of the experts local, a replicated gain
    whose gradient is summed over the ranks."""

    def exchange(x, indices, weights, scale):
        batch, route = ep.dispatch(x, indices, weights)
        rows = batch.values * scale[row_experts(batch)][:, None]
        return ep.combine(rows, route)

    def per_shard(mixes, scales, gain, x, indices, weights):
        def loss(mixes, scales, gain):
            out = layers(ep, mixes, scales, x * gain, indices, weights, exchange)
            return jax.lax.pmean(distance(out, x), "ep")

        value, gradients = jax.value_and_grad(loss, argnums=(0, 1, 2))(mixes, scales, gain)
        updated = [p - 1e-2 * g for p, g in zip((mixes, scales, gain), gradients, strict=True)]
        return value, *updated

    sharded_specs = (P(None, "ep"), P(None, "ep"), P())
    function = jax.shard_map(
        per_shard, mesh=ep.mesh, in_specs=(*sharded_specs, SPEC, SPEC, SPEC), out_specs=(P(), *sharded_specs)
    )
    return jax.jit(function, compiler_options={"xla_gpu_enable_latency_hiding_scheduler": True})


def dense_loss(mixes, scales, gain, x, indices, weights):
    def exchange(x, indices, weights, scale):
        return dense(x, indices, weights, scale, jnp.ones(len(x), bool))

    return distance(layers(None, mixes, scales, x * gain, indices, weights, exchange), x)


def check_training(ep: ExpertParallel, steps: int, put, gathered=lambda state: state, every=1):
    """Trains, and compares each `every`th loss with the dense oracle's.

    put(array, spec) shards a whole array, gathered(state) makes it whole again.
    """
    with jax.default_matmul_precision("highest"):
        ranks = ep.mesh.size
        hidden, experts_of_all = ep.config.hidden, ep.experts_per_rank * ranks
        rng = np.random.default_rng(1)
        normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
        begin = (normal(2, hidden, hidden) / 6, normal(2, experts_of_all), np.float32(1))
        specs = (P(None, "ep"), P(None, "ep"), P())
        state = [put(array, spec) for array, spec in zip(begin, specs, strict=True)]
        total = 8 * ranks
        batches = []
        for _ in range(20):
            choices = np.stack([rng.permutation(10)[:3] for _ in range(2 * total)]).astype(np.int32)
            batch = (
                normal(total, hidden),
                choices.reshape(total, 2, 3),
                rng.random((total, 2, 3), np.float32),
            )
            batches.append((batch, [put(array, SPEC) for array in batch]))
        step, oracle = train_step(ep), jax.jit(dense_loss)
        for number in range(steps):
            whole, batch = batches[number % len(batches)]
            wanted = oracle(*gathered(state), *whole) if number % every == 0 else None
            loss, *state = step(*state, *batch)
            if wanted is not None:
                np.testing.assert_allclose(loss, wanted, rtol=1e-4, err_msg=f"step {number}")
        first, last = (float(oracle(*s, *batches[0][0])) for s in (begin, gathered(state)))
        assert last < first
        ep.check(sync=True)


@paths
@ranks_of
def test_training_beside_collectives(path, ranks):
    """Exchanges, an all-gather of weights and a sum of gradients, in whatever order XLA runs them."""
    steps = 1000 if path == "nvlink" and ranks == 2 else 100
    with group(ranks, **PATHS[path]) as ep:
        put = lambda array, spec: jax.device_put(array, jax.NamedSharding(ep.mesh, spec))  # noqa: E731
        check_training(ep, steps, put, jax.device_get)


# --- errors ---------------------------------------------------------------------------------------------


@paths
@ranks_of
def test_a_bad_id(path, ranks):
    with group(ranks, **PATHS[path]) as ep:
        step = jax.jit(sharded(ep))
        good, bad = Case(ep, 8, 1), Case(ep, 8, 2)
        bad.indices[3, 1] = 10
        for _ in range(3):
            out = np.asarray(step(*bad.args))
            assert np.isnan(out[:8]).all()
            with pytest.raises(RoutingError, match=r"indices\[3, 1\] is 10, allowed are -1 and 0\.\.9"):
                ep.check(sync=True)
            same_bits(step(*good.args), good.expected())
            ep.check(sync=True)


@ranks_of
def test_too_many_rows(ranks):
    with group(ranks, rows=4) as ep:
        case = Case(ep, 8, 1, "all to one")
        out = np.asarray(jax.jit(sharded(ep))(*case.args))
        assert np.isnan(out).all()  # every token has an expert on rank 0
        with pytest.raises(RoutingError, match=r"rows=4"):
            ep.check(sync=True)


@ranks_of
def test_more_memory_than_there_is(ranks):
    """The error says how to leave room for the group."""
    ep = group(ranks, hidden=16384, max_tokens=1 << 20, chunk=1 << 20, depth=6, num_experts=8, top_k=2)
    device = jax.devices("gpu")[0]
    assert ep.config.memory(ranks).regions > device.memory_stats()["bytes_limit"] * 2
    with pytest.raises(Exception, match="XLA_PYTHON_CLIENT_MEM_FRACTION"):
        ep.connect()
    # And nothing of it stays behind.
    with group(ranks) as small:
        run(small, [Case(small, 8, 1)])


@paths
def test_memory(path):
    """What the group has allocated is what the documentation of ``ExchangeConfig.memory`` says."""
    with group(2, hidden=7168, max_tokens=512, depth=2, **PATHS[path]) as ep:
        ep.connect()
        memory = ep.stats()["memory"]
        regions, slots = ep.config.memory(2).regions, 2 * 2 * 2 * 512
        device = regions + 64 * slots
        assert device < memory["device"] < device + (8 << 20)
        pinned = 0 if path == "nvlink" else 2 * regions
        assert pinned < memory["pinned"] < pinned + (1 << 20)
        assert memory["total"] == memory["device"] + memory["pinned"]


def test_closed_and_reopened():
    """The same program runs on the next equal group."""
    make = functools.partial(group, 2, name="reopened")
    ep = make()
    step = jax.jit(sharded(ep))
    for seed in range(3):
        with make() as ep:
            case = Case(ep, 8, seed)
            same_bits(step(*case.args), case.expected())
            ep.check(sync=True)
