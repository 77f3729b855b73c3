"""Every bad argument is refused before anything moves, with its name, what it was and what is allowed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moe_oracle import SPEC, Case, make_mesh, sharded

import pplx_jax
from pplx_jax import ExchangeConfig, ExpertParallel

GOOD = dict(num_experts=8, top_k=2, hidden=16, max_tokens=8, dtype="float32")


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"num_experts": 0}, ValueError, "num_experts must be in 1..65535, got 0"),
        ({"num_experts": 8.0}, TypeError, "num_experts must be an int"),
        ({"top_k": 0}, ValueError, "top_k must be in 1..8, got 0"),
        ({"top_k": 9}, ValueError, "top_k must be in 1..8, got 9"),
        ({"num_experts": 64, "top_k": 17}, ValueError, "top_k must be in 1..16"),
        ({"top_k": True}, TypeError, "top_k must be an int"),
        ({"hidden": -1}, ValueError, "hidden must be in 1.."),
        ({"max_tokens": 0}, ValueError, "max_tokens must be in 1.."),
        ({"chunk": 9}, ValueError, "chunk must be in 1..8, got 9"),
        ({"chunk": 0}, ValueError, "chunk must be in 1..8, got 0"),
        ({"depth": 0}, ValueError, "depth must be in 1..6"),
        ({"depth": 8}, ValueError, "depth must be in 1..6"),
        ({"rows": 0}, ValueError, "rows must be in 1.."),
        ({"rows": -0.5}, ValueError, "rows as a factor"),
        ({"rows": "all"}, TypeError, "rows must be an int"),
        ({"dtype": "float64"}, ValueError, "dtype must be one of float32, bfloat16, float16, got float64"),
        ({"dtype": "nonsense"}, TypeError, "dtype must be one of float32"),
        ({"layout": "rows"}, ValueError, 'layout must be "ragged" or "padded", got \'rows\''),
        ({"quant": ["fp8"]}, ValueError, "quant must be None"),
        ({"quant": "int8"}, ValueError, 'quant must be None, "fp8" or "fp8_ue8m0", got \'int8\''),
        ({"combine_dtype": "bfloat16"}, ValueError, "combine_dtype must be float32 or dtype, float32, got"),
        ({"alignment": 0}, ValueError, "alignment must be in 1..4096"),
        ({"zero_tail": 1}, TypeError, "zero_tail must be a bool"),
        ({"on_overflow": "ignore"}, ValueError, "on_overflow must be"),
    ],
)
def test_config(fields, error, text):
    with pytest.raises(error, match=text):
        ExchangeConfig(**GOOD | fields)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"axis": "dp"}, ValueError, "axis 'dp' is not an axis of the mesh"),
        ({"axis": ()}, ValueError, "axis must name one or more"),
        ({"axis": None}, TypeError, "axis must be a mesh axis or a tuple of them, got None"),
        (
            {"expert_map": np.zeros((2, 4), int)},
            ValueError,
            r"must be \[4, slots\] or flat, got shape \[2, 4\]",
        ),
        (
            {"expert_map": [[0, 1], [2]]},
            ValueError,
            r"expert_map must be \[4, slots\] or flat, got \[\[0, 1\]",
        ),
        ({"axis": ("ep", "ep")}, ValueError, "distinct"),
        ({"name": ""}, ValueError, "name must be a string of 1 to 64"),
        ({"name": 3}, ValueError, "name must be a string"),
        ({"timeout": 0}, ValueError, "timeout must be a number of seconds > 0"),
        ({"stall_timeout": "long"}, ValueError, "stall_timeout must be a number"),
        ({"fabric": "sim:speed=9"}, ValueError, "fabric option 'speed=9'"),
        ({"fabric": "tcp:endpoints=0"}, ValueError, "endpoints must be in 1..16"),
        ({"fabric": 3}, TypeError, "fabric must be a string"),
        ({"fabric": ":"}, ValueError, "fabric has no name"),
        ({"config": ExchangeConfig(**GOOD)}, TypeError, "not both"),
        ({"expert_map": [0, 1, 2]}, ValueError, "equally many for each of 4 ranks"),
        ({"expert_map": [0] * 8}, ValueError, "places no rank for expert 1"),
        ({"expert_map": [9] * 8}, ValueError, "expert_map must hold -1 or 0..7"),
        ({"expert_map": [0.5] * 8}, ValueError, "expert_map must hold ints"),
        ({"experts": 8}, TypeError, "experts"),
        ({"max_tokens": 1 << 20, "top_k": 8, "num_experts": 4096}, ValueError, "pairs of token"),
    ],
)
def test_group(arguments, error, text):
    ranks = 8 if "top_k" in arguments else 4
    mesh = jax.sharding.AbstractMesh((2048,), ("ep",)) if "top_k" in arguments else make_mesh(ranks)
    with pytest.raises(error, match=text):
        ExpertParallel(mesh, **GOOD | arguments)


def test_experts_per_rank_of_memory():
    with pytest.raises(ValueError, match=r"experts_per_rank must be in 1\.\.65535, got 0"):
        ExchangeConfig(**GOOD).memory(4, experts_per_rank=0)


def test_mesh():
    with pytest.raises(TypeError, match="mesh must be"):
        ExpertParallel([jax.devices()], **GOOD)
    with pytest.raises(TypeError, match="config must be an ExchangeConfig"):
        ExpertParallel(make_mesh(2), config=dict(GOOD))
    with pytest.raises(ValueError, match="at most 2048"):
        ExpertParallel(jax.sharding.AbstractMesh((4096,), ("ep",)), **GOOD)


def arrays(**changes):
    good = {
        "x": jnp.zeros((6, 16), jnp.float32),
        "indices": jnp.zeros((6, 2), jnp.int32),
        "weights": jnp.zeros((6, 2), jnp.float32),
    }
    return good | changes


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"x": np.zeros((6, 8), np.float32)}, ValueError, r"x must be \[T, 16\], got float32\[6, 8\]"),
        ({"x": np.zeros(16, np.float32)}, ValueError, r"x must be \[T, 16\]"),
        ({"x": np.zeros((6, 16), np.float16)}, TypeError, "x must be float32"),
        ({"x": np.zeros((9, 16), np.float32)}, ValueError, "x has 9 tokens, max_tokens is 8"),
        ({"indices": np.zeros((6, 3), np.int32)}, ValueError, r"indices must be \[6, 2\], got"),
        ({"indices": np.zeros((6, 2), np.uint32)}, TypeError, "indices must be int32, got uint32"),
        ({"weights": np.zeros((5, 2), np.float32)}, ValueError, r"weights must be \[6, 2\]"),
        ({"weights": np.zeros((6, 2), np.float16)}, TypeError, "weights must be float32"),
        ({"num_tokens": np.zeros(2, np.int32)}, TypeError, "num_tokens must be an integer scalar"),
        ({"num_tokens": 1.5}, TypeError, "num_tokens must be an integer scalar"),
        ({"scales": np.zeros((6, 1), np.float32)}, ValueError, "scales: the config has quant=None"),
        ({"expert_map": np.zeros(5, np.int32)}, ValueError, r"expert_map must be \[2, 4\] or flat"),
        ({"expert_map": np.zeros(8, np.float32)}, TypeError, "expert_map must hold integers"),
        ({"name": 3}, TypeError, "name must be a string"),
    ],
)
def test_dispatch(changes, error, text):
    ep = ExpertParallel(make_mesh(2), **GOOD)

    def per_shard():
        given = arrays(**changes)
        given["x"] = jax.lax.pcast(jnp.asarray(given["x"]), "ep", to="varying")
        return ep.dispatch(given.pop("x"), given.pop("indices"), given.pop("weights"), **given)

    with pytest.raises(error, match=text):
        jax.eval_shape(jax.shard_map(per_shard, mesh=ep.mesh, in_specs=(), out_specs=SPEC))


def test_outside_shard_map():
    ep = ExpertParallel(make_mesh(2), **GOOD)
    with pytest.raises(ValueError, match=r"call them inside jax\.shard_map.*manual here: none"):
        ep.dispatch(**arrays())


def test_another_mesh():
    ep = ExpertParallel(make_mesh(2), **GOOD)
    function = jax.shard_map(lambda: ep.dispatch(**arrays()), mesh=make_mesh(4), in_specs=(), out_specs=SPEC)
    with pytest.raises(ValueError, match="axis 'ep' has size 4 here, 2 in the group's mesh"):
        jax.eval_shape(function)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda ep, other, y, route: ep.combine(y[:, :8], route), ValueError, "y must be"),
        (lambda ep, other, y, route: ep.combine(y[:3], route), ValueError, "y must be"),
        (
            lambda ep, other, y, route: ep.combine(y.astype(jnp.bfloat16), route),
            TypeError,
            "y must be float32",
        ),
        (lambda ep, other, y, route: ep.combine(y, y), TypeError, "route must come from dispatch"),
        (lambda ep, other, y, route: other.combine(y, route), ValueError, "another group"),
        (lambda ep, other, y, route: ep.combine(y, route, weighted=1), TypeError, "weighted must be a bool"),
        (
            lambda ep, other, y, route: ep.combine(y, route, accumulate=y[:2]),
            ValueError,
            r"accumulate must be \[6, 16\]",
        ),
    ],
)
def test_combine(change, error, text):
    ep = ExpertParallel(make_mesh(2), **GOOD)
    other = ExpertParallel(make_mesh(2), name="another", **GOOD)

    def per_shard():
        given = arrays()
        given["x"] = jax.lax.pcast(given["x"], "ep", to="varying")
        batch, route = ep.dispatch(**given)
        return change(ep, other, batch.tokens, route)

    with pytest.raises(error, match=text):
        jax.eval_shape(jax.shard_map(per_shard, mesh=ep.mesh, in_specs=(), out_specs=SPEC))


def test_replicated_tokens_are_refused():
    """Every rank of the axis would send the same tokens; the error says how to slice them."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("dp", "tp"))
    ep = ExpertParallel(mesh, axis=("dp", "tp"), **GOOD)
    given = arrays(x=jnp.zeros((8, 16), jnp.float32))

    def per_shard(x, slices):
        if slices:
            n = x.shape[0] // jax.lax.axis_size("tp")
            x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index("tp") * n, n)
        shape = (x.shape[0], 2)
        batch, route = ep.dispatch(x, jnp.full(shape, -1, jnp.int32), jnp.ones(shape, jnp.float32))
        return ep.combine(batch.tokens, route)

    specs = {"mesh": mesh, "in_specs": jax.P("dp"), "out_specs": jax.P(("dp", "tp"))}
    with pytest.raises(ValueError, match=r"x is replicated over axis 'tp'.*in_specs=P\(\('dp', 'tp'\)\)"):
        jax.eval_shape(jax.shard_map(lambda x: per_shard(x, False), **specs), given["x"])
    # The recipe in that message.
    out = jax.eval_shape(jax.shard_map(lambda x: per_shard(x, True), **specs), given["x"])
    assert out.shape == (8, 16)


