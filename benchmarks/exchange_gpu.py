"""dispatch + combine between this host's GPUs, against what JAX offers and what the hardware can do.

    python benchmarks/exchange_gpu.py [--tokens 1,128,512,4096] [--quant none,fp8] [--sms 8,16,24,48,96]
                                      [--proxy shm|tcp] [--json PATH] [--plot PATH]

One process, one rank a GPU. Every contender runs in it, in turns, with the same routing, which is new in each
exchange; reported is the median over turns of the time an exchange takes. Stages:

* dispatch, combine, pair: a jitted program of N of them, one after the other, over N; the next begins when
  this one's results are there. combine reuses routes that a dispatch made before.
* replay: the pair, as a command buffer of N.
* alone: one pair a launch, waited for, so with what JAX needs to launch it.

A chain is timed on the host from its launch to its end: with N of at least ten, launching is noise. The time
is that of the slowest rank, since the program ends when all have. Experts do nothing: ours combines rows
that lie ready. Before anything is timed, each shape's results are compared with a dense oracle, with experts
that differ.

Wire bytes are those that leave a rank, one row a (token, other rank); logical bytes are a row for every
(token, expert), there and back. The floor is the time that the wire bytes take at the rate of a large copy
from GPU to GPU, or the bytes that move through a rank's own memory at the rate of a large copy in it,
whichever is longer. Each exchange adds the time of a flag from GPU to GPU, half a round trip. All of that is
measured in the same run. For --proxy the GPUs have no way to each other but the host.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import ragged_baseline
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pplx_jax import ExpertParallel, gpu

SPEC, STACK = P("ep"), P(None, "ep")
# Microseconds of DeepEP 1.2.1 between 2 H200 of one host over NVLink, measured on the kind of machine that
# docs/performance.md describes, same hidden, experts and top-k: (dispatch, combine) by (tokens, quant).
DEEPEP = {
    (128, "fp8"): (29.5, 40.7),  # low-latency kernels
    (128, None): (31.0, 43.0),  # normal kernels, 96 SMs; does not lay tokens out by expert
    (4096, "fp8"): (126.0, 227.0),  # the same
    (4096, None): (219.0, 227.0),  # the same
}
# Programs that XLA would record by itself are launched kernel by kernel, unless the replay is timed.
UNRECORDED = {"xla_gpu_graph_min_graph_size": 1_000_000}
RECORDED = {"xla_gpu_graph_min_graph_size": 1}
_names = (f"benchmark{i}" for i in itertools.count())


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is exchanged."""

    tokens: int
    quant: str | None
    hidden: int
    experts: int
    top_k: int
    ranks: int

    @property
    def iterations(self) -> int:
        """N: fewer of the long ones."""
        return 20 if self.tokens <= 1024 else 10


@dataclasses.dataclass
class Row:
    """A line of the result; times in microseconds."""

    contender: str
    tokens: int
    quant: str | None
    sms: int | None
    dispatch: float
    combine: float
    pair: float
    replay: float | None
    alone: float
    wire_bytes: float
    logical_bytes: float
    floor: float

    @property
    def deepep(self) -> float | None:
        """Its pair over ours."""
        known = DEEPEP.get((self.tokens, self.quant))
        return sum(known) / self.pair if known else None


@dataclasses.dataclass
class Load:
    """Inputs of N exchanges, on the devices."""

    x: jax.Array
    indices: jax.Array  # [N, R * T, K]
    weights: jax.Array
    wire_rows: float  # that leave a rank in an exchange


def make_load(shape: Shape, mesh: Mesh) -> Load:
    rng = np.random.default_rng(0)
    total, n = shape.ranks * shape.tokens, shape.iterations
    order = np.argsort(rng.random((n, total, shape.experts)), axis=-1)
    indices = order[..., : shape.top_k].astype(np.int32)
    weights = rng.random((n, total, shape.top_k), np.float32)
    weights /= weights.sum(-1, keepdims=True)
    rank_of = indices // -(-shape.experts // shape.ranks)
    source = np.repeat(np.arange(shape.ranks), shape.tokens)[None, :, None]
    copies = sum(((rank_of == r) & (source != r)).any(-1).sum() for r in range(shape.ranks))
    x = np.asarray(jnp.asarray(rng.normal(size=(total, shape.hidden)), jnp.bfloat16))
    put = lambda array, spec: jax.device_put(array, NamedSharding(mesh, spec))  # noqa: E731
    rows = float(copies) / (n * shape.ranks)
    return Load(put(x, SPEC), put(indices, STACK), put(weights, STACK), rows)


