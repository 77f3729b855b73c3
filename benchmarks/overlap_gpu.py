"""What the halves of an exchange hide: matrix products between a dispatch's send and its recv.

    python benchmarks/overlap_gpu.py [--tokens 1024] [--products 8] [--fabrics nvlink,shm] [--trace FOLDER]

Per path, in microseconds a step, medians of programs of ten steps, in turns: the exchange (dispatch and
combine) alone; the products alone, as those of a shared expert; one after the other; the halves, with the
products between send and recv of the dispatch; and the exchange on a stream of its own (`compute_on`), beside
the products. `hidden` is how much of the shorter of the two has vanished with the better of these two.
With --trace the programs are recorded by JAX's profiler, to be opened in Perfetto.

On NVLink a send moves the rows itself, so that only the wait for peers can be hidden; by proxy the host moves
them while the GPU multiplies.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compute_on import compute_on
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pplx_jax import ExpertParallel

STEPS = 10


def programs(ep: ExpertParallel, products: int) -> dict[str, Any]:
    def multiply(x: jax.Array, matrix: jax.Array) -> jax.Array:
        for _ in range(products):
            x = (x @ matrix).astype(x.dtype)
        return x

    def exchange(x: Any, i: Any, w: Any, matrix: Any) -> Any:
        batch, route = ep.dispatch(x, i, w)
        return ep.combine(batch.values, route)

    def one_after_the_other(x: Any, i: Any, w: Any, matrix: Any) -> Any:
        batch, route = ep.dispatch(x, i, w)
        out = ep.combine(batch.values, route)
        return out + multiply(jax.lax.optimization_barrier((x, out))[0], matrix)

    def overlapped(x: Any, i: Any, w: Any, matrix: Any) -> Any:
        sent = ep.dispatch_send(x, i, w)
        # The products wait for the send to be enqueued, the recv for them: the order on the GPU.
        ticket, x = jax.lax.optimization_barrier((sent, x))
        shared = multiply(x, matrix)
        ticket, shared = jax.lax.optimization_barrier((ticket, shared))
        batch, route = ep.dispatch_recv(ticket)
        return ep.combine(batch.values, route) + shared

    def on_a_stream(x: Any, i: Any, w: Any, matrix: Any) -> Any:
        apart = compute_on(
            lambda *operands: exchange(*operands, None),
            compute_type="gpu_stream:1",
            out_memory_spaces=jax.memory.Space.Device,
        )
        return apart(x, i, w) + multiply(x, matrix)

    def chain(step: Any) -> Any:
        def steps(x: Any, indices: Any, weights: Any, matrix: Any) -> Any:
            for i in range(STEPS):
                x = step(x, indices[i], weights[i], matrix) * jnp.asarray(0.5, x.dtype)
            return x

        specs = (P("ep"), P(None, "ep"), P(None, "ep"), P())
        return jax.jit(jax.shard_map(steps, mesh=ep.mesh, in_specs=specs, out_specs=P("ep"), check_vma=False))

    return {
        "exchange": chain(exchange),
        "products": chain(lambda x, i, w, matrix: multiply(x, matrix)),
        "serial": chain(one_after_the_other),
        "halves": chain(overlapped),
        "stream": chain(on_a_stream),
    }


def measure(mesh: Mesh, path: str, args: argparse.Namespace) -> None:
    rng = np.random.default_rng(0)
    total = args.tokens * mesh.size
    options: dict[str, Any] = {} if path == "nvlink" else {"nvlink": False, "fabric": path}
    put = lambda array, *spec: jax.device_put(array, NamedSharding(mesh, P(*spec)))  # noqa: E731
    with ExpertParallel(
        mesh,
        name=f"overlap_{path}",
        num_experts=args.experts,
        top_k=args.top_k,
        hidden=args.hidden,
        max_tokens=args.tokens,
        dtype="bfloat16",
        depth=2,
        chunk=args.tokens,
        **options,
    ) as ep:
        indices = np.argsort(rng.random((STEPS, total, args.experts)), -1)[..., : args.top_k].astype(np.int32)
        inputs = (
            put(rng.normal(size=(total, args.hidden)).astype(jnp.bfloat16), "ep"),
            put(indices, None, "ep"),
            put(np.full(indices.shape, 1 / args.top_k, np.float32), None, "ep"),
            put((rng.normal(size=(args.hidden,) * 2) / args.hidden**0.5).astype(jnp.bfloat16)),
        )
        runs = programs(ep, args.products)
        for run in runs.values():
            for _ in range(3):
                jax.block_until_ready(run(*inputs))
        times: dict[str, list[float]] = {name: [] for name in runs}
        with jax.profiler.trace(str(args.trace)) if args.trace else contextlib.nullcontext():
            for _ in range(args.turns):
                for name, run in runs.items():
                    began = time.perf_counter()
                    jax.block_until_ready(run(*inputs))
                    times[name].append((time.perf_counter() - began) / STEPS * 1e6)
        ep.check(sync=True)
        exchange, products, serial, *others = (statistics.median(times[name]) for name in runs)
        hidden = (serial - min(others)) / min(exchange, products)
        figures = " ".join(f"{value:10.1f}" for value in (exchange, products, serial, *others))
        print(
            f"{path:8} {args.tokens:7} {figures} {hidden:8.0%}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--products", type=int, default=8, help="of [tokens, hidden] with [hidden, hidden]")
    parser.add_argument("--fabrics", default="nvlink,shm", help="of nvlink, shm, tcp")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--trace", help="folder for a profile")
    args = parser.parse_args()
    mesh = jax.make_mesh((jax.device_count(),), ("ep",), axis_types=(jax.sharding.AxisType.Explicit,))
    columns = ("exchange", "products", "serial", "halves", "stream")
    print(f"{'path':8} {'tokens':>7} " + " ".join(f"{name:>10}" for name in columns) + f" {'hidden':>8}")
    for path in args.fabrics.split(","):
        measure(mesh, path, args)


if __name__ == "__main__":
    main()