def test_partial_manual_is_refused():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("dp", "ep"))
    ep = ExpertParallel(mesh, **GOOD)

    def per_shard(x):
        shape = (x.shape[0], 2)
        return ep.dispatch(x, jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))[0].tokens

    function = jax.shard_map(per_shard, mesh=mesh, in_specs=SPEC, out_specs=SPEC, axis_names={"ep"})
    with pytest.raises(
        ValueError, match=r"every axis of the mesh manual, 'dp' is not: leave out axis_names="
    ):
        jax.eval_shape(jax.jit(function), jax.ShapeDtypeStruct((8, 16), jnp.float32))


def test_halves():
    ep = ExpertParallel(make_mesh(2), chunk=4, **GOOD)
    other = ExpertParallel(make_mesh(2), name="another", **GOOD)

    def inputs(n):
        indices = np.zeros((n, 2), np.int32)
        return np.zeros((n, 16), np.float32), indices, np.zeros((n, 2), np.float32)

    def refuses(body, error, text, tokens=8):
        function = jax.shard_map(body, mesh=ep.mesh, in_specs=SPEC, out_specs=SPEC)
        with pytest.raises(error, match=text):
            jax.eval_shape(function, *inputs(tokens))

    refuses(ep.dispatch_send, ValueError, "x has 6 tokens and chunk is 4: make chunk at least", tokens=12)
    refuses(lambda *a: ep.dispatch_recv(a[0]), TypeError, "sent must come from dispatch_send")
    refuses(lambda *a: other.dispatch_recv(ep.dispatch_send(*a)), ValueError, "another group's dispatch_send")
    refuses(lambda *a: ep.combine_recv(ep.dispatch_send(*a)), TypeError, "sent must come from combine_send")