# --- contenders ------------------------------------------------------------------------------------------


def scalar(array: jax.Array) -> jax.Array:
    """One element: enough to make what follows wait, and to keep what came before."""
    return array.reshape(-1)[0].astype(jnp.float32)


def scaled(rows: jax.Array, sizes: jax.Array, factors: jax.Array) -> jax.Array:
    """Experts that differ: each multiplies its rows."""
    expert = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(rows)), side="right")
    return rows * factors.astype(rows.dtype)[jnp.minimum(expert, len(factors) - 1)][:, None]


class Ours:
    """Programs of exchanges of a group, per shard."""

    name = "pplx_jax"
    replays = True

    def __init__(self, ep: ExpertParallel) -> None:
        self.ep = ep

    def dispatch(self, x: Any, indices: Any, weights: Any) -> Any:
        routes, after = [], None
        for i in range(len(indices)):
            batch, route = self.ep.dispatch(x, indices[i], weights[i], after=after)
            after = batch
            routes.append(route)
        return routes, scalar(batch.tokens)[None]

    def combine(self, y: Any, routes: Any) -> Any:
        out = None
        for route in routes:
            out = self.ep.combine(y, route, after=out)
        return scalar(out)[None]

    def rows(self, x: Any, indices: Any, weights: Any) -> jax.Array:
        batch, _ = self.ep.dispatch(x, indices[0], weights[0])
        return batch.values

    def pair(self, x: Any, indices: Any, weights: Any, y: Any) -> Any:
        out = None
        for i in range(len(indices)):
            _, route = self.ep.dispatch(x, indices[i], weights[i], after=out)
            out = self.ep.combine(y, route)
        return out

    def step(self, x: Any, indices: Any, weights: Any, factors: Any) -> Any:
        batch, route = self.ep.dispatch(x, indices[0], weights[0])
        return self.ep.combine(scaled(batch.values, batch.group_sizes, factors), route)

    def check(self) -> None:
        self.ep.check(sync=True)


class Ragged:
    """The same of the baseline."""

    name = "ragged_all_to_all"
    replays = False

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    def _dispatch(self, x: Any, indices: Any) -> Any:
        return ragged_baseline.dispatch(x, indices, self.shape.experts, self.shape.ranks)

    def dispatch(self, x: Any, indices: Any, weights: Any) -> Any:
        plans, order = [], jnp.zeros((), jnp.float32)
        for i in range(len(indices)):
            rows, _, plan = self._dispatch(x + (0 * order).astype(x.dtype), indices[i])
            order = scalar(rows)
            plans.append((plan, weights[i]))
        return plans, order[None]

    def combine(self, y: Any, plans: Any) -> Any:
        order = jnp.zeros((), jnp.float32)
        for plan, weights in plans:
            order = scalar(ragged_baseline.combine(y, weights + 0 * order, plan))
        return order[None]

    def rows(self, x: Any, indices: Any, weights: Any) -> jax.Array:
        return self._dispatch(x, indices[0])[0]

    def step(self, x: Any, indices: Any, weights: Any, factors: Any) -> Any:
        rows, sizes, plan = self._dispatch(x, indices[0])
        return ragged_baseline.combine(scaled(rows, sizes, factors), weights[0], plan)

    def pair(self, x: Any, indices: Any, weights: Any, y: Any) -> Any:
        out = x
        for i in range(len(indices)):
            # What came home goes out again, the weights of a token add up to one. Not y: without a use of its
            # rows XLA would leave most of the dispatch out.
            rows, _, plan = self._dispatch(out, indices[i])
            out = ragged_baseline.combine(rows, weights[i], plan)
        return out

    def check(self) -> None:
        """It finds no errors of its own."""


