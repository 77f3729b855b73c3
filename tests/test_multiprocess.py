"""Ranks in several processes: results, mismatches, peers that die, stop or never come, caches."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from moe_oracle import Case, dense, make_mesh, same_bits, sharded

from pplx_jax import ExpertParallel
from pplx_jax.testing import run_processes

pytestmark = pytest.mark.multiprocess
SMALL = dict(num_experts=10, top_k=3, hidden=16, max_tokens=8, chunk=5, dtype="float32")


def group(name, **options):
    return ExpertParallel(make_mesh(len(jax.devices())), name=name, **SMALL | options)


def on_mesh(ep, array):
    sharding = jax.NamedSharding(ep.mesh, P("ep"))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def local_rows(array):
    """This process's shards, in mesh order, as one array with where they lie."""
    shards = sorted(array.addressable_shards, key=lambda s: s.index[0].start or 0)
    return np.concatenate([np.asarray(s.data) for s in shards]), shards[0].index[0].start or 0


def check_rows(array, expected):
    rows, start = local_rows(array)
    same_bits(rows, expected[start : start + len(rows)])


def train(fabric, steps, **options):
    """Steps with new routing each, forward and backward; returns this process's last gradient."""
    with group(f"train {fabric}", fabric=fabric, **options) as ep:
        function = sharded(ep)

        def loss(x, i, w, s, c):
            out = function(x, i, w, s, c)
            return (out.astype(np.float32) ** 2).sum(), out

        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 2, 3), has_aux=True))
        skews = ["uniform", "zipf", "all to one", "holes", "nothing", "ragged"]
        for seed in range(steps):
            case = Case(ep, (8, 3)[seed % 2], seed, skews[seed % len(skews)])
            args = [on_mesh(ep, a) for a in case.args]
            (_, out), gradients = jax.block_until_ready(step(*args))
            check_rows(out, case.expected())
        ep.check()
        truth = jax.grad(
            lambda x, w, s: (dense(x, case.indices, w, s, case.valid()) ** 2).sum(), argnums=(0, 1, 2)
        )(case.x.astype(np.float32), case.weights, case.scale)
        rows = [local_rows(g) for g in gradients]
        for (mine, start), all_of_it in zip(rows, truth, strict=True):
            if ep.config.dtype == np.float32:
                np.testing.assert_allclose(
                    mine, np.asarray(all_of_it)[start : start + len(mine)], rtol=1e-3, atol=1e-3
                )
        stats = ep.stats()
        return [mine.tobytes() for mine, _ in rows], stats["fabric"], stats["ranks"][0]["exchanges"]


@pytest.mark.parametrize(("count", "devices"), [(2, 1), (4, 1), (2, 2)])
def test_every_fabric(processes, count, devices):
    seen = {}
    for fabric in ("tcp", "shm", "tcp:endpoints=4", "auto"):
        results = processes.run(train, count, fabric, 12, devices_per_process=devices)
        seen[fabric] = [gradient for gradient, _, _ in results]
        assert "libfabric" in results[0][1]
    assert all(result == seen["tcp"] for result in seen.values())


def test_bfloat16(processes):
    """Byte for byte the same as in one process."""
    many = processes.run(train, 2, "tcp", 4, dtype="bfloat16", devices_per_process=2)
    one = train("local", 4, dtype="bfloat16") if len(jax.devices()) == 4 else None
    single = processes.run(train, 1, "local", 4, dtype="bfloat16", devices_per_process=4)
    assert one is None
    for part in range(3):
        assert b"".join(rank[0][part] for rank in many) == single[0][0][part]


@pytest.mark.slow
def test_many_steps(processes):
    results = processes.run(train, 4, "shm", 120, timeout=240)
    assert all(exchanges >= 480 for _, _, exchanges in results)


def error_of(function):
    """Type and text of what a rank's user sees: from check(), and from the next execution."""
    began = time.monotonic()
    try:
        function()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - began
    return "nothing", "", time.monotonic() - began


def mismatched():
    """Ranks 0 and 1 run different programs; rank 2 runs rank 0's."""
    ep = group("mismatch", fabric="tcp", stall_timeout=5)
    ep.connect()

    def per_shard(x, i, w):
        name = "gate" if jax.process_index() == 1 else "attention"
        batch, route = ep.dispatch(x, i, w, name=name)
        return ep.combine(batch.tokens, route)

    case = Case(ep, 8, 1)
    step = jax.jit(jax.shard_map(per_shard, mesh=ep.mesh, in_specs=P("ep"), out_specs=P("ep")))
    args = [on_mesh(ep, a) for a in case.args[:3]]
    out, _ = local_rows(step(*args))
    first = error_of(ep.check)
    second = error_of(lambda: step(*args).block_until_ready())
    ep.close()
    return bool(np.isnan(out).all()), first, second


def test_mismatched_programs(processes):
    for poisoned, typed, inside in processes.run(mismatched, 3):
        assert poisoned
        assert typed[0] == "MismatchError"
        assert "'gate'" in typed[1]
        assert "'attention'" in typed[1]
        assert inside[0] in ("JaxRuntimeError", "ValueError")  # the latter on JAX's fast path
        assert "MismatchError" in inside[1]


