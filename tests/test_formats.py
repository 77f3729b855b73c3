"""float16, float8 with scales, the padded layout, a wider dtype on the way home: bit for bit."""

from __future__ import annotations

from itertools import count

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moe_oracle import SPEC, Case, dense, dequantized, experts, make_mesh, quantized, same_bits, sharded

from pplx_jax import ExchangeConfig, ExpertParallel, RoutingError

_names = (f"formats{i}" for i in count())
SHAPE = dict(num_experts=10, top_k=3, hidden=136, max_tokens=9)
SKEWS = ["uniform", "zipf", "all to one", "holes", "nothing", "ragged"]


def group(ranks: int = 4, **fields) -> ExpertParallel:
    return ExpertParallel(make_mesh(ranks), name=next(_names), **SHAPE | fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": "float16"},
        {"dtype": "float16", "combine_dtype": "float32"},
        {"dtype": "bfloat16", "combine_dtype": "float32", "chunk": 4},
        {"dtype": "float32", "layout": "padded"},
        {"dtype": "bfloat16", "layout": "padded", "alignment": 8, "chunk": 2},
        {"dtype": "bfloat16", "quant": "fp8"},
        {"dtype": "bfloat16", "quant": "fp8_ue8m0", "chunk": 4},
        {"dtype": "float32", "quant": "fp8", "hidden": 77, "layout": "padded"},
        {"dtype": "float16", "quant": "fp8_ue8m0", "combine_dtype": "float32", "alignment": 4},
    ],
    ids=str,
)
def test_grid(fields):
    with group(**fields) as ep:
        step = jax.jit(sharded(ep))
        for seed, skew in enumerate(SKEWS):
            case = Case(ep, (9, 4)[seed % 2], seed, skew)
            same_bits(step(*case.args).block_until_ready(), case.expected())
        ep.check()


@pytest.mark.parametrize("quant", ["fp8", "fp8_ue8m0"])
@pytest.mark.parametrize("given", [False, True], ids=["quantised inside", "given"])
def test_quantised_batch(quant, given):
    """Tokens and scales arrive as they were quantised; values are what they stand for."""
    with group(quant=quant, dtype="bfloat16", alignment=4) as ep:
        case = Case(ep, 9, 3, "holes")
        tokens, scales = quantized(case)
        config = ep.config

        def per_shard(x, scales, indices, weights):
            batch, route = ep.dispatch(x, indices, weights, scales=scales if given else None)
            home = ep.combine(batch.values, route, weighted=False)
            return batch.tokens, batch.scales, batch.values, home

        step = jax.jit(jax.shard_map(per_shard, mesh=ep.mesh, in_specs=SPEC, out_specs=SPEC))
        x = tokens if given else case.x
        rows, row_scales, values, home = step(x, scales, case.indices, case.weights)
        assert rows.dtype == config.token_dtype == jnp.float8_e4m3fn
        assert row_scales.dtype == config.scale_dtype
        rows, row_scales = np.asarray(rows), np.asarray(row_scales)
        same_bits(values, dequantized(config, rows, row_scales))
        # Every row that holds a token is one of the quantised tokens with its scales; the rest is zero.
        wanted = {tokens[t].tobytes() + scales[t].tobytes() for t in range(len(tokens))}
        got = [rows[m].tobytes() + row_scales[m].tobytes() for m in range(len(rows))]
        held = [row for row in got if row.strip(b"\0")]
        assert set(held) <= wanted
        assert len(held) == (case.indices >= 0).sum()
        counts = (case.indices >= 0).sum(-1)
        exact = dequantized(config, tokens, scales).astype(np.float32) * counts[:, None]
        np.testing.assert_allclose(np.asarray(home, np.float32), exact, rtol=1e-2)


def test_straight_through():
    """Gradients pass quantisation as if it were not there, in the config's dtype."""
    with group(quant="fp8", dtype="float32", hidden=32) as ep:
        case = Case(ep, 9, 5, "ragged")
        cotangent = np.random.default_rng(5).normal(size=case.x.shape).astype(np.float32)

        def ours(x, w, s):
            return (sharded(ep)(x, case.indices, w, s, case.counts) * cotangent).sum()

        values = dequantized(ep.config, *quantized(case))

        def wanted(x, w, s):
            through = x + jax.lax.stop_gradient(values - x)
            return (dense(through, case.indices, w, s, case.valid()) * cotangent).sum()

        gradients = [
            jax.jit(jax.grad(f, argnums=(0, 1, 2)))(case.x, case.weights, case.scale) for f in (ours, wanted)
        ]
        for a, b in zip(*gradients, strict=True):
            assert a.dtype == jnp.float32
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_what_has_no_derivative_says_so():
    with group(quant="fp8", dtype="float32", hidden=32) as ep:
        case = Case(ep, 9, 5)
        tokens, scales = quantized(case)

        def loss(part, scales):
            def per_shard(x, scales, indices, weights):
                batch, route = ep.dispatch(x.astype(jnp.float8_e4m3fn), indices, weights, scales=scales)
                out = ep.combine(part(batch), route)
                return jax.lax.psum((out**2).sum(), "ep")

            function = jax.shard_map(per_shard, mesh=ep.mesh, in_specs=SPEC, out_specs=jax.P())
            return lambda x, w: function(x, scales, case.indices, w)

        x = tokens.astype(np.float32)
        differentiable = loss(lambda batch: batch.values, scales)
        with pytest.raises(TypeError, match=r"dispatch with scales= has no derivative in x and scales"):
            jax.jit(jax.grad(differentiable))(x, case.weights)
        # The router's weights have one.
        gradient = jax.jit(jax.grad(differentiable, argnums=1))(x, case.weights)
        assert np.abs(gradient).min() > 0

        def per_shard(x, indices, weights):
            batch, route = ep.dispatch(x, indices, weights)
            return ep.combine(batch.tokens.astype(jnp.float32), route)

        function = jax.shard_map(per_shard, mesh=ep.mesh, in_specs=SPEC, out_specs=SPEC)
        with pytest.raises(TypeError, match=r"no derivative: use batch\.values"):
            jax.jit(jax.grad(lambda x: function(x, case.indices, case.weights).sum()))(case.x)


