"""Who may launch: one thread a group, any number of groups and of unfinished steps; and who is slow."""

from __future__ import annotations

import os
import socket
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from moe_oracle import Case, experts, make_mesh, same_bits, sharded

from pplx_jax import ExpertParallel, MismatchError

SMALL = dict(num_experts=6, top_k=2, hidden=16, max_tokens=8, dtype="float32")


def group(name, ranks, **options):
    return ExpertParallel(make_mesh(ranks), name=name, **SMALL | options)


def slow_step(ep):
    """A step whose experts take tens of milliseconds, between dispatch and combine."""

    def per_shard(x, indices, weights, scale, counts):
        batch, route = ep.dispatch(x, indices, weights, num_tokens=counts[0])
        y = experts(batch, scale)
        big = jnp.full((500, 500), y[0, 0])
        return ep.combine(y + jnp.linalg.norm(big @ big @ big @ big) * 0, route)

    return jax.jit(jax.shard_map(per_shard, mesh=ep.mesh, in_specs=(P("ep"),) * 5, out_specs=P("ep")))


def in_threads(*bodies):
    """Runs all at once; the errors that they raised."""
    errors = []
    start = threading.Barrier(len(bodies))

    def run(body):
        start.wait()
        try:
            body()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_two_threads_on_one_group_raise():
    ep = group("shared", 1)
    case = Case(ep, 8, 1)
    step = slow_step(ep)
    step(*case.args).block_until_ready()

    def body():
        for _ in range(20):
            step(*case.args).block_until_ready()

    errors = in_threads(body, body)
    assert errors
    for error in errors:
        assert "MismatchError" in str(error)
        assert "two threads launched at the same time" in str(error)
        assert "name=" in str(error)
    with pytest.raises(MismatchError, match=r"group 'shared'.*overlap on rank 0"):
        ep.check()
    ep.close()


@pytest.mark.parametrize("ranks", [1, 2])
def test_two_threads_with_a_lock(ranks):
    """Taking turns is legal, whoever launches."""
    with group("turns", ranks) as ep:
        case = Case(ep, 8, 1)
        step = slow_step(ep)
        lock = threading.Lock()

        def body():
            for _ in range(10):
                with lock:
                    same_bits(step(*case.args).block_until_ready(), case.expected())

        assert in_threads(body, body) == []


def test_two_threads_with_two_groups():
    with group("mine", 1) as mine, group("yours", 1) as yours:

        def body(ep, seed):
            def run():
                case = Case(ep, 8, seed)
                step = slow_step(ep)
                for _ in range(10):
                    same_bits(step(*case.args).block_until_ready(), case.expected())

            return run

        assert in_threads(body(mine, 1), body(yours, 2)) == []


@pytest.mark.parametrize("ranks", [1, 4])
def test_one_thread_may_be_steps_ahead(ranks):
    """Fast and slow programs of one thread, launched without waiting, run one after the other."""
    with group("ahead", ranks) as ep:
        case = Case(ep, 8, 1)
        steps = [slow_step(ep), jax.jit(sharded(ep))]
        for _ in range(3):
            for out in [steps[number % 3 != 0](*case.args) for number in range(12)]:
                same_bits(out, case.expected())
        ep.check()


def test_many_launches_back_to_back():
    with group("many", 4) as ep:
        step = jax.jit(sharded(ep))
        cases = [Case(ep, 8, seed) for seed in range(4)]
        expected = [case.expected() for case in cases]
        for number in range(500):
            # More than about 40 unfinished steps hang in XLA's thread pool.
            out = step(*cases[number % 4].args).block_until_ready()
            if number % 50 < 4:
                same_bits(out, expected[number % 4])
        ep.check()
        assert ep.stats()["ranks"][0]["exchanges"] == 1000


def late(seconds, steps):
    """Rank 2 comes late to every step; what this process says of it."""
    with ExpertParallel(make_mesh(3), name="late", fabric="tcp", **SMALL) as ep:
        case = Case(ep, 8, 1)
        sharding = jax.NamedSharding(ep.mesh, P("ep"))
        args = [jax.make_array_from_callback(a.shape, sharding, lambda i, a=a: a[i]) for a in case.args]
        step = jax.jit(sharded(ep))
        step(*args).block_until_ready()
        before = ep.stats()
        for _ in range(steps):
            if jax.process_index() == 2:
                time.sleep(seconds)
            step(*args).block_until_ready()
        stats = ep.stats()
        mine, then = stats["ranks"][0]["peers"], before["ranks"][0]["peers"]
        waited = [new["waited_seconds"] - old["waited_seconds"] for new, old in zip(mine, then, strict=True)]
        return stats, waited, os.getpid()


@pytest.mark.multiprocess
def test_the_slowest_rank_is_named(processes):
    seconds, steps = 0.5, 6
    results = processes.run(late, 3, seconds, steps)
    _, _, culprit = results[2]
    for rank, (stats, waited, _) in enumerate(results):
        peers = stats["ranks"][0]["peers"]
        assert waited[rank] == 0
        for other, peer in enumerate(peers):
            assert peer["longest_wait_seconds"] <= peer["waited_seconds"]
            assert peer["mean_wait_seconds"] * stats["ranks"][0]["exchanges"] == pytest.approx(
                peer["waited_seconds"]
            )
            assert (peer["sent_bytes"] > 0) == (peer["received_bytes"] > 0) == (other != rank)
        if rank == 2:
            assert max(waited) < seconds * steps / 2  # the others were there already
            continue
        assert waited[2] > seconds * steps * 0.8
        slowest = stats["slowest"]
        assert slowest["rank"] == 2
        assert slowest["process"] == f"{socket.gethostname()} pid {culprit}"
        assert slowest["seconds"] == peers[2]["waited_seconds"]
        assert slowest["longest"] > seconds * 0.8
        straggler = stats["straggler"]
        assert straggler["rank"] == 2
        assert straggler["process"] == slowest["process"]
        assert straggler["seconds"] == peers[2]["recent_wait_seconds"] > 0


def test_nobody_is_slow():
    with group("alone", 1) as ep:
        assert ep.stats()["slowest"] is None
        case = Case(ep, 8, 1)
        np.asarray(jax.jit(sharded(ep))(*case.args))
        assert ep.stats()["slowest"] is None
