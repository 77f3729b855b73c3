"""Programs that users write around the exchange: pipeline stages, unequal branches, export, many ranks."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.export
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from moe_oracle import SPEC, Case, dense, experts, make_mesh, same_bits, sharded

import pplx_jax
from pplx_jax import ExpertParallel
from pplx_jax.testing import run_processes

SMALL = dict(num_experts=10, top_k=3, hidden=16, max_tokens=8, chunk=3, dtype="float32")


def test_pipeline_stages():
    """vmap over stages of a shard_map over ep, the stages on a mesh axis of their own; with gradients."""
    stages = 2
    mesh = Mesh(np.array(jax.devices()).reshape(stages, 4), ("pp", "ep"))
    with ExpertParallel(mesh, name="stages", **SMALL) as ep:
        cases = [Case(ep, 8, seed) for seed in range(stages)]
        x, indices, weights, scale = (
            np.stack(parts) for parts in zip(*(c.args[:4] for c in cases), strict=True)
        )

        def layer(x, indices, weights, scale):
            batch, route = ep.dispatch(x, indices, weights)
            return ep.combine(experts(batch, scale), route)

        one_stage = jax.shard_map(layer, mesh=mesh, in_specs=SPEC, out_specs=SPEC)
        place = jax.NamedSharding(mesh, P("pp", "ep"))
        args = [jax.device_put(a, place) for a in (x, indices, weights, scale)]
        all_stages = jax.vmap(one_stage, spmd_axis_name="pp")
        out = jax.jit(all_stages)(*args)
        for case, got in zip(cases, out, strict=True):
            same_bits(got, case.expected())

        loss = lambda x, w, s: (all_stages(x, args[1], w, s) ** 2).sum()  # noqa: E731
        ours = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(args[0], args[2], args[3])
        for stage, case in enumerate(cases):
            wanted = jax.grad(
                lambda x, w, s, case=case: (dense(x, case.indices, w, s, case.valid()) ** 2).sum(), (0, 1, 2)
            )(case.x, case.weights, case.scale)
            for a, b in zip(ours, wanted, strict=True):
                np.testing.assert_allclose(a[stage], b, rtol=1e-4, atol=1e-4)
        ep.check()


def unequal_branches():
    """Ranks disagree on a cond's predicate: each runs another exchange, and each names both."""
    mesh = make_mesh(len(jax.devices()))
    ep = ExpertParallel(mesh, name="unequal", timeout=20, **SMALL)
    try:
        case = Case(ep, 8, 1)

        def per_shard(x, indices, weights):
            def branch(name):
                def run(x):
                    batch, route = ep.dispatch(x, indices, weights, name=name)
                    return ep.combine(batch.tokens, route)

                return run

            first = jax.lax.axis_index("ep") == 0
            return jax.lax.cond(first, branch("left"), branch("right"), x)

        step = jax.jit(jax.shard_map(per_shard, mesh=mesh, in_specs=SPEC, out_specs=SPEC))
        place = jax.NamedSharding(mesh, SPEC)
        args = [jax.make_array_from_callback(a.shape, place, lambda i, a=a: a[i]) for a in case.args[:3]]
        try:
            jax.block_until_ready(step(*args))
            ep.check()
        except (pplx_jax.MismatchError, jax.errors.JaxRuntimeError, ValueError) as error:
            return str(error)
        return "nothing was raised"
    finally:
        ep.close()


@pytest.mark.multiprocess
def test_cond_with_unequal_predicates(processes):
    texts = processes.run(unequal_branches, 2)
    for text in texts:
        assert "'left'" in text, text
        assert "'right'" in text, text
        assert "all ranks must run the same exchanges" in text, text


def exported_program(path):
    """In another process: the program from its serialised form, on an equal group."""
    exported = jax.export.deserialize(bytearray(Path(path).read_bytes()))
    with ExpertParallel(make_mesh(4), name="export", **SMALL) as ep:
        case = Case(ep, 8, 7)
        place = jax.NamedSharding(ep.mesh, SPEC)
        args = [jax.device_put(a, place) for a in case.args]
        same_bits(jax.jit(exported.call)(*args).block_until_ready(), case.expected())
        ep.check()
        gradient = jax.jit(jax.grad(lambda x: exported.call(x, *args[1:]).sum()))(args[0])
        truth = jax.grad(lambda x: dense(x, *args[1:4], case.valid()).sum())(case.x)
        np.testing.assert_allclose(gradient, truth, rtol=1e-5, atol=1e-5)
    return "done"


@pytest.mark.multiprocess
def test_export_to_another_process(tmp_path):
    """Exporting needs no network; running needs an equal group, wherever it is."""
    ep = ExpertParallel(make_mesh(4), name="export", **SMALL)
    case = Case(ep, 8, 1)
    place = jax.NamedSharding(ep.mesh, SPEC)
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place) for a in case.args]
    exported = jax.export.export(jax.jit(sharded(ep)), disabled_checks=pplx_jax.export_checks())(*shapes)
    assert ep.stats()["state"] == "not connected"
    path = tmp_path / "program"
    path.write_bytes(exported.serialize(vjp_order=1))
    assert run_processes(exported_program, 1, devices_per_process=4, args=(str(path),)) == ["done"]


def many_ranks(ranks):
    mesh = make_mesh(ranks)
    config = dict(num_experts=256, top_k=8, hidden=16, max_tokens=64, chunk=16, dtype="float32", rows=3.0)
    with ExpertParallel(mesh, name="many ranks", fabric="sim:seed=5", **config) as ep:
        step = jax.jit(sharded(ep))
        for seed in range(2):
            case = Case(ep, 64, seed)
            out = np.asarray(step(*case.args).block_until_ready())
            valid = case.valid()
            wanted = np.asarray(dense(case.x, case.indices, case.weights, case.scale, valid))
            np.testing.assert_allclose(out, wanted, rtol=1e-4, atol=1e-5)
        ep.check()
        rank = ep.stats()["ranks"][0]
        memory = ep.config.memory(ranks)
        return rank["region_bytes"], rank["staging_bytes"], memory.regions, memory.staging


@pytest.mark.slow
@pytest.mark.multiprocess
def test_64_ranks_in_chunks():
    """What 64 ranks really allocate is what `memory` says, which at full size stays under 2 GB."""
    ((regions, staging, said_regions, said_staging),) = run_processes(
        many_ranks, 1, devices_per_process=64, args=(64,), timeout=240
    )
    assert (regions, staging) == (said_regions, said_staging)
