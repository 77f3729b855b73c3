"""A slice of Kimi K2 decodes on this host's GPUs: where a layer's time goes, and the same slice with
`ragged_all_to_all` in place of the exchange.

    python benchmarks/model_slice_gpu.py [--tokens 128] [--context 4096] [--layers 3] [--only bf16,fp8]
                                         [--json PATH] [--trace FOLDER] [--small]

The slice has Kimi K2's sizes (hidden 7168, 384 experts of 2048, top-8, a shared expert, latent attention, the
whole vocabulary) and fewer layers: one dense, `--layers` with experts. Weights and the caches' contents are
hashed numbers, made on the GPUs; each GPU decodes `--tokens` sequences whose caches hold almost `--context`
tokens. One process drives all GPUs, one rank each. All contenders share weights and caches.

* step: the model's own compiled program of a greedy step, `Programs.step`, with command buffers; eight steps
  one after the other, each continuing the last one's caches, timed from the first launch to the last one's
  end; median over turns.
* layer: (step - the same slice's without its layers with experts) / their number.
* attention, experts, shared: programs of just these parts of the slice's layers one after the other, with
  their weights, over the number of layers; experts on rows that a dispatch laid out. The weights of a part
  are larger than the caches of the GPU. attention includes its norm and the caches.
* dispatch, combine: of twenty in a program, see exchange_gpu.py; with command buffers.
* other: what of the layer these leave: norms, router, sums, and waiting. Where the shared expert runs between
  dispatch's send and its recv ("overlapped"), what that hides is missing here.

`agree` is the share of the first step's tokens that equal those of the first contender, and says
whether the slices compute the same: by chance it would be 0. `captured` counts, in XLA's dump of the step's
program, the operations in command buffers and those outside.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from model_slice import STEPS, Contender, Row, Slice

from pplx_jax.grouped_gemm import gpu_library

CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("bf16"),
        Contender("ragged", ragged=True),
        Contender("fp8", quant="fp8"),
        Contender("bf16-overlapped", overlap=True),
        Contender("fp8-overlapped", quant="fp8", overlap=True),
    )
}


class Run:
    """Takes measurements one by one, as long as time is left; what fails is said and left out."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.began = time.monotonic()
        self.rows = {name: Row(name) for name in options.only}
        self.facts: dict[str, Any] = {}
        self.problems: list[str] = []

    def take(self, what: str, measurement: Callable[[], Any]) -> Any:
        """The measurement's result, or None."""
        if time.monotonic() - self.began > self.options.budget:
            self.problems.append(f"{what}: no time left")
            return None
        began = time.monotonic()
        try:
            result = measurement()
        except Exception as error:  # a contender that can't run leaves the others their turn
            self.problems.append(f"{what}: {type(error).__name__}: {str(error).splitlines()[0][:300]}")
            result = None
        print(f"  {what}: {time.monotonic() - began:.1f} s with compilation", file=sys.stderr, flush=True)
        self.save()
        return result

    def save(self) -> None:
        """Writes what is known by now."""
        for row in self.rows.values():
            row.settle()
        if self.options.json:
            found = {
                **self.facts,
                "rows": [dataclasses.asdict(row) for row in self.rows.values()],
                "problems": self.problems,
            }
            self.options.json.write_text(json.dumps(found, indent=1))

    def show(self) -> None:
        """Prints the table."""
        columns = ("layer", *Row.PARTS, "other")
        print(
            f"{'':<16}{'step ms':>9}{'tokens/s':>10}"
            + "".join(f"{column:>10}" for column in columns)
            + f"{'agree':>7}  captured (outside)"
        )
        for row in self.rows.values():
            numbers = [row.step_ms, row.tokens_per_second, *(getattr(row, column) for column in columns)]
            formats = ("9.2f", "10.0f", *("10.1f",) * len(columns))
            cells = [
                f"{number:{how}}" if number is not None else " " * int(how.split(".")[0])
                for number, how in zip(numbers, formats, strict=True)
            ]
            agree = f"{row.agree:7.0%}" if row.agree is not None else " " * 7
            inside = "-"
            if row.captured is not None:
                inside = f"{row.captured['inside']} ({sum(row.captured['outside'].values())})"
            print("".join((f"{row.contender:<16}", *cells, agree, "  ", inside)))
        for problem in self.problems:
            print(f"left out: {problem}")