Contender = Ours | Ragged


def compiled(contender: Contender, mesh: Mesh, **options: Any) -> Callable[..., Callable[..., Any]]:
    def mapped(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        whole = jax.shard_map(
            function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=isinstance(contender, Ours)
        )
        return jax.jit(whole, compiler_options=options or None)

    return mapped


def median_us(function: Callable[..., Any], args: Sequence[Any], turns: int) -> float:
    times = []
    for _ in range(turns):
        began = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - began)
    return 1e6 * statistics.median(times)


def stack(tree: Any) -> Any:
    """A leading axis on every leaf, so that each shard's part comes back as it is, whatever its rank."""
    return jax.tree.map(lambda leaf: leaf[None], tree)


def unstack(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[0], tree)


STAGES = ("dispatch", "combine", "pair", "alone", "replay")


def measure(
    contender: Contender,
    mesh: Mesh,
    load: Load,
    turns: int,
    *,
    only: Sequence[str] = STAGES,
    options: Mapping[str, Any] = UNRECORDED,
) -> dict[str, float | None]:
    """Microseconds an exchange, by stage; programs compiled with these options, but for the replay."""
    n = len(load.indices)
    given = (load.x, load.indices, load.weights)
    specs = (SPEC, STACK, STACK)
    mapped = compiled(contender, mesh, **options)
    dispatch = mapped(lambda *a: contender.dispatch(*a)[1], specs, SPEC)
    routes = mapped(lambda *a: stack(contender.dispatch(*a)[0]), specs, SPEC)
    combine = mapped(lambda y, r: contender.combine(y, unstack(r)), (SPEC, SPEC), SPEC)
    pair = mapped(contender.pair, (*specs, SPEC), SPEC)
    y = jax.block_until_ready(mapped(contender.rows, specs, SPEC)(*given))
    plans = jax.block_until_ready(routes(*given))
    alone = (load.x, load.indices[:1], load.weights[:1], y)
    stages: dict[str, tuple[Callable[..., Any], tuple[Any, ...], int]] = {
        "dispatch": (dispatch, given, n),
        "combine": (combine, (y, plans), n),
        "pair": (pair, (*given, y), n),
        "alone": (pair, alone, 1),
    }
    if contender.replays:
        replayed = compiled(contender, mesh, **RECORDED)(contender.pair, (*specs, SPEC), SPEC)
        stages["replay"] = (replayed, (*given, y), n)
    result: dict[str, float | None] = {"replay": None}
    for name, (function, args, count) in stages.items():
        if name not in only:
            continue
        for _ in range(3):  # the first one compiles, the next ones record
            jax.block_until_ready(function(*args))
        result[name] = median_us(function, args, turns) / count
    contender.check()
    return result


