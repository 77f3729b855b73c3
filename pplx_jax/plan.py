"""``python -m pplx_jax plan``: how a model lies on hosts, what memory it takes, what its decoding moves.

Everything is computed from the configuration; nothing is measured. Times are what the stated rates allow at
best, and leave out latencies, launches and imbalance. The formulas are in docs/models.md.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pplx_jax.config import SCALE_BLOCK, ExchangeConfig
from pplx_jax.models.config import DecoderConfig
from pplx_jax.models.errors import ModelError
from pplx_jax.models.quantized import block_of
from pplx_jax.models.registry import PUBLISHED, PUBLISHED_FLOAT8, family_of
from pplx_jax.models.sharding import check_mesh
from pplx_jax.models.sizes import Parameters, parameters, prefill_chunk, score_bytes

_WEIGHT_BYTES = {"float8": 1.0, "bfloat16": 2.0}
# A float32 scale for a block of 128 x 128.
_SCALE_BYTES = 4 / SCALE_BLOCK**2
_ACTIVATION_BYTES = 2

#: The network's cards of one GPU, all of 400 Gbit/s together, by the name of the host.
NETWORKS = {
    "AWS P5 (EFA)": "4 x 100 Gbit/s",
    "AWS P5en (EFA)": "2 x 200 Gbit/s",
    "AWS P6-B200 (EFA)": "1 x 400 Gbit/s",
    "ConnectX-7": "1 x 400 Gbit/s",
}


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The machines, and what is to run on them.

    Attributes:
      hosts, gpus: hosts, and GPUs of each.
      memory: of a GPU, GB (10^9 bytes).
      tp: GPUs that share attention and every expert.
      dp: copies of the whole.
      batch: sequences that the ranks of one tp group decode at a time.
      context: tokens of each sequence in the cache.
      quant: whether dispatched tokens are float8.
      hbm: GB/s that a GPU reads from its memory.
      nvlink: GB/s that a GPU writes to others of its host.
      network: Gbit/s of the network for each GPU, each way.
      tflops: TFLOP/s of a GPU in bfloat16.
    """

    hosts: int
    gpus: int = 8
    memory: float = 141.0
    tp: int = 1
    dp: int = 1
    batch: int = 128
    context: int = 4096
    quant: bool = True
    hbm: float = 4800.0
    nvlink: float = 450.0
    network: float = 400.0
    tflops: float = 989.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.name != "quant" and not getattr(self, field.name) > 0:
                raise ModelError(f"{field.name} must be above 0, got {getattr(self, field.name)!r}")
        if self.hosts * self.gpus % (self.tp * self.dp):
            raise ModelError(
                f"tp={self.tp} x dp={self.dp} doesn't divide {self.hosts} x {self.gpus} GPUs: choose divisors"
            )

    @property
    def ep(self) -> int:
        """Ranks that share the experts."""
        return self.hosts * self.gpus // (self.tp * self.dp)


def find_config(name: str, weights: str | None = None) -> tuple[DecoderConfig, bool]:
    """A configuration, and whether matrices are float8.

    Args:
      name: of a published checkpoint, such as "kimi-k2"; or the path of a config.json or of its folder.
      weights: "float8" or "bfloat16", in place of what the checkpoint has; or None.

    Raises:
      ModelError: there is no such thing, or nobody says how weights that aren't supported are to be counted.
    """
    if name in PUBLISHED:
        return PUBLISHED[name](), name in PUBLISHED_FLOAT8 if weights is None else weights == "float8"
    from pplx_jax.models.checkpoint import read_json

    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.exists():
        raise ModelError(
            f"{name!r} is neither a config.json nor a known model; known are {', '.join(sorted(PUBLISHED))}"
        )
    raw = read_json(path)
    config = family_of(raw).from_hf(raw)
    if weights is not None:
        return config, weights == "float8"
    try:
        return config, block_of(raw) is not None
    except ModelError as error:
        raise ModelError(f"{error}; to plan as if it were one, give --weights float8 or bfloat16") from error


