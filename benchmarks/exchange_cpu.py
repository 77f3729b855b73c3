"""dispatch + combine on CPU against what JAX offers for it: a capacity-padded MoE over ``lax.all_to_all``.

    python benchmarks/exchange_cpu.py [--tokens 128] [--hidden 1024] [--experts 32] [--top-k 4]

Starts the processes itself; every contender runs in the same ones, in turns of ten steps, with new routing
each step. A step is one jitted dispatch + combine, waited for; the experts give back what they get, so that
only the exchange is timed. Reported: median over turns of the slowest rank's time a step. (Single steps would
time how far apart the ranks start: with more processes than cores that is milliseconds.) The peer is
``all_to_all`` with every (token, expert) copied to a [R, E/R * capacity, H] buffer, capacity = 1.25 x the
balanced load; it drops what exceeds that, ours may not drop. Nobody quantises. The floor is the time that
copying the wire bytes twice (into and out of the network) takes at the memcpy rate measured in the same run,
all ranks sharing the machine's cores.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pplx_jax import ExpertParallel
from pplx_jax.testing import run_processes

CAPACITY = 1.25
STEPS = 10  # a turn


def routing(seed: int, tokens: int, experts: int, top_k: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.argsort(rng.random((tokens, experts)), axis=1)[:, :top_k].astype(np.int32)


def ours(ep: ExpertParallel) -> Callable[..., Any]:
    def step(x: Any, indices: Any, weights: Any) -> Any:
        batch, route = ep.dispatch(x, indices, weights)
        return ep.combine(batch.tokens, route)

    return step


def padded(ranks: int, experts: int, top_k: int, tokens: int) -> Callable[..., Any]:
    """Positions by a cumulative sum, scatter into [E, capacity, H], all_to_all there and back."""
    capacity = int(np.ceil(CAPACITY * tokens * top_k / experts))

    def step(x: Any, indices: Any, weights: Any) -> Any:
        flat = indices.reshape(-1)
        hot = jax.nn.one_hot(flat, experts, dtype=jnp.int32)
        position = jnp.take_along_axis(jnp.cumsum(hot, 0) - hot, flat[:, None], 1)[:, 0]
        slot = jnp.where(position < capacity, flat * capacity + position, experts * capacity)
        source = jnp.repeat(x, top_k, axis=0)
        buffer = jnp.zeros((experts * capacity, x.shape[1]), x.dtype).at[slot].set(source, mode="drop")
        buffer = buffer.reshape(ranks, -1, x.shape[1])
        there = jax.lax.all_to_all(buffer, "ep", 0, 0)
        back = jax.lax.all_to_all(there, "ep", 0, 0).reshape(experts * capacity, -1)
        rows = back.at[slot].get(mode="fill", fill_value=0).reshape(*indices.shape, -1)
        return (rows.astype(jnp.float32) * weights[..., None]).sum(1).astype(x.dtype)

    return step


def memcpy_rate() -> float:
    """Bytes per second that one core copies, out of cache."""
    source, target = np.ones(1 << 26, np.uint8), np.empty(1 << 26, np.uint8)
    times = []
    for _ in range(8):
        began = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - began)
    return source.nbytes / min(times)


def rank(options: argparse.Namespace) -> dict[str, Any]:
    """What one process measures: seconds of every step by contender."""
    devices = np.array(jax.devices())
    ranks, mesh = len(devices), Mesh(devices, ("ep",))
    tokens, hidden, experts, top_k = options.tokens, options.hidden, options.experts, options.top_k
    config = {
        "num_experts": experts,
        "top_k": top_k,
        "hidden": hidden,
        "max_tokens": tokens,
        "dtype": options.dtype,
        "rows": CAPACITY * 1.6,  # random routing exceeds the peer's capacity; ours may not drop
        "zero_tail": False,  # the grouped GEMM reads no row past the groups
    }
    groups = {
        f"pplx_jax {fabric}": ExpertParallel(mesh, name=fabric, fabric=fabric, **config)
        for fabric in ("shm", "tcp")
    }
    steps = {name: ours(ep) for name, ep in groups.items()}
    steps["all_to_all"] = padded(ranks, experts, top_k, tokens)
    jitted = {
        name: jax.jit(jax.shard_map(step, mesh=mesh, in_specs=P("ep"), out_specs=P("ep")))
        for name, step in steps.items()
    }

    def put(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, NamedSharding(mesh, P("ep")), lambda i: array[i])

    rng = np.random.default_rng(0)
    total = ranks * tokens
    x = put(np.asarray(jnp.asarray(rng.normal(size=(total, hidden)), options.dtype)))
    weights = put(rng.random((total, top_k), np.float32))
    routings = [routing(seed, total, experts, top_k) for seed in range(8)]
    indices = [put(one) for one in routings]
    seconds: dict[str, list[float]] = {name: [] for name in jitted}
    for turn in range(1 + options.turns):
        for name, function in jitted.items():
            # Lines the ranks up and, in the first turn, compiles.
            jax.block_until_ready(function(x, indices[0], weights))
            began = time.perf_counter()
            for step in range(STEPS):
                jax.block_until_ready(function(x, indices[step % len(indices)], weights))
            if turn:
                seconds[name].append((time.perf_counter() - began) / STEPS)
    sent = {}
    for name, ep in groups.items():
        ep.check()
        peers = ep.stats()["ranks"][0]["peers"]
        sent[name] = sum(peer["sent_bytes"] for peer in peers) / ((1 + options.turns) * (1 + STEPS))
        ep.close()
    row = hidden * np.dtype(options.dtype).itemsize
    capacity = int(np.ceil(CAPACITY * tokens * top_k / experts))
    sent["all_to_all"] = 2 * experts * capacity * row * (ranks - 1) / ranks
    return {"seconds": seconds, "sent": sent, "memcpy": memcpy_rate(), "logical": 2 * tokens * top_k * row}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    options = parser.parse_args(arguments)
    results = run_processes(rank, options.processes, args=(options,), timeout=600)

    cores = len(os.sched_getaffinity(0))
    copy = statistics.median(result["memcpy"] for result in results)
    print(
        f"{options.processes} processes on {cores} cores, {options.tokens} tokens a rank, hidden "
        f"{options.hidden}, {options.experts} experts, top-{options.top_k}, {options.dtype}; memcpy "
        f"{copy / 1e9:.1f} GB/s; logical {results[0]['logical'] / 1e6:.2f} MB a rank and step"
    )
    print(f"{'':<16}{'median us':>11}{'p90 us':>9}{'wire MB/rank':>14}{'floor us':>10}{'all_to_all /':>14}")
    slowest = {
        name: [max(times) for times in zip(*(r["seconds"][name] for r in results), strict=True)]
        for name in results[0]["seconds"]
    }
    peer = statistics.median(slowest["all_to_all"])
    for name, times in slowest.items():
        median = statistics.median(times)
        sent = statistics.mean(result["sent"][name] for result in results)
        floor = 2 * sent * options.processes / min(cores, options.processes) / copy
        p90 = statistics.quantiles(times, n=10)[-1]
        print(
            f"{name:<16}{median * 1e6:>11.0f}{p90 * 1e6:>9.0f}{sent / 1e6:>14.2f}{floor * 1e6:>10.0f}"
            f"{peer / median:>13.2f}x"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
