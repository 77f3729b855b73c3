"""Programs: identity by value, several groups, compilation caches, what the HLO holds."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P
from moe_oracle import SPEC, Case, experts, make_mesh, same_bits, sharded

import pplx_jax
from pplx_jax import ExpertParallel

SMALL = dict(num_experts=10, top_k=3, hidden=16, max_tokens=8, chunk=3, dtype="float32")


def test_equal_by_value():
    mesh = make_mesh(4)
    one, other = (ExpertParallel(mesh, name="value", **SMALL) for _ in range(2))
    assert one == other
    assert hash(one) == hash(other) == one.group_id
    assert one != ExpertParallel(mesh, name="value", **SMALL | {"depth": 2})
    assert one != ExpertParallel(mesh, name="other", **SMALL)
    assert one != ExpertParallel(make_mesh(2), name="value", **SMALL)
    # Where it runs and how long it waits are not part of the program.
    assert one == ExpertParallel(mesh, name="value", fabric="tcp", timeout=3, **SMALL)
    assert copy.deepcopy(one) is one
    with pytest.raises(TypeError, match=r"\.config"):
        pickle.dumps(one)
    assert pickle.loads(pickle.dumps(one.config)) == one.config


def test_a_count_is_no_factor():
    count, factor = (pplx_jax.ExchangeConfig(**SMALL | {"rows": rows}) for rows in (2, 2.0))
    assert count != factor
    assert count.num_rows(2) == 2
    assert factor.num_rows(2) == 48
    assert factor == pplx_jax.ExchangeConfig(**SMALL | {"rows": np.float64(2.0)})
    assert hash(factor) == hash(pplx_jax.ExchangeConfig(**SMALL | {"rows": 2.0}))


def test_groups_of_other_maps_differ_but_revive_each_others_programs():
    mesh = make_mesh(4)
    maps = [[list(range(3 * r, 3 * r + 3)) for r in range(4)] for _ in range(2)]
    for table in maps:
        table[3] = [9, -1, -1]
    maps[1].reverse()
    one, other = (ExpertParallel(mesh, name="maps", expert_map=table, **SMALL) for table in maps)
    assert one != other
    assert one.group_id == other.group_id
    assert one == ExpertParallel(mesh, name="maps", expert_map=np.reshape(maps[0], -1), **SMALL)


EXIT = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax, jax.numpy as jnp, numpy as np
from jax._src import xla_bridge
import pplx_jax
mesh = jax.sharding.AbstractMesh((2,), ("ep",))
config = dict(num_experts=4, top_k=1, hidden=8, max_tokens=4, dtype="float32")
pplx_jax.ExpertParallel(mesh, name="never connected", **config).close()
assert not xla_bridge.backends_are_initialized()
ep = pplx_jax.ExpertParallel(jax.sharding.Mesh(np.array(jax.devices()), ("ep",)), fabric="{fabric}", **config)
def per_shard(x):
    batch, route = ep.dispatch(x, jnp.zeros((4, 1), jnp.int32), jnp.ones((4, 1), jnp.float32))
    return ep.combine(batch.tokens, route)
step = jax.jit(jax.shard_map(per_shard, mesh=ep.mesh, in_specs=jax.P("ep"), out_specs=jax.P("ep")))
step(np.ones((8, 8), np.float32)).block_until_ready()
"""