def run(options: argparse.Namespace) -> Run:
    devices = jax.devices()[: options.ranks]
    mesh = Mesh(np.array(devices), ("ep",))
    runs = Run(options)
    part = Slice(options, mesh)
    made = time.monotonic() - runs.began
    config = part.config
    gigabytes = sum(a.nbytes for a in jax.tree.leaves(part.state)) / 1e9
    library = gpu_library()
    runs.facts = {
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "jax": jax.__version__,
        "grouped_gemm": getattr(library, "__name__", "jax"),
        "tokens": options.tokens,
        "context": options.context,
        "layers": options.layers,
        "config": dataclasses.asdict(config),
        "dtype": jnp.dtype(part.dtype).name,
        "weights_gigabytes": gigabytes,
        "weights_seconds": made,
    }
    print(
        f"{runs.facts['devices']}, JAX {jax.__version__}, experts by {runs.facts['grouped_gemm']}; hidden "
        f"{config.hidden_size}, top-{config.num_experts_per_tok} of {config.num_experts} experts of "
        f"{config.moe_intermediate_size}, 1 dense + {options.layers} layers, {gigabytes:.1f} GB of weights "
        f"made in {made:.1f} s; {options.tokens} sequences a GPU, context {options.context}",
        flush=True,
    )
    runs.take("step without experts", part.without_experts)
    runs.facts["step_without_experts_ms"] = part.base_us / 1e3

    def decode(*, overlap: bool) -> None:
        for name, row in runs.rows.items():
            if CONTENDERS[name].overlap == overlap:
                runs.take(f"step {name}", functools.partial(part.decode, CONTENDERS[name], row))

    decode(overlap=False)
    experts = runs.take("experts", part.experts_us)
    parts = {
        "attention": runs.take("attention", part.attention_us),
        "shared": runs.take("shared", part.shared_us),
    }
    if experts is not None:
        parts["experts"] = experts[0]
        runs.facts["experts_terabytes_per_second"] = experts[1] / experts[0] / 1e6
    exchanges: dict[Any, Any] = {}
    for name, row in runs.rows.items():
        for part_name, us in parts.items():
            setattr(row, part_name, us)
        contender = CONTENDERS[name]
        key = contender.ragged, contender.quant
        if key not in exchanges:
            exchanges[key] = runs.take(
                f"exchange {name}",
                functools.partial(part.exchange_us, contender.quant, ragged=contender.ragged),
            )
        if exchanges[key] is not None:
            row.dispatch, row.combine = exchanges[key]
    decode(overlap=True)
    runs.save()
    runs.show()
    if (rate := runs.facts.get("experts_terabytes_per_second")) is not None:
        print(f"experts read their weights at {rate:.2f} TB/s; {time.monotonic() - runs.began:.0f} s in all")
    return runs


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--tokens", type=int, default=128, help="sequences a GPU")
    parser.add_argument("--context", type=int, default=4096, help="tokens that the caches have room for")
    parser.add_argument("--layers", type=int, default=3, help="with experts; 17 GB a GPU each, of 2 GPUs")
    parser.add_argument("--ranks", type=int, default=None, help="GPUs; all")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--only", type=names, default=list(CONTENDERS), help=f"of {', '.join(CONTENDERS)}")
    parser.add_argument("--budget", type=float, default=270, help="seconds after which nothing new is begun")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--trace", type=Path, help="folder for profiles of three steps of each contender")
    parser.add_argument("--small", action="store_true", help="tiny sizes, float32, on any devices")
    options = parser.parse_args(arguments)
    if unknown := set(options.only) - set(CONTENDERS):
        parser.error(f"--only knows {', '.join(CONTENDERS)}, not {', '.join(sorted(unknown))}")
    if options.context < (least := STEPS * (options.turns + 1) + 16):
        parser.error(f"--context must be at least {least}, got {options.context}")
    if jax.default_backend() != "gpu" and not options.small:
        parser.error("no GPU here; --small runs anywhere")
    return 1 if run(options).problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