def distinct_ranks(experts: int, top_k: int, ranks: int) -> float:
    """How many ranks a token's experts lie on, on average, where all choices are equally likely.

    Each rank is missed with the probability that all K choices fall on the E - E/R experts elsewhere.
    """
    own = experts // ranks
    missed = math.prod((experts - own - i) / (experts - i) for i in range(top_k))
    return ranks * (1 - missed)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `make` finds; bytes are those of one GPU.

    Attributes:
      config, cluster, counts: what was asked, and the model's parameters.
      float8: whether matrices stay float8.
      experts_per_rank: experts of each MoE layer on a rank.
      weights: bytes by part.
      scratch: bytes of a layer's experts in bfloat16, where they are kept in float8.
      cache: bytes of all sequences' caches.
      prefill_chunk: tokens of each sequence's prompt that go through the model at once.
      prefill: bytes of a layer's attention scores meanwhile, float32 and as weights in bfloat16.
      exchange: bytes by part.
      rows: distinct ranks of a token on average: ``all``; those on ``other_hosts``; on this host's
        ``other_gpus``.
      wire: bytes that a GPU sends in a step, by kind and path.
      times: microseconds of a step, at best, by what limits them.
    """

    config: DecoderConfig
    cluster: Cluster
    counts: Parameters
    float8: bool
    experts_per_rank: int
    weights: dict[str, float]
    scratch: float
    cache: float
    prefill_chunk: int
    prefill: float
    exchange: dict[str, float]
    rows: dict[str, float]
    wire: dict[str, float]
    times: dict[str, float]

    @property
    def total(self) -> float:
        """Bytes in all."""
        parts = (*self.weights.values(), *self.exchange.values())
        return sum(parts) + self.scratch + self.cache + self.prefill

    @property
    def fits(self) -> bool:
        """Whether that is at most nine tenths of the memory: programs need some too."""
        return self.total <= 0.9 * self.cluster.memory * 1e9

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(self.times, key=lambda part: self.times[part])

    def tokens_per_second(self, *, overlapped: bool) -> float:
        """Of all sequences, at best: everything at a time, or one thing after the other."""
        times = self.times.values()
        groups = self.cluster.ep * self.cluster.dp
        return groups * self.cluster.batch / ((max(times) if overlapped else sum(times)) * 1e-6)


def make(config: DecoderConfig, cluster: Cluster, *, float8: bool) -> Plan:
    """Computes the plan.

    Raises:
      ModelError: the model can't lie so; says which numbers can.
    """
    check_mesh(config, {"ep": cluster.ep, "tp": cluster.tp})
    counts, ep, tp = parameters(config), cluster.ep, cluster.tp
    matrix = _WEIGHT_BYTES["float8"] + _SCALE_BYTES if float8 else _WEIGHT_BYTES["bfloat16"]
    weights = {
        "experts": counts.routed / ep / tp * matrix,
        "shared experts": counts.shared / tp * matrix,
        "attention": (counts.attention_split / tp + counts.attention_whole) * matrix,
        "dense layers": counts.dense / tp * matrix,
        "routers": counts.router * 4.0,
        "embedding and head": (counts.embedding + counts.head) / tp * 2.0,
    }
    own = config.num_experts // ep
    scratch = own * counts.expert / tp * 2.0 if float8 else 0.0
    splits = math.gcd(tp, config.cache_splits)
    token = config.cache_elements * _ACTIVATION_BYTES * config.num_hidden_layers / splits
    cache = cluster.batch * cluster.context * token
    chunk = prefill_chunk(config, cluster.batch, cluster.context, tp=tp)
    scores = score_bytes(config, cluster.batch, cluster.context, tp=tp)

    exchange_config = ExchangeConfig(
        num_experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        hidden=config.hidden_size,
        max_tokens=cluster.batch,
        quant="fp8" if cluster.quant else None,
    )
    memory = exchange_config.memory(ep)
    exchange = {"regions": float(memory.regions), "received tokens": float(memory.tokens)}

    rows = _rows(config, cluster)
    wire = _wire(config, cluster, exchange_config, rows)
    return Plan(
        config=config,
        cluster=cluster,
        counts=counts,
        float8=float8,
        experts_per_rank=own,
        weights=weights,
        scratch=scratch,
        cache=cache,
        prefill_chunk=chunk,
        prefill=chunk * scores * (4 + _ACTIVATION_BYTES) / 4,
        exchange=exchange,
        rows=rows,
        wire=wire,
        times=_times(config, cluster, counts, weights, scratch, cache, wire),
    )


def _rows(config: DecoderConfig, cluster: Cluster) -> dict[str, float]:
    ranks = cluster.ep
    found = distinct_ranks(config.num_experts, config.num_experts_per_tok, ranks)
    # tp's ranks are neighbours, so a host has so many of the experts' ranks (or a part of one).
    here = max(1, cluster.gpus // cluster.tp)
    return {
        "all": found,
        "other_hosts": found * (ranks - here) / ranks if ranks > here else 0.0,
        "other_gpus": found * (min(here, ranks) - 1) / ranks,
    }


def _wire(
    config: DecoderConfig, cluster: Cluster, exchange: ExchangeConfig, rows: dict[str, float]
) -> dict[str, float]:
    entries = min(config.num_experts_per_tok, config.num_experts // cluster.ep)
    header = -(-(8 + 12 * entries) // 16) * 16
    scales = exchange.num_scales * 4
    dispatch = header + config.hidden_size * exchange.token_dtype.itemsize + scales
    combine = config.hidden_size * _ACTIVATION_BYTES
    copies = cluster.batch * config.moe_layers
    return {
        "dispatch, network": copies * rows["other_hosts"] * dispatch,
        "combine, network": copies * rows["other_hosts"] * combine,
        "dispatch, NVLink": copies * rows["other_gpus"] * dispatch,
        "combine, NVLink": copies * rows["other_gpus"] * combine,
    }


def _times(
    config: DecoderConfig,
    cluster: Cluster,
    counts: Parameters,
    weights: dict[str, float],
    scratch: float,
    cache: float,
    wire: dict[str, float],
) -> dict[str, float]:
    tokens = cluster.batch * cluster.ep
    # An expert that no token chose isn't read.
    used = 1 - (1 - config.num_experts_per_tok / config.num_experts) ** tokens
    # float8 weights are read, written in bfloat16, and read again.
    again = 2 * scratch * config.moe_layers if scratch else 0.0
    others = sum(size for part, size in weights.items() if part not in ("experts", "embedding and head"))
    read_experts = weights["experts"] * used + again
    head = (counts.head or counts.embedding) / cluster.tp * 2.0
    met = counts.active - counts.expert * config.num_experts_per_tok * config.moe_layers
    routed = counts.expert * config.num_experts_per_tok * config.moe_layers
    attention = config.attention_flops * config.num_hidden_layers * cluster.context
    flops = cluster.batch * (2 * (met + routed) + attention) / cluster.tp
    network = wire["dispatch, network"] + wire["combine, network"]
    nvlink = wire["dispatch, NVLink"] + wire["combine, NVLink"]
    # bytes / (GB/s) is nanoseconds.
    return {
        "memory: experts": read_experts / cluster.hbm / 1e3,
        "memory: other weights": (others + head) / cluster.hbm / 1e3,
        "memory: caches": cache / cluster.hbm / 1e3,
        "arithmetic": flops / cluster.tflops / 1e6,
        "network": network / (cluster.network / 8) / 1e3,
        "NVLink": nvlink / cluster.nvlink / 1e3,
    }


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan's figures."""
    return {
        "ep": plan.cluster.ep,
        "tp": plan.cluster.tp,
        "dp": plan.cluster.dp,
        "experts_per_rank": plan.experts_per_rank,
        "prefill_chunk": plan.prefill_chunk,
        "parameters": {"total": plan.counts.total, "active": plan.counts.active},
        "bytes": {
            "weights": plan.weights,
            "scratch": plan.scratch,
            "cache": plan.cache,
            "prefill": plan.prefill,
            "exchange": plan.exchange,
            "total": plan.total,
        },
        "fits": plan.fits,
        "rows": plan.rows,
        "wire": plan.wire,
        "microseconds": plan.times,
        "bound": plan.bound,
        "tokens_per_second": {
            "overlapped": plan.tokens_per_second(overlapped=True),
            "one_after_the_other": plan.tokens_per_second(overlapped=False),
        },
    }