def configured_differently():
    return error_of(group("config", fabric="tcp", chunk=2 + jax.process_index()).connect)


def test_configured_differently(processes):
    for name, text, seconds in processes.run(configured_differently, 2):
        assert name == "MismatchError"
        assert "chunk=2" in text
        assert "chunk=3" in text
        assert seconds < 20  # at once, if this machine is not busy


def one_never_comes():
    ep = group("never", fabric="tcp", stall_timeout=1.0)
    ep.connect()
    case = Case(ep, 8, 1)
    step = jax.jit(sharded(ep))
    args = [on_mesh(ep, a) for a in case.args]
    if jax.process_index() == 2:
        until = time.monotonic() + 60
        while (result := error_of(ep.check))[0] == "nothing" and time.monotonic() < until:
            time.sleep(0.1)  # alive, but elsewhere
    else:
        step(*args).block_until_ready()
        result = error_of(ep.check)
        again = time.monotonic()
        error_of(lambda: step(*args).block_until_ready())
        assert time.monotonic() - again < 5
    ep.close()
    return result


def test_a_rank_that_never_comes(processes):
    results = processes.run(one_never_comes, 3)
    for name, text, _ in results[:2]:
        assert name == "TimeoutError"
        assert re.search(r"group 'never', exchange 0, dispatch.*rank 2 \(.*did not come within 3", text)
    assert results[2][0] == "TimeoutError"  # the others told it


def victim(how, fabric):
    """Rank 1 dies, or stops, between two steps; what the others see, and how soon."""
    ep = group(f"victim {how} {fabric}", fabric=fabric, timeout=2.0)
    case = Case(ep, 8, 1)
    args = [on_mesh(ep, a) for a in case.args]
    step = jax.jit(sharded(ep))
    step(*args).block_until_ready()
    if jax.process_index() == 1:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        # Wakes up again after twice the timeout.
        threading.Thread(target=lambda: os.system(f"sleep 5; kill -CONT {os.getpid()}")).start()
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGSTOP)
    began = time.monotonic()
    for _ in range(100):
        try:
            step(*args).block_until_ready()
        except (jax.errors.JaxRuntimeError, ValueError):
            break
    took = time.monotonic() - began
    name, text, _ = error_of(ep.check)
    ep.close()
    # New groups among the survivors' own devices still work in this process.
    alone = ExpertParallel(jax.sharding.Mesh(np.array(jax.local_devices()), ("ep",)), name="alone", **SMALL)
    with alone:
        local = Case(alone, 8, 1)
        same_bits(jax.jit(sharded(alone))(*local.args), local.expected())
    return name, text, took


@pytest.mark.parametrize("fabric", ["tcp", "shm"])
def test_a_rank_is_killed(fabric):
    results = run_processes(victim, 3, args=("kill", fabric), expect_death={1: signal.SIGKILL}, timeout=90)
    for rank in (0, 2):
        name, text, took = results[rank]
        assert name == "PeerError"
        assert "rank 1" in text
        assert took < 8


def test_a_rank_is_stopped():
    results = run_processes(victim, 3, args=("stop", "tcp"), timeout=90, allow_failures=True)
    for rank in (0, 2):
        name, text, took = results[rank].value
        assert name == "PeerError"
        assert "rank 1" in text
        assert "no sign of life" in text
        assert took < 8


def closes_early():
    ep = group("early", fabric="tcp")
    case = Case(ep, 8, 1)
    args = [on_mesh(ep, a) for a in case.args]
    step = jax.jit(sharded(ep))
    step(*args).block_until_ready()
    if jax.process_index() == 0:
        ep.close()
        return "closed", "", 0.0
    began = time.monotonic()
    step(*args).block_until_ready()
    name, text, _ = error_of(ep.check)
    ep.close()
    return name, text, time.monotonic() - began


def test_a_rank_closes_early(processes):
    _, (name, text, took) = processes.run(closes_early, 2)
    assert name == "PeerError"
    assert "rank 0" in text
    assert "closed the group" in text
    assert took < 5


def compiles(cache):
    """How often XLA compiled something for a group's program."""
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    misses = []
    jax.monitoring.register_event_listener(
        lambda event, **_: misses.append(event) if event == "/jax/compilation_cache/cache_misses" else None
    )
    with group("cached", fabric="tcp") as ep:
        case = Case(ep, 8, 1)
        args = [on_mesh(ep, a) for a in case.args]
        misses.clear()
        out = jax.jit(sharded(ep))(*args)
        check_rows(out, case.expected())
    return len(misses), len(list(Path(cache).iterdir()))


@pytest.mark.slow
def test_a_second_run_compiles_nothing(tmp_path):
    first = run_processes(compiles, 2, args=(str(tmp_path),))
    second = run_processes(compiles, 2, args=(str(tmp_path),))
    assert any(misses for misses, _ in first)
    assert [misses for misses, _ in second] == [0, 0]
    assert [entries for _, entries in second] == [entries for _, entries in first][-1:] * 2


def alone_on_a_mesh_of_many():
    return error_of(group("local", fabric="local").connect)


def test_in_process_fabrics_refuse_several_processes(processes):
    for name, text, _ in processes.run(alone_on_a_mesh_of_many, 2):
        assert name == "ValueError"
        assert "reaches only ranks of one process" in text