@pytest.mark.smoke
@pytest.mark.parametrize("fabric", ["local", "tcp"])
def test_a_program_that_never_closes_its_group_ends_quietly(fabric):
    done = subprocess.run(
        [sys.executable, "-c", EXIT.replace("{fabric}", fabric)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_group_id_is_the_same_in_every_process():
    # A constant: a change of it breaks persistent compilation caches and must be meant.
    ep = ExpertParallel(AbstractMesh((4,), ("ep",)), name="constant", **SMALL)
    again = ExpertParallel(make_mesh(4), name="constant", **SMALL)
    assert ep.group_id == again.group_id
    assert 0 < ep.group_id < 2**63


def test_two_live_groups_of_one_name():
    mesh = make_mesh(2)
    with ExpertParallel(mesh, name="twice", **SMALL) as ep:
        ep.connect()
        ep.connect()  # idempotent
        with pytest.raises(ValueError, match="already connected"):
            ExpertParallel(mesh, name="twice", **SMALL).connect()
    ExpertParallel(mesh, name="twice", **SMALL).connect()


def test_tracing_needs_no_network():
    mesh = AbstractMesh((4,), ("ep",), axis_types=(AxisType.Auto,))
    ep = ExpertParallel(mesh, name="abstract", **SMALL)
    shape = jax.ShapeDtypeStruct
    out = jax.eval_shape(
        sharded(ep),
        shape((32, 16), jnp.float32),
        shape((32, 3), jnp.int32),
        shape((32, 3), jnp.float32),
        shape((12,), jnp.float32),
        shape((4,), jnp.int32),
    )
    assert out.shape == (32, 16)
    with pytest.raises(ValueError, match="abstract"):
        ep.connect()


def test_compile_ahead_of_time_and_connect_at_first_execution():
    ep = ExpertParallel(make_mesh(4), name="ahead", **SMALL)
    case = Case(ep, 8, 1)
    compiled = jax.jit(sharded(ep)).lower(*case.args).compile()
    assert ep.stats()["state"] == "not connected"
    shardings = compiled.input_shardings[0]
    args = [jax.device_put(a, s) for a, s in zip(case.args, shardings, strict=True)]
    same_bits(compiled(*args).block_until_ready(), case.expected())
    assert ep.stats()["state"] == "connected"
    ep.close()


def test_close_and_reopen_without_recompiling():
    mesh = make_mesh(4)
    ep = ExpertParallel(mesh, name="reopen", **SMALL)
    case = Case(ep, 8, 1)
    step = jax.jit(sharded(ep))
    expected = case.expected()
    same_bits(step(*case.args).block_until_ready(), expected)
    ep.close()
    ep.close()
    assert ep.stats()["state"] == "closed"
    with pytest.raises(jax.errors.JaxRuntimeError, match="GroupClosedError"):
        step(*case.args).block_until_ready()
    with pytest.raises(pplx_jax.GroupClosedError):
        ep.connect()
    for fabric in ("local", "tcp"):
        with ExpertParallel(mesh, name="reopen", fabric=fabric, **SMALL):
            same_bits(step(*case.args).block_until_ready(), expected)
    assert step._cache_size() == 1


def test_a_group_that_is_gone():
    ep = ExpertParallel(make_mesh(2), name="gone", **SMALL)
    case = Case(ep, 4, 1)
    compiled = jax.jit(sharded(ep)).lower(*case.args).compile()
    args = [jax.device_put(a, s) for a, s in zip(case.args, compiled.input_shardings[0], strict=True)]
    del ep, case
    with pytest.raises(jax.errors.JaxRuntimeError, match="GroupClosedError"):
        jax.block_until_ready(compiled(*args))


def test_two_groups_at_once():
    mesh = make_mesh(4)
    with (
        ExpertParallel(mesh, name="one", **SMALL) as one,
        ExpertParallel(mesh, name="two", **SMALL | {"num_experts": 6, "top_k": 2}) as two,
    ):
        a, b = Case(one, 8, 1), Case(two, 8, 2)

        def per_shard(x, i, w, s, j, v, t):
            batch, route = one.dispatch(x, i, w)
            other, other_route = two.dispatch(x, j, v, after=route)
            first = one.combine(experts(batch, s), route, after=other_route)
            return first, two.combine(experts(other, t), other_route, after=first)

        step = jax.jit(jax.shard_map(per_shard, mesh=mesh, in_specs=SPEC, out_specs=SPEC))
        b.x = a.x
        for _ in range(20):
            x, y = jax.block_until_ready(step(*a.args[:4], *b.args[1:4]))
        same_bits(x, a.expected())
        same_bits(y, b.expected())


def test_programs_that_break_alternation():
    """Dispatch without combine, two dispatches before two combines in either order, combine twice."""
    with ExpertParallel(make_mesh(4), name="alternation", **SMALL) as ep:
        a, b = Case(ep, 8, 1), Case(ep, 8, 2)
        b.scale = a.scale

        def per_shard(x, i, w, s, y, j, v):
            ep.dispatch(x, i, w, name="unused")
            first, first_route = ep.dispatch(x, i, w, name="first")
            second, second_route = ep.dispatch(y, j, v, name="second", after=first_route)
            third, _ = ep.dispatch(y, j, v, name="third", after=second_route)
            out = ep.combine(experts(first, s), first_route, after=third)
            again = ep.combine(experts(second, s), second_route, after=out)
            twice = ep.combine(experts(first, s), first_route, after=again)
            return out, again, twice

        step = jax.jit(jax.shard_map(per_shard, mesh=ep.mesh, in_specs=SPEC, out_specs=SPEC))
        for _ in range(10):
            out, again, twice = jax.block_until_ready(step(*a.args[:4], *b.args[:3]))
        ep.check()
        same_bits(out, a.expected())
        same_bits(again, b.expected())
        same_bits(twice, a.expected())


COLLECTIVES = re.compile(
    r"\b(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|ragged-all-to-all)\b"
)


def test_no_collective_in_the_program():
    """Forward and backward consist of our calls alone; the partitioner adds nothing."""
    with ExpertParallel(make_mesh(4), name="hlo", **SMALL) as ep:
        case = Case(ep, 8, 1)
        function = sharded(ep)
        shard = lambda a: jax.device_put(a, jax.NamedSharding(ep.mesh, P("ep")))  # noqa: E731
        args = [shard(a) for a in case.args]
        forward = jax.jit(function).lower(*args).compile().as_text()

        def transpose(cotangent, *args):
            _, back = jax.vjp(lambda x, w, s: function(x, args[1], w, s, args[4]), args[0], args[2], args[3])
            return back(cotangent)

        backward = jax.jit(transpose).lower(args[0], *args).compile().as_text()
        for text in (forward, backward):
            assert "pplx_dispatch" in text
            assert not COLLECTIVES.findall(text)
        assert "pplx_dispatch_transpose" in backward
        assert "pplx_combine_transpose" in backward


def test_rows_bound_and_dropping():
    """on_overflow="drop": every expert keeps its first c rows, with the largest c that fits."""
    ranks, tokens = 2, 6
    config = dict(num_experts=2, top_k=1, hidden=4, max_tokens=tokens, dtype="float32", rows=5)
    with ExpertParallel(make_mesh(ranks), name="drop", on_overflow="drop", **config) as ep:
        case = Case(ep, tokens, 1)
        case.indices[:] = 0  # 12 tokens for expert 0

        def per_shard(x, w, s):
            batch, route = ep.dispatch(x, jnp.zeros((tokens, 1), jnp.int32), w)
            return ep.combine(experts(batch, s), route), batch.num_dropped[None], batch.num_rows[None]

        function = jax.shard_map(per_shard, mesh=ep.mesh, in_specs=SPEC, out_specs=SPEC)
        out, dropped, rows = jax.jit(function)(case.x, case.weights, case.scale)
        kept = np.arange(ranks * tokens) < 5
        assert dropped.tolist() == [7, 0]
        assert rows.tolist() == [5, 0]
        same_bits(out, np.where(kept[:, None], case.expected(), 0).astype(np.float32))
        loss = lambda x, w: function(x, w, case.scale)[0].sum()  # noqa: E731
        d_x, d_w = jax.jit(jax.grad(loss, argnums=(0, 1)))(case.x, case.weights)
        assert (np.asarray(d_x) != 0).any(-1).tolist() == kept.tolist()
        assert (np.asarray(d_w)[:, 0] != 0).tolist() == kept.tolist()


def test_expert_map_places_and_replicates():
    """Experts in another order, and expert 0 twice: the same results."""
    mesh = make_mesh(4)
    table = np.array([[0, 3, 1], [2, 0, 4], [9, 8, 7], [6, 5, -1]])
    with ExpertParallel(mesh, name="map", expert_map=table, **SMALL) as ep:
        case = Case(ep, 8, 1)
        logical = np.zeros(10, np.float32)
        logical[:] = np.random.default_rng(3).normal(size=10)
        case.scale = np.where(table < 0, 0, logical[table]).reshape(-1).astype(np.float32)
        out = jax.jit(sharded(ep))(*case.args)
        chosen = logical[case.indices]
        np.testing.assert_allclose(
            out, case.x * (case.weights * chosen).sum(-1)[:, None], rtol=1e-5, atol=1e-5
        )


def test_memory_is_what_it_says():
    config = pplx_jax.ExchangeConfig(num_experts=256, top_k=8, hidden=7168, max_tokens=128)
    with ExpertParallel(make_mesh(2), name="memory", **SMALL) as ep:
        ep.connect()
        memory = ep.config.memory(2)
        rank = ep.stats()["ranks"][0]
        assert rank["region_bytes"] == memory.regions
        assert rank["staging_bytes"] == memory.staging
    assert config.memory(8).total < 150e6  # 128 tokens a source, two lanes


def test_explicit_mesh_axes():
    mesh = jax.make_mesh((4,), ("ep",), axis_types=(AxisType.Explicit,))
    with ExpertParallel(mesh, name="explicit", **SMALL) as ep, jax.set_mesh(mesh):
        case = Case(ep, 8, 1)
        args = [jax.device_put(a, jax.NamedSharding(mesh, P("ep"))) for a in case.args]
        same_bits(jax.jit(sharded(ep))(*args).block_until_ready(), case.expected())


def test_axis_of_several_names():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("a", "b", "c"))
    with ExpertParallel(mesh, axis=("a", "c"), name="two axes", **SMALL) as ep:
        assert ep.num_ranks == 4
        case = Case(ep, 8, 1)
        args = [jax.device_put(a, jax.NamedSharding(mesh, P(("a", "c")))) for a in case.args]
        same_bits(jax.jit(sharded(ep))(*args).block_until_ready(), case.expected())