def show(plan: Plan, console: Console) -> None:
    """Prints the plan as tables."""
    config, cluster = plan.config, plan.cluster
    console.print(
        f"{type(config).__name__}: {plan.counts.total / 1e9:.1f} G parameters, "
        f"{plan.counts.active / 1e9:.1f} G of them for a token; {config.num_hidden_layers} layers, "
        f"{config.moe_layers} of them with {config.num_experts} experts, {config.num_experts_per_tok} "
        f"a token; matrices in {'float8' if plan.float8 else 'bfloat16'}."
    )
    console.print(_placement_table(plan))
    console.print(_memory_table(plan))
    console.print(_wire_table(plan))
    console.print(_time_table(plan))
    ranks = cluster.ep * cluster.dp
    console.print(
        f"Decoding {cluster.batch} sequences on each of {ranks} ranks is bound by {plan.bound}: "
        f"at best {plan.tokens_per_second(overlapped=True):,.0f} tokens/s in all if everything overlaps, "
        f"{plan.tokens_per_second(overlapped=False):,.0f} if nothing does. Computed from rates, not "
        f"measured; latencies and imbalance come on top (docs/models.md)."
    )
    if not plan.fits:
        console.print(
            f"It doesn't fit: {plan.total / 1e9:.1f} GB of {cluster.memory:.0f} GB. Take more "
            f"hosts, a smaller --batch or --context, or float8 weights."
        )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    return table