def fails_once_then_works(ep, case, broken, text):
    """A data error: this execution gives NaN, the next raises, `check` settles it, then all is well."""
    step = jax.jit(sharded(ep))
    args = list(case.args)
    args[1] = broken
    out = np.asarray(step(*args).block_until_ready())
    assert np.isnan(out).any()
    with pytest.raises(jax.errors.JaxRuntimeError, match="RoutingError"):
        step(*case.args).block_until_ready()
    with pytest.raises(pplx_jax.RoutingError, match=text):
        ep.check()
    ep.check()
    np.testing.assert_array_equal(step(*case.args).block_until_ready(), case.expected())
    return out


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (8, r"indices\[2, 1\] is 8, allowed are -1 and 0\.\.7"),
        (-2, r"indices\[2, 1\] is -2"),
        (1 << 30, r"indices\[2, 1\] is 1073741824"),
        ("same", r"indices\[2, 1\] is \d a second time"),
    ],
)
def test_bad_expert_ids(bad, text):
    with ExpertParallel(make_mesh(4), name="bad ids", **GOOD) as ep:
        case = Case(ep, 8, 1)
        broken = case.indices.copy()
        token = 2 * case.tokens + 2  # on rank 2
        broken[token, 1] = broken[token, 0] if bad == "same" else bad
        out = fails_once_then_works(ep, case, broken, text)
        # All of rank 2's tokens, and those that rank 2 should have handled; the rest is right.
        home = np.arange(len(out)) // case.tokens
        visits = (case.indices // ep.experts_per_rank == 2).any(-1)
        poisoned = np.isnan(out).any(-1)
        assert poisoned.tolist() == ((home == 2) | visits).tolist()
        np.testing.assert_array_equal(out[~poisoned], case.expected()[~poisoned])


def test_more_rows_than_allowed():
    with ExpertParallel(make_mesh(4), name="overflow", rows=20, **GOOD) as ep:
        case = Case(ep, 8, 1)
        crowded = case.indices.copy()
        crowded[:] = [0, 1]
        fails_once_then_works(ep, case, crowded, r"rank 0 receives 64 rows, rows=20.*on_overflow")


def test_bad_num_tokens():
    with ExpertParallel(make_mesh(2), name="count", **GOOD) as ep:
        case = Case(ep, 8, 1)
        step = jax.jit(sharded(ep))
        case.counts[1] = 9
        assert np.isnan(step(*case.args).block_until_ready()).any()
        with pytest.raises(pplx_jax.RoutingError, match=r"num_tokens is 9, allowed are 0\.\.8"):
            ep.check()


@pytest.mark.parametrize("executions", [1, 2], ids=["after one", "raised inside jit"])
def test_leaving_the_context_raises_the_typed_error(executions):
    def program():
        with ExpertParallel(make_mesh(2), name="leave", **GOOD) as ep:
            case = Case(ep, 8, 1)
            case.indices[0, 0] = 99
            for _ in range(executions):
                jax.jit(sharded(ep))(*case.args).block_until_ready()

    with pytest.raises(pplx_jax.RoutingError, match="is 99"):
        program()


def test_tampered_route():
    """A route is made of arrays: nonsense in them is a data error, not a crash."""
    with ExpertParallel(make_mesh(2), name="tampered", **GOOD) as ep:
        case = Case(ep, 8, 1)

        def per_shard(x, i, w, change):
            batch, route = ep.dispatch(x, i, w)
            arrays = route.arrays._replace(slot_rows=route.arrays.slot_rows + change[0])
            return ep.combine(batch.tokens, type(route)(arrays, route.weights, route.group_sizes, route.call))

        step = jax.jit(jax.shard_map(per_shard, mesh=ep.mesh, in_specs=SPEC, out_specs=SPEC))
        args = case.args[:3]
        step(*args, np.zeros(2, np.int32)).block_until_ready()
        ep.check()
        assert np.isnan(step(*args, np.full(2, 1 << 20, np.int32)).block_until_ready()).any()
        with pytest.raises(pplx_jax.RoutingError, match="route's arrays"):
            ep.check()
        assert not np.isnan(step(*args, np.zeros(2, np.int32)).block_until_ready()).any()


def test_missing_provider():
    with pytest.raises(pplx_jax.FabricError, match="nosuch"):
        ExpertParallel(make_mesh(2), name="provider", fabric="nosuch", **GOOD).connect()