@pytest.mark.parametrize("given", [{"rows": 3}, {"rows": 0.6}], ids=str)
def test_padded_layout(given):
    """[EL, rows, H], each expert's first rows kept, counts, and gradients of what was kept."""
    ranks, tokens = 4, 9
    fields = {"layout": "padded", "on_overflow": "drop", "dtype": "float32", "hidden": 4}
    with group(ranks, **fields | given) as ep:
        case = Case(ep, tokens, 2, "zipf")
        case.x[:] = np.arange(1, ranks * tokens + 1)[:, None]  # a row names its token
        room = ep.config.rows_per_expert(ranks)
        assert room == (3 if given["rows"] == 3 else int(np.ceil(0.6 * ranks * tokens * 3 / 10)))

        def per_shard(x, indices, weights, scale):
            batch, route = ep.dispatch(x, indices, weights)
            counts = jnp.stack([batch.num_rows, batch.num_dropped])
            out = ep.combine(experts(batch, scale), route)
            return batch.tokens, batch.weights, batch.group_sizes, counts, out

        function = jax.shard_map(per_shard, mesh=ep.mesh, in_specs=SPEC, out_specs=SPEC)
        rows, weights, sizes, counts, out = jax.jit(function)(*case.args[:4])
        assert rows.shape == (ranks * ep.experts_per_rank, room, 4)
        kept = np.zeros(case.indices.shape, bool)
        for expert in range(10):
            where = np.argwhere(case.indices == expert)[:room]
            kept[tuple(where.T)] = True
            assert sizes[expert] == len(where)
            assert rows[expert, :, 0].tolist() == [t + 1 for t, _ in where] + [0] * (room - len(where))
            assert weights[expert, : len(where)].tolist() == case.weights[tuple(where.T)].tolist()
        counts = np.asarray(counts).reshape(ranks, 2)
        assert counts.sum(0).tolist() == [kept.sum(), (~kept).sum()]
        assert (~kept).any()
        wanted = lambda x, w, s: dense(x, np.where(kept, case.indices, -1), w, s, case.valid())  # noqa: E731
        np.testing.assert_allclose(out, wanted(case.x, case.weights, case.scale), rtol=1e-5)
        both = []
        for f in (lambda x, w, s: function(x, case.indices, w, s)[4], wanted):
            loss = lambda x, w, s, f=f: (f(x, w, s) ** 2).sum()  # noqa: E731
            both.append(jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(case.x, case.weights, case.scale))
        for a, b in zip(*both, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4)


def test_padded_overflow_raises():
    with group(2, layout="padded", rows=2, dtype="float32") as ep:
        case = Case(ep, 9, 1, "all to one")
        assert np.isnan(np.asarray(jax.jit(sharded(ep))(*case.args))).any()
        with pytest.raises(RoutingError, match=r"for one expert, room is for 2: raise rows="):
            ep.check()


def test_memory_of_formats():
    plain = ExchangeConfig(num_experts=256, top_k=8, hidden=7168, max_tokens=128)
    fp8 = ExchangeConfig(num_experts=256, top_k=8, hidden=7168, max_tokens=128, quant="fp8")
    wide = ExchangeConfig(num_experts=256, top_k=8, hidden=7168, max_tokens=128, combine_dtype="float32")
    assert fp8.memory(8).tokens == plain.num_rows(8) * (7168 + 56 * 4)
    assert plain.memory(8).tokens == plain.num_rows(8) * 7168 * 2
    assert wide.memory(8).regions > 1.9 * plain.memory(8).regions
    assert fp8.num_scales == 56
    assert plain.num_scales == 0


def test_bounded_memory_at_64_ranks():
    """The figure that users size hosts by: chunked, it stays under 2 GB."""
    config = ExchangeConfig(num_experts=256, top_k=8, hidden=7168, max_tokens=4096, rows=2.0)
    memory = config.memory(64)
    assert config.chunk == 512
    assert memory.total < 2e9
    whole = ExchangeConfig(num_experts=256, top_k=8, hidden=7168, max_tokens=4096, rows=2.0, chunk=4096)
    assert whole.memory(64).total > 7 * memory.total