def expect_sound(contender: Contender, mesh: Mesh, load: Load, shape: Shape) -> None:
    """One step, with experts that multiply by different factors, against the dense oracle."""
    rng = np.random.default_rng(3)
    slots = -(-shape.experts // shape.ranks) * shape.ranks
    # Powers of two: exact in bfloat16.
    factors = (2.0 ** rng.integers(-3, 3, slots)).astype(np.float32)
    put = jax.device_put(factors, NamedSharding(mesh, SPEC))
    mapped = compiled(contender, mesh, **UNRECORDED)
    step = mapped(contender.step, (SPEC, STACK, STACK, SPEC), SPEC)
    out = np.asarray(step(load.x, load.indices[:1], load.weights[:1], put), np.float32)
    indices, weights = np.asarray(load.indices[0]), np.asarray(load.weights[0])
    wanted = np.asarray(load.x, np.float32) * (weights * factors[indices]).sum(-1, keepdims=True)
    error = np.abs(out - wanted).max() / np.abs(wanted).max()
    if not error < (0.02 if shape.quant is None else 0.08):
        raise SystemExit(f"{contender.name}: results are wrong, by {error:.3g} of the largest")


# --- what the hardware can do ----------------------------------------------------------------------------


def copy_rates(devices: Sequence[jax.Device]) -> tuple[float, float]:
    """Bytes per second: from GPU to GPU in each direction, and read plus written in one GPU's memory."""
    size = 1 << 30
    local = jax.device_put(jnp.ones(size // 4, jnp.float32), devices[0])
    passes = 10  # in one launch, which would count otherwise
    bump = jax.jit(lambda a: jax.lax.fori_loop(0, passes, lambda _, b: b + 1, a))
    jax.block_until_ready(bump(local))
    memory = 2 * size * passes / (median_us(bump, (local,), 5) / 1e6)
    if len(devices) < 2:
        return memory, memory
    copies = 4
    move = lambda a: [jax.device_put(a, devices[1]) for _ in range(copies)]  # noqa: E731
    jax.block_until_ready(move(local))
    return copies * size / (median_us(move, (local,), 10) / 1e6), memory


def flag_us(devices: Sequence[jax.Device]) -> float:
    """Microseconds from a store into a peer's memory to the load there that sees it; 0 for one GPU."""
    if len(devices) < 2:
        return 0.0
    extension = gpu.extension()
    assert extension is not None
    return float(extension.flag_latency_us(gpu.ordinal(devices[0]), gpu.ordinal(devices[1])))


def floor_us(shape: Shape, load: Load, rates: tuple[float, float], flag: float) -> tuple[float, float, float]:
    """Wire bytes, logical bytes and the floor of a pair, for one rank."""
    row = 2.0 * shape.hidden
    token = row if shape.quant is None else shape.hidden * (1 + 4 / 128)
    wire = load.wire_rows * (token + row)
    logical = shape.tokens * shape.top_k * (token + row)
    # Rows are read once and written once where they are laid out; on the way back each is read.
    copies = load.wire_rows * shape.ranks / max(shape.ranks - 1, 1)
    through = copies * 2 * (token + row) + logical
    over_links = wire / rates[0] if shape.ranks > 1 else 0.0
    return wire, logical, 2 * flag + 1e6 * max(over_links, through / rates[1])


# --- the run ---------------------------------------------------------------------------------------------


def group(shape: Shape, mesh: Mesh, options: argparse.Namespace, sms: int | None) -> ExpertParallel:
    where: dict[str, Any] = {"nvlink": False, "fabric": options.proxy} if options.proxy else {}
    return ExpertParallel(
        mesh,
        name=next(_names),
        num_sms=sms,
        num_experts=shape.experts,
        top_k=shape.top_k,
        hidden=shape.hidden,
        max_tokens=shape.tokens,
        chunk=shape.tokens,
        quant=shape.quant,
        zero_tail=False,
        **where,
    )


def gpus() -> list[jax.Device]:
    try:
        return jax.devices("gpu")
    except RuntimeError as error:
        raise SystemExit(f"exchange_gpu needs GPUs, and JAX finds none: {error}") from error


def run(options: argparse.Namespace) -> list[Row]:
    devices = gpus()[: options.ranks]
    mesh = Mesh(np.array(devices), ("ep",))
    rates, flag = copy_rates(devices), flag_us(devices)
    print(
        f"{len(devices)} x {devices[0].device_kind}, JAX {jax.__version__}, hidden {options.hidden}, "
        f"top-{options.top_k} of {options.experts}, bfloat16; GPU to GPU {rates[0] / 1e9:.0f} GB/s, in "
        f"memory {rates[1] / 1e9:.0f} GB/s read and written, a flag {flag:.2f} us"
        + (f"; by proxy, {options.proxy}" * bool(options.proxy))
    )
    print(
        f"{'':<18}{'tokens':>7}{'quant':>7}{'sms':>5}{'dispatch':>10}{'combine':>9}{'pair':>9}{'replay':>9}"
        f"{'alone':>9}{'wire MB':>9}{'logical':>9}{'floor':>8}{'/floor':>8}{'DeepEP/':>9}{'ragged/':>9}"
    )
    rows: list[Row] = []
    for tokens, quant in itertools.product(options.tokens, options.quant):
        shape = Shape(tokens, quant, options.hidden, options.experts, options.top_k, len(devices))
        load = make_load(shape, mesh)
        wire, logical, floor = floor_us(shape, load, rates, flag)

        def add(
            contender: Contender,
            sms: int | None,
            peer: Row | None = None,
            *,
            shape: Shape = shape,
            load: Load = load,
            sizes: tuple[float, float, float] = (wire, logical, floor),
        ) -> Row:
            expect_sound(contender, mesh, load, shape)
            times: dict[str, Any] = measure(contender, mesh, load, options.turns)
            row = Row(contender.name, shape.tokens, shape.quant, sms, **times, **sized(sizes))
            rows.append(row)
            show(row, peer)
            return row

        # It does not quantise: the same shape in bfloat16.
        peer = None
        if options.baseline and quant is None and shape.experts % shape.ranks == 0:
            peer = add(Ragged(shape), None)
        for sms in options.sms:
            with group(shape, mesh, options, sms) as ep:
                add(Ours(ep), sms, peer)
                if options.breakdown:
                    print(json.dumps(ep.stats()["ranks"][0], indent=1, default=str))
    return rows


def sized(sizes: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip(("wire_bytes", "logical_bytes", "floor"), sizes, strict=True))


def show(row: Row, peer: Row | None) -> None:
    number = lambda value, width=9: f"{value:>{width}.1f}" if value is not None else " " * width  # noqa: E731
    print(
        f"{row.contender:<18}{row.tokens:>7}{row.quant or '-':>7}{row.sms or '-':>5}"
        f"{number(row.dispatch, 10)}{number(row.combine)}{number(row.pair)}"
        f"{number(row.replay)}{number(row.alone)}"
        f"{row.wire_bytes / 1e6:>9.2f}{row.logical_bytes / 1e6:>9.2f}{row.floor:>8.1f}"
        f"{row.pair / row.floor:>8.2f}"
        + (f"{row.deepep:>9.2f}" if row.deepep else " " * 9)
        + (f"{peer.pair / row.pair:>9.1f}" if peer else ""),
        flush=True,
    )


def plot(rows: Sequence[Row], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    key = lambda row: (row.contender, row.quant or "bf16", row.sms or 0)  # noqa: E731
    for (contender, quant, sms), line in itertools.groupby(sorted(rows, key=key), key):
        points = sorted(line, key=lambda row: row.tokens)
        label = f"{contender} {quant}" + (f", {sms} SMs" if sms else "")
        axes[0].plot([row.tokens for row in points], [row.pair for row in points], "o-", label=label)
    floors = sorted({(row.tokens, row.floor) for row in rows if row.quant is None})
    axes[0].plot(*zip(*floors, strict=True), "k--", label="floor, bf16") if floors else None
    axes[0].set(xscale="log", yscale="log", xlabel="tokens a rank", ylabel="us for dispatch + combine")
    axes[0].legend(fontsize=7)
    ours = [row for row in rows if row.sms]
    curve = lambda row: (row.tokens, row.quant or "bf16")  # noqa: E731
    for (tokens, quant), line in itertools.groupby(sorted(ours, key=curve), curve):
        points = sorted(line, key=lambda row: row.sms or 0)
        rate = [row.wire_bytes / row.pair / 1e3 for row in points]
        axes[1].plot([row.sms for row in points], rate, "o-", label=f"{tokens} tokens, {quant}")
    axes[1].set(xlabel="SMs", ylabel="GB/s of wire bytes, each direction")
    if ours:
        axes[1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=140)


def main(arguments: list[str]) -> None:
    numbers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=numbers, default=[1, 32, 128, 512, 1024, 4096, 8192])
    parser.add_argument("--quant", default="none,fp8", help="of none, fp8, fp8_ue8m0")
    parser.add_argument("--sms", type=numbers, default=[None], help="blocks a kernel may use; the default's")
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--ranks", type=int, default=None, help="GPUs; all")
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--proxy", choices=["shm", "tcp"], help="messages go by the host, over this fabric")
    parser.add_argument("--no-baseline", dest="baseline", action="store_false")
    parser.add_argument("--breakdown", action="store_true", help="the group's statistics after each line")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args(arguments)
    options.quant = [None if name == "none" else name for name in options.quant.split(",")]
    if options.proxy:
        options.breakdown = True
    rows = run(options)
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main(sys.argv[1:])