def _placement_table(plan: Plan) -> Table:
    cluster, config = plan.cluster, plan.config
    table = _table("Where what lies", "host", "GPUs", "ep ranks", "experts of every MoE layer", "attention")
    ranks = max(1, cluster.gpus // cluster.tp)
    for host in _some(cluster.hosts):
        if host is None:
            table.add_row("...", "", "", "", "")
            continue
        first = host * cluster.gpus // cluster.tp % cluster.ep
        last = min(first + ranks, cluster.ep) - 1
        begin, end = first * plan.experts_per_rank, (last + 1) * plan.experts_per_rank - 1
        table.add_row(
            str(host),
            f"{host * cluster.gpus}-{(host + 1) * cluster.gpus - 1}",
            f"{first}-{last}" if last > first else str(first),
            f"{begin}-{end} ({plan.experts_per_rank} a rank)",
            f"{config.num_attention_heads // cluster.tp} heads, {cluster.batch} sequences a rank",
        )
    return table


def _some(count: int) -> list[int | None]:
    return list(range(count)) if count <= 6 else [0, 1, 2, None, count - 1]


def _memory_table(plan: Plan) -> Table:
    table = _table("Memory of a GPU", "part", "GB")
    for part, size in plan.weights.items():
        table.add_row(f"weights: {part}", f"{size / 1e9:.2f}")
    if plan.scratch:
        table.add_row("one layer's experts in bfloat16", f"{plan.scratch / 1e9:.2f}")
    context = f"{plan.cluster.batch} x {plan.cluster.context} tokens"
    table.add_row(f"cache: {context}", f"{plan.cache / 1e9:.2f}")
    table.add_row(f"prefill: scores of {plan.prefill_chunk} tokens at a time", f"{plan.prefill / 1e9:.2f}")
    for part, size in plan.exchange.items():
        table.add_row(f"exchange: {part}", f"{size / 1e9:.2f}")
    table.add_section()
    table.add_row(f"of {plan.cluster.memory:.0f} GB", f"{plan.total / 1e9:.2f}")
    if plan.cluster.hosts > 1:
        pinned = 2 * plan.exchange["regions"]
        table.add_row("and for other hosts' ranks (on the host, if NICs reach no GPU)", f"{pinned / 1e9:.2f}")
    return table


def _wire_table(plan: Plan) -> Table:
    rows = plan.rows
    title = (
        f"What a GPU sends in a step: a token's {plan.config.num_experts_per_tok} experts lie on "
        f"{rows['all']:.2f} ranks, {rows['other_hosts']:.2f} of them on other hosts"
    )
    table = _table(title, "exchange", "MB a step", "KB a layer")
    for part, size in plan.wire.items():
        layers = max(plan.config.moe_layers, 1)
        table.add_row(part, f"{size / 1e6:.2f}", f"{size / layers / 1e3:.1f}")
    return table


def _time_table(plan: Plan) -> Table:
    cluster = plan.cluster
    network = f"{cluster.network:.0f} Gbit/s a GPU"
    names = ", ".join(f"{host} {cards}" for host, cards in NETWORKS.items()) if cluster.network == 400 else ""
    rates = {
        "memory: experts": f"{cluster.hbm:.0f} GB/s",
        "memory: other weights": f"{cluster.hbm:.0f} GB/s",
        "memory: caches": f"{cluster.hbm:.0f} GB/s",
        "arithmetic": f"{cluster.tflops:.0f} TFLOP/s",
        "network": f"{network}: {names}" if names else network,
        "NVLink": f"{cluster.nvlink:.0f} GB/s",
    }
    table = _table("What a step takes at best", "limit", "us", "at")
    for part, time in sorted(plan.times.items(), key=lambda item: -item[1]):
        table.add_row(part, f"{time:,.0f}", rates[part])
    return table


def run(name: str, cluster: Cluster, *, weights: str | None, json_output: bool) -> None:
    """Makes and prints a plan.

    Args:
      name: see `find_config`.
      cluster: the machines.
      weights: "float8" or "bfloat16"; None: as the checkpoint is.
      json_output: print one JSON object.

    Raises:
      ModelError: see `find_config` and `make`.
    """
    if weights not in (None, *_WEIGHT_BYTES):
        raise ModelError(f"weights must be float8 or bfloat16, got {weights!r}")
    config, float8 = find_config(name, weights)
    plan = make(config, cluster, float8=float8)
    if json_output:
        print(json.dumps(as_json(plan), indent=2))
    else:
        show(plan, Console(highlight=False))
