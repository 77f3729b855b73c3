"""A process for each GPU: the same results, and a peer that dies or never comes."""

from __future__ import annotations

import os
import signal
import time

import jax
import numpy as np
import pytest
from gpu import PATHS, PROCESS, SKEWS, SMALL, need
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import PartitionSpec as P
from moe_oracle import Case, dense, make_mesh, sharded
from test_gpu_exchange import check_training
from test_multiprocess import check_rows, error_of, local_rows, on_mesh

from pplx_jax import ExpertParallel
from pplx_jax.testing import run_processes

pytestmark = [pytest.mark.gpu, pytest.mark.multiprocess]


def group(path, name, **options):
    return ExpertParallel(make_mesh(len(jax.devices())), name=name, **SMALL | PATHS[path] | options)


def on_two(function, *args, **options):
    need(2)
    return run_processes(function, 2, args=args, env=PROCESS, timeout=90, **options)


def train(steps):
    """On every path, forward and backward; returns each path's last gradient, for the bits to be compared."""
    gradients = {}
    for path in PATHS:
        with group(path, path) as ep:
            function = sharded(ep)

            def loss(x, i, w, s, c, function=function):
                out = function(x, i, w, s, c)
                return (out**2).sum(), out

            step = jax.jit(jax.value_and_grad(loss, argnums=(0, 2), has_aux=True))
            for seed in range(steps):
                case = Case(ep, (8, 3)[seed % 2], seed, SKEWS[seed % len(SKEWS)])
                (_, out), (d_x, d_w) = step(*[on_mesh(ep, a) for a in case.args])
                check_rows(out, case.expected())
            ep.check(sync=True)

            def wanted(x, w, case=case):
                return (dense(x, case.indices, w, case.scale, case.valid()) ** 2).sum()

            dense_gradients = jax.grad(wanted, argnums=(0, 1))(case.x, case.weights)
            for ours, theirs in zip((d_x, d_w), dense_gradients, strict=True):
                rows, start = local_rows(ours)
                mine = np.asarray(theirs)[start : start + len(rows)]
                np.testing.assert_allclose(rows, mine, rtol=1e-3, atol=1e-3)
            gradients[path] = [local_rows(d_x)[0].tobytes(), local_rows(d_w)[0].tobytes()]
    return len(jax.local_devices()), gradients


def test_every_path():
    for devices, gradients in on_two(train, 30):
        assert devices == 1
        assert gradients["nvlink"] == gradients["shm"] == gradients["tcp"]


def train_beside_collectives(steps):
    with group("nvlink", "collectives") as ep:

        def put(array, spec):
            whole = np.asarray(array)
            sharding = jax.NamedSharding(ep.mesh, spec)
            return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

        check_training(ep, steps, put, lambda state: process_allgather(state, tiled=True), every=10)
    return steps


def test_training_beside_collectives():
    """As in one process: an all-gather of weights and a sum of gradients between the exchanges."""
    assert on_two(train_beside_collectives, 1000) == [1000, 1000]


def victim(path):
    """Rank 1 dies between two steps; what the other sees, and how soon."""
    ep = group(path, "victim", timeout=2.0)
    case = Case(ep, 8, 1)
    args = [on_mesh(ep, a) for a in case.args]
    step = jax.jit(sharded(ep))
    step(*args).block_until_ready()
    ep.check(sync=True)
    if jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    name, text = "nothing", ""
    while name == "nothing" and time.monotonic() - began < 30:
        error_of(lambda: step(*args).block_until_ready())
        name, text, _ = error_of(lambda: ep.check(sync=True))
    took = time.monotonic() - began
    ep.close()
    return name, text, took


@pytest.mark.parametrize("path", PATHS)
def test_a_rank_is_killed(path):
    name, text, took = on_two(victim, path, expect_death={1: signal.SIGKILL})[0]
    assert name in ("PeerError", "TimeoutError")
    assert "rank 1" in text
    assert took < 10


def one_never_comes(path):
    ep = group(path, "never", stall_timeout=1.0)
    ep.connect()
    case = Case(ep, 8, 1)
    args = [on_mesh(ep, a) for a in case.args]
    if jax.process_index() == 1:
        time.sleep(8)  # alive, but elsewhere
        result = error_of(lambda: ep.check(sync=True))
    else:
        out = None

        def run():
            nonlocal out
            out = sharded_step(ep)(*args).block_until_ready()

        error_of(run)
        poisoned = out is None or bool(np.isnan(local_rows(out)[0]).all())
        result = error_of(lambda: ep.check(sync=True)) if poisoned else ("not poisoned", "", 0.0)
    ep.close()
    return result


def sharded_step(ep):
    return jax.jit(sharded(ep))


@pytest.mark.parametrize("path", PATHS)
def test_a_rank_that_never_comes(path):
    (name, text, _), (other, _, _) = on_two(one_never_comes, path)
    assert name == "TimeoutError"
    assert "rank 1" in text
    assert "did not come" in text
    assert other == "TimeoutError"  # it was told


def mismatched(path):
    """Two programs that differ in a call's name."""
    ep = group(path, "mismatch", stall_timeout=5)
    ep.connect()
    name = "gate" if jax.process_index() == 1 else "attention"

    def per_shard(x, i, w):
        batch, route = ep.dispatch(x, i, w, name=name)
        return ep.combine(batch.tokens, route)

    case = Case(ep, 8, 1)
    step = jax.jit(jax.shard_map(per_shard, mesh=ep.mesh, in_specs=P("ep"), out_specs=P("ep")))
    error_of(lambda: step(*[on_mesh(ep, a) for a in case.args[:3]]).block_until_ready())
    result = error_of(lambda: ep.check(sync=True))
    ep.close()
    return result


@pytest.mark.parametrize("path", PATHS)
def test_mismatched_programs(path):
    for name, text, _ in on_two(mismatched, path):
        assert name == "MismatchError"
        assert all(f"'{each}'" in text for each in ("attention", "gate")), text
